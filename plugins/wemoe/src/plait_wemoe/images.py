"""Image columns of datasets as batches of tensors, and any column in shuffled batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from plait_vision import decode
from torch import Tensor

from plait_wemoe.inputs import Inputs, placed
from plait_wemoe.preprocessing import Preprocessing

HELD_BYTES = 256 << 20


class ImageColumn:
    """The ``image`` column of a dataset; every other column, labels first of all, is dropped at once.

    Decoded images are held until they fill :data:`HELD_BYTES`; later ones are decoded whenever they are read.

    Args:
        size: side to which images are resized and cropped; ``None`` takes them as they are.
        preprocessing: what is done to them in place of that.

    Raises:
        ValueError: no image column, or no row; when reading, an image that is not plain 8-bit (see
            :func:`plait_vision.decode`), or images of several sizes.
    """

    def __init__(self, dataset: Any, size: int | None = None, preprocessing: Preprocessing | None = None) -> None:
        if "image" not in dataset.column_names:
            raise ValueError(f"the data has no column 'image'; its columns are {', '.join(dataset.column_names)}")
        if len(dataset) == 0:
            raise ValueError("the data has no sample")
        images = dataset.with_format(None).select_columns("image")
        if isinstance(images.features["image"], datasets.Image):
            images = images.cast_column("image", datasets.Image(decode=False))
        self._images = images
        self.size, self.preprocessing = size, preprocessing
        self._held: dict[int, np.ndarray] = {}
        self._room = HELD_BYTES

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        """Which images these are, and in which size."""
        return f"{self._images._fingerprint} {self.size if self.preprocessing is None else self.preprocessing.name}"

    def read(self, rows: Sequence[int]) -> Tensor:
        """(N, 3, H, W), in [0, 1] where there is no preprocessing."""
        rows = list(rows)
        missing = [row for row in rows if row not in self._held]
        cells = self._images[missing]["image"] if missing else []
        found = {
            row: self._pixels(decode(cell, f"the image in row {row}")) for row, cell in zip(missing, cells, strict=True)
        }
        images = [found[row] if row in found else self._held[row] for row in rows]
        for row, image in found.items():
            if image.nbytes <= self._room:
                self._held[row] = image
                self._room -= image.nbytes
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"images of a batch differ in size: {sorted({image.shape for image in images})}; resize them"
            )
        batch = torch.from_numpy(np.stack(images))
        return batch if self.preprocessing is not None else batch.movedim(-1, 1).float() / 255

    def _pixels(self, image: Image.Image) -> np.ndarray:
        return _pixels(image, self.size) if self.preprocessing is None else self.preprocessing.apply(image).numpy()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Batches one after the other as one."""
        return torch.cat(list(parts))

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The first ``limit`` images (``None``: all) in order."""
        end = len(self) if limit is None else min(limit, len(self))
        for start in range(0, end, batch_size):
            yield self.read(range(start, min(start + batch_size, end)))


class ShuffledBatches:
    """Endless batches of a column: shuffled anew in each epoch, the last short batch used as it is.

    Batch ``step`` depends on the seed and the step alone, so training can go on anywhere.
    """

    def __init__(
        self, column: Any, batch_size: int, seed: int, device: Any = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.column, self.batch_size, self.seed, self.device, self.dtype = column, batch_size, seed, device, dtype
        self.per_epoch = -(-len(column) // batch_size)

    def __getitem__(self, step: int) -> Inputs:
        return placed(self.column.read(self.rows(step)), self.device, self.dtype)

    def in_order(self, batch_size: int = 128) -> Iterator[Inputs]:
        """Every input once, in the order of the data."""
        return (placed(inputs, self.device, self.dtype) for inputs in self.column.batches(batch_size))

    def rows(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * epoch) % 2**63)
        order = torch.randperm(len(self.column), generator=generator)
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()


def _pixels(image: Image.Image, size: int | None) -> np.ndarray:
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image)
