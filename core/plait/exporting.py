"""A stored result as files that others open: a model folder, a data set, pictures."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

from plait import codecs
from plait.errors import PlaitError, nearest
from plait.optional import require
from plait.run_folder import read_provenance
from plait.store import ARTIFACT, Store


def key_of(run: Path, step: str) -> str:
    """The key of a step of a run, by its name or label.

    Raises:
        PlaitError: there is no such step, or there are several.
    """
    keys = {entry["label"]: entry["key"] for entry in read_provenance(run)["steps"]}
    found = [label for label in keys if step in (label, label.partition("[")[0])]
    if not found:
        names = {name for label in keys for name in (label, label.partition("[")[0])}
        raise PlaitError(f"the run has no step {step!r}{nearest(step, names)}")
    if len(found) > 1:
        raise PlaitError(f"step {step} has {len(found)} results; name one: {', '.join(found[:8])}")
    return str(keys[found[0]])


def export(store: Store, key: str, folder: Path) -> str:
    """Write a stored result into a new folder.

    A model becomes the folder that its ``from_pretrained`` opens; a dataset with images, pictures with a
    ``metadata.csv`` (which ``datasets`` opens as ``imagefolder``), any other what ``load_from_disk`` opens; a mapping
    a folder for each of its parts; everything else the files that it is stored as.

    Returns:
        what was written, in a few words.

    Raises:
        PlaitError: the result is not in the store, or the folder cannot be written.
    """
    if not store.has(key):
        raise PlaitError(f"the result is not in the store {store.root} any more; run the pipeline again")
    if folder.exists() and any(folder.iterdir()):
        raise PlaitError(f"{folder} is not empty; name a new folder")
    try:
        return _export(store.folder(key) / ARTIFACT, folder)
    except OSError as error:
        raise PlaitError(f"{folder} cannot be written: {error.strerror}") from error


def _export(artifact: Path, folder: Path) -> str:
    content = artifact / "content"
    if parts := codecs.parts(artifact):
        made = [f"{name}: {_export(content / place, folder / _file_name(name))}" for name, place in parts.items()]
        return "; ".join(made)
    codec = json.loads((artifact / codecs.CODEC_FILE).read_text(encoding="utf-8"))["codec"]
    if codec == "module":
        _copy(content / "model", folder)
        kind = json.loads((content / "module.json").read_text(encoding="utf-8"))["class"].replace(":", ".")
        return f"a model for {kind}.from_pretrained"
    if codec == "dataset":
        return _export_dataset(codecs.load(artifact), folder)
    _copy(content, folder)
    return f"files of a result of kind {codec}"


def _export_dataset(data: Any, folder: Path) -> str:
    datasets = require("datasets")
    column = next((name for name, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        data.save_to_disk(folder, num_shards=None if len(data) else 1)
        return f"{len(data)} rows for datasets.load_from_disk"
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name, kind in data.features.items() if isinstance(kind, datasets.Value | datasets.ClassLabel)]
    left_out = [name for name in data.column_names if name not in (column, *others)]
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *others])
        for number, row in enumerate(data):
            name = f"{number:06d}.png"
            row[column].save(folder / name)
            writer.writerow([name, *(row[other] for other in others)])
    return f"{len(data)} pictures with metadata.csv" + (f", without {', '.join(left_out)}" if left_out else "")


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for place, names, files in os.walk(folder):  # what is stored is read-only
        for name in (*names, *files):
            path = os.path.join(place, name)
            os.chmod(path, 0o755 if os.path.isdir(path) else 0o644)
    os.chmod(folder, 0o755)


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in name) or "part"
