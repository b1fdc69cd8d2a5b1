"""Which nodes, or which classes, are for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Data

MASKS = ("train_mask", "val_mask", "test_mask")
CLASSES = ("train_classes", "val_classes", "test_classes")


def split_per_class(y: Tensor, per_class: int, num_val: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Masks [n]: ``per_class`` labelled nodes of each class, ``num_val`` others to validate, the rest to test.

    Raises:
        ValueError: a class, or what is left over, is too small.
    """
    order = _labelled(y, generator)
    sizes = torch.bincount(y[order])
    small = torch.nonzero((sizes > 0) & (sizes < per_class)).flatten().tolist()
    if small:
        raise ValueError(f"class {small[0]} has {int(sizes[small[0]])} nodes, fewer than per_class = {per_class}")
    train = torch.cat([order[y[order] == c][:per_class] for c in torch.unique(y[order]).tolist()])
    rest = order[~torch.isin(order, train)]
    if num_val >= len(rest):
        raise ValueError(f"num_val is {num_val}, but only {len(rest)} nodes are left beside the labelled ones")
    return _masks(len(y), train, rest[:num_val], rest[num_val:])


def split_by_share(y: Tensor, train: float, val: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Masks [n]: random shares of all labelled nodes, the rest of them to test."""
    order = _labelled(y, generator)
    first, second = round(train * len(order)), round((train + val) * len(order))
    if first < 1 or second >= len(order):
        raise ValueError(f"shares {train} and {val} of {len(order)} nodes leave no node to train or to test")
    return _masks(len(y), order[:first], order[first:second], order[second:])


def count_splits(data: Data) -> int:
    """How many splits the graph's own masks hold: [n] is one, [n, splits] several."""
    missing = [name for name in MASKS if data.get(name) is None]
    if missing:
        raise ValueError(f"the graph has no {missing[0]}; draw a split with per_class or train_share")
    counts = {data[name].shape[1] for name in MASKS if data[name].dim() == 2}
    if len(counts) > 1:
        raise ValueError(f"the graph's masks hold {' and '.join(map(str, sorted(counts)))} splits; they must agree")
    return counts.pop() if counts else 1


def chosen_split(data: Data, number: int) -> tuple[Tensor, ...]:
    """Masks [n] of the graph's own split ``number``, which counts from 0."""
    count = count_splits(data)
    if number >= count:
        raise ValueError(f"number is {number}, but the graph has {count} split{'s' * (count > 1)}, counted from 0")
    return tuple(data[m] if data[m].dim() == 1 else data[m][:, number] for m in MASKS)


def split_classes(y: Tensor, parts: Sequence[int | Sequence[int]], generator: torch.Generator) -> list[Tensor]:
    """Disjoint sets of the classes that have nodes, one a part: those it lists, or so many random others.

    Raises:
        ValueError: a listed class has no nodes or is listed twice, or the classes are too few.
    """
    present, given = torch.unique(y[y >= 0]), listed_classes(parts)
    for c in given:
        if not (present == c).any():
            raise ValueError(f"class {c} is asked for, but no node has it; the graph has {len(present)} classes")
    sizes = [part if isinstance(part, int) else len(part) for part in parts]
    if sum(sizes) > len(present):
        raise ValueError(f"{' + '.join(map(str, sizes))} classes are asked for, but the graph has {len(present)}")
    others = present[~torch.isin(present, torch.tensor(given, dtype=torch.long))]
    drawn = iter(others[torch.randperm(len(others), generator=generator)].tolist())
    return [torch.tensor([next(drawn) for _ in range(p)] if isinstance(p, int) else list(p)) for p in parts]


def listed_classes(parts: Sequence[int | Sequence[int]]) -> list[int]:
    """The classes that are listed in any part; ``ValueError`` where one is listed twice."""
    given = [c for part in parts if not isinstance(part, int) for c in part]
    twice = [c for c in given if given.count(c) > 1]
    if twice:
        raise ValueError(f"class {twice[0]} is listed twice; the parts must be disjoint")
    return given


def _labelled(y: Tensor, generator: torch.Generator) -> Tensor:
    """The nodes with a label (>= 0), in random order."""
    order = torch.randperm(len(y), generator=generator)
    return order[y[order] >= 0]


def _masks(n: int, *parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(n, dtype=torch.bool).index_fill_(0, part, True) for part in parts)
