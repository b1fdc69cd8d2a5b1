"""Content-addressed artifacts on disk: atomic, locked between processes, checksummed.

::

    <root>/objects/ab/ab12…/   artifact/  extras/  meta.json      one finished step
    <root>/tmp/…               what is being written; renamed into objects/ when complete
    <root>/scratch/ab12…/      what a running step keeps for a resume (``run.folder``)
    <root>/locks/ab12….lock
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
from filelock import FileLock, Timeout

from plait.errors import StoreError

META = "meta.json"


def default_root() -> Path:
    """``PLAIT_STORE`` where it is set, else ``.plait`` in the current folder."""
    return Path(os.environ.get("PLAIT_STORE") or ".plait").absolute()


@attrs.frozen
class Entry:
    """One stored result."""

    key: str
    folder: Path
    meta: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(fact["size"] for fact in self.meta["files"].values())


class Store:
    """A store below ``root`` (made at first use).

    Raises:
        StoreError: from every method, where the disk is full, read-only or not accessible.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def folder(self, key: str) -> Path:
        """Where the result with this key is, or will be."""
        return self.root / "objects" / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether a complete result is there: its files exist in the sizes they were written with."""
        return self.entry(key) is not None

    def entry(self, key: str) -> Entry | None:
        """The stored result, or ``None``."""
        folder = self.folder(key)
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            complete = all((folder / name).stat().st_size == fact["size"] for name, fact in meta["files"].items())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        return Entry(key, folder, meta) if complete else None

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the key alone among all processes; released by the system if the process dies."""
        with self._explained():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / "locks" / f"{key}.lock")
        with self._explained():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if on_wait:
                    on_wait()
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def scratch(self, key: str) -> Path:
        """The folder that a step with this key finds again after a kill."""
        folder = self.root / "scratch" / key
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, write: Callable[[Path], None], facts: dict[str, Any]) -> Entry:
        """Store a result: ``write`` fills a folder beside the store, which then moves in as one piece."""
        aside = self.root / "tmp" / f"{os.getpid()}-{uuid.uuid4().hex}"
        with self._explained():
            try:
                aside.mkdir(parents=True)
                write(aside)
                files = {
                    str(path.relative_to(aside)): _file_facts(path)
                    for path in sorted(aside.rglob("*"))
                    if path.is_file()
                }
                meta = {"key": key, "created": time.time(), **facts, "files": files}
                _write_synced(aside / META, json.dumps(meta, indent=1))
                target = self.folder(key)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():  # incomplete, else it would have been taken from the store
                    _remove(target)
                os.replace(aside, target)
                _sync_folder(target.parent)
            finally:
                _remove(aside)
            _protect(target)
            _remove(self.root / "scratch" / key)
        return Entry(key, self.folder(key), meta)

    def touch(self, key: str) -> None:
        """Remember that a result was used now, for :meth:`collect`."""
        with contextlib.suppress(OSError):
            os.utime(self.folder(key) / META)

    def entries(self) -> Iterator[Entry]:
        """All complete results."""
        for folder in sorted((self.root / "objects").glob("*/*")):
            if entry := self.entry(folder.name):
                yield entry

    def collect(self, older_than: float) -> tuple[int, int]:
        """Delete results not used for ``older_than`` seconds, and what killed processes left.

        Returns:
            number of deleted results, and bytes freed.
        """
        count = freed = 0
        limit = time.time() - older_than
        with self._explained():
            for folder in sorted((self.root / "objects").glob("*/*")) + sorted((self.root / "scratch").glob("*")):
                with (
                    contextlib.suppress(Timeout),
                    FileLock(self.root / "locks" / f"{folder.name}.lock").acquire(timeout=0),
                ):
                    used = _last_used(folder)
                    if used is not None and used <= limit:
                        freed += _size(folder)
                        count += folder.parent.name != "scratch"
                        _remove(folder)
            for aside in (self.root / "tmp").glob("*"):
                if not _is_alive(int(aside.name.partition("-")[0])):
                    freed += _size(aside)
                    _remove(aside)
        return count, freed

    def changed_files(self, key: str) -> list[str]:
        """The files of a complete result that differ from the checksums they were written with."""
        entry = self.entry(key)
        if entry is None:
            return []
        return [name for name, fact in entry.meta["files"].items() if _sha256(entry.folder / name) != fact["sha256"]]

    def verify(self) -> dict[str, str]:
        """Key → what is wrong, for every result whose files differ from their checksums."""
        broken = {}
        for folder in sorted((self.root / "objects").glob("*/*")):
            if self.entry(folder.name) is None:
                broken[folder.name] = "incomplete"
            elif changed := self.changed_files(folder.name):
                broken[folder.name] = f"changed: {', '.join(changed)}"
        return broken

    def remove(self, key: str) -> None:
        """Delete one result."""
        with self.lock(key), self._explained():
            _remove(self.folder(key))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (
                errno.ENOSPC,
                errno.EROFS,
                errno.EACCES,
                errno.EPERM,
                errno.EDQUOT,
                errno.ENOTDIR,
                errno.EEXIST,
            ):
                raise
            remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another place"
            raise StoreError(
                f"the store {self.root} cannot be written ({error.strerror}); {remedy}, e.g. with --store or PLAIT_STORE"
            ) from error


def _file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _protect(folder: Path) -> None:
    """Take away the right to write below a result: a library that keeps its caches beside what it reads cannot."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.chmod(os.path.join(place, name), 0o444)
        os.chmod(place, 0o555)


def _remove(folder: Path) -> None:
    for place, names, _ in os.walk(folder):
        for name in ("", *names):
            with contextlib.suppress(OSError):
                os.chmod(os.path.join(place, name), 0o755)
    shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float | None:
    for path in (folder / META, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
