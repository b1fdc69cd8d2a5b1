"""Words that fields and algorithms share; nothing here imports a library."""

from __future__ import annotations

from typing import Literal

DATA = ("dataset", "clients")
CLASSIFIERS = ("classifier", "image-text-model", "multi-task-model")
TEMPLATES = ("a photo of a {}.",)
ALL_TASKS = "*"
IS_BACKDOOR = "is_backdoor"  # the column that marks the rows that an attack poisoned; for measuring only

Norm = Literal["linf", "l2"]
Loss = Literal["cross-entropy", "margin"]
