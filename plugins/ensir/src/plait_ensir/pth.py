"""Tables in the authors' file format: a pickled dict from bin starts to weights.

``{(0, 32, 64): [R, G, B], …}``: the key holds the lower ends of the M bins on the 0–255 scale, the value one tensor of
M weights per colour channel; keys come in flat order (the last model's bin runs fastest).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from plait.weights import read_checkpoint

from plait_ensir.gmm import LEVELS, UNKNOWN, Settings, Table, num_bins


def load_pth(path: Path | str, models: Sequence[str]) -> Table:
    """Read a table that the authors' code wrote; the bin width follows from its keys.

    The file says neither which models it is for nor where its weights come from: ``models`` are named here, in its
    order, and every group's source is ``UNKNOWN``.

    Raises:
        ValueError: the file is no such table, or not one of ``len(models)`` models.
    """
    entries = read_checkpoint(path)
    try:
        axes = {len(key) for key in entries}
        starts = sorted({start for key in entries for start in key})
        lut = torch.stack([torch.stack([channel.flatten() for channel in entries[key]]) for key in sorted(entries)])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a table of the authors' code: {error}") from error
    if axes != {len(models)}:
        raise ValueError(f"{path} is a table of {max(axes)} models, and {len(models)} are named: {', '.join(models)}")
    bin_width = starts[1] if len(starts) > 1 else LEVELS
    if sorted(entries) != list(_keys(bin_width, len(models))):
        raise ValueError(f"{path} lacks some cells of a table with bin_width {bin_width}")
    unknown = torch.full(lut.shape[:2], UNKNOWN, dtype=torch.uint8)
    nothing = torch.zeros(lut.shape[:2], dtype=torch.int64)
    settings = Settings(bin_width=bin_width)
    return Table(lut, nothing, unknown, nothing.int(), models=models, settings=settings, num_images=0)


def save_pth(table: Table, path: Path | str) -> None:
    """Write a table as the authors' code reads it; a one-channel table is repeated for R, G and B."""
    lut = table.lut.cpu().expand(-1, 3, -1)
    keys = _keys(table.settings.bin_width, len(table.models))
    torch.save({key: [channel.clone() for channel in cell] for key, cell in zip(keys, lut, strict=True)}, path)


def _keys(bin_width: int, num_models: int) -> itertools.product[tuple[int, ...]]:
    starts = range(0, num_bins(bin_width) * bin_width, bin_width)
    return itertools.product(starts, repeat=num_models)
