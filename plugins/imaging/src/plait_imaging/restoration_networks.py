"""``load-model: residual-cnn`` and ``optimize: restoration-network``; ``restore: torch-model`` runs what they make."""

from __future__ import annotations

import copy
from typing import Any, Literal

import attrs
import plait
import torch
from datasets import Dataset
from plait import Run, hookimpl
from plait.fields import field, in_range

from plait_imaging.images import names, read_batches, sizes, to_float
from plait_imaging.networks import ResidualCNN
from plait_imaging.training import Pair, Settings, train_restorer

_HELD_BYTES = 512 << 20


@attrs.frozen(kw_only=True)
class LoadResidualCNN:
    """A small fresh convolutional network, image → image, also several times as large."""

    gives = "restorer"

    channels: int = field(32, "of the hidden layers", in_range(1))
    num_layers: int = field(6, "3 × 3 convolutions", in_range(2))
    scale: int = field(1, "the result is so many times as high and wide", in_range(1))

    @hookimpl
    def load_model(self, run: Run) -> ResidualCNN:
        """The network, which changes nothing but the size until it is trained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.derived_seed("weights"))
            network: ResidualCNN = plait.build_module(
                ResidualCNN, channels=self.channels, num_layers=self.num_layers, scale=self.scale
            )
        return network.eval()


@attrs.frozen(kw_only=True)
class TrainRestorationNetwork:
    """Plain training of any network from image to image on pairs of ``image`` and ``target``."""

    takes = {"data": "dataset"}
    columns_needed = ("image", "target")

    loss: Literal["l1", "l2"] = field("l1", "mean absolute or mean squared error")
    num_steps: int = field(1000, "of Adam", in_range(1))
    batch_size: int = field(16, "pairs a step, drawn with replacement", in_range(1))
    crop_size: int = field(
        48, "side of a random window of the input, in pixels; smaller images are taken whole", in_range(1)
    )
    flip: bool = field(True, "mirror half of the windows")
    learning_rate: float = field(1e-3, "of Adam, where it starts", in_range(0, low_open=True))
    schedule: Literal["cosine", "constant"] = field("cosine", "of the learning rate; cosine: to 0")
    precision: Literal["fp32", "bf16"] = field("fp32", "of activations; weights and loss stay float32")

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Run) -> torch.nn.Module:
        """A trained copy of the model, every parameter of it."""
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; expected a torch.nn.Module from image to image")
        if not any(parameter.is_floating_point() for parameter in model.parameters()):
            raise ValueError(f"model, a {type(model).__name__}, has no parameters to train")
        _check_pairs(data)
        network = copy.deepcopy(model).to(run.device)

        with run.loop(self, "training", inputs=(model, data)) as loop:
            train_restorer(
                network,
                _Pairs(data),
                len(data),
                Settings(**attrs.asdict(self)),
                seed=run.derived_seed("training"),
                device=run.device,
                checkpoint=loop,
                track=loop.track,
                log=loop.log,
            )
        return network.cpu().eval()


class _Pairs:
    """Pairs of a dataset by their numbers, in [0, 1]; the first ones that are asked for stay decoded in memory."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._held: dict[int, Pair] = {}
        self._room = _HELD_BYTES

    def __call__(self, rows: list[int]) -> list[Pair]:
        missing = sorted(set(rows) - self._held.keys())
        read = dict(zip(missing, self._read(missing), strict=True)) if missing else {}
        for row, pair in read.items():
            size = sum(image.numel() for image in pair)
            if size <= self._room:
                self._held[row] = pair
                self._room -= size
        pairs = {**self._held, **read}
        return [(to_float(image), to_float(target)) for image, target in map(pairs.__getitem__, rows)]

    def _read(self, rows: list[int]) -> list[Pair]:
        chosen = self._data.select(rows)
        images, targets = (
            [image for _, batch in read_batches(chosen, column) for image in batch] for column in ("image", "target")
        )
        return list(zip(images, targets, strict=True))


def _check_pairs(data: Any) -> None:
    if not isinstance(data, Dataset):
        raise ValueError(f"data is a {type(data).__name__}; expected a dataset of pairs (name a split as step.split)")
    for column in ("image", "target"):
        if column not in data.column_names:
            raise ValueError(f"data has no column {column!r}; it has {', '.join(data.column_names) or 'none'}")
    if not len(data):
        raise ValueError("data has no pairs; give at least one")
    scales = set()
    for name, (height, width), (tall, wide) in zip(names(data), sizes(data), sizes(data, "target"), strict=True):
        scale = tall // height
        if (tall, wide) != (height * scale, width * scale) or not scale:
            raise ValueError(
                f"pair {name}: the image is {height}×{width} pixels and its target {tall}×{wide}; targets must be a "
                "whole number of times as large"
            )
        scales.add(scale)
    if len(scales) > 1:
        raise ValueError(f"the targets are {' and '.join(map(str, sorted(scales)))} times as large; give all one scale")
