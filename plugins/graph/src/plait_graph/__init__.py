"""Graphs for plait: data, splits, few-shot episodes, graph networks, plain training, accuracy."""

import warnings

with warnings.catch_warnings():  # PyG's use of torch.jit is no business of our users
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    import torch_geometric.nn  # noqa: F401

__plait_api__ = "0.1"
