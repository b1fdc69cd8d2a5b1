"""Small inputs on which the conformance kit tries the federated methods."""

from __future__ import annotations

from typing import Any

import torch
from plait import Run
from plait.testing import Example

from plait_federated.client_data import inputs_of
from plait_federated.plugin.data import Digits8x8, Partition
from plait_federated.plugin.models import FederatedModel
from plait_federated.plugin.training import DFedAvg

QUICK: dict[str, Any] = {"rounds": 3, "batch_size": 8, "local_epochs": 1, "engine": "loop"}


def clients() -> dict[str, Any]:
    """48 digits of 4 clients, and 12 to test on."""
    digits = Digits8x8().load_data(Run())
    few = {"train": digits["train"].select(range(48)), "test": digits["test"].select(range(12))}
    shared: dict[str, Any] = Partition(num_clients=4, scheme="iid").transform(few, Run())
    return shared


def logits(model: Any) -> torch.Tensor:
    """What a model says about twelve digits."""
    with torch.no_grad():
        outputs: torch.Tensor = model(inputs_of(clients()["test"], None).float() / 255)
    return outputs


def decentralised() -> Example:
    """For methods that exchange models with neighbours."""
    return _training({"topology": "ring"})


def centralised() -> Example:
    """For methods with a server."""
    return _training({"active_ratio": 0.5})


def partition() -> Example:
    digits = clients()["train"].remove_columns("client")
    fields = {"num_clients": 4, "scheme": "iid"}
    empty, wrong = {"data": digits.select([])}, {"data": digits.remove_columns("label")}
    return Example(
        arguments={"data": digits}, fields=fields, random=True, progress=False, device=False, empty=empty, wrong=wrong
    )


def model() -> Example:
    data = clients()
    train = data["train"]
    empty, wrong = {"data": train.select([])}, {"data": train.remove_columns("image")}
    return Example(
        arguments={"data": data},
        fields={"architecture": "mlp"},
        random=True,
        progress=False,
        device=False,
        empty=empty,
        wrong=wrong,
        outputs=logits,
    )


def rounds() -> Example:
    given = clients()
    net = FederatedModel(architecture="mlp").load_model(given, Run())
    history = DFedAvg(topology="ring", output="all", **QUICK).aggregate(net, given, Run())["history"]
    data = {"dfedavg": history}
    return Example(
        arguments={"data": data}, progress=False, device=False, empty={"data": {"dfedavg": []}}, wrong={"data": [1]}
    )


def accuracy() -> Example:
    given = clients()
    net = FederatedModel(architecture="mlp").load_model(given, Run())
    test = given["test"]
    arguments = {"model": net, "data": test}
    empty, wrong = {"data": test.select([])}, {"data": test.remove_columns("label")}
    return Example(arguments=arguments, progress=False, empty=empty, wrong=wrong)


def graph() -> Example:
    data = clients()
    wrong = {"data": data["train"].remove_columns("client")}
    fields = {"topology": "ring"}
    return Example(arguments={"data": data}, fields=fields, progress=False, device=False, wrong=wrong)


def _training(fields: dict[str, Any]) -> Example:
    given = clients()
    net = FederatedModel(architecture="mlp").load_model(given, Run())
    train = given["train"]
    return Example(
        arguments={"model": net, "clients": given},
        fields=QUICK | fields,
        random=True,
        empty={"clients": train.select([])},
        wrong={"clients": train.remove_columns("label")},
        outputs=logits,
    )
