"""A small federated problem: 6 clients, 8 features, 3 classes."""

import pytest
import torch
from plait_federated.rounds import Gossip, dfedavg
from plait_federated.settings import FederatedSettings
from plait_federated.shards import ClientShards
from plait_federated.topology import Graph
from plait_federated.training import FederatedTraining
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def make_shards():
    def make(sizes=(9, 9, 9, 9, 9, 9), **changes):
        generator = torch.Generator().manual_seed(1)
        total = sum(sizes)
        inputs = torch.randn(total, 8, generator=generator)
        labels = torch.randint(3, (total,), generator=generator)
        members = tuple(torch.arange(total).split(list(sizes)))
        return ClientShards(inputs, labels, members, **{"seed": 4, "batch_size": 4, "local_epochs": 2} | changes)

    return make


@pytest.fixture
def make_training(model, make_shards, tmp_path):
    def make(method: Gossip | None = None, *, shards=None, network=None, graph=None, folder="run", rounds=3, **options):
        shards = shards or make_shards()
        names = FederatedSettings.__dataclass_fields__
        settings = FederatedSettings(
            rounds=rounds, seed=4, **{name: options.pop(name) for name in list(options) if name in names}
        )
        graph = graph or Graph(name="ring", num_clients=shards.num_clients)
        options = {"engine": "loop"} | options
        return FederatedTraining(
            network or model, shards, method or dfedavg(), settings, graph=graph, folder=tmp_path / folder, **options
        )

    return make
