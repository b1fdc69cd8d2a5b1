"""Generator and discriminator (sections 2.4 and 2.5): the networks of WaveDiff, conditioned on the degraded image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_semiddm_weather.diffusion import timestep_embedding
from plait_semiddm_weather.wavelets import SubBands

SQRT2 = math.sqrt(2)
ZERO = 1e-10  # the scale of what begins at nearly nothing


def _initialised(layer: nn.Module, scale: float = 1.0, by_outputs: bool = False) -> nn.Module:
    """Uniform weights of variance ``scale / fan``, the average fan or that of the outputs, and no bias."""
    weight = layer.weight
    spatial = weight[0, 0].numel() if weight.ndim > 2 else 1
    fan_in, fan_out = weight.shape[1] * spatial, weight.shape[0] * spatial
    fan = fan_out if by_outputs else (fan_in + fan_out) / 2
    bound = math.sqrt(3 * max(scale, ZERO) / fan)
    nn.init.uniform_(weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _conv3(inputs: int, outputs: int, scale: float = 1.0, groups: int = 1, by_outputs: bool = False) -> nn.Module:
    return _initialised(nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups), scale, by_outputs)


def _conv1(inputs: int, outputs: int, scale: float = 1.0, bias: bool = True, by_outputs: bool = False) -> nn.Module:
    return _initialised(nn.Conv2d(inputs, outputs, 1, bias=bias), scale, by_outputs)


def _linear(inputs: int, outputs: int, by_outputs: bool = False) -> nn.Module:
    return _initialised(nn.Linear(inputs, outputs), by_outputs=by_outputs)


def _group_norm(channels: int, affine: bool) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6, affine=affine)


class Mapping(nn.Module):
    """Latent z → its embedding: ``z / √(mean z² + 1e-8)`` through linear layers with SiLU."""

    def __init__(self, latent_dim: int, embed_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [latent_dim, *[embed_dim] * (num_layers + 1)]
        self.layers = nn.ModuleList(_linear(i, o, by_outputs=True) for i, o in itertools.pairwise(widths))

    def forward(self, latent: Tensor) -> Tensor:
        embedding = latent * (latent.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            embedding = F.silu(layer(embedding))
        return embedding


class AdaptiveNorm(nn.Module):
    """Group norm whose scale and shift come from the latent's embedding (AdaGN)."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels, affine=False)
        self.style = _linear(embed_dim, 2 * channels, by_outputs=True)
        with torch.no_grad():
            self.style.bias[:channels] = 1

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.style(embedding)[:, :, None, None].chunk(2, dim=1)
        return scale * self.norm(x) + shift


