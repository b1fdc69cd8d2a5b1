"""Libraries that the core uses where they are installed, and never imports by itself."""

from __future__ import annotations

import importlib
from typing import Any

from plait.errors import MissingDependency

PACKAGES = {"PIL": "pillow", "torch_geometric": "torch-geometric", "skimage": "scikit-image", "sklearn": "scikit-learn"}


def require(module: str) -> Any:
    """Import a module by name.

    Raises:
        MissingDependency: it is not installed; the message says which package to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != top:
            raise
        raise MissingDependency(
            f"this needs {top}, which is not installed; pip install {PACKAGES.get(top, top)}"
        ) from error
