"""``transform: select``, ``concat``, ``relabel``, ``caption`` and ``resize``: cutting and joining labelled images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs
from datasets import ClassLabel, Dataset, Image, concatenate_datasets
from PIL.Image import Resampling
from plait import hookimpl
from plait.errors import nearest
from plait.fields import REQUIRED, field, in_range

from plait_vision.columns import with_class_labels, with_classes
from plait_vision.images import decode, encode_png
from plait_vision.kinds import DATA
from plait_vision.writing import write_rows


@attrs.frozen(kw_only=True)
class Select:
    """Some of the rows, and some of the columns, of a dataset or of each of its splits."""

    takes = {"data": DATA}
    gives = "data"

    where: dict[str, Any] = field(
        attrs.Factory(dict), "column: a value, or a list of values, that a row must have; classes by name or number"
    )
    first: int | None = field(None, "take the first so many of these rows", in_range(1))
    draw: int | None = field(None, "take so many of these rows, drawn at random, in their order", in_range(1))
    columns: tuple[str, ...] | None = field(None, "take only these columns")

    def __attrs_post_init__(self) -> None:
        if self.first is not None and self.draw is not None:
            raise ValueError("first and draw are two ways to take fewer rows; give one of them")

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.where, *(self.columns or ())]))

    @property
    def columns_kept(self) -> tuple[str, ...] | None:
        return self.columns

    @hookimpl
    def transform(self, data: Any, run: Any) -> Any:
        """The rows that are left, with the columns that are left."""
        return _over_splits(data, functools.partial(self._selected, run=run), "select")

    def _selected(self, dataset: Dataset, split: str, run: Any) -> Dataset:
        rows = list(range(len(dataset)))
        for column, wanted in self.where.items():
            values = _column(dataset, column)
            allowed = _allowed(dataset, column, wanted)
            rows = [row for row in rows if values[row] in allowed]
        if not rows:
            wanted = ", ".join(f"{column} is {value!r}" for column, value in self.where.items())
            raise ValueError(f"{split or 'the data'} has no row where {wanted}")
        count = self.first or self.draw or len(rows)
        if count > len(rows):
            raise ValueError(
                f"{'first' if self.first else 'draw'} is {count}; {split or 'the data'} has {len(rows)} {'such ' if self.where else ''}rows"
            )
        if self.draw is not None:
            generator = run.numpy_generator(split) if split else run.numpy_generator()
            rows = [rows[place] for place in sorted(generator.choice(len(rows), count, replace=False).tolist())]
        taken = dataset.select(rows[:count])
        if self.columns is None:
            return taken
        for column in self.columns:
            _has_column(dataset, column)
        return taken.select_columns(list(self.columns))


@attrs.frozen(kw_only=True)
class Concat:
    """Several datasets one below the other."""

    takes = {"data": DATA}
    gives = "data"

    origin: str | None = field(None, "a new column with this name says from which dataset a row is")

    @property
    def columns_made(self) -> tuple[str, ...]:
        return () if self.origin is None else (self.origin,)

    @hookimpl
    def transform(self, data: Any, run: Any) -> Dataset:
        """``data`` maps names to datasets with equal columns; classes are joined by name."""
        if not isinstance(data, Mapping) or not data or not all(isinstance(part, Dataset) for part in data.values()):
            raise ValueError("concat takes several datasets by name; give data: {a: …, b: …}")
        parts = dict(data)
        name, first = next(iter(parts.items()))
        for other, part in parts.items():
            if apart := set(part.column_names) ^ set(first.column_names):
                raise ValueError(
                    f"{name} and {other} differ in the columns {', '.join(sorted(apart))}; transform: select takes those that both have"
                )
        for column, feature in first.features.items():
            if isinstance(feature, ClassLabel):
                parts = with_class_labels(parts, column)
        for other, part in parts.items():
            for column, feature in parts[name].features.items():
                if part.features[column] != feature:
                    raise ValueError(f"{column} is {feature} in {name} and {part.features[column]} in {other}")
        if self.origin is not None:
            if self.origin in first.column_names:
                raise ValueError(f"origin is {self.origin!r}, which the data has already; give another name")
            parts = {key: part.add_column(self.origin, [key] * len(part)) for key, part in parts.items()}
        return concatenate_datasets([part.select_columns(parts[name].column_names) for part in parts.values()])


@attrs.frozen(kw_only=True)
class Relabel:
    """Other classes: renamed, joined where several get one name, or left out. Numbers of classes stay.

    A name that the data has already keeps its number, and a new one takes that of the first class that is renamed to it, so that
    the labels mean the same to a classifier of the old classes. Names that no row can have any more stay, too, unless
    ``unused`` says otherwise.
    """

    takes = {"data": DATA}
    gives = "data"

    classes: dict[str, str] = field(REQUIRED, "name of a class now: its new name")
    others: Literal["keep", "drop"] = field("keep", "what becomes of the rows of other classes")
    unused: Literal["keep", "drop"] = field(
        "keep", "names that no row can have any more: keep them, or drop them and number the others anew"
    )
    column: str = field("label", "column with the classes")

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return (self.column,)

    @hookimpl
    def transform(self, data: Any, run: Any) -> Any:
        """The data with a new ``ClassLabel``, the same in all splits."""
        parts = _splits(data, "relabel")
        for part in parts.values():
            _class_names(part, self.column)
        parts = with_class_labels(parts, self.column)
        feature, numbers = self._new(_class_names(next(iter(parts.values())), self.column))
        done = {split: self._relabelled(part, split, feature, numbers) for split, part in parts.items()}
        return done if isinstance(data, Mapping) else done[""]

    def _new(self, names: Sequence[str]) -> tuple[ClassLabel, dict[int, int]]:
        """The classes, and the old number of a class whose rows are kept → its new one."""
        for name in self.classes:
            if name not in names:
                raise ValueError(f"classes names {name!r}{nearest(name, names)}; the data has {', '.join(names)}")
        new = {
            number: self.classes.get(name, name)
            for number, name in enumerate(names)
            if name in self.classes or self.others == "keep"
        }
        known = list(names)
        for number, name in new.items():
            if name in known:
                continue
            if names[number] in new.values():  # this name stays in use
                known.append(name)
            else:
                known[number] = name
        if self.unused == "drop":
            known = list(dict.fromkeys(new.values()))
        return ClassLabel(names=known), {number: known.index(name) for number, name in new.items()}

    def _relabelled(self, dataset: Dataset, split: str, feature: ClassLabel, numbers: Mapping[int, int]) -> Dataset:
        labels = _column(dataset, self.column)
        if not any(label in numbers for label in labels):
            raise ValueError(
                f"{split or 'the data'} has no row of {', '.join(self.classes)}; others: keep takes the rest"
            )
        kept = dataset.select([row for row, label in enumerate(labels) if label in numbers])
        values = [numbers[label] for label in labels if label in numbers]
        return with_classes(kept, self.column, values, feature)


@attrs.frozen(kw_only=True)
class Caption:
    """Writes captions: templates with the name of each row's class, or of another class."""

    takes = {"data": DATA}
    gives = "data"

    templates: tuple[str, ...] = field(("a photo of a {}",), "texts with {} where the name of the class goes")
    shift: int = field(0, "classes that the name is off by, for captions that are wrong; 0: the right one")
    column: str = field("caption", "name of the new column; it takes the place of one that has it")
    label_column: str = field("label", "column with the classes")

    def __attrs_post_init__(self) -> None:
        if not self.templates or any("{}" not in template for template in self.templates):
            raise ValueError("templates are texts with {} in each, and at least one; write 'a photo of a {}'")

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return (self.label_column,)

    @property
    def columns_made(self) -> tuple[str, ...]:
        return (self.column,)

    @hookimpl
    def transform(self, data: Any, run: Any) -> Any:
        """The data with a column of texts, or of lists of texts where there are several templates."""
        return _over_splits(data, self._captioned, "caption")

    def _captioned(self, dataset: Dataset, split: str) -> Dataset:
        names = _class_names(dataset, self.label_column)
        shifted = [names[(number + self.shift) % len(names)] for number in range(len(names))]
        written = [[template.replace("{}", name) for template in self.templates] for name in shifted]
        texts: list[Any] = [texts[0] for texts in written] if len(self.templates) == 1 else written
        kept = dataset.remove_columns([self.column] if self.column in dataset.column_names else [])
        return kept.add_column(self.column, [texts[label] for label in _labels(dataset, self.label_column, split)])


