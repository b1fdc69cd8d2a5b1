"""The merged model: a backbone whose up-scaled layers merge their weights for every input; also on disk."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait_wemoe.ensembling import DenseDeltas, EnsembledLinear, LowRankDeltas, SparseDeltas, store_deltas
from plait_wemoe.pruning import prune_together
from plait_wemoe.routing import Gate, Router, position_code
from plait_wemoe.storing import load_module, save_module
from plait_wemoe.upscaling import Block, UpscaleConfig, block_linears, first_tensor, upscaled_linears


class WeightEnsemblingMoE(nn.Module):
    """A backbone whose up-scaled linear layers merge their weights by routers; called like the backbone.

    Made by :func:`~plait_wemoe.wemoe.upscale` or :meth:`from_pretrained`; only :meth:`router_parameters` require gradients then.
    All other parameters can be trained too, θ₀ of the up-scaled layers among them; the task vectors are buffers, which stay.
    Cast to half precision it keeps weights in it, while routers and merging compute in float32.

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

    def set_routing(self, mode: str, weights: Tensor | None = None) -> Self:
        """Route by ``sample``, by ``batch``, or with ``fixed`` weights, (T,) or (K, T).

        Raises:
            ValueError: another mode, weights missing or of another shape.
        """
        if mode not in ("sample", "batch", "fixed"):
            raise ValueError(f"routing is {mode!r}; allowed is sample, batch or fixed")
        fixed = self._per_block(weights) if mode == "fixed" else [None] * len(self.gates)
        for gate, own in zip(self.gates, fixed, strict=True):
            gate.routing, gate.fixed = mode, own
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
                raise ValueError(f"{weights!r} is not an expert; allowed is one of {', '.join(self.experts)}")
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
    named = {name for block in blocks for name in block}
    names: dict[int, list[str]] = {}
    for name, module in backbone.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {
        name: (name, *(n for n in names[id(backbone.get_submodule(name))] if n not in named)) for name in sorted(named)
    }


def _attention_mask(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ``attention_mask`` (samples, tokens) of a call, by name, by position or inside a mapping of inputs."""
    try:
        given: Mapping[str, Any] = inspect.signature(model.forward).bind(*args, **kwargs).arguments
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
