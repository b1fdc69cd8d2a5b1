"""Suppress content shift: better diffusion features by off-the-shelf generation techniques.

Meng, Xu, Wang, Yang, Cao, Huang, NeurIPS 2024 (arXiv 2410.06719). In the paper's order: features under a technique (§4), the
Img2Img guideline (§5.1, GATE), the Laplacian score (§5.2, eqs. 1–2), amalgamation (§5.3, eqs. 3–5). :func:`extract` is one
bucket's features; :func:`content_shift` runs the whole: buckets, then their gated fusion.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
import torch.nn.functional as F
from plait_diffusion import Backbone, DenoiserCall, Extractor, expanded
from plait_vision import finite_loss
from torch import Tensor, nn

from plait_content_shift.techniques import Bucket

Granularity = Literal["channel", "scalar"]
Reference = Literal["matched", "plain"]

# --- Features under techniques (§4) ---------------------------------------------------------------------------------------


@torch.no_grad()
def extract(
    extractor: Extractor,
    backbone: Backbone,
    images: Tensor,
    bucket: Bucket,
    *,
    rows: Sequence[int],
    seeds: Sequence[int],
    timestep: float,
    prompts: Sequence[str] | None = None,
    noise: bool = True,
    latents: Tensor | None = None,
) -> list[dict[str, Tensor]]:
    """Features of a batch of images under a bucket's techniques, once for every seed of the noise.

    Draws that share weights stand beside each other in one batch: one pass for all of them, and the image is encoded once.

    Args:
        images: [B, 3, H, W] in [0, 1].
        rows: their numbers; with a seed they decide the noise.
        timestep: nominal.
        prompts: one an image; None: the bucket's, else the extractor's.
        noise: False: the clean image at the smallest timestep (the reference of the score).
        latents: of the images, to skip the encoder.
    """
    texts = prompts if prompts is not None else None if bucket.prompt is None else [bucket.prompt] * len(images)
    begin = bucket.denoise_from if noise and bucket.denoise_from is not None else timestep
    with bucket.weights(backbone) as model:
        calls: list[DenoiserCall] = []
        for seed in seeds:
            known = calls[0].latents if calls else latents
            call = extractor.prepare(
                model, images, rows=rows, seed=seed, prompts=texts, timestep=begin, noise=noise, latents=known
            )
            calls.append(call)
        call = stacked(calls)
        used = bucket if noise else attrs.evolve(bucket, denoise_from=None)
        found = extractor.capture(model, used(model, call, timestep))
    parts = {name: value.chunk(len(seeds)) for name, value in found.items()}
    return [{name: values[number] for name, values in parts.items()} for number in range(len(seeds))]


def stacked(calls: Sequence[DenoiserCall]) -> DenoiserCall:
    """Passes at one timestep as one pass of a larger batch.

    Raises:
        ValueError: they are at different timesteps.
    """
    if len(calls) == 1:
        return calls[0]
    if len({float(call.timestep) for call in calls}) > 1:
        raise ValueError("passes at different timesteps cannot be stacked into one")
    conditions = [{name: expanded(value, len(call.sample)) for name, value in call.condition.items()} for call in calls]
    return attrs.evolve(
        calls[0],
        sample=torch.cat([call.sample for call in calls]),
        images=torch.cat([call.images for call in calls]),
        latents=torch.cat([call.latents for call in calls]),
        noise=torch.cat([call.noise for call in calls]),
        prompts=tuple(prompt for call in calls for prompt in call.prompts),
        rows=tuple(row for call in calls for row in call.rows),
        condition={name: _joined([condition[name] for condition in conditions]) for name in conditions[0]},
    )


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*values, strict=True))
    return torch.cat(list(values)) if isinstance(first, Tensor) and first.ndim else first


# --- The Img2Img guideline (§5.1) ----------------------------------------------------------------------------------------


@torch.no_grad()
def img2img(
    backbone: Backbone,
    images: Tensor,
    bucket: Bucket,
    noise: Tensor,
    *,
    start: int,
    num_steps: int = 20,
    prompts: Sequence[str] | None = None,
    rows: Sequence[int] = (),
    latents: Tensor | None = None,
) -> Tensor:
    """Images noised to timestep ``start`` and drawn again in ``num_steps`` DDIM steps (Euler for flow models).

    Args:
        images: [B, 3, S, S] in [0, 1], at the model's size.
        noise: as the latents.

    Returns:
        [B, 3, S, S] in [0, 1].
    """
    with bucket.weights(backbone) as model:
        if latents is None:
            latents = model.latents(model.moments(images))
        texts = list(prompts) if prompts is not None else [bucket.prompt or ""] * len(images)
        call = DenoiserCall(
            sample=latents,
            timestep=float(start),
            nominal=float(start),
            condition=model.condition(texts if len(set(texts)) > 1 else texts[:1], images.shape[-1]),
            images=images.to(model.device),
            latents=latents,
            noise=noise,
            prompts=tuple(texts),
            rows=tuple(rows) or tuple(range(len(images))),
        )
        shown = bucket.shown(model, call)
        return model.decode(_redrawn(model, bucket, call, shown, start, num_steps))


def _redrawn(
    model: Backbone, bucket: Bucket, call: DenoiserCall, shown: Sequence[Any], start: int, num_steps: int
) -> Tensor:
    config = model.scheduler.config
    times = torch.linspace(start, 0, num_steps + 1).round().tolist()
    if not hasattr(model.scheduler, "alphas_cumprod"):  # flow: x moves along the velocity
        sigmas = [time / config.num_train_timesteps for time in times]
        x = (1 - sigmas[0]) * call.latents + sigmas[0] * call.noise
        for here, there in itertools.pairwise(sigmas):
            at = attrs.evolve(call, sample=x, timestep=here * config.num_train_timesteps)
            x = x + (there - here) * bucket.predicted(model, at, shown)
        return x
    alphas = model.scheduler.alphas_cumprod.to(call.latents.device, torch.float32)
    signal, level = alphas.sqrt(), (1 - alphas).sqrt()
    first = int(times[0])
    x = signal[first] * call.latents + level[first] * call.noise
    for here, there in itertools.pairwise(map(int, times)):
        out = bucket.predicted(model, attrs.evolve(call, sample=x, timestep=float(here)), shown).to(x.dtype)
        out = out[:, : x.shape[1]]
        if config.prediction_type == "v_prediction":
            clean, eps = signal[here] * x - level[here] * out, signal[here] * out + level[here] * x
        else:
            clean, eps = (x - level[here] * out) / signal[here], out
        x = clean if there == 0 else signal[there] * clean + level[there] * eps
    return x


@attrs.frozen
class Verdict:
    """Of the guideline.

    Attributes:
        improvement: mean over images of the reference's squared error less the candidate's.
        low, high: 95 % interval of it, by bootstrap over images.
        closer: share of images on which the candidate is closer.
        accepted: the interval lies above 0.
    """

    improvement: float
    low: float
    high: float
    closer: float

    @property
    def accepted(self) -> bool:
        return self.low > 0


def guideline(reference: Tensor, candidate: Tensor, generator: torch.Generator, *, num_samples: int = 2000) -> Verdict:
    """Whether images drawn with a technique are closer to the input than without (§5.1).

    Args:
        reference, candidate: [N], the error of every image without and with it.
    """
    gain = (reference - candidate).double().cpu()
    drawn = torch.randint(len(gain), (num_samples, len(gain)), generator=generator)
    means = gain[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Verdict(float(gain.mean()), low, high, float((gain > 0).double().mean()))


# --- The Laplacian score (§5.2) ------------------------------------------------------------------------------------------


def contours(features: Tensor) -> Tensor:
    """eq. 1: [B, C, H, W] → [B, H, W], the length over channels of the 5-point Laplacian; reflected borders, fp32."""
    x = features.float()
    if min(x.shape[-2:]) > 1:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    else:  # there is nothing to reflect
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    centre = x[..., 1:-1, 1:-1]
    laplacian = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:] - 4 * centre
    return laplacian.norm(dim=1)


@attrs.define
class Score:
    """eq. 2 over many images: 1 where contours equal the reference's, 0 as bad as the anchor, below 0 worse.

    Attributes:
        reference: ``plain``: features without technique and noise, as the paper reads. ``matched``: features at no noise under
            the same technique as what is scored, each difference as a share of the reference's contours; a technique moves
            features even without noise, which is no content shift.
    """

    reference: Reference = "matched"
    _anchor: float = 0.0
    _scored: float = 0.0
    _count: int = 0

    def add(self, anchor: Tensor, features: Tensor, plain: Tensor, matched: Tensor) -> None:
        """Take in some images, each [B, C, H, W].

        Args:
            anchor: at the noise, without technique.
            features: at the noise, with it.
            plain, matched: without noise, without and with the technique.
        """
        bare, own = contours(plain), contours(matched)
        if self.reference == "plain":
            self._anchor += float(_difference(bare, contours(anchor)).sum())
            self._scored += float(_difference(bare, contours(features)).sum())
        else:
            self._anchor += float((_difference(bare, contours(anchor)) / _mass(bare)).sum())
            self._scored += float((_difference(own, contours(features)) / _mass(own)).sum())
        self._count += len(anchor)

    @property
    def is_defined(self) -> bool:
        """Whether the anchor differs from the reference at all."""
        return self._anchor > 0

    def value(self) -> float:
        """The score; 0 where it is not defined."""
        return (self._anchor - self._scored) / self._anchor if self.is_defined else 0.0


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().sum((1, 2)).double()


def _mass(reference: Tensor) -> Tensor:
    return reference.sum((1, 2)).double().clamp(min=1e-12)


# --- Amalgamation (§5.3) --------------------------------------------------------------------------------------------------


class Assigner(nn.Module):
    """f of eq. 3, shared by the buckets: [B, C, H, W] → logits [B, K], K = C (a weight a channel) or 1 (one a bucket).

    Args:
        spatial: False: rows [B, C] (pixels, pooled features) instead of maps.
    """

    def __init__(self, channels: int, out: int, hidden: int, dropout: float, spatial: bool) -> None:
        super().__init__()
        if spatial:
            self.layers = nn.Sequential(
                nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm2d(hidden), nn.Dropout(dropout),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, out),
            )  # fmt: skip
        else:
            self.layers = nn.Sequential(
                nn.Linear(channels, hidden),
                nn.ReLU(),
                nn.BatchNorm1d(hidden),
                nn.Dropout(dropout),
                nn.Linear(hidden, out),
            )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class Gate(nn.Module):
    """eqs. 3–4: buckets [B, C, H, W] (or [B, C]) → one feature, a softmax over buckets weighing them.

    The weight of a bucket is one number a channel and image (the code) or one an image (the paper). The outputs of several
    assigners stand beside each other, n·C channels; an attention feature is put behind, ungated.

    Args:
        num_assigners: n.
        head: ``conv``: a 3×3 convolution of the result (for rows a linear layer), ``none``: as it is.
    """

    def __init__(
        self,
        channels: int,
        *,
        attention_channels: int = 0,
        num_assigners: int = 1,
        granularity: Granularity = "channel",
        hidden: int = 128,
        dropout: float = 0.5,
        head: Literal["conv", "none"] = "none",
        spatial: bool = True,
    ) -> None:
        super().__init__()
        out = channels if granularity == "channel" else 1
        self.assigners = nn.ModuleList(Assigner(channels, out, hidden, dropout, spatial) for _ in range(num_assigners))
        width = num_assigners * channels + attention_channels
        self.head: nn.Module = nn.Identity()
        if head == "conv":
            self.head = (
                nn.Conv2d(width, width, 3, padding=1, bias=False) if spatial else nn.Linear(width, width, bias=False)
            )
        self.channels, self.out_channels = channels, width

    def weights(self, buckets: Sequence[Tensor]) -> Tensor:
        """eq. 3: [n, b, B, K], not negative, summing to 1 over buckets.

        Raises:
            ValueError: buckets of different shapes, or of other channels than the gate's.
        """
        shapes = {tuple(bucket.shape) for bucket in buckets}
        if len(shapes) != 1 or buckets[0].shape[1] != self.channels:
            raise ValueError(
                f"buckets have shapes {', '.join(str(list(shape)) for shape in sorted(shapes))}; all need {self.channels} channels"
                " and one size, so extract them with one extractor"
            )
        logits = [torch.stack([assigner(bucket) for bucket in buckets]) for assigner in self.assigners]
        return torch.stack(logits).softmax(1)

    def forward(self, buckets: Sequence[Tensor], attention: Tensor | None = None) -> Tensor:
        """eq. 4: [B, n·C (+ C of the attention feature), H, W]."""
        return self.fuse(buckets, self.weights(buckets), attention)

    def fuse(self, buckets: Sequence[Tensor], weights: Tensor, attention: Tensor | None = None) -> Tensor:
        """The buckets under given weights."""
        parts = []
        for of_assigner in weights:
            total = torch.zeros_like(buckets[0])
            for weight, bucket in zip(of_assigner, buckets, strict=True):
                total = total + weight.view(*weight.shape, *(1,) * (bucket.ndim - 2)) * bucket
            parts.append(total)
        return self.head(torch.cat([*parts, *([] if attention is None else [attention])], 1))


def sparsity(weights: Tensor) -> Tensor:
    """[n, b, B, K] → the length of the weights over buckets, in [1/√b, 1], averaged over images, channels and assigners."""
    return weights.norm(dim=1).mean()


def diversity(weights: Tensor) -> Tensor:
    """[n, b, B, K] → Σ_j Σ_{k≠j} ||w^j − w^k|| / 2, averaged over images and channels: how far assigners are apart."""
    total = weights.new_zeros(())
    for j in range(len(weights)):
        for k in range(j):
            total = total + (weights[j] - weights[k]).norm(dim=0).mean()
    return total


def regularised(loss: Tensor, weights: Tensor, sparsity_weight: float, diversity_weight: float) -> Tensor:
    """eq. 5: L − γ1 Σ_j ||w^j|| − (γ2 / 2) Σ_j Σ_{k≠j} ||w^j − w^k||."""
    return loss - sparsity_weight * len(weights) * sparsity(weights) - diversity_weight * diversity(weights)


class SparsityWalk:
    """The released code's search for the strength of the sparsity term: a random walk from 0, accepted by luck or by progress."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.strength = self._accepted = 0.0
        self._best = -math.inf
        self._previous: float | None = None
        self._step = 0

    def loss(self, loss: Tensor, weights: Tensor) -> Tensor:
        """L − s (L / R) R with the fraction held fixed."""
        term = sparsity(weights)
        return loss - self.strength * term * loss.detach() / term.detach()

    def update(self, loss: float) -> None:
        """Call after every step."""
        self._step += 1
        if self._step % 5:
            return
        if self._previous is not None:
            gain = self._previous - loss
            if gain > self._best or self._random.random() < 1 / 20:
                self._accepted, self._best = self.strength, gain
            self._best *= 0.9
            self.strength = max(0.0, self._accepted + self._random.choice((-1e-5, 0.0, 1e-5)))
        self._previous = loss

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        version, numbers, gauss = self._random.getstate()
        own = {name: getattr(self, name) for name in ("strength", "_accepted", "_best", "_previous", "_step")}
        return {**own, "random": [version, list(numbers), gauss]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
        for name, value in state.items():
            if name != "random":
                setattr(self, name, value)


def fit_gate(
    gate: Gate,
    readout: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Sequence[int]], tuple[list[Tensor], Tensor | None]],
    num_rows: int,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    sparsity_weight: float | Literal["walk"] = 0.0,
    diversity_weight: float = 0.0,
    seed: int = 0,
    checkpoint: Any = None,
    checkpoint_every: int = 100,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
    log: Callable[..., None] = lambda **values: None,
) -> None:
    """Train a gate together with a readout of the fused feature, in place.

    Args:
        loss_of: (what the readout gives, numbers of the rows) → loss.
        read: numbers of rows → buckets, and an attention feature or None.
        sparsity_weight: γ1 of eq. 5, or ``walk``, as released.
        checkpoint: lets an interrupted call resume, to the same bits.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [*gate.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    walk = SparsityWalk(seed)
    start = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        gate.load_state_dict(state["gate"])
        readout.load_state_dict(state["readout"])
        optimizer.load_state_dict(state["optimizer"])
        walk.restore(state["walk"])
        start = state["step"]
    gate.train()
    readout.train()
    devices = [parameters[0].device] if parameters[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for step in track(range(start, num_steps)):
            torch.manual_seed(seed * 1_000_003 + step)  # dropout of a resumed run draws the same
            rows = torch.randperm(num_rows)[:batch_size].tolist()
            buckets, attention = read(rows)
            weights = gate.weights(buckets)
            loss = loss_of(readout(gate.fuse(buckets, weights, attention)), torch.tensor(rows))
            if sparsity_weight == "walk":
                total = walk.loss(loss, weights)
            else:
                total = regularised(loss, weights, float(sparsity_weight), diversity_weight)
            value = finite_loss(loss, step)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            walk.update(value)
            log(step=step, loss=value)
            if checkpoint is not None and (step + 1) % checkpoint_every == 0 and step + 1 < num_steps:
                state = {
                    "gate": gate.state_dict(),
                    "readout": readout.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                checkpoint.save({**state, "walk": walk.state(), "step": step + 1})
    gate.eval()
    readout.eval()
    for parameter in parameters:
        parameter.grad = None


# --- The whole -------------------------------------------------------------------------------------------------------------


def content_shift(
    extractor: Extractor,
    backbone: Backbone,
    images: Tensor,
    buckets: Mapping[str, Bucket],
    gate: Gate | None = None,
    *,
    rows: Sequence[int],
    seed: int,
    timestep: float,
    share_noise: bool = False,
    side: int | None = None,
) -> Tensor:
    """From images to the fused feature: every bucket's features, brought to one side, gated.

    Args:
        images: [B, 3, H, W] in [0, 1].
        gate: a trained one; None: the mean of the buckets.
        seed: of the noise; without ``share_noise`` every bucket draws its own.
        side: that activations are brought to, by their nearest cells, and put beside each other; default: the largest.

    Returns:
        [B, C, side, side].
    """
    maps = []
    for number, bucket in enumerate(buckets.values()):
        own = seed if share_noise else seed_of_bucket(seed, number)
        (found,) = extract(extractor, backbone, images, bucket, rows=rows, seeds=[own], timestep=timestep)
        largest = side or max(value.shape[-1] for value in found.values())
        maps.append(torch.cat([F.interpolate(value.float(), (largest, largest)) for value in found.values()], 1))
    return torch.stack(maps).mean(0) if gate is None else gate(maps)


def seed_of_bucket(seed: int, number: int) -> int:
    """The seed of a bucket's noise; that of the first is the seed itself."""
    return (seed + 0x9E3779B97F4A7C15 * number) % 2**63
