"""``load-data``: image-text lists, class folders and the small beds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
from plait import PlaitError, hookimpl
from plait.fields import doc, in_range, one_of
from plait_vision.columns import is_saved_dataset, read_saved
from plait_vision.files import Files, class_folders, composed
from plait_vision.images import Transparency, check_rules

from plait_clip import image_text_datasets, image_text_rows, prompts, toy_data
from plait_clip.plugin.errors import as_plait_errors

_TRANSPARENCY = doc(
    "images with transparent pixels: refuse, drop the alpha channel, or the colour [R, G, B] behind them"
)
_SIXTEEN_BIT = doc("16-bit images: refuse them, or scale 0–65535 to 0–255 (colour by the high byte)")


def _rules(method: ImageText | ClassFolder) -> dict[str, Any]:
    """How images are decoded; only what is not the default."""
    chosen = {"transparency": method.transparency, "sixteen_bit": method.sixteen_bit}
    with as_plait_errors():
        check_rules(**chosen)
    return {name: rule for name, rule in chosen.items() if rule != "refuse"}


def _bad_image_field() -> Any:
    return attrs.field(
        default="raise",
        validator=one_of("raise", "skip"),
        metadata=doc("a missing or damaged image: fail with its row number, or leave its row out and count it"),
    )


@attrs.frozen(kw_only=True)
class ImageText:
    """Image-caption pairs from a list, a tar, a folder or a Hugging Face dataset."""

    source: str = attrs.field(
        metadata=doc(
            "a .csv, .tsv, .json (also COCO's and Karpathy's), .jsonl or .parquet list, a WebDataset .tar, a folder with "
            "metadata.csv or tars (also one for each split), a saved dataset, or owner/name on the Hugging Face hub"
        )
    )
    split: str | None = attrs.field(default=None, metadata=doc("only this split; default: all that the source has"))
    image_root: Path | None = attrs.field(
        default=None, metadata=doc("folder that the images of a list are relative to; default: the list's own")
    )
    image_column: str | None = attrs.field(default=None, metadata=doc("column of the images; default: found by name"))
    caption_column: str | None = attrs.field(default=None, metadata=doc("column of the captions; default: by name"))
    label_column: str = attrs.field(
        default="label", metadata=doc("column of class numbers or names, where there is one")
    )
    id_column: str | None = attrs.field(default=None, metadata=doc("column whose values must all differ"))
    delimiter: str | None = attrs.field(default=None, metadata=doc("of a CSV list; default: as its header shows"))
    encoding: str | None = attrs.field(
        default=None, metadata=doc("of a CSV list; default: UTF-8, or by its byte order mark")
    )
    quotes: bool = attrs.field(
        default=True, metadata=doc('whether a cell of a CSV list may stand between "; false takes them as they are')
    )
    class_names: tuple[str, ...] | str | None = attrs.field(
        default=None, metadata=doc("class names in the order of the labels: imagenet, or a list; default: as found")
    )
    restval_in_train: bool = attrs.field(
        default=True, metadata=doc("Karpathy's split restval counts as train, as is usual for COCO")
    )
    transparency: Transparency = attrs.field(default="refuse", metadata=_TRANSPARENCY)
    sixteen_bit: Literal["refuse", "scale"] = attrs.field(
        default="refuse", validator=one_of("refuse", "scale"), metadata=_SIXTEEN_BIT
    )
    on_bad_image: Literal["raise", "skip"] = _bad_image_field()

    def __attrs_post_init__(self) -> None:
        _rules(self)

    @hookimpl
    def load_data(self, run: Any) -> datasets.Dataset | dict[str, datasets.Dataset]:
        with as_plait_errors():
            path = Path(self.source).expanduser()
            saved = is_saved_dataset(path)
            hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) and not path.suffix
            parts, skipped = self._datasets(path, bool(hub), run) if saved or hub else self._rows(path, run)
        if skipped:
            run.warn(f"{skipped} rows without a readable image were left out")
        if self.split is not None:
            if self.split not in parts:
                raise PlaitError(f"split is {self.split!r}; the source has {', '.join(map(repr, parts))}")
            return parts[self.split]
        return next(iter(parts.values())) if len(parts) == 1 else parts

    def _rows(self, path: Path, run: Any) -> tuple[dict[str, datasets.Dataset], int]:
        columns = image_text_rows.Columns(
            image=self.image_column, caption=self.caption_column, label=self.label_column, id=self.id_column
        )
        table = image_text_rows.Table(delimiter=self.delimiter, encoding=self.encoding, quotes=self.quotes)
        rows = run.track(image_text_rows.read(path, columns, self.image_root, table), "reading images")
        if self.restval_in_train:
            rows = (attrs.evolve(row, split="train") if row.split == "restval" else row for row in rows)
        seen: set[str] = set()
        if self.split is not None:
            rows = (row for row in rows if seen.add(row.split) or row.split == self.split)
        names = None if self.class_names is None else prompts.class_names(self.class_names)
        skip = self.on_bad_image == "skip"
        try:
            return image_text_datasets.from_rows(
                rows, run.folder / "rows", names=names, rules=_rules(self), skip_bad_images=skip
            )
        except ValueError:
            if seen and self.split not in seen:
                have = ", ".join(sorted(filter(None, seen))) or "none, so leave it out"
                raise PlaitError(f"split is {self.split!r}; the rows of {path} have the splits: {have}") from None
            raise

    def _datasets(self, path: Path, hub: bool, run: Any) -> tuple[dict[str, datasets.Dataset], int]:
        if hub:
            try:
                found = datasets.load_dataset(self.source, split=self.split)
            except Exception as error:  # the hub's client raises many kinds
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise PlaitError(f"source {self.source} is no file here and cannot be downloaded ({reason})") from error
        else:
            found = read_saved(path)
        parts = dict(found) if isinstance(found, dict) else {self.split or "": found}
        if self.split is not None and self.split in parts:
            parts = {self.split: parts[self.split]}
        checked, skipped = {}, 0
        for name, part in parts.items():
            skip = self.on_bad_image == "skip"
            checked[name], missing = image_text_datasets.from_dataset(
                part,
                image=self.image_column,
                caption=self.caption_column,
                label=self.label_column,
                folder=run.folder / "rows",
                rules=_rules(self),
                skip_bad_images=skip,
            )
            skipped += missing
        names = None if self.class_names is None else prompts.class_names(self.class_names)
        return image_text_datasets.with_label_names(checked, names), skipped


@attrs.frozen(kw_only=True)
class ClassFolder:
    """A folder of images for each class, captioned by templates; folders of splits may lie between."""

    folder: Path = attrs.field(
        metadata=doc("a folder, zip or tar that holds <class>/<image> or <split>/<class>/<image>")
    )
    templates: tuple[str, ...] | str = attrs.field(
        default="photo",
        metadata=doc(
            "captions with {} for the class: openai-imagenet, openai-simple, photo, or a list; every image gets all"
        ),
    )
    class_names: dict[str, str] = attrs.field(
        factory=dict, metadata=doc("class folder: its name in captions; default: the folder's name, _ as blank")
    )
    transparency: Transparency = attrs.field(default="refuse", metadata=_TRANSPARENCY)
    sixteen_bit: Literal["refuse", "scale"] = attrs.field(
        default="refuse", validator=one_of("refuse", "scale"), metadata=_SIXTEEN_BIT
    )
    on_bad_image: Literal["raise", "skip"] = _bad_image_field()

    def __attrs_post_init__(self) -> None:
        _rules(self)

    @hookimpl
    def load_data(self, run: Any) -> datasets.Dataset | dict[str, datasets.Dataset]:
        parts, skipped = {}, 0
        with as_plait_errors(), Files(self.folder) as files:
            splits = class_folders(files)
            # One list of classes for all splits, so that a label means the same in each.
            classes = sorted({child for found in splits.values() for child in found})
            chosen = {composed(child): name for child, name in self.class_names.items()}
            unknown = sorted(set(chosen) - set(classes))
            if unknown:
                raise PlaitError(f"class_names names {unknown[0]!r}, which is no class folder of {files.path}")
            names = {child: chosen.get(child, child.replace("_", " ")) for child in classes}
            texts = prompts.templates(self.templates)
            for split, found in splits.items():
                rows = run.track(
                    image_text_rows.class_rows(files, found, names, texts), f"reading {split or files.path.name}"
                )
                part, missing = image_text_datasets.from_rows(
                    rows,
                    run.folder / "rows",
                    names=list(names.values()),
                    rules=_rules(self),
                    skip_bad_images=self.on_bad_image == "skip",
                )
                parts[split], skipped = part[""], skipped + missing
        if skipped:
            run.warn(f"{skipped} unreadable images were left out")
        return parts.get("", parts)


@attrs.frozen(kw_only=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits with captions; needs no file. Splits: train, test."""

    num_train: int = attrs.field(
        default=1400, validator=in_range(10, 1787), metadata=doc("digits for training; the others are the test split")
    )

    @hookimpl
    def load_data(self, run: Any) -> dict[str, datasets.Dataset]:
        images, labels = toy_data.digits()
        parts = zip(("train", "test"), toy_data.digit_split(len(images), self.num_train), strict=True)
        return {
            split: image_text_datasets.from_arrays(
                images[rows], toy_data.digit_captions(labels[rows], seed), labels[rows], toy_data.DIGIT_NAMES
            )
            for seed, (split, rows) in enumerate(parts)
        }