class Attention(nn.Module):
    """Every position looks at every other; one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels, affine=True)
        self.query, self.key, self.value = (_conv1(channels, channels, 0.1) for _ in range(3))
        self.output = _conv1(channels, channels, ZERO)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return (x + self.output(attended)) / SQRT2


class Block(nn.Module):
    """A residual block, perhaps with a wavelet transform that halves or doubles the sides.

    Args:
        resample: ``down`` keeps the three detail bands of its branch, ``up`` takes such bands.
        detail_channels: channels of the bands that ``up`` takes.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        time_dim: int,
        embed_dim: int,
        dropout: float,
        resample: Literal["none", "down", "up"] = "none",
        detail_channels: int = 0,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_0 = AdaptiveNorm(inputs, embed_dim)
        self.conv_0 = _conv3(inputs, outputs)
        self.time = _linear(time_dim, outputs)
        self.norm_1 = AdaptiveNorm(outputs, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv_1 = _conv3(outputs, outputs, ZERO)
        changes = inputs != outputs or resample != "none"
        self.skip = _conv1(inputs, outputs) if changes else nn.Identity()
        if resample != "none":
            self.bands = SubBands(order="generator")
        if resample == "up":
            self.details = _conv3(3 * detail_channels, 3 * outputs, groups=3)

    def forward(
        self, x: Tensor, time: Tensor, embedding: Tensor, details: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The result and, of ``down``, the three detail bands side by side."""
        h = self.conv_0(F.silu(self.norm_0(x, embedding)))
        x = self.skip(x)
        kept = None
        if self.resample == "down":
            channels = h.shape[1]
            low, kept = self.bands(h).split([channels, 3 * channels], dim=1)
            h, x = low / 2, self.bands(x)[:, :channels] / 2
        elif self.resample == "up":
            assert details is not None
            high = 2 * self.details(details / 2)
            h, x = (self.bands.inverse(torch.cat([2 * y, high], dim=1)) for y in (h, x))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv_1(self.dropout(F.silu(self.norm_1(h, embedding))))
        return (x + h) / SQRT2, kept


class PyramidStep(nn.Module):
    """The input, halved by a wavelet transform, as a side entrance of the next level."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bands = SubBands(order="generator")
        self.conv = _conv3(4 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bands(x) / 2)


class Generator(nn.Module):
    """``G(x_{t+1}, c, t, z) → ŝ_0``.

    Args:
        in_channels: of ``[x_{t+1}, c]``; 12 where there is only ``c``.
        out_channels: of ``ŝ_0``.
        base_channels: n, a multiple of 4; ``channel_mult`` × n channels in each level.
        attention_levels: levels with attention; the bottleneck has it in any case.
        latent_dim, latent_embed_dim, mapping_layers: of z and its embedding.
        output: ``tanh``, as published, or ``residual``: ``ŝ_0 = c / 2 + …``.

    Raises:
        ValueError: ``base_channels`` is no multiple of 4, an attention level does not exist.
    """

    def __init__(
        self,
        *,
        in_channels: int = 24,
        out_channels: int = 12,
        base_channels: int = 16,
        channel_mult: Sequence[int] = (1, 2),
        layers_per_block: int = 1,
        attention_levels: Sequence[int] = (),
        latent_dim: int = 32,
        latent_embed_dim: int = 64,
        mapping_layers: int = 2,
        output: Literal["tanh", "residual"] = "residual",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if base_channels < 4 or base_channels % 4:
            raise ValueError(f"base_channels is {base_channels}; allowed is a multiple of 4")
        levels = len(channel_mult)
        wrong = [level for level in attention_levels if not 0 <= level < levels]
        if wrong:
            raise ValueError(f"attention_levels names level {wrong[0]}; there are levels 0 to {levels - 1}")
        n = base_channels
        self.base_channels, self.latent_dim, self.output = n, latent_dim, output
        self.multiple_of = 2 ** (levels + 1)
        time_dim = 4 * n
        self.time_in, self.time_out = _linear(n, time_dim), _linear(time_dim, time_dim)
        self.mapping = Mapping(latent_dim, latent_embed_dim, mapping_layers)

        def block(i: int, o: int, resample: Literal["none", "down", "up"] = "none", details: int = 0) -> Block:
            return Block(i, o, time_dim, latent_embed_dim, dropout, resample, details)

        self.first = _conv3(in_channels, n)
        self.encoder, self.encoder_attention = nn.ModuleList(), nn.ModuleList()
        self.down, self.pyramid = nn.ModuleList(), nn.ModuleList()
        skips, channels, pyramid = [n], n, in_channels
        for level, mult in enumerate(channel_mult):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers_per_block):
                blocks.append(block(channels, n * mult))
                channels = n * mult
                attentions.append(Attention(channels) if level in attention_levels else nn.Identity())
                skips.append(channels)
            self.encoder.append(blocks)
            self.encoder_attention.append(attentions)
            if level < levels - 1:
                self.down.append(block(channels, channels, "down"))
                self.pyramid.append(PyramidStep(pyramid, channels))
                pyramid = channels
                skips.append(channels)
        self.bands = SubBands(order="generator")
        self.middle_0, self.middle_attention, self.middle_1 = (
            block(channels, channels),
            Attention(channels),
            block(channels, channels),
        )
        self.decoder, self.decoder_attention, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(levels)):
            blocks = nn.ModuleList()
            for _ in range(layers_per_block + 1):
                blocks.append(block(channels + skips.pop(), n * channel_mult[level]))
                channels = n * channel_mult[level]
            self.decoder.append(blocks)
            self.decoder_attention.append(Attention(channels) if level in attention_levels else nn.Identity())
            if level:
                self.up.append(block(channels, channels, "up", n * channel_mult[level - 1]))
        self.head_norm = _group_norm(channels, affine=True)
        self.head = _conv3(channels, out_channels, ZERO)

    def forward(self, noisy: Tensor | None, condition: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        """Sub-bands ``[B, 12, h, w]`` (or no ``noisy``), ``t [B]``, ``z [B, latent_dim]`` → ``ŝ_0 [B, 12, h, w]``.

        Raises:
            ValueError: h or w is no multiple of ``multiple_of / 2``.
        """
        x = condition if noisy is None else torch.cat([noisy, condition], dim=1)
        if x.shape[-2] % (self.multiple_of // 2) or x.shape[-1] % (self.multiple_of // 2):
            height, width = 2 * x.shape[-2], 2 * x.shape[-1]
            raise ValueError(f"the image is {height}×{width} pixels; sides have to be multiples of {self.multiple_of}")
        time = self.time_out(F.silu(self.time_in(timestep_embedding(t, self.base_channels))))
        embedding = self.mapping(latent)
        pyramid, h = x, self.first(x)
        skips, details = [h], []
        for level, (blocks, attentions) in enumerate(zip(self.encoder, self.encoder_attention, strict=True)):
            for one, attention in zip(blocks, attentions, strict=True):
                h = attention(one(h, time, embedding)[0])
                skips.append(h)
            if level < len(self.down):
                h, kept = self.down[level](h, time, embedding)
                details.append(kept)
                pyramid = h = (self.pyramid[level](pyramid) + h) / SQRT2
                skips.append(h)
        h = self._in_low_band(self.middle_0, h, time, embedding)
        h = self.middle_attention(h)
        h = self.middle_1(h, time, embedding)[0]
        h = self._in_low_band(self.middle_1, h, time, embedding)
        for place, (blocks, attention) in enumerate(zip(self.decoder, self.decoder_attention, strict=True)):
            for one in blocks:
                h = one(torch.cat([h, skips.pop()], dim=1), time, embedding)[0]
            h = attention(h)
            if place < len(self.up):
                h = self.up[place](h, time, embedding, details.pop())[0]
        head = self.head(F.silu(self.head_norm(h)))
        return torch.tanh(head) if self.output == "tanh" else condition / 2 + head

    def _in_low_band(self, block: nn.Module, h: Tensor, time: Tensor, embedding: Tensor) -> Tensor:
        bands = self.bands(h)
        low, high = bands.split([h.shape[1], 3 * h.shape[1]], dim=1)
        return self.bands.inverse(torch.cat([2 * block(low / 2, time, embedding)[0], high], dim=1))


class SmoothDown(nn.Module):
    """Half the sides: every channel by the kernel ``outer([1, 3, 3, 1]) / 64``, stride 2."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(row, row)[None, None] / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])


class DiscriminatorStage(nn.Module):
    """A residual stage of the discriminator."""

    def __init__(self, inputs: int, outputs: int, time_dim: int, down: bool) -> None:
        super().__init__()
        self.conv_0 = _conv3(inputs, outputs, by_outputs=True)
        self.time = _linear(time_dim, outputs, by_outputs=True)
        self.conv_1 = _conv3(outputs, outputs, ZERO, by_outputs=True)
        self.skip = _conv1(inputs, outputs, bias=False, by_outputs=True)
        self.down = SmoothDown() if down else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_0(F.leaky_relu(x, 0.2)) + self.time(time)[:, :, None, None]
        h, x = self.down(F.leaky_relu(h, 0.2)), self.down(x)
        return (self.conv_1(h) + self.skip(x)) / SQRT2


class Discriminator(nn.Module):
    """``D(x_t, t, x_{t+1}) → logit``; as published it does not see the degraded image.

    Args:
        in_channels: 24, or 36 with the degraded image.
        base_channels: n; 2 n, 4 n and 8 n channels.
        num_layers: stages, at least 3; all but the first halve the sides.
        time_embed_dim: of t, even.

    Raises:
        ValueError: fewer than 3 stages.
    """

    def __init__(
        self, *, in_channels: int = 24, base_channels: int = 8, num_layers: int = 4, time_embed_dim: int = 64
    ) -> None:
        super().__init__()
        if num_layers < 3:
            raise ValueError(f"num_layers of the discriminator is {num_layers}; allowed is 3 or more")
        n = base_channels
        self.time_embed_dim = time_embed_dim
        self.time_in, self.time_out = (_linear(time_embed_dim, time_embed_dim, by_outputs=True) for _ in range(2))
        self.first = _conv1(in_channels, 2 * n, by_outputs=True)
        widths = [2 * n, 2 * n, 4 * n, *[8 * n] * (num_layers - 2)]
        self.stages = nn.ModuleList(
            DiscriminatorStage(i, o, time_embed_dim, down=number > 0)
            for number, (i, o) in enumerate(itertools.pairwise(widths))
        )
        self.last = _conv3(8 * n + 1, 8 * n, ZERO, by_outputs=True)
        self.logit = _linear(8 * n, 1, by_outputs=True)

    def forward(self, less: Tensor, t: Tensor, noisier: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B, 12, h, w]`` each → logits ``[B]``.

        Raises:
            ValueError: B is above 4 and no multiple of 4, see :func:`check_batch_size`.
        """
        check_batch_size(len(less))
        time = F.leaky_relu(self.time_in(timestep_embedding(t, self.time_embed_dim)), 0.2)
        time = F.leaky_relu(self.time_out(time), 0.2)
        inputs = [less, noisier] if condition is None else [less, noisier, condition]
        h = self.first(torch.cat(inputs, dim=1))
        for stage in self.stages:
            h = stage(h, time)
        h = F.leaky_relu(self.last(F.leaky_relu(_with_spread(h), 0.2)), 0.2)
        return self.logit(h.sum(dim=(2, 3)))[:, 0]


def check_batch_size(batch_size: int) -> None:
    """The spread over a batch is taken over groups of 4.

    Raises:
        ValueError: the batch cannot be divided into such groups.
    """
    if batch_size < 1 or (batch_size > 4 and batch_size % 4):
        raise ValueError(
            f"batch_size is {batch_size}; the discriminator compares groups of 4: take 1 to 4, or a multiple of 4"
        )


def _with_spread(h: Tensor) -> Tensor:
    """One more channel: how much the images of a group differ (minibatch standard deviation)."""
    batch, channels, height, width = h.shape
    group = min(batch, 4)
    spread = h.view(group, batch // group, channels, height, width).var(dim=0, unbiased=False)
    spread = (spread + 1e-8).sqrt().mean(dim=(1, 2, 3))
    return torch.cat([h, spread.repeat(group)[:, None, None, None].expand(-1, 1, height, width)], dim=1)
