"""SPair-71k as it is unpacked (Min et al., 2019), and any data set laid out like it: images, and pairs with marked points.

::

    SPair-71k/JPEGImages/<category>/<image>.jpg
    SPair-71k/PairAnnotation/<split>/<number>-<source>-<target>:<category>.json
    SPair-71k/Layout/<layout>/<split>.txt        one such name a line, without .json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from plait_vision import as_cell

from plait_diffusion.correspondence import Pair

SPLITS = ("trn", "val", "test")
_POINTS = datasets.List(datasets.List(datasets.Value("float32"), length=2))
PAIR_FEATURES = datasets.Features(
    {
        "source": datasets.Value("string"),
        "target": datasets.Value("string"),
        "category": datasets.Value("string"),
        "source_points": _POINTS,
        "target_points": _POINTS,
        "source_size": datasets.List(datasets.Value("int64"), length=2),
        "target_size": datasets.List(datasets.Value("int64"), length=2),
        "source_box": datasets.List(datasets.Value("float32"), length=4),
        "target_box": datasets.List(datasets.Value("float32"), length=4),
    }
)


def read_pairs(
    folder: Path,
    split: str,
    layout: str = "large",
    *,
    pairs_per_category: int | None = None,
    generator: np.random.Generator | None = None,
) -> list[dict[str, Any]]:
    """The pairs of a split in the columns of :data:`PAIR_FEATURES`; images are named ``<category>/<image>``.

    Args:
        pairs_per_category: drawn at random by ``generator``, in the order of the list; None: all.

    Raises:
        ValueError: the list, an annotation or one of its entries is missing or makes no sense; names the file.
    """
    listed = folder / "Layout" / layout / f"{split}.txt"
    if not listed.is_file():
        have = sorted(path.stem for path in listed.parent.glob("*.txt"))
        raise ValueError(
            f"{listed} is missing; {f'there are {chr(44).join(have)}' if have else 'unpack SPair-71k, with its folder Layout, there'}"
        )
    names = listed.read_text(encoding="utf-8").split()
    if not names:
        raise ValueError(f"{listed} is empty; unpack SPair-71k again")
    if pairs_per_category is not None:
        assert generator is not None
        names = _some_of_each(names, pairs_per_category, generator)
    return [_pair(folder / "PairAnnotation" / split / f"{name}.json") for name in names]


def read_images(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The images of pairs as rows with ``image``, ``name`` and ``category``."""
    for name in names:
        place = folder / "JPEGImages" / name
        found = next(
            (file for suffix in (".jpg", ".jpeg", ".png") if (file := place.with_name(place.name + suffix)).is_file()),
            None,
        )
        if found is None:
            raise ValueError(f"{place}.jpg is missing, which pairs name; unpack SPair-71k again")
        yield {"image": as_cell(found)[0], "name": name, "category": name.partition("/")[0]}


def to_pairs(data: Any, where: str) -> list[Pair]:
    """Rows in the columns of :data:`PAIR_FEATURES` as pairs.

    Raises:
        ValueError: columns are missing; there are no pairs.
    """
    needed = [name for name in PAIR_FEATURES if name != "source_box"]
    columns = getattr(data, "column_names", None)
    if columns is None or (missing := [name for name in needed if name not in columns]):
        what = f"lacks {', '.join(missing)}" if columns is not None else f"is a {type(data).__name__}"
        raise ValueError(f"{where} {what}; give pairs as load-data: spair does")
    if not len(data):
        raise ValueError(f"{where} has no pairs")
    return [
        Pair(
            source=row["source"],
            target=row["target"],
            source_points=torch.tensor(row["source_points"], dtype=torch.float32),
            target_points=torch.tensor(row["target_points"], dtype=torch.float32),
            source_size=tuple(row["source_size"]),
            target_size=tuple(row["target_size"]),
            target_box=tuple(row["target_box"]),
            category=row["category"],
        )
        for row in data.with_format(None)
    ]


def _some_of_each(names: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    taken: dict[str, int] = {}
    chosen = set()
    for place in generator.permutation(len(names)).tolist():
        category = names[place].rpartition(":")[2]
        taken[category] = taken.get(category, 0) + 1
        if taken[category] <= count:
            chosen.add(place)
    return [names[place] for place in sorted(chosen)]


def _pair(file: Path) -> dict[str, Any]:
    try:
        facts: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        category = facts["category"]
        row = {
            "source": f"{category}/{Path(facts['src_imname']).stem}",
            "target": f"{category}/{Path(facts['trg_imname']).stem}",
            "category": category,
            "source_points": facts["src_kps"],
            "target_points": facts["trg_kps"],
            "source_size": [facts["src_imsize"][1], facts["src_imsize"][0]],  # there width comes first
            "target_size": [facts["trg_imsize"][1], facts["trg_imsize"][0]],
            "source_box": facts["src_bndbox"],
            "target_box": facts["trg_bndbox"],
        }
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); unpack SPair-71k again") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is not an annotation of a pair ({type(error).__name__}: {error})") from error
    if not row["source_points"] or len(row["source_points"]) != len(row["target_points"]):
        raise ValueError(
            f"{file} marks {len(row['source_points'])} points in the source and {len(row['target_points'])} in the target;"
            " as many, and at least one, are needed"
        )
    return row
