"""Which nodes, or which classes, are for training, validation and test."""

from __future__ import annotations

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
    order = torch.randperm(len(y), generator=generator)
    sizes = torch.bincount(y)
    small = torch.nonzero((sizes > 0) & (sizes < per_class)).flatten().tolist()
    if small:
        raise ValueError(f"class {small[0]} has {int(sizes[small[0]])} nodes, fewer than per_class = {per_class}")
    train = torch.cat([order[y[order] == c][:per_class] for c in torch.unique(y).tolist()])
    rest = order[~torch.isin(order, train)]
    if num_val >= len(rest):
        raise ValueError(f"num_val is {num_val}, but only {len(rest)} nodes are left beside the labelled ones")
    return _masks(len(y), train, rest[:num_val], rest[num_val:])


def split_by_share(y: Tensor, train: float, val: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Masks [n]: random shares of all nodes, the rest to test."""
    order = torch.randperm(len(y), generator=generator)
    first, second = round(train * len(y)), round((train + val) * len(y))
    if first < 1 or second >= len(y):
        raise ValueError(f"shares {train} and {val} of {len(y)} nodes leave no node to train or to test")
    return _masks(len(y), order[:first], order[first:second], order[second:])


def chosen_split(data: Data, number: int) -> tuple[Tensor, ...]:
    """Masks [n] of split ``number`` (modulo their count) of masks [n, splits]."""
    missing = [name for name in MASKS if data.get(name) is None]
    if missing:
        raise ValueError(f"the graph has no {missing[0]}; draw a split with per_class or train_share")
    return tuple(data[m] if data[m].dim() == 1 else data[m][:, number % data[m].shape[1]] for m in MASKS)


def split_classes(
    num_classes: int, sizes: tuple[int, int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Disjoint random sets of classes for training, validation and test."""
    if sum(sizes) > num_classes:
        raise ValueError(f"{' + '.join(map(str, sizes))} classes are asked for, but the graph has {num_classes}")
    order = torch.randperm(num_classes, generator=generator)
    train, val, test, _ = order.split([*sizes, num_classes - sum(sizes)])
    return train, val, test


def _masks(n: int, *parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(n, dtype=torch.bool).index_fill_(0, part, True) for part in parts)
