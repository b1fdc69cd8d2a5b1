"""Images in folders, zips and tars: which there are, of which class and split, and their bytes.

Names are paths inside their source with ``/``, in Unicode's composed form (NFC), whichever form the file system or the
archive has. Hidden files and what systems leave behind (``__MACOSX``, ``Thumbs.db``) are never among them.
"""

from __future__ import annotations

import os
import re
import tarfile
import threading
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import attrs

from plait_vision.images import SUFFIXES, is_hidden, is_image_name
from plait_vision.tables import read_table

_SPLITS = re.compile(r"train(ing)?|val(id(ation)?)?|dev|eval(uation)?|test(ing)?|restval", re.IGNORECASE)
_FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "name", "id")
_LABEL_COLUMNS = ("label", "class", "cls", "category")


def composed(name: str) -> str:
    """A name in Unicode's composed form: ``é`` is one letter, as on Linux and Windows, and not two, as on macOS."""
    return unicodedata.normalize("NFC", name)


class Files:
    """The files of a folder, a zip or a tar, by name; close it, or use it in a ``with`` statement.

    Attributes:
        path: where they lie.
        names: of all files but hidden ones, sorted.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a folder, a zip or a tar.

        Raises:
            ValueError: there is none, it is damaged, or two of its files have one name but for Unicode's form.
        """
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | tarfile.TarFile | None = None
        if self.path.is_dir():
            stored: Mapping[str, str] = _folder_names(self.path)
        elif not self.path.exists():
            raise ValueError(f"{self.path} does not exist; give a folder, a zip or a tar")
        elif zipfile.is_zipfile(self.path):
            self._archive = zipfile.ZipFile(self.path)
            stored = {
                info.filename: info.filename.replace("\\", "/")
                for info in self._archive.infolist()
                if not info.is_dir()
            }
        elif tarfile.is_tarfile(self.path):
            self._archive = tarfile.open(self.path)  # noqa: SIM115
            stored = {member.name: member.name.removeprefix("./") for member in self._archive if member.isfile()}
        else:
            raise ValueError(f"{self.path} is neither a folder nor a zip or tar; give one of these")
        self._stored = _by_name(stored, self.path)
        self.names = tuple(sorted(self._stored))

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the archive."""
        if self._archive is not None:
            self._archive.close()

    @property
    def images(self) -> list[str]:
        """The names of the images, by their suffixes."""
        return [name for name in self.names if is_image_name(name)]

    def read(self, name: str) -> bytes:
        """The content of one file; may be called from several threads.

        Raises:
            ValueError: the file cannot be read, or the archive is damaged or encrypted.
        """
        stored = self._stored[name]
        try:
            if self._archive is None:
                return (self.path / stored).read_bytes()
            with self._lock:
                if isinstance(self._archive, zipfile.ZipFile):
                    return self._archive.read(stored)
                return self._archive.extractfile(stored).read()  # type: ignore[union-attr]
        except OSError as error:
            raise ValueError(f"{self.label(name)} cannot be read: {error.strerror or error}") from error
        except (zipfile.BadZipFile, tarfile.TarError, RuntimeError, EOFError, NotImplementedError) as error:
            raise ValueError(f"{self.label(name)} cannot be read: {error}") from error

    def label(self, name: str) -> str:
        """How messages call a file: its whole path."""
        return f"{self.path}/{name}"


def by_stem(names: Iterable[str], where: object) -> dict[str, str]:
    """Name without suffix → name, sorted.

    Raises:
        ValueError: two files have one stem, such as ``a.png`` and ``a.jpg``.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        stem = PurePosixPath(name).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{found[stem]} and {name} in {where} share the stem {stem}; rename one of them")
        found[stem] = name
    return dict(sorted(found.items()))


