"""Which modules of a model are up-scaled, and how: configuration, blocks, the layout of their inputs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait_wemoe.ensembling import COMPUTE, STORAGE
from plait_wemoe.inputs import Inputs, call
from plait_wemoe.states import State

_BLOCK = r"(?P<block>(?:.*\.)?(?:layers|resblocks|blocks|layer|block|h|albert_layers)\.(?:encoder_layer_)?\d+(?:\.layer\.\d+)?)\."
# Module names of known families: CLIP, ViT (transformers, timm, open_clip, torchvision), T5, BERT and its like, Llama. Modules with the same
# ``block`` share coefficients; the router reads what enters the first of them.
PATTERNS = {
    "mlp": _BLOCK + r"(?:mlp|ffn|ffn_output|feed_forward|DenseReluDense|intermediate\.dense|output\.dense)",
    "attention": _BLOCK + r"(?:self_attn|attn|attention|SelfAttention)",
}
GRANULARITY = ("tensor", "block", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscaleConfig:
    """How a mixture is built; names and defaults as in the published configurations.

    Attributes:
        init_lambda: λ of the static merge and of the routers' first coefficients.
        upscale: which modules get routed weights, names of :data:`PATTERNS`.
        pattern: regular expression for the full names of the modules to up-scale, in place of ``upscale``;
            a group named ``block`` ties modules to one router reading.
        router_depth, router_hidden_size, router_init_std: see :class:`~plait_wemoe.routing.Router`.
        shared_router: one router for all blocks.
        position_encoding: give the block's number to the router, in ``position_encoding_dim`` values.
        prune_ratio: share of the entries of a task vector to drop; ``None`` keeps all.
        prune_granularity: one threshold per expert and ``tensor``, ``block`` or ``model``.
        delta_storage: ``auto`` is sparse from a prune ratio of 0.5 on, else dense.
        merge_dtype: in which task vectors are taken and weights are merged, ``float32`` or ``float64``.
        compute, group_radius: see :mod:`~plait_wemoe.ensembling`.
    """

    init_lambda: float = 0.3
    upscale: tuple[str, ...] = ("mlp",)
    pattern: str | None = None
    router_depth: int = 2
    router_hidden_size: int | None = None
    router_init_std: float = 0.01
    shared_router: bool = False
    position_encoding: bool = False
    position_encoding_dim: int = 8
    prune_ratio: float | None = None
    prune_granularity: str = "tensor"
    delta_storage: str = "auto"
    delta_rank: int | None = None
    merge_dtype: str = "float32"
    compute: str = "auto"
    group_radius: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("prune_granularity", GRANULARITY),
            ("delta_storage", ("auto", *STORAGE)),
            ("merge_dtype", ("float32", "float64")),
            ("compute", COMPUTE),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is one of {', '.join(allowed)}")
        if self.prune_ratio is not None and not 0 <= self.prune_ratio <= 1:
            raise ValueError(f"prune_ratio is {self.prune_ratio}; allowed is [0, 1], or none to prune nothing")
        if self.router_depth not in (0, 1, 2):
            raise ValueError(f"router_depth is {self.router_depth}; allowed is 0, 1 or 2")
        if not self.upscale or not set(self.upscale) <= set(PATTERNS):
            raise ValueError(f"upscale is {list(self.upscale)}; allowed is a list of {', '.join(PATTERNS)}")
        if self.position_encoding and self.position_encoding_dim % 2:
            raise ValueError(f"position_encoding_dim is {self.position_encoding_dim}; allowed is an even number")
        if self.delta_storage == "lowrank" and (self.delta_rank is None or self.delta_rank < 1):
            raise ValueError(f"delta_rank is {self.delta_rank}; low-rank storage needs a whole number from 1 on")
        if self.compute == "group" and self.group_radius < 0:
            raise ValueError(f"group_radius is {self.group_radius}; allowed is a number from 0 on")

    @property
    def storage(self) -> str:
        """The storage that ``auto`` stands for: sparse entries cost twice a dense one."""
        if self.delta_storage != "auto":
            return self.delta_storage
        return "sparse" if self.prune_ratio is not None and self.prune_ratio >= 0.5 else "dense"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.merge_dtype)


@dataclasses.dataclass(frozen=True)
class Block:
    """Modules that share one reading of a router: their names, the input's width and its samples' axis."""

    modules: tuple[str, ...]
    width: int
    batch_axis: int


def find_blocks(model: nn.Module, example: Inputs, config: UpscaleConfig) -> list[Block]:
    """The blocks to up-scale, in the order of the model, those off the way of ``model(example)`` left out.

    Modules that the model uses in several places are one block, which reads its input anew in each of them. The samples' axis of a block is the one that grows when the model is given three samples, not two.
    """
    patterns = [config.pattern] if config.pattern else [PATTERNS[part] for part in config.upscale]
    members: dict[str, list[str]] = {}
    for name, _ in model.named_modules(remove_duplicate=False):
        for pattern in patterns:
            if found := re.fullmatch(pattern, name):
                key = found.groupdict().get("block", name)
                members.setdefault(f"{key} {pattern}", []).append(name)
    objects = {key: tuple(id(model.get_submodule(name)) for name in names) for key, names in members.items()}
    members = {
        key: names for key, names in members.items() if key == next(k for k in objects if objects[k] == objects[key])
    }
    shapes = {count: _input_shapes(model, example, [names[0] for names in members.values()], count) for count in (2, 3)}
    blocks = []
    for names in members.values():
        two, three = (shapes[count].get(names[0]) for count in (2, 3))
        if two is None or three is None:
            continue
        grows = [axis for axis, sizes in enumerate(zip(two, three, strict=True)) if sizes[0] != sizes[1]]
        if len(grows) != 1 or (two[grows[0]], three[grows[0]]) != (2, 3):
            raise ValueError(f"{names[0]} gets inputs {two} for 2 samples and {three} for 3: no axis counts samples")
        blocks.append(Block(tuple(names), two[-1], grows[0]))
    if not blocks:
        candidates = [
            name
            for name, module in model.named_modules()
            if name and sum(_is_linear(m) for m in module.children()) >= 2
        ]
        raise ValueError(
            f"no module on the way of the input matches {' or '.join(patterns)}; modules with two or more linear layers: "
            f"{', '.join(candidates[:12]) or 'none'}"
        )
    widths = sorted({block.width for block in blocks})
    if config.shared_router and len(widths) > 1:
        raise ValueError(f"a shared router needs blocks of one width; these are {widths} wide: set shared_router false")
    return blocks


def _input_shapes(model: nn.Module, example: Inputs, names: Sequence[str], count: int) -> dict[str, torch.Size]:
    """Shapes of what enters the named modules when the model is given ``count`` samples."""
    shapes: dict[str, torch.Size] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shapes[name] = first_tensor(args, kwargs).shape

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in names]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            call(model, repeated(example, count))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return shapes


def repeated(example: Inputs, count: int) -> Inputs:
    if isinstance(example, Tensor):
        return example[:1].repeat(count, *[1] * (example.dim() - 1))
    return {name: repeated(value, count) for name, value in example.items()}


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def block_linears(model: nn.Module, blocks: Sequence[Block]) -> list[list[str]]:
    """Names of the linear layers of each block."""
    return [
        [
            f"{name}.{inner}".rstrip(".")
            for name in block.modules
            for inner, module in model.get_submodule(name).named_modules()
            if _is_linear(module)
        ]
        for block in blocks
    ]


def upscaled_linears(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    return [linear for names in block_linears(model, blocks) for linear in names]


def refuse_other_changes(
    model: nn.Module, blocks: Sequence[Block], linears: Sequence[str], base: State, experts: Mapping[str, State]
) -> None:
    """Only ``nn.Linear`` layers are routed: anything else that an expert changed would silently be lost."""
    routed = {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}
    for name in (name for block in blocks for name in block.modules):
        if any(isinstance(module, nn.MultiheadAttention) for module in model.get_submodule(name).modules()):
            raise ValueError(
                f"{name} is an nn.MultiheadAttention, which is not made of nn.Linear calls; up-scale mlp only"
            )
        for inner, _ in model.get_submodule(name).named_parameters():
            full = f"{name}.{inner}"
            if full not in routed and any(not torch.equal(base[full].cpu(), s[full].cpu()) for s in experts.values()):
                raise ValueError(
                    f"{full} was fine-tuned but is not an nn.Linear; only nn.Linear layers can be up-scaled"
                )
