"""``load-data``: image-text lists, class folders and the toy data."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
from plait import hookimpl
from plait.fields import REQUIRED, field, in_range, path_or_name_field
from plait_vision.columns import is_saved_dataset, read_saved
from plait_vision.files import Files, class_folders, composed
from plait_vision.images import Transparency, check_rules

import plait_clip as clip  # what handles images imports torch: it waits until something is read
from plait_clip import image_text_rows, prompts


@attrs.frozen(kw_only=True)
class _ImageFields:
    """How images are read."""

    transparency: Transparency = field(
        "refuse", "images with transparent pixels: refuse, drop the alpha channel, or the colour [R, G, B] behind them"
    )
    sixteen_bit: Literal["refuse", "scale"] = field(
        "refuse", "16-bit images: refuse them, or scale 0–65535 to 0–255 (colour by the high byte)"
    )
    on_bad_image: Literal["raise", "skip"] = field(
        "raise", "a missing or damaged image: fail with its row number, or leave its row out and count it"
    )

    def __attrs_post_init__(self) -> None:
        check_rules(transparency=self.transparency, sixteen_bit=self.sixteen_bit)

    def _reading(self, run: Any) -> dict[str, Any]:
        """Arguments of :mod:`plait_clip.image_text_datasets`."""
        chosen = {"transparency": self.transparency, "sixteen_bit": self.sixteen_bit}
        return {
            "folder": run.folder / "rows",
            "rules": {name: rule for name, rule in chosen.items() if rule != "refuse"},
            "skip_bad_images": self.on_bad_image == "skip",
        }


@attrs.frozen(kw_only=True)
class ImageText(_ImageFields):
    """Image-caption pairs from a list, a tar, a folder or a Hugging Face dataset."""

    gives = "dataset"

    source: str = path_or_name_field(
        REQUIRED,
        "a .csv, .tsv, .json (also COCO's and Karpathy's), .jsonl or .parquet list, a WebDataset .tar, a folder with "
        "metadata.csv or tars (also one for each split), a saved dataset, or owner/name on the Hugging Face hub",
    )
    split: str | None = field(None, "only this split; default: all that the source has")
    image_root: Path | None = field(None, "folder that the images of a list are relative to; default: the list's own")
    image_column: str | None = field(None, "column of the images; default: found by name")
    caption_column: str | None = field(None, "column of the captions; default: by name")
    label_column: str = field("label", "column of class numbers or names, where there is one")
    id_column: str | None = field(None, "column whose values must all differ")
    delimiter: str | None = field(None, "of a CSV list; default: as its header shows")
    encoding: str | None = field(None, "of a CSV list; default: UTF-8, or by its byte order mark")
    quotes: bool = field(True, 'whether a cell of a CSV list may stand between "; false takes them as they are')
    class_names: tuple[str, ...] | str | None = field(
        None, "class names in the order of the labels: imagenet, or a list; default: as found"
    )
    restval_in_train: bool = field(True, "Karpathy's split restval counts as train, as is usual for COCO")

    def input_files(self) -> Iterator[Path]:
        """The images that a list names; missing ones are for the step to tell, with their row numbers."""
        with contextlib.suppress(ValueError, OSError):
            rows = image_text_rows.read_names(self._path, self._columns, self.image_root, self._table)
            yield from (image for image in rows if image.is_file())

    @property
    def _path(self) -> Path:
        return Path(self.source).expanduser()

    @property
    def _columns(self) -> image_text_rows.ListColumns:
        return image_text_rows.ListColumns(
            image=self.image_column, caption=self.caption_column, label=self.label_column, id=self.id_column
        )

    @property
    def _table(self) -> image_text_rows.TableFormat:
        return image_text_rows.TableFormat(delimiter=self.delimiter, encoding=self.encoding, quotes=self.quotes)

    @hookimpl
    def load_data(self, run: Any) -> datasets.Dataset | dict[str, datasets.Dataset]:
        hub = not self._path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) and not self._path.suffix
        if hub or is_saved_dataset(self._path):
            parts, skipped = self._from_datasets(self._downloaded() if hub else read_saved(self._path), run)
        else:
            parts, skipped = self._from_rows(run)
        if skipped:
            run.warn(f"{skipped} rows without a readable image were left out")
        if self.split is not None:
            if self.split not in parts:
                raise ValueError(f"split is {self.split!r}; the source has {', '.join(map(repr, parts))}")
            return parts[self.split]
        return next(iter(parts.values())) if len(parts) == 1 else parts

    def _from_rows(self, run: Any) -> tuple[dict[str, datasets.Dataset], int]:
        found = image_text_rows.read(self._path, self._columns, self.image_root, self._table)
        rows = run.track(found, "reading images")
        if self.restval_in_train:
            rows = (attrs.evolve(row, split="train") if row.split == "restval" else row for row in rows)
        seen: set[str] = set()
        labels: set[str] = set()
        if self.split is not None:
            rows = image_text_rows.of_split(rows, self.split, seen, labels)
        try:
            return clip.image_text_datasets.from_rows(
                rows, names=self._class_names(), labels=labels, **self._reading(run)
            )
        except ValueError:
            if seen and self.split not in seen:
                have = ", ".join(sorted(filter(None, seen))) or "none, so leave it out"
                raise ValueError(f"split is {self.split!r}; the rows of {self._path} have the splits: {have}") from None
            raise

    def _downloaded(self) -> Any:
        try:
            return datasets.load_dataset(self.source, split=self.split)
        except Exception as error:  # the hub's client raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConnectionError(
                f"source {self.source} is not a file here and cannot be downloaded ({reason})"
            ) from error

    def _from_datasets(self, found: Any, run: Any) -> tuple[dict[str, datasets.Dataset], int]:
        every = dict(found) if isinstance(found, dict) else {self.split or "": found}
        parts = every if self.split is None or self.split not in every else {self.split: every[self.split]}
        columns: dict[str, Any] = {
            "image": self.image_column,
            "caption": self.caption_column,
            "label": self.label_column,
        }
        checked, skipped = {}, 0
        for name, part in parts.items():
            checked[name], missing = clip.image_text_datasets.from_dataset(part, **columns, **self._reading(run))
            skipped += missing
        return clip.image_text_datasets.with_label_names(
            checked, self._class_names(), every, self.label_column
        ), skipped

    def _class_names(self) -> tuple[str, ...] | None:
        return None if self.class_names is None else prompts.class_names(self.class_names)


@attrs.frozen(kw_only=True)
class ClassFolder(_ImageFields):
    """A folder of images for each class, captioned by templates; folders of splits may lie between."""

    gives = "dataset"

    folder: Path = field(REQUIRED, "a folder, zip or tar that holds <class>/<image> or <split>/<class>/<image>")
    templates: tuple[str, ...] | str = field(
        "photo",
        "captions with {} for the class: openai-imagenet, openai-simple, photo, or a list; every image gets all",
    )
    class_names: dict[str, str] = field(
        attrs.Factory(dict), "class folder: its name in captions; default: the folder's name, _ as blank"
    )

    @hookimpl
    def load_data(self, run: Any) -> datasets.Dataset | dict[str, datasets.Dataset]:
        parts, skipped = {}, 0
        with Files(self.folder) as files:
            splits = class_folders(files)
            # One list of classes for all splits, so that a label means the same in each.
            classes = sorted({child for found in splits.values() for child in found})
            chosen = {composed(child): name for child, name in self.class_names.items()}
            unknown = sorted(set(chosen) - set(classes))
            if unknown:
                raise ValueError(f"class_names names {unknown[0]!r}, which is not a class folder of {files.path}")
            names = {child: chosen.get(child, child.replace("_", " ")) for child in classes}
            texts = prompts.templates(self.templates)
            for split, found in splits.items():
                rows = image_text_rows.class_rows(files, found, names, texts)
                rows = run.track(rows, f"reading {split or files.path.name}")
                part, missing = clip.image_text_datasets.from_rows(
                    rows, names=list(names.values()), **self._reading(run)
                )
                parts[split], skipped = part[""], skipped + missing
        if skipped:
            run.warn(f"{skipped} unreadable images were left out")
        return parts.get("", parts)


@attrs.frozen(kw_only=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits with captions; needs no file. Splits: train, test."""

    gives = "dataset"
    columns_made = ("image", "captions", "label")
    splits = ("train", "test")

    num_train: int = field(1400, "digits for training; the others are the test split", in_range(10, 1787))

    @hookimpl
    def load_data(self, run: Any) -> dict[str, datasets.Dataset]:
        images, labels = clip.toy_data.digits()
        parts = zip(("train", "test"), clip.toy_data.digit_split(len(images), self.num_train), strict=True)
        return {
            split: clip.image_text_datasets.from_arrays(
                images[rows], clip.toy_data.digit_captions(labels[rows], seed), labels[rows], clip.toy_data.DIGIT_NAMES
            )
            for seed, (split, rows) in enumerate(parts)
        }


