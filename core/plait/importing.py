"""Users' own code, named by import path or by file, with the local modules that it imports."""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from plait.errors import nearest

FILE_ATTRIBUTE = "__plait_file__"
DOUBTFUL_SECONDS = 2.0  # some file systems count in twos

_local_folders: set[str] = set()
_folder_of_late: dict[str, Path] = {}
_reading_own_results = contextvars.ContextVar("reading_own_results", default=False)


def import_code(place: str, folder: Path | None = None) -> ModuleType:
    """The module at ``package.module`` or ``some/file.py``, both looked for from ``folder``.

    A file is a module of its own, which may import the modules that lie beside it wherever the program was started;
    after an edit of it or of these it is another one.

    Args:
        place: dotted name, or path of a file that ends in ``.py``.
        folder: default the current one.

    Raises:
        OSError: the file is not there or cannot be read.
        ImportError: a module beside it has the name of an installed one.
        Exception: whatever the module raises while it is imported.
    """
    folder = (folder or Path.cwd()).absolute()
    if place.endswith(".py"):
        return _import_file(folder / os.path.expanduser(place))
    _make_importable(folder)
    for file in _files_of(folder, place):
        _drop_doubtful_byte_code(local_sources(file, folder))
    return importlib.import_module(place)


def is_of_python(path: str) -> bool:
    """Whether ``module:name`` lies in Python's own library, where nothing is a method, a model or a part of one."""
    module = path.rpartition(":")[0]
    return not module.endswith(".py") and module.partition(".")[0] in sys.stdlib_module_names


def named_object(path: str, is_wanted: Callable[[Any], bool], wanted: str, folder: Path | None = None) -> Any:
    """The class or function that the user names, ``package.module:name`` or ``./file.py:name``; it is not called.

    Args:
        is_wanted: whether a class or function is of the kind that is needed here, such as :func:`makes`.
        wanted: that kind in words, for the message: "a class with a method propose".
        folder: where files are looked for; default the current one.

    Raises:
        ValueError: it cannot be imported, or is something else than what is wanted.
    """
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{path!r} is not of the form package.module:name or ./file.py:name")
    if is_of_python(path):
        raise ValueError(f"{path!r} is of Python's own library; name {wanted}")
    try:
        found: Any = import_code(place, folder)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"{path!r} cannot be imported: {_reason(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{path!r}: there is no {part!r} in {place}{nearest(part, vars(found))}")
        found = getattr(found, part)
    is_code = inspect.isclass(found) or inspect.isfunction(found)
    if not is_code or is_of_python(f"{found.__module__}:{name}") or not is_wanted(found):
        raise ValueError(f"{path!r} is not {wanted}")
    return found


def stored_object(path: str, file: str | None, is_wanted: Callable[[Any], bool], wanted: str) -> Any:
    """As :func:`named_object`, for a name that stands in a stored file rather than in the pipeline.

    Args:
        file: the file of the user's that the module was loaded from, if it was.

    Raises:
        ValueError: as there; or the name leads to a file, and it is not plait's own store that says so. A folder that
            comes from elsewhere must not choose which file is run.
    """
    if file is not None and not _reading_own_results.get():
        raise ValueError(
            f"the model is of a class in {file}, which its folder names and the pipeline does not; "
            "import the class in your own code and call its from_pretrained"
        )
    return named_object(f"{file or path.rpartition(':')[0]}:{path.rpartition(':')[2]}", is_wanted, wanted)


@contextlib.contextmanager
def reading_own_results() -> Iterator[None]:
    """What is read inside was written by this store, so that files which it names are the pipeline's."""
    token = _reading_own_results.set(True)
    try:
        yield
    finally:
        _reading_own_results.reset(token)


def makes(kind: type) -> Callable[[Any], bool]:
    """Whether something is a subclass of ``kind``, or a function that says it returns one, or one in a user's file."""

    def check(found: Any) -> bool:
        if inspect.isclass(found):
            return issubclass(found, kind)
        if hasattr(sys.modules.get(found.__module__), FILE_ATTRIBUTE):
            return True
        try:
            returned = typing.get_type_hints(found).get("return")
        except Exception:  # an annotation that cannot be resolved says nothing
            return False
        return inspect.isclass(returned) and issubclass(returned, kind)

    return check


def local_sources(file: Path, root: Path | None = None) -> list[Path]:
    """The file and every module beside it (in ``root``) that it imports, directly or through another of them.

    Modules that are imported by a computed name are not seen.
    """
    root = root or file.parent
    found: dict[Path, None] = {}
    todo = [file]
    while todo:
        source = todo.pop()
        if source not in found:
            found[source] = None
            todo += _imported_by(source, root)
    return [file, *sorted(path for path in found if path != file)]