def class_folders(files: Files) -> dict[str, dict[str, list[str]]]:
    """Split → class → names of its images, all sorted; the split is ``""`` where there are none.

    Images lie in ``<class>/`` or ``<split>/<class>/``; one folder around all of this, as archives have it, is passed over.

    Raises:
        ValueError: no images in class folders, or images at different depths.
    """
    images = files.images
    parts = {name: PurePosixPath(name).parts for name in images}
    shown = [len(part) for part in parts.values()]
    skip = 0
    while images and min(shown) > skip + 2 and _is_wrapper({part[skip] for part in parts.values()}):
        skip += 1
    depths = {len(part) - skip: name for name, part in reversed(parts.items())}
    if not images or set(depths) == {1}:
        raise ValueError(
            f"{files.path} has no images in class folders ({', '.join(SUFFIXES)}); lay them out as <class>/<image> or "
            "<split>/<class>/<image>, or give a table of labels"
        )
    if len(depths) > 1 or min(depths) > 3:
        raise ValueError(
            f"{files.path} has images at different or too great depths ({', '.join(sorted(depths.values()))}); lay them out "
            "all as <class>/<image> or all as <split>/<class>/<image>"
        )
    found: dict[str, dict[str, list[str]]] = {}
    for name in images:
        *split, label, _ = parts[name][skip:]
        found.setdefault("".join(split), {}).setdefault(label, []).append(name)
    return found


def labels_from_table(
    files: Files,
    table: Path | str,
    *,
    file_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> dict[str, dict[str, list[str]]]:
    """As :func:`class_folders`, from a CSV or TSV table: a row names an image (its suffix may be missing) and its class.

    A column ``split`` puts the rows into splits.

    Args:
        file_column, label_column: default: found by name (``file_name``, ``file``, ``image``, …; ``label``, ``class``, …).
        delimiter, encoding: as :func:`plait_vision.tables.read_table`.

    Raises:
        ValueError: the table cannot be read; a column is missing; a row names no image, one that is not there or one that
            an earlier row has; an image has no row.
    """
    images, known = files.images, set(files.names)
    places: dict[str, list[str]] = {}
    for name in images:
        for short in {
            name,
            PurePosixPath(name).with_suffix("").as_posix(),
            PurePosixPath(name).name,
            PurePosixPath(name).stem,
        }:
            places.setdefault(short, []).append(name)
    found: dict[str, dict[str, list[str]]] = {}
    seen: dict[str, int] = {}
    for line, row in read_table(table, delimiter=delimiter, encoding=encoding):
        wanted = composed(_cell(row, file_column, _FILE_COLUMNS, "files", table, line)).removeprefix("./")
        label = composed(_cell(row, label_column, _LABEL_COLUMNS, "labels", table, line))
        candidates = [wanted] if wanted in known else places.get(wanted, [])
        if len(candidates) != 1:
            what = "is not an image of" if not candidates else f"may be {' or '.join(candidates[:3])} in"
            raise ValueError(f"{table}, line {line}: {wanted!r} {what} {files.path}; write its path inside the folder")
        (name,) = candidates
        if name in seen:
            raise ValueError(f"{table}, line {line}: {name} has a label in line {seen[name]} already; keep one")
        seen[name] = line
        found.setdefault(row.get("split", ""), {}).setdefault(label, []).append(name)
    missing = [name for name in images if name not in seen]
    if missing or not seen:
        raise ValueError(
            f"{table} has no row for {len(missing)} of the images in {files.path}: {', '.join(missing[:3])}; add them"
        )
    return found


@attrs.frozen(kw_only=True)
class Sample:
    """What belongs together in a WebDataset tar: all files that are alike up to the first dot of their name.

    Attributes:
        key: that name, with its folder.
        parts: extension in lower case (``jpg``, ``txt``, ``cls``, ``json``) → content.
        where: how messages call it.
    """

    key: str
    parts: Mapping[str, bytes]
    where: str

    @property
    def image(self) -> tuple[str, bytes] | None:
        """Name and content of the image, or None."""
        for extension, content in self.parts.items():
            if f".{extension.rpartition('.')[2]}" in SUFFIXES:
                return f"{self.key}.{extension}", content
        return None

    def text(self, extension: str) -> str | None:
        """The text of a part such as ``txt`` or ``cls``, or None where there is none.

        Raises:
            ValueError: it is not UTF-8.
        """
        content = self.parts.get(extension)
        try:
            return None if content is None else content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.where}.{extension} is not UTF-8 text ({error.reason}); save it as UTF-8"
            ) from error


