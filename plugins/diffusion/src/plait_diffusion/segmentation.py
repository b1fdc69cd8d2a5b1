"""What pixels are, from the features of few labelled images: an ensemble of small MLPs, or ridge regression.

Baranchuk et al., Label-Efficient Semantic Segmentation with Diffusion Models, ICLR 2022, and ridge regression. Features stay
at their own sides; the row of a pixel is looked up when it is needed, by the four cells around it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from plait_vision import finite_loss
from torch import Tensor, nn

IGNORED = 255
Track = Callable[..., Iterable[Any]]


@attrs.frozen(kw_only=True)
class Settings:
    """Of the ensemble; defaults as published.

    Attributes:
        num_models: networks of the ensemble.
        batch_size: pixels a step.
        num_epochs: most passes over the pixels.
        patience: steps without a new lowest loss of a batch, after which training stops.
        warmup_epochs: passes before which it does not stop.
        min_pixels: of a class in a mask; fewer are ignored in training.
    """

    num_models: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 64
    num_epochs: int = 100
    patience: int = 50
    warmup_epochs: int = 4
    min_pixels: int = 20


class PixelRows:
    """Maps of some images as rows of pixels on a grid of another side.

    Every activation is brought to the largest of their sides by its nearest cell, and from there to ``side`` bilinearly
    (``align_corners=False``), exactly as if both were done for whole maps.
    """

    def __init__(self, maps: Sequence[Tensor], side: int) -> None:
        """``maps``: one [N, C_i, h_i, w_i] an activation, of the same N images."""
        self.num_images = len(maps[0])
        self.side = side
        self.channels = sum(value.shape[1] for value in maps)
        height, width = (max(value.shape[axis] for value in maps) for axis in (2, 3))
        self._y, self._x = _bilinear(side, height), _bilinear(side, width)
        # Channels last: a pixel's row is one piece of memory.
        self._maps = [value.permute(0, 2, 3, 1).contiguous() for value in maps]
        self._nearest = [
            (_nearest(height, value.shape[2]).to(value.device), _nearest(width, value.shape[3]).to(value.device))
            for value in maps
        ]

    def __len__(self) -> int:
        return self.num_images * self.side**2

    def rows(self, pixels: Tensor) -> Tensor:
        """Numbers of pixels, image by image and row-major → [n, C], float32."""
        image, place = pixels // self.side**2, pixels % self.side**2
        y, x = place // self.side, place % self.side
        out: list[Tensor] = []
        for value, (to_y, to_x) in zip(self._maps, self._nearest, strict=True):
            total: Tensor | float = 0.0
            for cells_y, weights_y in self._y:
                for cells_x, weights_x in self._x:
                    corner = value[image, to_y[cells_y.to(y.device)[y]], to_x[cells_x.to(x.device)[x]]].float()
                    total = total + corner * (weights_y.to(y.device)[y] * weights_x.to(x.device)[x])[:, None]
            assert isinstance(total, Tensor)
            out.append(total)
        return torch.cat(out, 1)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All rows in order."""
        device = self._maps[0].device
        for pixels in torch.arange(len(self), device=device).split(batch_size):
            yield self.rows(pixels)


def _bilinear(size: int, cells: int) -> list[tuple[Tensor, Tensor]]:
    """(cell, weight) of the two cells around every one of ``size`` positions."""
    place = ((torch.arange(size, dtype=torch.float32) + 0.5) * (cells / size) - 0.5).clamp(min=0)
    first = place.floor().long().clamp(max=cells - 1)
    weight = place - first
    return [(first, 1 - weight), ((first + 1).clamp(max=cells - 1), weight)]


def _nearest(size: int, cells: int) -> Tensor:
    return (torch.arange(size) * cells) // size


class PixelClassifier(nn.Module):
    """[n, C] → logits [n, K]: two hidden layers with ReLU and batch normalisation; weights N(0, 0.02), biases 0."""

    def __init__(self, channels: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        first, second = (128, 32) if num_classes < 30 else (256, 128)
        self.layers = nn.Sequential(
            nn.utils.skip_init(nn.Linear, channels, first), nn.ReLU(), nn.BatchNorm1d(first),
            nn.utils.skip_init(nn.Linear, first, second), nn.ReLU(), nn.BatchNorm1d(second),
            nn.utils.skip_init(nn.Linear, second, num_classes),
        )  # fmt: skip
        with torch.no_grad():
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 0.02, generator=generator)
                    layer.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


def without_small_regions(masks: Tensor, min_pixels: int) -> Tensor:
    """Masks [N, H, W], with classes of fewer pixels in a mask set to ignored."""
    flat = masks.flatten(1)
    classes = int(flat[flat != IGNORED].max()) + 1 if bool((flat != IGNORED).any()) else 1
    known = flat.clamp(max=classes)
    counts = torch.zeros(len(flat), classes + 1, dtype=torch.long).scatter_add_(1, known, torch.ones_like(known))
    small = counts.gather(1, known) < min_pixels
    return flat.masked_fill(small, IGNORED).view_as(masks)