_RANGE = re.compile(r"^(train|test)(?:\[(\d*):(\d*)\])?$")


@attrs.frozen(kw_only=True)
class FashionMnist:
    """Fashion-MNIST with truthful captions (Xiao et al., 2017), from local files."""

    gives = "dataset"
    columns_made = ("image", "captions", "label")

    folder: Path = field(
        REQUIRED,
        "folder of the four idx files, plain or .gz, such as Debian's dataset-fashion-mnist installs, or the folder "
        "that torchvision downloaded to",
    )
    splits: dict[str, str] = field(
        attrs.Factory(
            lambda: {
                "pretrain": "train[0:8000]",
                "suspicious": "train[8000:16000]",
                "clean": "train[20000:24000]",
                "test": "test[0:2000]",
            }
        ),
        "split name: its rows, such as train[0:8000] or test",
    )

    def __attrs_post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits is empty; give at least one, such as {train: 'train[0:8000]'}")
        for name, rows in self.splits.items():
            if not _RANGE.match(rows):
                raise ValueError(f"splits.{name} is {rows!r}; allowed is train or test, or rows such as train[0:8000]")

    @hookimpl
    def load_data(self, run: Any) -> dict[str, datasets.Dataset]:
        parts = clip.toy_data.fashion_mnist(self.folder.expanduser())
        # The captions of the clean split differ from run to run, those of the others are part of the data.
        seeds = {"pretrain": 0, "suspicious": 1, "clean": run.seed}
        found = {}
        for name, wanted in self.splits.items():
            part, start, stop = _RANGE.match(wanted).groups()  # type: ignore[union-attr]
            images, labels = parts[part]
            rows = slice(int(start or 0), int(stop or len(images)))
            if not 0 <= rows.start < rows.stop <= len(images):
                raise ValueError(f"splits.{name} is {wanted!r}, but {part} has rows 0 to {len(images)}")
            images, labels = images[rows], labels[rows]
            captions = clip.toy_data.fashion_captions(images, labels, seeds.get(name, 2))
            found[name] = clip.image_text_datasets.from_arrays(images, captions, labels, clip.toy_data.FASHION_NAMES)
        return found