def tar_samples(path: Path | str) -> Iterator[Sample]:
    """The samples of a WebDataset tar, as a stream.

    Raises:
        ValueError: the tar cannot be read, or a key comes again after others (its files must lie next to one another).
    """
    path = Path(path).expanduser()
    key = ""
    parts: dict[str, bytes] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile() or is_hidden(member.name.removeprefix("./")):
                    continue
                folder, slash, name = composed(member.name).removeprefix("./").rpartition("/")
                stem, _, extension = name.partition(".")
                if folder + slash + stem != key:
                    if parts:
                        yield Sample(key=key, parts=parts, where=f"{path}/{key}")
                    key, parts = folder + slash + stem, {}
                    if key in seen:
                        raise ValueError(f"{path}/{key} is a duplicate, or its files do not lie next to one another")
                    seen.add(key)
                if extension.lower() in parts:
                    raise ValueError(f"{path}/{key}.{extension} is a duplicate; keep one")
                parts[extension.lower()] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a tar: {error}") from error
    if parts:
        yield Sample(key=key, parts=parts, where=f"{path}/{key}")


def tar_shards(path: Path | str) -> dict[str, list[Path]]:
    """Split → WebDataset tars, sorted; empty where there are none.

    ``path`` is a tar, or a folder of tars; their splits are folders between (``train/0000.tar``) or words of their names
    (``pets-train-0000.tar``), and ``""`` where there are none.

    Raises:
        ValueError: some of the tars belong to a split and others to none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return {"": [path]} if path.suffix == ".tar" else {}
    found: dict[str, list[Path]] = {}
    for tar in sorted(path.glob("*.tar")):
        words = [word for word in re.split(r"[-_.]", tar.stem) if _SPLITS.fullmatch(word)]
        found.setdefault(words[0] if words else "", []).append(tar)
    for tar in sorted(path.glob("*/*.tar")) if not found else []:
        found.setdefault(tar.parent.name, []).append(tar)
    if "" in found and len(found) > 1:
        split = next(filter(None, found))
        raise ValueError(
            f"{found[split][0]} is of split {split} and {found[''][0]} of none; rename one, or move it away"
        )
    return found


def _folder_names(folder: Path) -> dict[str, str]:
    def tell(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    found = {}
    seen: set[str] = set()  # links may lead in circles
    for place, folders, names in os.walk(folder, onerror=tell, followlinks=True):
        seen.add(os.path.realpath(place))
        inner = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in folders if not is_hidden(name) and inner[name] not in seen]
        for name in names:
            inside = (Path(place) / name).relative_to(folder).as_posix()
            found[inside] = inside
    return found


def _by_name(stored: Mapping[str, str], path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for own, shown in stored.items():
        name = composed(shown)
        if is_hidden(name):
            continue
        if name in found:
            raise ValueError(f"{path} has a duplicate {name}; remove or rename one")
        found[name] = own
    return found


def _is_wrapper(names: set[str]) -> bool:
    return len(names) == 1 and not _SPLITS.fullmatch(next(iter(names)))


def _cell(row: Mapping[str, str], wanted: str | None, known: Iterable[str], what: str, table: object, line: int) -> str:
    names = [name for name in ([wanted] if wanted else known) if name in row]
    if not names:
        asked = repr(wanted) if wanted else f"of {what} ({', '.join(known)})"
        raise ValueError(f"{table} has no column {asked}; its columns are {', '.join(row)}")
    if not row[names[0]].strip():
        raise ValueError(f"{table}, line {line}: column {names[0]!r} is empty; fill it in or remove the row")
    return row[names[0]].strip()
