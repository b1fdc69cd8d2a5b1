"""Federated learning: partitions, graphs, engines and baselines that decentralised methods share."""

__version__ = "0.1.0"
