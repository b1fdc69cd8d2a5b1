"""Content-addressed artifacts on disk: atomic, locked between processes, checksummed.

::

    <root>/objects/ab/ab12…/   artifact/  extras/  meta.json      one finished step
    <root>/contents/cd/cd34…   another name (hard link) of every larger file in objects/: equal files are one
    <root>/tmp/ab12…-…/        what is being written; renamed into objects/ when complete
    <root>/scratch/ab12…/      what a running step keeps for a resume (``run.folder``)
    <root>/locks/ab12….lock    who computes it; other hosts that see the folder respect it
    <root>/runs/….json, .lock  the results that a running pipeline needs
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import xxhash
from filelock import SoftFileLease, Timeout

from plait.errors import StoreError, writing

META = "meta.json"
ARTIFACT = "artifact"  # the folder of the result itself in what is stored
KEY = re.compile(r"[0-9a-f]{64}")
CONTENT = re.compile(r"[0-9a-f]{32}-[0-9]+")
SHARED = 4096  # bytes; smaller files take a block of the disk at most
# A holder that has died on this host is seen at once; one on another host when it has not stirred for so long.
LEASE_SECONDS = 60.0
# A holder writes its name into the lock as soon as it has made it; one that has not after so long was killed in between.
NAMELESS_SECONDS = 5.0
# After so long a file that nobody refreshes belongs to nobody, whatever the clocks of two hosts say.
ABANDONED_SECONDS = 3600.0


def default_root() -> Path:
    """``PLAIT_STORE`` where it is set, else ``.plait`` in the current folder."""
    return Path(os.environ.get("PLAIT_STORE") or ".plait").absolute()


_CHECKED: dict[Path, set[str]] = {}


@attrs.frozen
class Entry:
    """One stored result."""

    key: str
    folder: Path
    meta: dict[str, Any]

    @property
    def is_dropped(self) -> bool:
        """Whether only what is around the result is left, see :meth:`Store.drop`."""
        return bool(self.meta.get("dropped"))

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(fact["size"] for fact in self.meta["files"].values())


def own_sizes(groups: Mapping[str, Sequence[Entry]]) -> dict[str, int]:
    """Bytes that each group of results takes on the disk and no other group shares: what deleting it would free."""
    found: dict[tuple[int, int], tuple[int, set[str]]] = {}
    for name, entries in groups.items():
        for entry in entries:
            for file in entry.meta["files"]:
                with contextlib.suppress(OSError):  # deleted since it was listed
                    facts = (entry.folder / file).stat()
                    found.setdefault((facts.st_dev, facts.st_ino), (facts.st_size, set()))[1].add(name)
    own = dict.fromkeys(groups, 0)
    for size, names in found.values():
        if len(names) == 1:
            own[names.pop()] += size
    return own


class Store:
    """A store below ``root`` (made at first use).

    Raises:
        StoreError: from every method, where the disk is full, read-only or not accessible.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        self._checked = _CHECKED.setdefault(self.root, set())

    def folder(self, key: str) -> Path:
        """Where the result with this key is, or will be."""
        return self.root / "objects" / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether a complete result is there: its files exist in the sizes they were written with."""
        entry = self.entry(key)
        return entry is not None and not entry.is_dropped

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
        """Hold the key alone among all processes of all hosts that see the store; it is free again when the process dies."""
        lease = self._lease("locks", key)
        with self._explained():
            try:
                lease.acquire(timeout=0)
            except Timeout:
                if on_wait:
                    on_wait()
                _wait_for(lease)
        try:
            yield
        finally:
            lease.release()

    @contextlib.contextmanager
    def needed(self, name: str, keys: Iterable[str]) -> Iterator[None]:
        """While it holds, :meth:`collect` on any host leaves the results with these keys alone.

        Args:
            name: of the run, different for every one.
        """
        lease = self._lease("runs", name)
        with self._explained():
            lease.acquire(timeout=0)
            _write_synced(self.root / "runs" / f"{name}.json", json.dumps(list(keys)))
        try:
            yield
        finally:
            (self.root / "runs" / f"{name}.json").unlink(missing_ok=True)
            lease.release()

    def _lease(self, kind: str, name: str) -> SoftFileLease:
        folder = self.root / kind
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
        return SoftFileLease(folder / f"{name}.lock", lease_duration=LEASE_SECONDS)

    def scratch(self, key: str) -> Path:
        """The folder that a step with this key finds again after a kill."""
        folder = self.root / "scratch" / key
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, write: Callable[[Path], None], facts: dict[str, Any]) -> Entry:
        """Store a result: ``write`` fills a folder beside the store, which then moves in as one piece."""
        aside = self.root / "tmp" / f"{key}-{uuid.uuid4().hex}"
        files: dict[str, Any] = {}
        with self._explained():
            try:
                aside.mkdir(parents=True)
                write(aside)
                for path in sorted(aside.rglob("*")):
                    if path.is_file():
                        files[str(path.relative_to(aside))] = self._settle(path)
                meta = {"key": key, "created": time.time(), **facts, "files": files}
                _write_synced(aside / META, json.dumps(meta, indent=1))
                target = self.folder(key)
                target.parent.mkdir(parents=True, exist_ok=True)
                if self.has(key):  # another host that took this one for dead has finished it; the results are equal
                    return Entry(key, target, json.loads((target / META).read_text(encoding="utf-8")))
                if target.exists():  # incomplete
                    _remove(target)
                os.replace(aside, target)
                _sync_folder(target.parent)
            finally:
                _remove(aside)
                self._forget(files.values())
            _protect(target)
            self._checked.discard(key)
            _remove(self.root / "scratch" / key)
        return Entry(key, self.folder(key), meta)

    def _settle(self, file: Path) -> dict[str, Any]:
        """Bring a file that was just written safely to the disk, or make it another name of an equal one there."""
        size = file.stat().st_size
        facts = {"size": size, "xxh3": _checksum(file)}
        if size < SHARED or file.is_symlink():
            _sync(file)
            return facts
        known, link = self._content(facts), file.with_name(f"{file.name}.link")
        with contextlib.suppress(OSError):  # there is none, or the file system has no (more) such links
            os.link(known, link)
            if _is_equal(link, file):
                os.replace(link, file)
                return facts
        link.unlink(missing_ok=True)
        _sync(file)
        with contextlib.suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, link)
            os.replace(link, known)  # also of one that is damaged
        link.unlink(missing_ok=True)
        return facts

    def _content(self, facts: Mapping[str, Any]) -> Path:
        """The name of a content below ``contents``."""
        checksum = str(facts["xxh3"])
        return self.root / "contents" / checksum[:2] / f"{checksum}-{facts['size']}"

    def _forget(self, files: Iterable[Mapping[str, Any]]) -> None:
        """Let go of the contents of deleted files, where no other result has them."""
        for facts in files:
            _delete_last(self._content(facts))

    def drop(self, key: str) -> None:
        """Delete a result that nothing needs any more, and keep what is stored around it (for reports).

        It stays where another run, on any host, is going to need it.
        """
        entry = self.entry(key)
        if entry is None or sum(key in keys for keys in self._keys_of_runs()) > 1:
            return
        with self.lock(key), self._explained():
            every = entry.meta["files"]
            files = {name: fact for name, fact in every.items() if not name.startswith(f"{ARTIFACT}/")}
            os.chmod(entry.folder, 0o755)
            unfinished = entry.folder / f"{META}.new"
            _write_synced(unfinished, json.dumps({**entry.meta, "files": files, "dropped": True}, indent=1))
            os.replace(unfinished, entry.folder / META)
            _remove(entry.folder / ARTIFACT)
            _protect(entry.folder)
            self._forget(every.values())

    def touch(self, key: str) -> None:
        """Remember that a result was used now, for :meth:`collect`."""
        with contextlib.suppress(OSError):
            os.utime(self.folder(key) / META)

    def entries(self) -> Iterator[Entry]:
        """All complete results."""
        for folder in self._folders("objects/*/*"):
            if entry := self.entry(folder.name):
                yield entry

    def unfinished(self) -> tuple[int, int]:
        """How many steps that did not finish keep a checkpoint for a resume, and its bytes in all."""
        folders = self._folders("scratch/*")
        return len(folders), sum(map(_size, folders))

    def collect(self, older_than: float) -> tuple[int, int]:
        """Delete results not used for ``older_than`` seconds, and what killed processes left.

        What a running pipeline needs and what is being written stay, on whichever host that is; so do files that are not
        the store's.

        Returns:
            number of deleted results, and bytes freed.
        """
        count = freed = 0
        limit = time.time() - older_than
        with self._explained():
            needed = set().union(*self._keys_of_runs())
            for folder in [*self._folders("objects/*/*"), *self._folders("scratch/*")]:
                used = _last_used(folder)
                if used is None or used > limit or folder.name in needed:
                    continue
                with self._if_free(folder.name) as free:
                    if free:
                        freed += _size(folder)
                        count += folder.parent.name != "scratch"
                        _remove(folder)
            for aside in self._folders("tmp/*"):
                with self._if_free(aside.name.partition("-")[0]) as free:
                    if free:
                        freed += _size(aside)
                        _remove(aside)
            contents = (self.root / "contents").glob("*/*")
            freed += sum(_delete_last(path) for path in contents if CONTENT.fullmatch(path.name))
            for file in (self.root / "locks").glob("*.lock"):  # of processes that were killed
                with self._if_free(file.stem):
                    pass
        return count, freed

    def _folders(self, pattern: str) -> list[Path]:
        """The store's own folders of a kind."""
        found = self.root.glob(pattern)
        return sorted(path for path in found if KEY.fullmatch(path.name.partition("-")[0]) and path.is_dir())

    def _keys_of_runs(self) -> list[set[str]]:
        """The keys that each running pipeline needs; what runs that were killed left is swept."""
        found = []
        for lock in (self.root / "runs").glob("*.lock"):  # of a run that was killed before it said what it needs
            if _nameless(lock) and _is_abandoned(lock):
                lock.unlink(missing_ok=True)
        for file in (self.root / "runs").glob("*.json"):
            lock = file.with_suffix(".lock")
            lease = self._lease("runs", file.stem)
            try:
                keys = set(json.loads(file.read_text(encoding="utf-8")))
                lease.acquire(timeout=0)
            except Timeout:
                if not _is_abandoned(lock):
                    found.append(keys)
                continue
            except (OSError, ValueError):  # it has just ended, or is not the store's
                continue
            file.unlink(missing_ok=True)
            lease.release()
        return found

    @contextlib.contextmanager
    def _if_free(self, key: str) -> Iterator[bool]:
        """Hold a key if nobody does."""
        lease = self._lease("locks", key)
        if _nameless(lock := Path(lease.lock_file)) and _is_abandoned(lock):
            lock.unlink(missing_ok=True)
        try:
            lease.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lease.release()

    def check(self, key: str) -> None:
        """Compare a result with its checksums, once in a process.

        Raises:
            StoreError: it is gone, or its files have changed since they were written.
        """
        if key in self._checked:
            return
        if not self.has(key):
            raise StoreError("its stored result is gone or incomplete; run the pipeline again")
        if changed := self.changed_files(key):
            raise StoreError(
                f"its stored result is damaged ({', '.join(changed[:3])}); plait cache verify --delete removes it, and a run computes it anew"
            )

    def changed_files(self, key: str) -> list[str]:
        """The files of a complete result that differ from the checksums they were written with."""
        entry = self.entry(key)
        if entry is None:
            return []
        files = entry.meta["files"].items()
        changed = [name for name, fact in files if _checksum(entry.folder / name) != fact["xxh3"]]
        if not changed:
            self._checked.add(key)
        return changed

    def verify(self) -> dict[str, str]:
        """Key → what is wrong, for every result whose files differ from their checksums."""
        broken = {}
        for folder in self._folders("objects/*/*"):
            if self.entry(folder.name) is None:
                broken[folder.name] = "incomplete"
            elif changed := self.changed_files(folder.name):
                broken[folder.name] = f"changed: {', '.join(changed)}"
        return broken

    def remove(self, key: str) -> None:
        """Delete one result."""
        entry = self.entry(key)
        with self.lock(key), self._explained():
            _remove(self.folder(key))
            self._forget(entry.meta["files"].values() if entry else ())

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        remedy = "name another place with --store or PLAIT_STORE, or free some space"
        return writing(f"the store {self.root}", remedy, StoreError)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _checksum(path: Path) -> str:
    """XXH3 (128 bits): finds flipped bytes at the speed of memory, so that every load can afford it."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(path.stat().st_size, 2**20) or 1))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _is_equal(one: Path, other: Path) -> bool:
    with one.open("rb", buffering=0) as first, other.open("rb", buffering=0) as second:
        while (piece := first.read(2**20)) == second.read(2**20):
            if not piece:
                return True
    return False


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
            mode = os.lstat(path := os.path.join(place, name)).st_mode
            if not stat.S_ISLNK(mode) and mode & 0o222:  # a link leads to what is not the store's
                os.chmod(path, 0o444)
        os.chmod(place, 0o555)


def _remove(folder: Path) -> None:
    for place, names, _ in os.walk(folder):
        for name in ("", *names):
            with contextlib.suppress(OSError):
                os.chmod(os.path.join(place, name), 0o755)
    shutil.rmtree(folder, ignore_errors=True)


def _delete_last(content: Path) -> int:
    """Delete a name of a content if no result has another; the bytes freed."""
    with contextlib.suppress(OSError):
        facts = content.stat()
        if facts.st_nlink == 1:
            content.unlink()
            return facts.st_size
    return 0


def _last_used(folder: Path) -> float | None:
    for path in (folder / META, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return None


def _size(folder: Path) -> int:
    """Bytes of the files that have no other name elsewhere."""
    facts = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(fact.st_size for fact in facts if fact.st_nlink == 1)


def _wait_for(lease: SoftFileLease) -> None:
    """Acquire a lease as soon as it is free; a lock without a name, which filelock leaves alone for ever, goes."""
    lock = Path(lease.lock_file)
    while True:
        before = _nameless(lock)
        try:
            lease.acquire(timeout=NAMELESS_SECONDS)
            return
        except Timeout:
            # Should it be taken this very moment, two processes compute the same result, and one of them is kept.
            if before is not None and _nameless(lock) == before:
                lock.unlink(missing_ok=True)


def _nameless(lock: Path) -> tuple[int, int] | None:
    """Which lock is there, if its holder's name is not in it."""
    try:
        with lock.open("rb") as file:
            facts = os.fstat(file.fileno())
            return None if file.read(1) else (facts.st_ino, facts.st_mtime_ns)
    except OSError:
        return None


def _is_abandoned(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime > ABANDONED_SECONDS
    except OSError:
        return True
