"""One line on each method, read from its source: nothing is imported."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path


def summary(target: str) -> str:
    """The first line of the docstring of the class at ``module:Class``; empty where its source is not to be found."""
    module, _, name = target.partition(":")
    documented = _class(module, name.split(".")[0], seen=frozenset())
    return next(iter((ast.get_docstring(documented) or "").splitlines()), "") if documented is not None else ""


def _class(module: str, name: str, seen: frozenset[tuple[str, str]]) -> ast.ClassDef | None:
    """The definition of a class, also where the module only imports it."""
    tree = _tree(module)
    if tree is None or (module, name) in seen:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class(_imported(module, node), alias.name, seen | {(module, name)})
    return None


def _imported(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    file = _file(module)
    parts = module.split(".")
    package = parts if file is not None and file.name == "__init__.py" else parts[:-1]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


@functools.cache
def _tree(module: str) -> ast.Module | None:
    file = _file(module)
    if file is None:
        return None
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _file(module: str) -> Path | None:
    return next(_files(module), None)


def _files(module: str) -> Iterator[Path]:
    # importlib would import the packages around the module.
    for place in sys.path:
        base = Path(place, *module.split("."))
        for file in (base / "__init__.py", base.with_name(f"{base.name}.py")):
            if file.is_file():
                yield file