@attrs.frozen(kw_only=True)
class Resize:
    """Images of another size, by Pillow's bicubic interpolation with anti-aliasing."""

    takes = {"data": DATA}
    gives = "data"

    size: int | tuple[int, int] = field(REQUIRED, "height and width in pixels; one number: the shorter side")
    columns: tuple[str, ...] = field(("image",), "columns with images")

    def __attrs_post_init__(self) -> None:
        if min(self.size if isinstance(self.size, tuple) else (self.size,)) < 1:
            raise ValueError(f"size is {self.size}; allowed is 1 or more")

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return self.columns

    @hookimpl
    def transform(self, data: Any, run: Any) -> Any:
        """The data with the images resized, 8-bit PNG."""
        return _over_splits(data, functools.partial(self._resized, run=run), "resize")

    def _resized(self, dataset: Dataset, split: str, run: Any) -> Dataset:
        for column in self.columns:
            _has_column(dataset, column)
            if not isinstance(dataset.features[column], Image):
                raise ValueError(f"column {column!r} holds {dataset.features[column]}, not images")
        raw = dataset.with_format(None)
        for column, feature in dataset.features.items():
            raw = raw.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else raw

        def rows() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(run.track(raw, f"resizing {split}".strip())):
                cells = {column: self._cell(row[column], f"{column} of row {number}") for column in self.columns}
                yield {**row, **cells}

        return write_rows(run.folder, rows(), dataset.features)

    def _cell(self, cell: Any, where: str) -> dict[str, Any]:
        picture = decode(cell, where)
        width, height = picture.size
        if isinstance(self.size, tuple):
            height, width = self.size
        else:
            scale = self.size / min(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        return {"bytes": encode_png(picture.resize((width, height), Resampling.BICUBIC)), "path": None}


def _over_splits(data: Any, function: Callable[[Dataset, str], Dataset], method: str) -> Any:
    done = {split: function(part, split) for split, part in _splits(data, method).items()}
    return done if isinstance(data, Mapping) else done[""]


def _splits(data: Any, method: str) -> dict[str, Dataset]:
    """The splits, none of them empty; of a dataset alone, with the name ``""``."""
    parts = data if isinstance(data, Mapping) else {"": data}
    for split, part in parts.items():
        if not isinstance(part, Dataset):
            raise ValueError(
                f"{method} takes a dataset or its splits; {split or 'the data'} is of type {type(part).__name__}"
            )
        if len(part) == 0:
            raise ValueError(f"{split or 'the data'} has no rows; {method} needs at least one")
    return dict(parts)


def _has_column(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        have = dataset.column_names
        raise ValueError(f"there is no column {column!r}{nearest(column, have)}; the data has {', '.join(have)}")


def _column(dataset: Dataset, column: str) -> list[Any]:
    _has_column(dataset, column)
    values: list[Any] = dataset.with_format(None).select_columns(column)[:][column]
    return values


def _class_names(dataset: Dataset, column: str) -> list[str]:
    _has_column(dataset, column)
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"column {column!r} holds {feature}, not classes with names (ClassLabel)")
    names: list[str] = feature.names
    return names


def _labels(dataset: Dataset, column: str, split: str) -> list[int]:
    """The classes' numbers; a row without a class (missing, −1) is refused."""
    return _column(with_class_labels({split: dataset}, column)[split], column)


def _allowed(dataset: Dataset, column: str, wanted: Any) -> Collection[Any]:
    """The values as the column holds them: a class by its number."""
    values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        return values
    for value in values:
        if isinstance(value, str) and value not in feature.names:
            known = ", ".join(feature.names)
            raise ValueError(f"{column} {value!r} is not a class{nearest(value, feature.names)}; the data has {known}")
    return {feature.str2int(value) if isinstance(value, str) else value for value in values}