_RANGE = re.compile(r"^(train|test)(?:\[(\d*):(\d*)\])?$")


@attrs.frozen(kw_only=True)
class FashionMnist:
    """Fashion-MNIST with truthful captions (Xiao et al., 2017), from local files."""

    folder: Path = attrs.field(
        metadata=doc(
            "folder of the four idx files, plain or .gz, such as Debian's dataset-fashion-mnist installs, or the folder "
            "that torchvision downloaded to"
        )
    )
    splits: dict[str, str] = attrs.field(
        factory=lambda: {
            "pretrain": "train[0:8000]",
            "suspicious": "train[8000:16000]",
            "clean": "train[20000:24000]",
            "test": "test[0:2000]",
        },
        metadata=doc("split name: its rows, such as train[0:8000] or test"),
    )

    def __attrs_post_init__(self) -> None:
        if not self.splits:
            raise PlaitError("splits is empty; give at least one, such as {train: 'train[0:8000]'}")
        for name, rows in self.splits.items():
            if not _RANGE.match(rows):
                raise PlaitError(f"splits.{name} is {rows!r}; allowed is train or test, or rows such as train[0:8000]")

    @hookimpl
    def load_data(self, run: Any) -> dict[str, datasets.Dataset]:
        with as_plait_errors():
            parts = toy_data.fashion_mnist(self.folder.expanduser())
        # The captions of the clean split differ from run to run, those of the others are part of the bed.
        seeds = {"pretrain": 0, "suspicious": 1, "clean": run.seed}
        found = {}
        for name, wanted in self.splits.items():
            part, start, stop = _RANGE.match(wanted).groups()  # type: ignore[union-attr]
            images, labels = parts[part]
            rows = slice(int(start or 0), int(stop or len(images)))
            if not 0 <= rows.start < rows.stop <= len(images):
                raise PlaitError(f"splits.{name} is {wanted!r}, but {part} has rows 0 to {len(images)}")
            images, labels = images[rows], labels[rows]
            captions = toy_data.fashion_captions(images, labels, seeds.get(name, 2))
            found[name] = image_text_datasets.from_arrays(images, captions, labels, toy_data.FASHION_NAMES)
        return found
