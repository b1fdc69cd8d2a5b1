"""Users' own code, named by import path or by file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def import_code(place: str, folder: Path | None = None) -> ModuleType:
    """The module at ``package.module`` or ``some/file.py``, both looked for from ``folder``.

    A file is a module of its own; after an edit it is another one.

    Args:
        place: dotted name, or path of a file that ends in ``.py``.
        folder: default the current one.

    Raises:
        OSError: the file is not there or cannot be read.
        Exception: whatever the module raises while it is imported.
    """
    folder = folder or Path.cwd()
    if place.endswith(".py"):
        return _import_file(folder / os.path.expanduser(place))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(place)
    finally:
        sys.path.remove(str(folder))


def _import_file(file: Path) -> ModuleType:
    # The content is part of the name: an edited file is another module.
    name = f"plait_file_{hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__plait_file__"] = str(file.resolve())
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