def train_pixel_classifiers(
    pixels: PixelRows,
    masks: Tensor,
    num_classes: int,
    settings: Settings,
    generator: Callable[[str], torch.Generator],
    *,
    device: torch.device | str = "cpu",
    checkpoint: Any = None,
    track: Track = iter,
) -> list[PixelClassifier]:
    """The ensemble; each network sees pixels in an order of its own.

    Args:
        pixels: of the training images.
        masks: int64 [N, side, side] class numbers, :data:`IGNORED` where there is none.
        generator: name → fresh generator, for weights and order.
        checkpoint: with ``load()`` and ``save(state)``; finished networks are not trained again.

    Raises:
        ValueError: fewer than two pixels have a class.
        FloatingPointError: the loss is not finite.
    """
    labels = without_small_regions(masks, settings.min_pixels).flatten()
    known = (labels != IGNORED).nonzero()[:, 0]
    if len(known) < 2:  # batch normalisation has nothing to go by
        count = "one pixel" if len(known) else "no pixel"
        raise ValueError(f"{count} of the training images has a class; give masks with class numbers below 255")
    labels = labels.to(device)
    models: list[PixelClassifier] = []
    for state in (checkpoint.load() if checkpoint is not None else None) or []:
        model = PixelClassifier(pixels.channels, num_classes, generator("")).to(device)
        model.load_state_dict(state)
        models.append(model.eval())
    for number in track(range(len(models), settings.num_models)):
        order = generator(f"pixels {number}")
        model = PixelClassifier(pixels.channels, num_classes, generator(f"classifier {number}")).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        best, since, step = float("inf"), 0, 0
        for epoch in range(settings.num_epochs):
            for batch in known[torch.randperm(len(known), generator=order)].to(device).split(settings.batch_size):
                if len(batch) < 2:  # batch normalisation has nothing to go by
                    continue
                loss = F.cross_entropy(model(pixels.rows(batch)), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if epoch >= settings.warmup_epochs:
                    value = float(loss.detach())
                    best, since = (value, 0) if value < best else (best, since + 1)
                    if since > settings.patience:
                        break
            finite_loss(loss, step)  # not after every batch, which would wait for the device
            if since > settings.patience:
                break
        models.append(model.eval())
        if checkpoint is not None:
            checkpoint.save([model.state_dict() for model in models])
    return models


@torch.no_grad()
def vote(models: Sequence[nn.Module], rows: Tensor) -> Tensor:
    """[n, C] → [n]: the class that most networks name; of equally many the smallest."""
    named = torch.stack([model(rows).argmax(1) for model in models])
    return torch.mode(named.cpu(), dim=0).values if len(models) > 1 else named[0].cpu()


class Ridge:
    """Ridge regression of one-hot classes on standardised rows, from sums over pixels alone."""

    def __init__(self, channels: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self._gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=device)
        self._right = torch.zeros(channels + 1, num_classes, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Take in [n, C] and their classes [n]."""
        known = labels != IGNORED
        rows = rows[known].double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        self._gram += rows.T @ rows
        self._right += rows.T @ F.one_hot(labels[known], self.num_classes).double()

    def solve(self, strength: float) -> Callable[[Tensor], Tensor]:
        """A function rows [n, C] → classes [n]; ``strength`` is the penalty a pixel, of standardised channels.

        Raises:
            ValueError: nothing was taken in.
        """
        count = float(self._gram[-1, -1])
        if not count:
            raise ValueError("no pixel of the training images has a class; give masks with class numbers below 255")
        mean = self._gram[-1, :-1] / count
        centred = self._gram[:-1, :-1] / count - torch.outer(mean, mean)
        scale = centred.diagonal().clamp(min=1e-12).sqrt()
        offset = self._right[-1] / count
        cross = self._right[:-1] / count - torch.outer(mean, offset)
        identity = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        weights = torch.linalg.solve(centred / torch.outer(scale, scale) + strength * identity, cross / scale[:, None])
        return lambda rows: (((rows.double() - mean) / scale) @ weights + offset).argmax(1).cpu()


@attrs.define
class Confusion:
    """Counts of (true class, predicted class) over all pixels."""

    counts: Tensor

    @classmethod
    def of(cls, num_classes: int) -> Confusion:
        return cls(torch.zeros(num_classes, num_classes, dtype=torch.long))

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Class numbers of the same shape; where the truth is :data:`IGNORED` nothing counts."""
        known = truth != IGNORED
        size = len(self.counts)
        pairs = truth[known].flatten() * size + predicted[known].flatten()
        self.counts += torch.bincount(pairs, minlength=size**2).view(size, size)

    def scores(self) -> dict[str, float]:
        """mIoU over the classes that occur (in truth or prediction), share of right pixels, mean recall; as shares."""
        hits = self.counts.diagonal().double()
        truth, predicted = self.counts.sum(1), self.counts.sum(0)
        union = truth + predicted - hits
        occurs = union > 0
        has_truth = truth > 0
        return {
            "mIoU": float((hits[occurs] / union[occurs]).mean()) if bool(occurs.any()) else 0.0,
            "aAcc": float(hits.sum() / max(1, int(self.counts.sum()))),
            "mAcc": float((hits[has_truth] / truth[has_truth]).mean()) if bool(has_truth.any()) else 0.0,
        }


def mean_and_spread(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Score → mean and sample standard deviation over repeats."""
    return {
        name: (
            statistics.fmean(score[name] for score in scores),
            statistics.stdev(score[name] for score in scores) if len(scores) > 1 else 0.0,
        )
        for name in scores[0]
    }
