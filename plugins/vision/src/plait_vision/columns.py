"""Hugging Face datasets in the project's columns: saved datasets, class labels, images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np

from plait_vision.kinds import IS_BACKDOOR


def is_saved_dataset(folder: Path | str) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    folder = Path(folder).expanduser()
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def read_saved(folder: Path | str) -> dict[str, datasets.Dataset]:
    """What ``save_to_disk`` wrote: split → dataset; the split is ``""`` where one dataset was saved.

    Raises:
        ValueError: it cannot be read.
    """
    folder = Path(folder).expanduser()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds: a missing file, JSON, Arrow, a feature that this version lacks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} cannot be read as a saved dataset: {reason}") from error
    return dict(found) if isinstance(found, dict) else {"": found}


def with_class_labels(
    parts: Mapping[str, datasets.Dataset], column: str = "label", names: Sequence[str] | None = None
) -> dict[str, datasets.Dataset]:
    """The splits with ``column`` as ``ClassLabel`` with the same names in all; row by row the classes stay what they were.

    Args:
        parts: split → dataset, with class numbers, class names or a ``ClassLabel`` in the column.
        names: the classes in the order of their numbers. Default: a ``ClassLabel``'s own; else the texts that occur,
            sorted; else the numbers up to the highest.

    Raises:
        ValueError: no such column; a row without label (missing, blank, negative) or with one that is not a class; columns
            of several kinds; two classes of one name.
    """
    for split, part in parts.items():
        if column not in part.column_names:
            raise ValueError(f"{split or 'the dataset'} has no column {column!r} but {', '.join(part.column_names)}")
    labels = {split: _labels(part, column, split) for split, part in parts.items()}
    occurring = {label for column_labels in labels.values() for label in column_labels}
    names = list(names or class_names_in(parts, column))
    texts = any(isinstance(label, str) for label in occurring)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"duplicate class name {twice[0]!r}; rename one")
    place: dict[str | int, int] = (
        {name: i for i, name in enumerate(names)} if texts else {i: i for i in range(len(names))}
    )
    outside = sorted(occurring - place.keys(), key=str)
    if outside:
        raise ValueError(
            f"label {outside[0]!r} is not one of the {len(names)} classes; give names that cover all labels"
        )
    feature = datasets.ClassLabel(names=names)
    return {
        split: part
        if part.features[column] == feature
        else with_classes(part, column, [place[label] for label in labels[split]], feature)
        for split, part in parts.items()
    }


def class_names_in(parts: Mapping[str, datasets.Dataset], column: str = "label") -> list[str]:
    """The classes of the splits in the order of their numbers, as :func:`with_class_labels` has them by default.

    Of a split that is read alone, give it the names of all: a class that the split lacks keeps its number then. Rows without
    a class count for nothing.

    Raises:
        ValueError: names in one split and numbers in another.
    """
    occurring: set[str | int] = set()
    for part in parts.values():
        feature = part.features[column]
        values = part.with_format(None).unique(column) if isinstance(feature, datasets.Value) else []
        if isinstance(feature, datasets.ClassLabel):
            values = feature.names
        occurring |= {value for value in values if isinstance(value, (str, int)) and str(value).strip()}
    if not any(isinstance(value, str) for value in occurring):
        return [str(number) for number in range(max(map(int, occurring), default=-1) + 1)]
    if not all(isinstance(value, str) for value in occurring):
        raise ValueError(f"column {column!r} holds names in one split and numbers in another; give the same in all")
    return _own_names(parts, column) or sorted(map(str, occurring))


def _labels(part: datasets.Dataset, column: str, split: str) -> list[str | int]:
    """The labels of a split: names where it has names (also a ``ClassLabel``'s), else numbers from 0."""
    feature = part.features[column]
    known = isinstance(feature, (datasets.ClassLabel, datasets.Value))
    kind = feature.dtype if known else str(feature)
    if not known or not (kind.startswith(("int", "uint")) or kind in ("string", "large_string", "bool")):
        raise ValueError(f"column {column!r} holds {kind}; expected class numbers or names")
    values = part.with_format(None).select_columns(column)[:][column]
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{split + ', ' if split else ''}row {row}: label {value!r} is not a class; leave unlabelled rows out"
            )
    if isinstance(feature, datasets.ClassLabel):
        return [feature.names[value] for value in values]
    return [int(value) if isinstance(value, bool) else value for value in values]


def _own_names(parts: Mapping[str, datasets.Dataset], column: str) -> list[str] | None:
    """The classes of the splits that have a ``ClassLabel``, in its order, those of later splits at the end."""
    names: dict[str, None] = {}
    for part in parts.values():
        if isinstance(part.features[column], datasets.ClassLabel):
            names |= dict.fromkeys(part.features[column].names)
    return list(names) or None


def with_classes(
    part: datasets.Dataset, column: str, numbers: list[int], feature: datasets.ClassLabel
) -> datasets.Dataset:
    """The rows with other classes in a column that they have, in its place."""
    order = part.column_names
    if order == [column]:  # without it there would be no rows
        return datasets.Dataset.from_dict({column: numbers}, features=datasets.Features({column: feature}))
    return part.remove_columns(column).add_column(column, numbers, feature=feature).select_columns(order)


def flags_of(data: datasets.Dataset, column: str = IS_BACKDOOR) -> np.ndarray:
    """``[N]`` bool, a column that marks rows.

    Raises:
        ValueError: it is missing, holds something else than true and false, or a row has no mark.
    """
    if column not in data.column_names:
        raise ValueError(f"column {column!r} is missing; the data have {', '.join(data.column_names)}")
    feature = data.features[column]
    if feature != datasets.Value("bool"):
        kind = feature.dtype if isinstance(feature, (datasets.Value, datasets.ClassLabel)) else feature
        raise ValueError(
            f"column {column!r} holds {kind}, not true and false; make a boolean column of it, such as by "
            f"data.map(lambda row: {{{column!r}: row[{column!r}] == 1}}), or name another"
        )
    marks = data.with_format(None).select_columns(column)[:][column]
    missing = next((row for row, mark in enumerate(marks) if mark is None), None)
    if missing is not None:
        raise ValueError(f"row {missing}: column {column!r} is empty; mark every row with true or false")
    return np.asarray(marks, bool)
