"""The methods: ``merge`` (WEMoE, E-WEMoE, baselines), and the toy tasks that they are measured on."""

from plait_wemoe.plugin.merging import (
    Dare,
    Fisher,
    Individual,
    RegMean,
    SimpleAverage,
    TaskArithmetic,
    Ties,
)
from plait_wemoe.plugin.multi_task import (
    FolderModel,
    FourTasks,
    MultiTaskAccuracy,
    MultiTaskTraining,
    MultiTaskViT,
    TextClassifier,
)
from plait_wemoe.plugin.training import (
    AdaMerging,
    Concrete,
    EWEMoE,
    EWEMoEFast,
    EWEMoEPublished,
    WEMoE,
    WEMoEIcml,
)

__all__ = [
    "AdaMerging",
    "Concrete",
    "Dare",
    "EWEMoE",
    "EWEMoEFast",
    "EWEMoEPublished",
    "Fisher",
    "FolderModel",
    "FourTasks",
    "Individual",
    "MultiTaskAccuracy",
    "MultiTaskTraining",
    "MultiTaskViT",
    "RegMean",
    "SimpleAverage",
    "TaskArithmetic",
    "TextClassifier",
    "Ties",
    "WEMoE",
    "WEMoEIcml",
]
