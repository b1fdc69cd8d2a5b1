"""WEMoE and E-WEMoE: one model from a base and its fine-tuned experts, MLPs merged anew for every input.

Everything but the MLPs is merged once by task arithmetic. Every MLP keeps the pre-trained weights θ₀ and
the experts' task vectors τ_t; a router turns the tokens that enter the block into coefficients r, and the
MLP runs once with θ₀ + Σ_t r_t τ_t. E-WEMoE keeps only the largest entries of τ_t and shares one router.

Sources: "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts" (ICML 2024, arXiv 2402.00433);
"Efficient and Effective Weight-Ensembling Mixture of Experts for Multi-Task Model Merging" (arXiv 2410.21804).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait_wemoe.ensembling import (
    COMPUTE,
    STORAGE,
    DenseDeltas,
    EnsembledLinear,
    LowRankDeltas,
    SparseDeltas,
    store_deltas,
)
from plait_wemoe.inputs import Inputs, call
from plait_wemoe.pruning import keep_above, magnitude_threshold, prune, prune_together
from plait_wemoe.routing import Gate, Router, position_code
from plait_wemoe.states import (
    Source,
    State,
    buffer_names,
    check_states,
    completed,
    fingerprint,
    state_like,
    state_of,
    task_vector,
    tied_names,
    weight_names,
    with_state,
)
from plait_wemoe.static import scaled_sum
from plait_wemoe.storing import load_module, save_module

_BLOCK = r"(?P<block>(?:.*\.)?(?:layers|resblocks|blocks|layer|block|h)\.(?:encoder_layer_)?\d+(?:\.layer\.\d+)?)\."
# Module names of known families: CLIP, ViT (transformers, timm, open_clip, torchvision), T5, BERT. Modules with the same
# ``block`` share coefficients; the router reads what enters the first of them.
PATTERNS = {
    "mlp": _BLOCK + r"(?:mlp|ffn|feed_forward|DenseReluDense|intermediate\.dense|output\.dense)",
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


# ------------------------------------------------------------------------------------------- building


def upscale(
    base: nn.Module, experts: Mapping[str, Source], example: Inputs, config: UpscaleConfig, seed: int = 0
) -> WEMoE:
    """Merge experts into a copy of the base; routers are at their first values.

    Args:
        base: the pre-trained model; ``base(example)`` must run. It is not changed.
        experts: name → fine-tuned copy of the base (module, state dict or path to weights).
        example: one or more inputs, batched along axis 0, or a mapping of keyword arguments. It is only used
            to find which blocks are on the way, how wide they are and which axis counts samples.
        seed: of the routers' first values.

    Raises:
        KeyError, ValueError, TypeError: experts that do not fit (see :func:`~plait_wemoe.states.check_states`),
            a pattern that matches no module, modules that cannot be up-scaled.
    """
    base_state = state_of(base)
    expert_states = {name: state_like(base, source) for name, source in experts.items()}
    check_states(base_state, expert_states)
    blocks = find_blocks(base, example, config)
    linears = upscaled_linears(base, blocks)
    tied = tied_names(base.state_dict())
    origin, tuned = _under_all_names(base_state, tied), {n: _under_all_names(s, tied) for n, s in expert_states.items()}
    _refuse_other_changes(base, blocks, linears, origin, tuned)

    routed = {tied.get(entry, entry) for entry in _entries(origin, linears)}
    static = static_state(base_state, expert_states, routed, config, buffer_names(base))
    model = WEMoE(with_state(base, static), blocks, tuple(experts), config, seed)
    for task_vectors in pruned_task_vectors(origin, tuned, block_linears(base, blocks), config):
        model.install(task_vectors)
    model.sources = {"base": fingerprint(base_state), **{n: fingerprint(s) for n, s in expert_states.items()}}
    return model


def _under_all_names(state: State, tied: Mapping[str, str]) -> State:
    return {**state, **{alias: state[name] for alias, name in tied.items()}}


def static_state(
    base: State, experts: Mapping[str, State], routed: Collection[str], config: UpscaleConfig, buffers: Collection[str]
) -> State:
    """θ₀ + λ Σ_t τ_t for every weight, but θ₀ itself for ``routed`` ones; buffers are averaged over the experts."""
    merged = {
        name: scaled_sum(base[name], [state[name] for state in experts.values()], config.init_lambda, config.dtype)
        for name in weight_names(base, buffers)
        if name not in routed
    }
    return completed(base, experts, merged, "the static part of WEMoE", buffers)


def pruned_task_vectors(
    base: State, experts: Mapping[str, State], blocks: Sequence[Sequence[str]], config: UpscaleConfig
) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
    """Pruned task vectors block by block: linear → ((T, out, in), (T, out) or ``None``)."""
    thresholds: list[Tensor | None] = [None] * len(experts)
    if config.prune_ratio is not None and config.prune_granularity == "model":
        every = [name for linears in blocks for name in _entries(base, linears)]
        for t, state in enumerate(experts.values()):
            vectors = [task_vector(base[name], state[name], config.dtype) for name in every]
            thresholds[t] = magnitude_threshold(vectors, config.prune_ratio)
    for linears in blocks:
        names = _entries(base, linears)
        by_expert = []
        for state, threshold in zip(experts.values(), thresholds, strict=True):
            vectors = [task_vector(base[name], state[name], config.dtype) for name in names]
            if config.prune_granularity == "tensor":
                by_expert.append([prune(vector, config.prune_ratio) for vector in vectors])
            elif config.prune_granularity == "block":
                by_expert.append(prune_together(vectors, config.prune_ratio))
            else:
                by_expert.append(vectors if threshold is None else [keep_above(v, threshold) for v in vectors])
        stacks = {name: torch.stack(pruned) for name, pruned in zip(names, zip(*by_expert, strict=True), strict=True)}
        yield {linear: (stacks[f"{linear}.weight"], stacks.get(f"{linear}.bias")) for linear in linears}


def _entries(base: State, linears: Sequence[str]) -> list[str]:
    return [f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias") if f"{linear}.{kind}" in base]


# ------------------------------------------------------------------------- finding blocks and layouts


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


def _refuse_other_changes(
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
                raise ValueError(f"{full} was fine-tuned but is no nn.Linear; only nn.Linear layers can be up-scaled")


# ------------------------------------------------------------------------------------------ the model


class WEMoE(nn.Module):
    """A backbone whose up-scaled linear layers merge their weights by routers; called like the backbone.

    Made by :func:`upscale` or :meth:`from_pretrained`; only :meth:`router_parameters` require gradients then. The
    weights of up-scaled layers never do, see :meth:`routed_parameters`. Cast to half precision it keeps weights in it,
    while routers and merging compute in float32.

    Attributes:
        experts: names, in the order of the coefficients; blocks: what is up-scaled.
        sources: name → SHA-256 of the weights that were merged.
    """

    stores_parts: ClassVar[bool] = True

    def __init__(
        self, backbone: nn.Module, blocks: Sequence[Block], experts: Sequence[str], config: UpscaleConfig, seed: int = 0
    ) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        self.blocks, self.experts = tuple(blocks), tuple(experts)
        self.sources: dict[str, str] = {}
        self.requires_grad_(False)
        coded = config.position_encoding_dim if config.position_encoding else 0
        widths = [block.width + coded for block in self.blocks]
        with torch.random.fork_rng(devices=[]):  # the published initialisation draws from the global generator
            torch.manual_seed(seed)
            self.routers = nn.ModuleList(
                Router(
                    width,
                    len(self.experts),
                    config.router_depth,
                    config.router_hidden_size,
                    config.init_lambda,
                    config.router_init_std,
                )
                for width in (widths[:1] if config.shared_router else widths)
            )
        self.gates = nn.ModuleList(
            Gate(
                self.routers[0 if config.shared_router else index],
                position_code(index, coded) if coded else None,
                block.batch_axis,
            )
            for index, block in enumerate(self.blocks)
        )
        device = next(backbone.parameters()).device
        self.routers.to(device)
        self.gates.to(device)
        self._names = block_linears(backbone, self.blocks)
        self._places = _places(backbone, self._names)
        self._linears: dict[str, EnsembledLinear] = {}

    def install(self, task_vectors: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Give linear layers their task vectors: name → ((T, out, in), (T, out) or ``None``)."""
        for name, (weights, biases) in task_vectors.items():
            self._install(name, store_deltas(weights, self.config.storage, self.config.delta_rank), biases)

    def _install(self, name: str, deltas: nn.Module, biases: Tensor | None) -> None:
        number = next(index for index, names in enumerate(self._names) if name in names)
        gate = self.gates[number]
        layer = EnsembledLinear(self.backbone.get_submodule(name), deltas, biases, gate)
        layer.compute, layer.group_radius = self.config.compute, self.config.group_radius
        layer.merge_dtype = self.config.dtype
        self._linears[name] = layer
        for place in self._places[name]:
            self.backbone.set_submodule(place, layer)
        entry = self.backbone.get_submodule(self.blocks[number].modules[0])
        if not any(isinstance(hook, _Reading) for hook in entry._forward_pre_hooks.values()):
            entry.register_forward_pre_hook(_Reading(gate), with_kwargs=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = _attention_mask(self.backbone, args, kwargs)
        for gate in self.gates:
            gate.mask = mask
        try:
            return self.backbone(*args, **kwargs)
        finally:
            for gate in self.gates:
                gate.mask = gate.coefficients = None

    # ------------------------------------------------------------------------------------- routing

    def router_parameters(self) -> list[nn.Parameter]:
        return list(self.routers.parameters())

    def routed_parameters(self) -> list[nn.Parameter]:
        """θ₀ of the up-scaled layers, which no gradient reaches."""
        return [p for layer in self._linears.values() for p in (layer.weight, layer.bias) if p is not None]

    def set_routing(self, mode: str, weights: Tensor | None = None) -> Self:
        """Route by ``sample``, by ``batch``, or with ``fixed`` weights, (T,) or (K, T).

        Raises:
            ValueError: another mode, weights missing or of another shape.
        """
        if mode not in ("sample", "batch", "fixed"):
            raise ValueError(f"routing is {mode!r}; allowed is sample, batch or fixed")
        if mode == "fixed":
            weights = self._per_block(weights)
        for index, gate in enumerate(self.gates):
            gate.routing = mode
            gate.fixed = None if mode != "fixed" else weights[index]
        return self

    def _per_block(self, weights: Tensor | None) -> Tensor:
        shape = (len(self.blocks), len(self.experts))
        if weights is None or weights.shape not in (shape, shape[1:]):
            got = None if weights is None else tuple(weights.shape)
            raise ValueError(f"fixed routing weights have shape {got}; allowed is {shape[1:]} or {shape}")
        first = next(self.backbone.parameters())
        return weights.to(first.device, torch.float32).expand(shape).contiguous()

    @torch.no_grad()
    def routing_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """Every sample's coefficients for inputs of the model, (K, B, T)."""
        self(*args, **kwargs)
        return torch.stack([gate.per_sample for gate in self.gates])

    @torch.no_grad()
    def export_static(self, weights: Tensor | str) -> nn.Module:
        """A plain backbone with the MLPs merged once: ``weights`` (T,) or (K, T), or one expert's name."""
        if isinstance(weights, str):
            if weights not in self.experts:
                raise ValueError(f"{weights!r} is no expert; allowed is one of {', '.join(self.experts)}")
            weights = torch.eye(len(self.experts))[self.experts.index(weights)]
        weights = self._per_block(weights)
        with self.plain_backbone() as backbone:
            dense = copy.deepcopy(backbone)
        for row, names in zip(weights, self._names, strict=True):
            for name in names:
                layer, linear = self._linears[name], dense.get_submodule(name)
                weight, bias = layer.merged(row)
                # New ones: blocks that shared θ₀ need not share what it is merged to.
                linear.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
                if bias is not None:
                    linear.bias = nn.Parameter(bias.to(layer.bias.dtype), layer.bias.requires_grad)
        return dense

    def prune_routers(self, ratio: float) -> None:
        """Magnitude-prune every router tensor by the rule of the task vectors, each router once."""
        with torch.no_grad():
            for parameter in self.router_parameters():
                parameter.copy_(prune_together([parameter], ratio)[0])

    def summary(self) -> dict[str, int]:
        """Counts of parameters: ``total`` counts every stored number but not indices (as the papers do)."""
        routers = sum(parameter.numel() for parameter in self.router_parameters())
        base = sum(p.numel() for p in self.backbone.parameters())
        deltas = sum(
            buffer.numel()
            for layer in self._linears.values()
            for name, buffer in layer.named_buffers()
            if not name.endswith(("positions", "experts"))
        )
        return {"base": base, "deltas": deltas, "routers": routers, "total": base + deltas + routers}

    # ------------------------------------------------------------------------------ saving, loading

    @contextmanager
    def plain_backbone(self) -> Iterator[nn.Module]:
        """The backbone as it was built, with pre-trained MLPs, for the time of the block."""
        layers = {name: self.backbone.get_submodule(name) for name in self._linears}
        hooks = {module: dict(module._forward_pre_hooks) for module in self.backbone.modules()}
        try:
            for name, layer in layers.items():
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                plain.weight, plain.bias = layer.weight, layer.bias
                plain.training = layer.training
                for place in self._places[name]:
                    self.backbone.set_submodule(place, plain)
            for module, found in hooks.items():
                for key in [key for key, hook in found.items() if isinstance(hook, _Reading)]:
                    del module._forward_pre_hooks[key]
            yield self.backbone
        finally:
            for name, layer in layers.items():
                for place in self._places[name]:
                    self.backbone.set_submodule(place, layer)
            for module, found in hooks.items():
                module._forward_pre_hooks.clear()
                module._forward_pre_hooks.update(found)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, backbone/ and moe.safetensors (routers once; task vectors as they are stored)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with self.plain_backbone() as backbone:
            save_module(backbone, folder / "backbone")
        tensors = {f"router.{name}": value for name, value in self.routers.state_dict().items()}
        for name, layer in self._linears.items():
            tensors |= _delta_tensors(name, layer, self.experts)
        for index, gate in enumerate(self.gates):
            if gate.fixed is not None:
                tensors[f"fixed.{index}"] = gate.fixed
        tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        save_file(tensors, folder / "moe.safetensors", {"format": "pt", "torch": torch.__version__})
        config = {
            "experts": self.experts,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "routing": self.gates[0].routing,
            "sources": self.sources,
            "upscale": dataclasses.asdict(self.config),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what :meth:`save_pretrained` wrote; neither base nor experts are needed."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        backbone = load_module(folder / "backbone")
        fields = dict(config["upscale"], upscale=tuple(config["upscale"]["upscale"]))
        blocks = [Block(tuple(b["modules"]), b["width"], b["batch_axis"]) for b in config["blocks"]]
        model = cls(backbone, blocks, config["experts"], UpscaleConfig(**fields))
        model.sources = config["sources"]
        tensors = load_file(folder / "moe.safetensors")
        routers = {n.removeprefix("router."): value for n, value in tensors.items() if n.startswith("router.")}
        model.routers.to(next(iter(routers.values())).dtype).load_state_dict(routers)
        for name in upscaled_linears(backbone, blocks):
            model._install(name, *_read_deltas(name, backbone.get_submodule(name), model.experts, tensors))
        fixed = [tensors[f"fixed.{index}"] for index in range(len(blocks)) if f"fixed.{index}" in tensors]
        return model.set_routing(config["routing"], torch.stack(fixed) if fixed else None)

    def save_routers(self, path: str | Path) -> None:
        """Write the routers alone; :meth:`load_routers` re-attaches them to a mixture of the same models."""
        metadata = {"sources": json.dumps(self.sources), "experts": json.dumps(self.experts)}
        tensors = {name: value.detach().cpu().clone() for name, value in self.routers.state_dict().items()}
        save_file(tensors, path, metadata)

    def load_routers(self, path: str | Path) -> Self:
        """Raises ValueError if the routers were trained for other models or another order of experts."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if json.loads(metadata["sources"]) != self.sources or json.loads(metadata["experts"]) != list(self.experts):
            raise ValueError(f"the routers in {path} were trained for other base or expert weights")
        self.routers.load_state_dict(load_file(path))
        return self


class _Reading:
    """Forward pre-hook of a block's first module: lets its router read the input."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.gate.route(first_tensor(args, kwargs))


def _places(backbone: nn.Module, blocks: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Up-scaled layer → all its names in the model, but those that another block up-scales for itself."""
    named, names = {name for block in blocks for name in block}, {}
    for name, module in backbone.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {
        name: (name, *(n for n in names[id(backbone.get_submodule(name))] if n not in named)) for name in sorted(named)
    }


def _attention_mask(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ``attention_mask`` (samples, tokens) of a call, by name, by position or inside a mapping of inputs."""
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        given = kwargs  # what is wrong with the call, the call itself says best
    for found in (kwargs, given, *(value for value in given.values() if isinstance(value, Mapping))):
        mask = found.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
    return None


def _delta_tensors(name: str, layer: EnsembledLinear, experts: Sequence[str]) -> dict[str, Tensor]:
    """Task vectors of a layer as they go to disk: ``delta.<layer>.<weight|bias>.<expert>[.values|.indices]``."""
    deltas, tensors = layer.deltas, {}
    for t, expert in enumerate(experts):
        if isinstance(deltas, SparseDeltas):
            mine = deltas.experts == t
            tensors[f"delta.{name}.weight.{expert}.values"] = deltas.values[mine]
            tensors[f"delta.{name}.weight.{expert}.indices"] = deltas.positions[mine]
        elif isinstance(deltas, LowRankDeltas):
            tensors[f"delta.{name}.weight.{expert}.up"] = deltas.up.unflatten(1, (len(experts), -1))[:, t]
            tensors[f"delta.{name}.weight.{expert}.down"] = deltas.down.unflatten(0, (len(experts), -1))[t]
        else:
            tensors[f"delta.{name}.weight.{expert}"] = deltas.values[t]
        if layer.bias_deltas is not None and isinstance(deltas, SparseDeltas):
            kept = layer.bias_deltas[t].nonzero().squeeze(1)
            tensors[f"delta.{name}.bias.{expert}.values"] = layer.bias_deltas[t][kept]
            tensors[f"delta.{name}.bias.{expert}.indices"] = kept.to(torch.int32)
        elif layer.bias_deltas is not None:
            tensors[f"delta.{name}.bias.{expert}"] = layer.bias_deltas[t]
    return tensors


def _read_deltas(
    name: str, linear: nn.Linear, experts: Sequence[str], tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, Tensor | None]:
    """The inverse of :func:`_delta_tensors` for one layer."""

    def read(kind: str, part: str = "") -> list[Tensor]:
        found = [tensors.get(f"delta.{name}.{kind}.{expert}{part}") for expert in experts]
        return [] if found[0] is None else found

    device, biases = linear.weight.device, None
    if read("bias"):
        biases = torch.stack(read("bias")).to(device)
    elif values := read("bias", ".values"):
        biases = values[0].new_zeros(len(experts), linear.out_features)
        for row, indices, kept in zip(biases, read("bias", ".indices"), values, strict=True):
            row[indices.long()] = kept
        biases = biases.to(device)
    if read("weight", ".up"):
        up, down = torch.stack(read("weight", ".up"), dim=1).flatten(1), torch.cat(read("weight", ".down"))
        return LowRankDeltas(up, down, len(experts)).to(device), biases
    if values := read("weight", ".values"):
        counts = torch.tensor([len(kept) for kept in values])
        numbers = torch.arange(len(experts)).repeat_interleave(counts)
        positions = torch.cat(read("weight", ".indices"))
        return SparseDeltas(positions, numbers, torch.cat(values), len(experts), linear.weight.shape).to(device), biases
    return DenseDeltas(torch.stack(read("weight"))).to(device), biases
