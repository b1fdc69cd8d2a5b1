"""Which code made a result: one rule for methods, nested methods, wrappers and kits, installed or not.

* A distribution counts by its version and by what its wheel holds; an editable one by its version and the content of
  all its sources; either with the plait packages that it requires.
* A file that is named by its path counts by its content and that of every module beside it that it imports.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from plait.errors import PlaitError
from plait.importing import FILE_ATTRIBUTE, digest_of_sources, local_sources

LIBRARIES = (
    "torch", "torchvision", "numpy", "datasets", "transformers", "diffusers", "open_clip_torch", "timm", "torch-geometric",
    "scikit-image", "scikit-learn", "pillow",
)  # fmt: skip
NO_SOURCES = ("tests", "test", "__pycache__", "node_modules", "build", "dist")


def code_of(cls: type[Any]) -> dict[str, str]:
    """What a class's code is made of: distribution or file → version or digest."""
    module = sys.modules[cls.__module__]
    file = getattr(module, FILE_ATTRIBUTE, None)
    if file is not None:
        return code_of_file(Path(file))
    package = distribution_of(cls.__module__)
    if package is not None:
        return dict(code_of_distribution(package))
    source = getattr(module, "__file__", None)
    return code_of_file(Path(source)) if source else {cls.__module__: "without a file"}


def code_of_file(file: Path) -> dict[str, str]:
    """A file of the user's with the local modules that it imports."""
    root = file.parent
    while (root / "__init__.py").exists():  # a module of a package may import the whole package
        root = root.parent
    sources = local_sources(file)
    if root != file.parent:
        sources = sorted({*sources, *_sources_below(root / file.relative_to(root).parts[0])})
    return {file.name: digest_of_sources(sources)[:16]}


@functools.cache
def code_of_distribution(package: str) -> Mapping[str, str]:
    """A distribution and the plait packages that it requires, directly or through another of them."""
    found: dict[str, str] = {}
    todo = [package]
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            found[name] = version_of(name)
            todo += [required for required in _requirements(name) if _is_plait_package(required)]
    return dict(sorted(found.items()))


@functools.cache
def version_of(package: str) -> str:
    """Version and content of a distribution; ``missing`` where it is not installed."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
    folder = _editable_folder(distribution)
    if folder is None:
        return f"{distribution.version}+{_content_of_wheel(distribution)}"
    files = sorted({file for root in _import_roots(distribution, folder) for file in _sources_below(root)})
    if not files:  # a key that depends on none would never change
        raise PlaitError(f"package {package} is installed from {folder}, and there are no sources; install it again")
    return f"{distribution.version}+{digest_of_sources(files)[:12]}"


@functools.cache
def distribution_of(module: str) -> str | None:
    """The distribution that a module belongs to; ``None`` for a user's own."""
    top = module.partition(".")[0]
    if top == "plait":
        return "plait"
    if top in _plait_packages():
        return _plait_packages()[top]
    owners = importlib.metadata.packages_distributions().get(top, ())
    return owners[0] if owners else None


@functools.cache
def plait_modules() -> frozenset[str]:
    """Top-level modules of plait and of every package that offers methods: those whose errors speak to users."""
    return frozenset({"plait", *_plait_packages()})


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that results come from."""
    return {name: version for name in LIBRARIES if (version := _version(name)) is not None}


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _plait_packages() -> dict[str, str]:
    """Top-level module → distribution, of all that have an entry point of plait."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        for ep in distribution.entry_points:
            if ep.group.startswith("plait."):
                found[ep.value.partition(":")[0].partition(".")[0]] = canonicalize_name(distribution.name)
    return found


def _is_plait_package(name: str) -> bool:
    return canonicalize_name(name) == "plait" or canonicalize_name(name) in _plait_packages().values()


def _requirements(package: str) -> Iterator[str]:
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def _content_of_wheel(distribution: importlib.metadata.Distribution) -> str:
    # A wheel that was built again under the same version is another one. Its RECORD has the digest of every file.
    digest = hashlib.sha256()
    for file in sorted(distribution.files or [], key=str):
        if file.parts[0].endswith(".dist-info") or file.suffix == ".pyc" or file.parts[0] == "..":
            continue
        place = Path(str(file.locate()))
        value = file.hash.value if file.hash else digest_of_sources([place]) if place.is_file() else "missing"
        digest.update(f"{file} {value}\n".encode())
    return digest.hexdigest()[:12]


def _editable_folder(distribution: importlib.metadata.Distribution) -> Path | None:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(origin["url"]).path))


def _import_roots(distribution: importlib.metadata.Distribution, folder: Path) -> Iterator[Path]:
    """Folders and files that an editable install makes importable; its whole folder where that is not to be found out."""
    found = False
    for file in distribution.files or []:
        place = Path(str(file.locate()))
        if file.suffix == ".pth" and place.is_file():
            for line in place.read_text(encoding="utf-8").splitlines():
                if line.strip() and not line.startswith(("import ", "#")) and Path(line).is_dir():
                    yield Path(line)
                    found = True
        elif file.name.startswith("__editable__") and file.suffix == ".py" and place.is_file():
            for source in _mapping_of_finder(place):
                yield Path(source)
                found = True
    if not found:
        yield folder


def _mapping_of_finder(file: Path) -> Iterable[str]:
    """Packages of setuptools' finder for editable installs: its table ``MAPPING`` of module → path."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "MAPPING" for target in targets):
            value: dict[str, str] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return [path if os.path.isdir(path) else f"{path}.py" for path in value.values()]
    return []


def _sources_below(root: Path) -> Iterator[Path]:
    """All files of packages below a folder, data files too; without tests, environments and what is hidden."""
    if root.is_file():
        yield root
        return
    for folder, names, files in os.walk(root):
        names[:] = sorted(
            name
            for name in names
            if name not in NO_SOURCES
            and not name.startswith(".")
            and not name.endswith((".egg-info", ".dist-info"))
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        )
        yield from (
            Path(folder, name) for name in sorted(files) if not name.startswith(".") and not name.endswith(".pyc")
        )
