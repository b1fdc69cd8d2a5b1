"""Graphs for plait: data, splits, few-shot episodes, graph networks, plain training, accuracy.

What there is for the author of a method:

* of a training (hook ``optimize``): :class:`GraphTraining`, whose subclass only says how a model is updated
  (:class:`Update`, :class:`PlainUpdate`), and :func:`betas_field`; the loop beneath it is :func:`train`;
* of any method: :data:`GRAPHS`, the kinds of data that it takes;
* what an update learns from: :class:`Task`, :class:`Objective`, :class:`NodeObjective`, :class:`EpisodeObjective`;
* of a model: :class:`SavedModule` saves itself; a few-shot one is an :class:`EpisodeModel`, which answers
  :class:`Episode` on an :class:`EpisodeGraph`;
* of an evaluation: :func:`node_logits`, :func:`node_scores`, :func:`episode_accuracies`, :func:`episode_scores`,
  :func:`compare`;
* checks of inputs: :func:`check_graph`, :func:`check_is_module`; :func:`library_warnings_to` for warnings of libraries.

The methods are in :mod:`plait_graph.plugin`.
"""

import warnings

with warnings.catch_warnings():  # users cannot change PyG's use of torch.jit
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    import torch_geometric.nn  # noqa: F401

from plait_graph.accuracy import compare, episode_scores, node_scores
from plait_graph.datasets import check_graph
from plait_graph.episodes import Episode
from plait_graph.fewshot import EpisodeGraph, EpisodeModel
from plait_graph.graph_training import GRAPHS, GraphTraining, betas_field
from plait_graph.library_warnings import library_warnings_to
from plait_graph.models import SavedModule, check_is_module
from plait_graph.tasks import EpisodeObjective, NodeObjective, Objective, Task, episode_accuracies, node_logits
from plait_graph.training_loop import PlainUpdate, Update, train

__plait_api__ = "0.1"
__all__ = [
    "GRAPHS",
    "Episode",
    "EpisodeGraph",
    "EpisodeModel",
    "EpisodeObjective",
    "GraphTraining",
    "NodeObjective",
    "Objective",
    "PlainUpdate",
    "SavedModule",
    "Task",
    "Update",
    "betas_field",
    "check_graph",
    "check_is_module",
    "compare",
    "episode_accuracies",
    "episode_scores",
    "library_warnings_to",
    "node_logits",
    "node_scores",
    "train",
]
