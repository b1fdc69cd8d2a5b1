"""``load-data: labelled-images``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from datasets import Dataset, Features, Image, Value
from plait import hookimpl
from plait.fields import REQUIRED, field, in_range

from plait_vision.columns import class_names_in, is_saved_dataset, read_saved, with_class_labels
from plait_vision.files import Files, Sample, class_folders, labels_from_table, tar_samples, tar_shards
from plait_vision.images import as_cell
from plait_vision.rules import ImageRules
from plait_vision.writing import write_rows

_TEXTS = Features({"image": Image(), "label": Value("string"), "name": Value("string")})


@attrs.frozen(kw_only=True)
class LabelledImages(ImageRules):
    """Images with classes: class folders, a table of labels, WebDataset tars, or a saved Hugging Face dataset."""

    gives = "dataset"
    columns_made = ("image", "label", "name")

    source: Path = field(
        REQUIRED,
        "a folder, zip or tar with <class>/<image> or <split>/<class>/<image>; a WebDataset .tar with cls, or a folder "
        "of them; a folder of save_to_disk",
    )
    labels: Path | None = field(
        None, "a .csv or .tsv with a file and its class in each row, for images that do not lie in class folders"
    )
    file_column: str | None = field(None, "column of the files in labels; default: by name")
    label_column: str | None = field(None, "column of the classes in labels or in a saved dataset; default: by name")
    image_column: str = field("image", "column of the images in a saved dataset")
    delimiter: str | None = field(None, "of labels; default: as its header shows")
    encoding: str | None = field(None, "of labels; default: UTF-8, or by its byte order mark")
    class_names: tuple[str, ...] | None = field(
        None, "the classes in the order of their numbers; default: sorted as found"
    )
    split: str | None = field(None, "only this split; default: all that the source has")
    max_per_class: int | None = field(None, "take the first so many images of each class; null takes all", in_range(1))

    def __attrs_post_init__(self) -> None:
        if self.labels is None and (self.file_column or self.delimiter or self.encoding):
            raise ValueError(
                "file_column, delimiter and encoding are of a table of labels; give labels, or leave them out"
            )

    @hookimpl
    def load_data(self, run: Any) -> Dataset | dict[str, Dataset]:
        """A dataset, or split → dataset, with columns ``image``, ``label`` (``ClassLabel``) and ``name``."""
        source = Path(self.source)  # in Python it may be a text
        if is_saved_dataset(source):
            every = {split: self._renamed(part) for split, part in read_saved(source).items()}
            parts = with_class_labels(self._picked(every), names=self.class_names or class_names_in(every))
            # Every image is decoded: a bad one is refused here, by its row, and all decoders read the same from it.
            rows = {split: self._saved_rows(part, split) for split, part in parts.items()}
            return _alone(
                {split: self._written(run, rows[split], part.features, split) for split, part in parts.items()}
            )
        shards = _labelled_shards(source)
        texts, classes = self._from_shards(shards, run) if shards else self._from_files(source, run)
        # Folders have names, tables and shards may have numbers: those of the classes.
        if (shards or self.labels) and all(label.isdigit() for label in classes):
            numbered = {split: part.cast_column("label", Value("int64")) for split, part in texts.items()}
            names = [str(number) for number in range(max(map(int, classes), default=-1) + 1)]
            return _alone(with_class_labels(numbered, names=self.class_names or names))
        return _alone(with_class_labels(texts, names=self.class_names or sorted(classes)))

    def _from_files(self, source: Path, run: Any) -> tuple[dict[str, Dataset], set[str]]:
        """The images of the chosen splits, and the classes of all, so that a label means the same in each."""
        with Files(source) as files:
            if self.labels is None:
                found = class_folders(files)
            else:
                found = labels_from_table(
                    files,
                    self.labels,
                    file_column=self.file_column,
                    label_column=self.label_column,
                    delimiter=self.delimiter,
                    encoding=self.encoding,
                )

            def rows(classes: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
                for label, names in sorted(classes.items()):
                    for name in names[: self.max_per_class]:
                        cell = self._cell(files.read(name), files.label(name))
                        yield {"image": cell, "label": label, "name": name}

            picked = self._picked(found).items()
            written = {split: self._written(run, rows(part), _TEXTS, split) for split, part in picked}
            return written, {label for part in found.values() for label in part}

    def _from_shards(self, shards: dict[str, list[Path]], run: Any) -> tuple[dict[str, Dataset], set[str]]:
        classes: set[str] = set()

        def rows(tars: list[Path]) -> Iterator[dict[str, Any]]:
            taken: dict[str, int] = {}
            for sample in (sample for tar in tars for sample in tar_samples(tar)):
                label = _class_of(sample)
                classes.add(label)
                taken[label] = taken.get(label, 0) + 1
                if self.max_per_class is None or taken[label] <= self.max_per_class:
                    name, content = _image_of(sample)
                    yield {"image": self._cell(content, f"{sample.where} ({name})"), "label": label, "name": name}

        parts = {split: self._written(run, rows(tars), _TEXTS, split) for split, tars in self._picked(shards).items()}
        if self.split is not None and self.class_names is None:  # the others' classes have numbers, too
            others = (tar for split, tars in shards.items() if split != self.split for tar in tars)
            classes |= {label for tar in others for sample in tar_samples(tar) if (label := _label_text(sample))}
        return parts, classes

    def _renamed(self, part: Dataset) -> Dataset:
        for column, ours in ((self.image_column, "image"), (self.label_column or "label", "label")):
            if column not in part.column_names:
                have = ", ".join(part.column_names)
                raise ValueError(f"{self.source} has no column {column!r}; name one of {have} by {ours}_column")
            if column != ours:
                part = part.remove_columns([ours] if ours in part.column_names else []).rename_column(column, ours)
        part = part.select_columns([name for name in ("image", "label", "name") if name in part.column_names])
        if not isinstance(part.features["image"], Image):
            raise ValueError(
                f"column {self.image_column!r} of {self.source} holds {part.features['image']}, not images"
            )
        return part

    def _saved_rows(self, part: Dataset, split: str) -> Iterator[dict[str, Any]]:
        taken: dict[int, int] = {}
        for number, row in enumerate(part.with_format(None).cast_column("image", Image(decode=False))):
            taken[row["label"]] = taken.get(row["label"], 0) + 1
            if self.max_per_class is None or taken[row["label"]] <= self.max_per_class:
                path = (row["image"] or {}).get("path")
                where = f"{self.source}, {split + ', ' if split else ''}row {number}{f' ({path})' if path else ''}"
                yield {**row, "image": self._cell(row["image"], where), "name": str(row.get("name") or path or number)}

    def _cell(self, content: Any, where: str) -> dict[str, Any]:
        return as_cell(content, where, transparency=self.transparency, sixteen_bit=self.sixteen_bit)[0]

    def _written(self, run: Any, rows: Iterable[dict[str, Any]], features: Features, split: str) -> Dataset:
        features = Features({"image": Image(), "label": features["label"], "name": Value("string")})
        return write_rows(run.folder, run.track(rows, f"images {split}".strip()), features)

    def _picked(self, parts: dict[str, Any]) -> dict[str, Any]:
        if self.split is None:
            return parts
        if self.split not in parts:
            have = ", ".join(filter(None, parts)) or "none, so leave it out"
            raise ValueError(f"split is {self.split!r}; {self.source} has {have}")
        return {"": parts[self.split]}


def _alone(parts: dict[str, Dataset]) -> Dataset | dict[str, Dataset]:
    empty = [split for split, part in parts.items() if len(part) == 0]
    if empty or not parts:
        raise ValueError(f"{empty[0] if empty and empty[0] else 'the source'} has no labelled images")
    return parts[""] if list(parts) == [""] else parts


def _labelled_shards(source: Path) -> dict[str, list[Path]]:
    """The WebDataset tars at ``source``, if it is one or a folder of them; a tar of class folders is not."""
    shards = tar_shards(source)
    tars = [tar for several in shards.values() for tar in several]
    first = next(tar_samples(tars[0]), None) if tars else None
    return shards if first is not None and _label_text(first) is not None else {}


def _label_text(sample: Sample) -> str | None:
    if "cls" in sample.parts or "json" not in sample.parts:
        return sample.text("cls")
    try:
        label = json.loads(sample.parts["json"]).get("label")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{sample.where}.json is not a JSON object ({error})") from error
    return None if label is None else str(label)


def _class_of(sample: Sample) -> str:
    label = _label_text(sample)
    if not label:
        raise ValueError(f"{sample.where} has no class: {sample.where}.cls is missing or empty")
    return label


def _image_of(sample: Sample) -> tuple[str, bytes]:
    if sample.image is None:
        raise ValueError(f"{sample.where} has no image but {', '.join(sample.parts)}")
    return sample.image
