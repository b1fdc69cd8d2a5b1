"""plait braids research methods: find a method, configure it, compose it with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plait.errors import ConfigurationError, MissingDependency, PipelineError, PlaitError, StoreError
from plait.hookspecs import hookimpl

if TYPE_CHECKING:
    from plait.building import build_module
    from plait.context import Run
    from plait.loading import load
    from plait.report import Report
    from plait.runner import run

__version__ = "0.1.0"
API = "0.1"

__all__ = [
    "API", "ConfigurationError", "MissingDependency", "PipelineError", "PlaitError", "Report", "Run", "StoreError", "__version__",
    "build_module", "hookimpl", "load", "run",
]  # fmt: skip

_LAZY = {
    "build_module": "plait.building",
    "Run": "plait.context",
    "Report": "plait.report",
    "load": "plait.loading",
    "run": "plait.runner",
}


def __getattr__(name: str) -> Any:
    # `plait list` must not pay for what it does not use.
    if name not in _LAZY:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
