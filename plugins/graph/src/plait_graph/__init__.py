"""Graphs for plait: data, splits, few-shot episodes, graph networks, plain training, accuracy."""

__plait_api__ = "0.1"
