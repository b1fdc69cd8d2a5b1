"""Federated learning: partitions, graphs, engines and baselines that decentralised methods share.

For authors of methods, stable:

* a method is a rule for the engines: :class:`Gossip` (a start for local training and a :data:`LocalStep`) or
  :class:`Server`; the steps of the baselines are ``sgd_step``, ``momentum_step``, ``sam_step``, ``prox_step`` (with
  ``check_prox``) and ``clip``, made from a :data:`Gradient` and the constants of a round, :class:`Local`;
* :func:`follow` trains a model by a rule on :class:`ClientShards`, as :class:`FederatedSettings` say, over a
  :class:`Graph`, and gives a :class:`TrainingOutcome`; :func:`describe_graph` puts a graph into words;
* :mod:`plait_federated.methods` has the fields of adapters (``Decentralised``, ``Centralised``, ``Proximal``,
  ``SharpnessAware``) and ``train``, from hook to engines. It alone of these needs plait;
* :mod:`plait_federated.conformance_examples` has small inputs for the conformance tests of methods.
"""

from plait_federated.rounds import Gossip, Server
from plait_federated.settings import FederatedSettings, UpdateOrder
from plait_federated.shards import ClientShards
from plait_federated.steps import (
    Gradient,
    Local,
    LocalStep,
    check_prox,
    clip,
    momentum_step,
    prox_step,
    sam_step,
    sgd_step,
)
from plait_federated.topology import Graph, MixingWeights, describe_graph
from plait_federated.training import TrainingOutcome, follow

__version__ = "0.1.0"
__plait_api__ = "0.1"

__all__ = [
    "ClientShards",
    "FederatedSettings",
    "Gossip",
    "Gradient",
    "Graph",
    "Local",
    "LocalStep",
    "MixingWeights",
    "Server",
    "TrainingOutcome",
    "UpdateOrder",
    "check_prox",
    "clip",
    "describe_graph",
    "follow",
    "momentum_step",
    "prox_step",
    "sam_step",
    "sgd_step",
]
