"""EnsIR from the first step to the last: :func:`ensir`.

Sun, Ren, Liu, Park, Wang, Cao: "EnsIR: An Ensemble Algorithm for Image Restoration via Gaussian Mixture Models",
NeurIPS 2024, arXiv 2410.22959. Where the released code departs from the mathematics, it is followed by default;
:class:`Settings` has both.

M models have restored the same images. ``x_m`` is what model m proposes for a colour sample, ``y`` the truth, both on
0–255; ``b`` is the width of a bin and ``T = ceil(256 / b)``. The numbers are those of this package, wherever a formula
is met in the code. In the paper's words, (1) divides the pixels into ranges, (2) to (6) are the Gaussian mixture model of
a range and its expectation maximisation on the reference set, (7) is the lookup table of the range-wise ensemble weights,
and (8) the ensemble inference.

::

    q_m  = min(⌊x_m / b⌋, T − 1)                                the cell (q_1, …, q_M) of a sample         (1)

    for every group, a cell and a colour channel, with the N samples of the reference that fell there:
    μ_m  = mean x_m,  σ²_m = mean (x_m − μ_m)²                  μ is frozen for good, σ² is a start         (2)
    e_m  = √ mean (x_m − x̄)²,  π = softmax(1 / (1e-10 + e))     x̄ is the average of the models              (3)
    r_nm = softmax_m( log π_m + log N(y_n; μ_m, σ²_m) )         E-step                                      (4)
    R_m  = Σ_n r_nm,  π_m = (R_m + ε) / N,
    σ²_m = Σ_n r_nm (y_n − c_m)² / R_m + ε                      M-step, c_m = Σ_n r_nm y_n / (R_m + ε)      (5)
    until mean_n log Σ_m π_m N(y_n; μ_m, σ²_m) gains less than the tolerance                                (6)
    lut[cell, channel] = π                                      a cell without samples: the one before it   (7)

    fused = Σ_m lut[cell, channel, m] · x_m                     for every sample of the test images         (8)

All groups are fitted at once, from additive statistics: memory is bounded by one image and the number of occupied groups,
whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from plait_ensir.gmm import (
    FAILED,
    FEW,
    FITTED,
    LEVELS,
    Mixture,
    Settings,
    Table,
    agreement_weights,
    as_planes,
    bins,
    cell_index,
    fit_mixtures,
    num_bins,
    to_levels,
)

DEFAULTS = Settings()
_UPDATE_BLOCK = 2**20  # samples
_BATCH = 2**21  # groups × truth values × models per EM batch

Track = Callable[[Any, str], Iterable[Any]]


def _untracked(iterable: Any, description: str) -> Iterable[Any]:
    return iterable  # type: ignore[no-any-return]


def ensir(
    candidates: Iterable[Sequence[Tensor]],
    reference: Iterable[Sequence[Tensor]] | Table,
    models: Sequence[str],
    settings: Settings = DEFAULTS,
    *,
    device: torch.device | str = "cpu",
    track: Track = _untracked,
    on_learned: Callable[[Estimator, Table], None] = lambda estimator, table: None,
    on_fusing: Callable[[Table, list[Tensor]], None] = lambda table, images: None,
) -> Iterator[Tensor]:
    """Learn the weights from the reference, eq. (1) to (7), and fuse the candidates with them, eq. (8).

    Args:
        candidates: the images to fuse: M tensors each, ``[C, H, W]`` or ``[N, C, H, W]``, in the order of ``models``,
            uint8, or float32 or float64 in [0, 1].
        reference: the same models' images of other scenes: M + 1 tensors each, the truth at the end; or a table that
            was learned before.
        models: the names of the M models.
        device: where to compute.
        track: wraps the loops over reference, EM and candidates, with what it is that they do, to show progress.
        on_learned: called once, when the weights are learned.
        on_fusing: called with the images of every candidate that is fused.

    Returns:
        The fused images one after the other, float32 in [0, 1] on the CPU, neither clipped nor rounded. All is learned when
        this function returns.

    Raises:
        ValueError: models, sizes or channels do not fit; NaN, inf or refused values; no reference images.
    """
    settings.check_models(len(models))
    if isinstance(reference, Table):
        table = reference
    else:
        table = learn(reference, models, settings, device=device, track=track, on_learned=on_learned)
    table.check(models, settings.bin_width)
    return _fuse(candidates, table.to(device), device, track, on_fusing)


def learn(
    reference: Iterable[Sequence[Tensor]],
    models: Sequence[str],
    settings: Settings = DEFAULTS,
    *,
    device: torch.device | str = "cpu",
    track: Track = _untracked,
    on_learned: Callable[[Estimator, Table], None] = lambda estimator, table: None,
) -> Table:
    """The first half of :func:`ensir`, with the same arguments: the table of weights."""
    estimator = Estimator(models, settings)
    for *images, target in track(reference, "reference"):
        estimator.update([image.to(device) for image in images], target.to(device))
    table = estimator.finish(lambda batches: track(batches, "EM"))
    on_learned(estimator, table)
    return table


def _fuse(
    candidates: Iterable[Sequence[Tensor]],
    table: Table,
    device: torch.device | str,
    track: Track,
    on_fusing: Callable[[Table, list[Tensor]], None],
) -> Iterator[Tensor]:
    for images in track(candidates, "fusing"):
        images = [image.to(device) for image in images]
        on_fusing(table, images)
        yield table.apply(images).cpu()


class Estimator:
    """Learns a table from reference images that come in any number of portions, in any order: eq. (1) to (7).

    ::

        estimator = Estimator(["swinir", "srformer"])
        for restored, truth in portions:  # restored: one tensor per model
            estimator.update(restored, truth)
        table = estimator.finish()

    Memory: one portion, and about 2 KiB per (cell, channel) that occurs, for a ground truth of 8-bit levels. Ground
    truth between the levels is kept sample by sample.
    """

    def __init__(self, models: Sequence[str], settings: Settings = DEFAULTS) -> None:
        settings.check_models(len(models))
        self.models, self.settings = tuple(models), settings
        self._cells = num_bins(settings.bin_width) ** len(models)
        self._num_images = 0

    def update(self, candidates: Sequence[Tensor], target: Tensor) -> None:
        """Take in reference images.

        Args:
            candidates: one tensor per model, in the order of ``models``, ``[N, C, H, W]`` or ``[C, H, W]``.
            target: ground truth of the same shape. All uint8, or float32 or float64 in [0, 1].

        Raises:
            ValueError: number, shapes or channels do not fit, or there are NaN, inf, values on the 0–255 scale or
                refused ones, or floats of less than 32 bits. Nothing of this portion was taken in then.
        """
        if len(candidates) != len(self.models):
            raise ValueError(f"{len(candidates)} candidates were given for {len(self.models)} models")
        planes = as_planes([*candidates, target], [*self.models, "target"], self.settings.clip_input)
        N, C, P = planes[0].shape
        channels = 1 if self.settings.channels == "shared" else C
        if self._num_images and channels != self._C:
            raise ValueError(f"images with {C} channels follow images with {self._C}; give all of them alike")
        # From here on nothing is refused: a portion is taken in whole or not at all.
        if not self._num_images:
            self._allocate(channels, planes[0].device)
        channel = torch.arange(C, device=planes[0].device).repeat_interleave(P) % self._C
        for n in range(N):
            image = [plane[n].flatten() for plane in planes]
            for start in range(0, C * P, _UPDATE_BLOCK):
                block = slice(start, start + _UPDATE_BLOCK)
                *x, y = (to_levels(samples[block]) for samples in image)
                self._add(x, y, channel[block])
        self._num_images += N

    def finish(self, progress: Callable[[list[Tensor]], Iterable[Tensor]] = iter) -> Table:
        """Fit every cell and return the table; ``update`` may go on afterwards.

        Args:
            progress: wraps the list of EM batches, to show how far the fit is.
        """
        if not self._num_images:
            raise ValueError("there are no reference images; give at least one")
        s, n = self.settings, self._n.double()
        self._mean, self._variance, self._weight = (t.to(getattr(torch, s.dtype), copy=True) for t in self._start(n))
        source = torch.full_like(self._n, FEW, dtype=torch.uint8)
        updates = torch.zeros_like(self._n, dtype=torch.int32)

        self._histograms = _Histograms(*self._entries(), len(n))
        many = (n >= s.min_samples).nonzero().squeeze(1)
        for groups in progress(self._histograms.batches(many, len(self.models))):
            value, count = self._histograms[groups]
            fit = fit_mixtures(  # eq. (4) to (6)
                value.to(self._mean.dtype),
                count.to(self._mean.dtype),
                self._mean[groups],
                self._variance[groups],
                self._weight[groups],
                max_iterations=s.max_iterations,
                tolerance=s.tolerance,
                epsilon=s.epsilon,
                variance_center=s.variance_center,
            )
            self._weight[groups], self._variance[groups] = fit.weight, fit.variance
            updates[groups] = fit.updates
            source[groups] = torch.where(fit.failed, FAILED, FITTED).to(torch.uint8)
        self._source = source
        return self._table(source, updates)

    def _start(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of every model, eq. (2), and the starting weights, eq. (3), of every group, ``[G, M]``."""
        s, M = self.settings, len(self.models)
        offset = self._offset / n
        mean = (_unravel(self._group // self._C, s.bin_width, M) * s.bin_width).T + offset
        variance = (self._offset_squared / n - offset**2).clamp(min=0)
        if s.default_weight is not None:
            start = torch.tensor(s.default_weight, device=n.device).double().expand(len(n), M)
        elif s.initial_weights == "uniform":
            start = torch.full((len(n), M), 1 / M, device=n.device).double()
        else:
            start = agreement_weights(self._distance_squared.T / (n * M**2).unsqueeze(1))
        return mean.T, variance.T, start

    def busiest(self, num_groups: int) -> list[Mixture]:
        """The groups with the most samples among those fitted by the last :meth:`finish`."""
        fitted = (self._source == FITTED).nonzero().squeeze(1)
        chosen = fitted[self._n[fitted].argsort(descending=True, stable=True)[:num_groups]]
        cell = _unravel(self._group[chosen] // self._C, self.settings.bin_width, len(self.models))
        mixtures = []
        for group, bin_tuple in zip(chosen, cell, strict=True):
            value, count = self._histograms[group[None]]
            mixtures.append(
                Mixture(
                    bins=tuple(bin_tuple.tolist()),
                    channel=int(self._group[group] % self._C),
                    value=value[0],
                    count=count[0],
                    mean=self._mean[group],
                    variance=self._variance[group],
                    weight=self._weight[group],
                )
            )
        return mixtures

    def _allocate(self, channels: int, device: torch.device) -> None:
        M = len(self.models)
        self._C = channels
        self._slot_of_group = torch.full((self._cells * channels,), -1, dtype=torch.int32, device=device)
        self._group = torch.zeros(0, dtype=torch.int64, device=device)  # one row per group that occurs
        self._n = torch.zeros(0, dtype=torch.int64, device=device)
        self._truth = torch.zeros(0, LEVELS, dtype=torch.int64, device=device)
        # Sums of whole numbers below 2⁵³, so exact in float64 and free of the order of samples for 8-bit images.
        self._offset, self._offset_squared, self._distance_squared = torch.zeros(3, M, 0, device=device).double()
        self._between_levels: list[tuple[Tensor, Tensor]] = []

    def _add(self, x: list[Tensor], y: Tensor, channel: Tensor) -> None:
        b, M = self.settings.bin_width, len(x)
        slot = self._slots(cell_index(x, b).long() * self._C + channel)
        K = len(self._n)
        self._n += torch.bincount(slot, minlength=K)
        x64 = [levels.double() for levels in x]
        total = torch.stack(x64).sum(dim=0)
        for m, levels in enumerate(x64):
            offset = levels - bins(x[m], b) * b  # from the start of the bin: small numbers, no cancellation
            self._offset[m] += torch.bincount(slot, offset, K)
            self._offset_squared[m] += torch.bincount(slot, offset**2, K)
            self._distance_squared[m] += torch.bincount(slot, (M * levels - total) ** 2, K)
        if y.dtype == torch.uint8 or ((y == y.round()) & (y >= 0) & (y < LEVELS)).all():
            self._truth += torch.bincount(slot * LEVELS + y.long(), minlength=K * LEVELS).view(K, LEVELS)
        else:
            self._between_levels.append((slot.int(), y))

    def _slots(self, group: Tensor) -> Tensor:
        """Row of every sample's group in the statistics; makes room for groups not seen before."""
        slot = self._slot_of_group[group]
        new = torch.unique(group[slot < 0])
        if len(new):
            K = len(self._n)
            self._slot_of_group[new] = torch.arange(K, K + len(new), dtype=torch.int32, device=new.device)
            self._group = torch.cat([self._group, new])
            self._n, self._truth = (_longer(t, len(new), 0) for t in (self._n, self._truth))
            self._offset, self._offset_squared, self._distance_squared = (
                _longer(t, len(new), 1) for t in (self._offset, self._offset_squared, self._distance_squared)
            )
            slot = self._slot_of_group[group]
        return slot.long()

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """The ground truth as (slot, value, count)."""
        slot, value = self._truth.nonzero(as_tuple=True)
        count = self._truth[slot, value]
        for more_slots, more_values in self._between_levels:
            slot = torch.cat([slot, more_slots.long()])
            value = torch.cat([value.double(), more_values.double()])
            count = torch.cat([count, torch.ones_like(more_slots, dtype=torch.int64)])
        return slot, value.double(), count

    def _table(self, source: Tensor, updates: Tensor) -> Table:
        """Eq. (7)."""
        M, groups = len(self.models), self._cells * self._C
        lut = torch.full((groups, M), 1 / M, device=source.device)
        lut[self._group] = self._weight.float()
        if self.settings.empty_cells == "previous":
            # The group filled last before each group, in flat order; −1, hence uniform, before the first one.
            filled = torch.full((groups,), -1, device=source.device)
            filled[self._group] = self._group
            last = filled.cummax(0).values
            lut = torch.where((last >= 0).unsqueeze(1), lut[last.clamp(min=0)], 1 / M)

        def spread(per_slot: Tensor) -> Tensor:
            return torch.zeros(groups, dtype=per_slot.dtype, device=source.device).index_copy_(0, self._group, per_slot)

        return Table(
            lut.view(self._cells, self._C, M),
            *(spread(t).view(self._cells, self._C) for t in (self._n, source, updates)),
            models=self.models,
            settings=self.settings,
            num_images=self._num_images,
        )


def estimate(
    candidates: Sequence[Tensor],
    target: Tensor,
    models: Sequence[str] | None = None,
    settings: Settings = DEFAULTS,
) -> Table:
    """The table of reference images that are all in memory; see :class:`Estimator` for streams and for the arguments.

    Args:
        models: names, by default "0", "1", ….
    """
    estimator = Estimator(models or [str(m) for m in range(len(candidates))], settings)
    estimator.update(candidates, target)
    return estimator.finish()


class _Histograms:
    """The ground truth of every group, ragged: how often which value occurs."""

    def __init__(self, slot: Tensor, value: Tensor, count: Tensor, num_slots: int) -> None:
        order = slot.argsort(stable=True)
        self._value, self._count = value[order], count[order]
        self._length = torch.bincount(slot, minlength=num_slots)
        self._start = self._length.cumsum(0) - self._length

    def __getitem__(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Values and counts, ``[G, V]``, padded at the end with count 0."""
        length = self._length[slots].unsqueeze(1)
        position = torch.arange(int(length.max()), device=slots.device).expand(len(slots), -1)
        entry = (self._start[slots].unsqueeze(1) + position).clamp(max=len(self._value) - 1)
        return self._value[entry], self._count[entry].masked_fill(position >= length, 0)

    def batches(self, slots: Tensor, num_models: int) -> list[Tensor]:
        """Split ``slots`` into batches of similar numbers of values and bounded size."""
        slots = slots[self._length[slots].argsort(descending=True, stable=True)]
        batches = []
        while len(slots):
            size = max(1, _BATCH // (int(self._length[slots[0]]) * num_models))
            batches.append(slots[:size])
            slots = slots[size:]
        return batches


def _unravel(cell: Tensor, bin_width: int, num_models: int) -> Tensor:
    """Bin tuples of flat cells, ``[..., M]``."""
    T = num_bins(bin_width)
    return torch.stack([cell // T ** (num_models - 1 - m) % T for m in range(num_models)], dim=-1)


def _longer(tensor: Tensor, more: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