def digest_of_sources(files: list[Path]) -> str:
    """SHA-256 over the content of source files."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"


def _imported_by(source: Path, root: Path) -> Iterator[Path]:
    for level, name, _ in _imports_of(source):
        base = root
        for _ in range(level):
            base = source.parent if base is root else base.parent
        yield from _files_of(base, name)


def _imports_of(source: Path) -> tuple[tuple[int, str, bool], ...]:
    """Every import statement's level, dotted name and whether it stands inside a function."""
    facts = source.stat()
    return _parsed_imports(source, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.lru_cache(maxsize=10_000)
def _parsed_imports(source: Path, *_: int) -> tuple[tuple[int, str, bool], ...]:
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # the import of it will say so
        return ()
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, id(node) in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
            found += [(node.level, name, id(node) in late) for name in names]
    return tuple(found)


def _files_of(folder: Path, dotted: str) -> Iterator[Path]:
    """Files of a dotted name and of the packages around it; the last part may be no module but a name in one."""
    for part in dotted.split("."):
        folder = folder / part
        for candidate in (folder.with_name(f"{folder.name}.py"), folder / "__init__.py"):
            if candidate.is_file():
                yield candidate


def _import_file(file: Path) -> ModuleType:
    file = file.resolve()
    sources = local_sources(file)
    # The content is part of the name: an edited file is another module.
    name = f"plait_file_{hashlib.sha256(f'{file} {digest_of_sources(sources)}'.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    tops = {source.relative_to(file.parent).parts[0].removesuffix(".py") for source in sources[1:]}
    if tops:
        _forget_local_modules(file.parent, tops, _imported_late(sources, tops))
        _make_importable(file.parent)
    _drop_doubtful_byte_code(sources)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__[FILE_ATTRIBUTE] = str(file)
    sys.modules[name] = module
    try:
        with _first_on_path(file.parent if tops else None):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _drop_doubtful_byte_code(sources: Iterable[Path]) -> None:
    """Delete byte code that may be of an earlier text of its source.

    Python compares a source's size and the second of its last change, so an edit in the second of the last import is
    lost on it if it keeps the size, while keys of results, which go by content, would say that the new code ran.
    """
    for source in sources:
        with contextlib.suppress(OSError, NotImplementedError):
            byte_code = Path(importlib.util.cache_from_source(str(source)))
            if byte_code.stat().st_mtime - source.stat().st_mtime < DOUBTFUL_SECONDS:
                byte_code.unlink()


@contextlib.contextmanager
def _first_on_path(folder: Path | None) -> Iterator[None]:
    """Modules beside a file are looked for before those of the same name beside other files."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _make_importable(folder: Path) -> None:
    # At the end, so that nothing there hides an installed module; for good, since methods import when they run too.
    _local_folders.add(str(folder))
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _forget_local_modules(folder: Path, tops: Iterable[str], late: Collection[str]) -> None:
    """Let modules beside a file be imported anew, as they are now; refuse names that could mean two modules.

    Args:
        tops: names of the modules and packages beside the file that it imports.
        late: those that are imported only when a function runs.

    Raises:
        ImportError: an installed module has one of the names; or one beside another file, and it is imported late.
    """
    elsewhere = [
        place for place in sys.path if place and place not in _local_folders and Path(place).absolute() != folder
    ]
    for top in sorted(tops):
        installed = importlib.machinery.PathFinder.find_spec(top, elsewhere)
        if top in sys.stdlib_module_names or (installed is not None and installed.origin):
            where = "of Python's own" if top in sys.stdlib_module_names else f"at {installed.origin}"  # type: ignore[union-attr]
            raise ImportError(
                f"module {top!r} in {folder} has the same name as one {where}, so one would hide the other; rename it"
            )
        other = _folder_of_late.get(top)
        if top in late:
            _folder_of_late[top] = folder
        if other is not None and other != folder and other.is_dir():
            raise ImportError(
                f"module {top!r} in {folder} has the same name as one in {other} that a function imports when it runs; rename one"
            )
        for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
            del sys.modules[name]
    importlib.invalidate_caches()


def _imported_late(sources: Iterable[Path], tops: Collection[str]) -> set[str]:
    names = {
        name.partition(".")[0] for source in sources for level, name, late in _imports_of(source) if late and not level
    }
    return names & set(tops)
