"""A small federated problem: 6 clients, 8 features, 3 classes."""

import pytest
import torch
from plait_federated.settings import FederatedSettings
from plait_federated.shards import ClientShards
from plait_federated.topology import Graph
from plait_federated.training import FederatedTraining
from torch import nn


@pytest.fixture
def make_training(tmp_path):
    def make(method, *, graph=None, folder="run", rounds=3, update_order="synchronous", **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
        inputs, labels = torch.randn(54, 8), torch.randint(3, (54,))
        members = tuple(torch.arange(54).split([4, 14, 9, 9, 9, 9]))
        shards = ClientShards(inputs, labels, members, seed=4, batch_size=4, local_epochs=2)
        return FederatedTraining(
            model,
            shards,
            method,
            FederatedSettings(rounds=rounds, seed=4, update_order=update_order),
            graph=graph or Graph(name="ring", num_clients=6),
            folder=tmp_path / folder,
            **{"engine": "loop"} | options,
        )

    return make
