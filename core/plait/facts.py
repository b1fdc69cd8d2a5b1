"""All that makes a step's result but for its inputs: what its key, the store and ``plait plan`` know of it."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from plait.calling import wrappers_of
from plait.configuration import fields_of, plain
from plait.errors import ConfigurationError
from plait.fields import HOOK, OUTPUT
from plait.pipeline import Step
from plait.versions import code_of, code_of_file, library_versions

KEY_FORMAT = 3
SMALL = 64 * 2**20  # bytes; a single file up to here counts by its content


def facts_of(step: Step, folder: Path) -> dict[str, Any]:
    """JSON-like facts; two steps with equal facts and equal inputs have equal results.

    Args:
        folder: that of the pipeline; paths below it count relative to it.

    Raises:
        ConfigurationError: a file that the step reads is not there.
    """
    cls = type(step.instance)
    instances = list(_with_nested(step.instance))
    code: dict[str, str] = {}
    for instance in instances:
        code |= code_of(type(instance))
    wrappers = {name: code_of(wrapper) for name, wrapper in wrappers_of(step.hook)}
    needed = {name for instance in instances for name in getattr(instance, "depends_on_libraries", ())}
    versions = library_versions()
    return {
        "format": KEY_FORMAT,
        "step": step.name,
        "hook": step.hook,
        "method": f"{step.method.package or 'file'}:{cls.__module__ if step.method.package else ''}:{cls.__qualname__}",
        "fields": _relative(_fields(step.instance), folder),
        "code": code,
        "wrappers": wrappers,
        "libraries": {name: versions.get(name, "not installed") for name in sorted(needed)},
        "files": _files(instances, folder),
        "seed": step.seed,
        **({} if step.limit is None else {"limit": step.limit}),
    }


def lost_outputs(instance: Any) -> list[Path]:
    """Files and folders that a method is to write beside its result and that are not there."""
    fields = [field for field in fields_of(type(instance)).values() if OUTPUT in field.metadata]
    paths = [getattr(instance, field.name) for field in fields]
    return [Path(path) for path in paths if path is not None and not Path(path).exists()]


def _fields(instance: Any) -> dict[str, Any]:
    (fields,) = plain(instance).values()
    return dict(fields)


def _relative(value: Any, folder: Path) -> Any:
    """Texts that are paths below the pipeline's folder, relative to it: where the folder lies makes no result."""
    if isinstance(value, dict):
        return {name: _relative(item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    prefix = f"{folder}{os.sep}"
    return f"./{value[len(prefix) :]}" if isinstance(value, str) and value.startswith(prefix) else value


def _with_nested(instance: Any) -> Iterator[Any]:
    """A method and all methods in its fields."""
    yield instance
    for field in fields_of(type(instance)).values():
        if HOOK in field.metadata:
            value = getattr(instance, field.name)
            for method in value if isinstance(value, (list, tuple)) else [value]:
                if method is not None:
                    yield from _with_nested(method)


def _files(instances: Iterable[Any], folder: Path) -> dict[str, str]:
    """Path → content of everything on this machine that the fields name."""
    found: dict[str, str] = {}
    for instance in instances:
        for field in attrs.fields(type(instance)):
            if OUTPUT not in field.metadata and HOOK not in field.metadata:
                for value in _leaves(getattr(instance, field.name, None)):
                    found |= _named_by(value, folder)
        listed = getattr(instance, "input_files", None)
        if listed is not None:
            found |= _listed(type(instance).__name__, listed(), folder)
    return dict(sorted(found.items()))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _named_by(value: Any, folder: Path) -> dict[str, str]:
    if isinstance(value, str) and ".py:" in value:
        file = folder / value.rpartition(":")[0]
        return code_of_file(file) if file.is_file() else {}
    if not isinstance(value, (str, Path)) or not str(value):
        return {}
    path = folder / os.path.expanduser(value)
    try:
        if path.is_file():
            return {_relative(str(path), folder): _content(path)}
        # A name that happens to be that of a folder is read as one only where it is written as a path.
        if path.is_dir() and (isinstance(value, Path) or os.sep in value):
            return {_relative(str(path), folder): _content_of_folder(path)}
    except (OSError, ValueError):  # a text that cannot be a path
        pass
    return {}


def _listed(method: str, files: Iterable[Path | str], folder: Path) -> dict[str, str]:
    digest, count = hashlib.sha256(), 0
    for file in files:
        path = folder / file
        try:
            facts = path.stat()
        except OSError as error:
            raise ConfigurationError(f"{path}, which is listed, cannot be read: {error.strerror}") from error
        digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        count += 1
    return {f"{count} files listed for {method}": digest.hexdigest()[:16]} if count else {}


def _content(path: Path) -> str:
    facts = path.stat()
    if facts.st_size > SMALL:
        return f"{facts.st_size} bytes, {facts.st_mtime_ns}"
    return _digest_of(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.lru_cache(maxsize=10_000)
def _digest_of(path: Path, *_: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _content_of_folder(folder: Path) -> str:
    """Names, sizes and times of all files, also below links."""
    digest, seen = hashlib.sha256(), set()
    for place, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder around it
            names.clear()
            continue
        seen.add(real)
        names.sort()
        for name in sorted(files):
            path = os.path.join(place, name)
            try:
                facts = os.stat(path)
            except OSError:  # a broken link
                digest.update(f"{path[len(str(folder)) :]} broken\n".encode("utf-8", "surrogateescape"))
                continue
            digest.update(
                f"{path[len(str(folder)) :]} {facts.st_size} {facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
    return digest.hexdigest()[:16]
