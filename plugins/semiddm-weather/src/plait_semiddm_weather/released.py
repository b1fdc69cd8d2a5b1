"""Checkpoints of the released code (``netG_dict`` in a ``.pth``): its names ↔ ours.

The network is WaveDiff's, a flat list ``all_modules.N`` in the order of use, and ``z_transform``. No file of the authors
was at hand; what is tested is that every tensor of the published network has one name, and that names come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from plait.weights import read_weights
from torch import Tensor, nn

from plait_semiddm_weather.model import WeatherRestorer
from plait_semiddm_weather.networks import Attention, Block, Generator, PyramidStep
from plait_semiddm_weather.settings import PRESETS, Architecture

ENTRY = "netG_dict"
BLOCK = {
    "norm_0.style": "GroupNorm_0.style",
    "conv_0": "Conv_0",
    "time": "Dense_0",
    "norm_1.style": "GroupNorm_1.style",
    "conv_1": "Conv_1",
    "skip": "Conv_2",
    "details": "convH_0",
}
ATTENTION = {"query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "output": "NIN_3"}


def load_released(file: Path | str) -> WeatherRestorer:
    """The published generator, as student and teacher; there is neither discriminator nor scorer in such a file.

    Raises:
        ValueError: as :func:`plait.weights.read_weights`, or its tensors are not those of the published network.
    """
    given = read_weights(file, entry=ENTRY)
    model = WeatherRestorer(Architecture(**PRESETS["paper"][0]))
    own = model.student.state_dict()
    state = {}
    for name, theirs in released_names(model.student).items():
        if theirs not in given:
            raise ValueError(f"{file} has no {theirs}, which the published generator has; is it another network's?")
        tensor = _turned(theirs, given[theirs])
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(given[theirs].shape)} instead of {tuple(own[name].shape)}"
            raise ValueError(
                f"{file} has {theirs} of shape {shapes}; it is of another size than the published generator"
            )
        state[name] = tensor
    model.student.load_state_dict(state)
    model.teacher.load_state_dict(state)
    return model.eval()


def released_state(network: Generator) -> dict[str, Tensor]:
    """The generator's tensors as the released code names and lays them out."""
    own = network.state_dict()
    found = {}
    for name, theirs in released_names(network).items():
        value = own[name]
        found[theirs] = value[:, :, 0, 0].T.contiguous() if theirs.endswith(".W") else value
    return found


def released_names(network: Generator) -> dict[str, str]:
    """Our name → theirs, for every tensor of the generator."""
    found: dict[str, str] = {}
    for number, module in enumerate(_in_order(network)):
        place = next(name for name, one in network.named_modules() if one is module)
        parts = _parts(module)
        for name, _ in module.named_parameters():
            layer, _, kind = name.rpartition(".")
            theirs = parts.get(layer, layer)
            if theirs.startswith("NIN"):
                kind = {"weight": "W", "bias": "b"}[kind]
            found[f"{place}.{name}"] = ".".join(filter(None, ("all_modules", str(number), theirs, kind)))
    for number in range(len(network.mapping.layers)):
        for kind in ("weight", "bias"):
            found[f"mapping.layers.{number}.{kind}"] = f"z_transform.{2 * number + 1}.{kind}"
    return found


def _parts(module: nn.Module) -> dict[str, str]:
    if isinstance(module, Block):
        return BLOCK
    if isinstance(module, Attention):
        return {**ATTENTION, "norm": "GroupNorm_0"}
    return {}


def _in_order(network: Generator) -> Iterator[nn.Module]:
    """The modules as they are used."""
    yield from (network.time_in, network.time_out, network.first)
    for level, (blocks, attentions) in enumerate(zip(network.encoder, network.encoder_attention, strict=True)):
        for block, attention in zip(blocks, attentions, strict=True):
            yield block
            if isinstance(attention, Attention):
                yield attention
        if level < len(network.down):
            yield network.down[level]
            pyramid = network.pyramid[level]
            assert isinstance(pyramid, PyramidStep)
            yield pyramid
    yield from (network.middle_0, network.middle_attention, network.middle_1)
    for place, (blocks, attention) in enumerate(zip(network.decoder, network.decoder_attention, strict=True)):
        yield from blocks
        if isinstance(attention, Attention):
            yield attention
        if place < len(network.up):
            yield network.up[place]
    yield from (network.head_norm, network.head)


def _turned(name: str, tensor: Tensor) -> Tensor:
    """Their 1 × 1 layers of the attention are matrices ``[in, out]``."""
    return tensor.T[:, :, None, None] if name.endswith(".W") and tensor.ndim == 2 else tensor
