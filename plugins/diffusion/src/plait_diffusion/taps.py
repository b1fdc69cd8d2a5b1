"""Activations by name: official ids of GDF, module paths of diffusers, globs; and one pass that captures them.

Names, as those of arXiv 2410.03558: ``up-level1-repeat0-vit-block0-cross-q``; or module paths,
``up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q``, the latter with or without ``unet.`` or ``transformer.`` in front and with a tap behind it: ``@in``, ``@out`` (default), ``@0``
and ``@1`` (of a tuple), ``@image`` and ``@text`` (of joint tokens), ``@map`` (attention probabilities, ``[B, heads, N, T]``),
``@mean-map`` (their mean over the heads). Globs (``up_blocks.*.attn2.to_q``) stand for all that match.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from plait_diffusion import families

TapKind = Literal["in", "out", "0", "1", "image", "text", "map", "mean-map", "self-map", "cross-map"]
KINDS: tuple[str, ...] = ("in", "out", "0", "1", "image", "text", "map", "mean-map")
MAPS = ("map", "mean-map", "self-map", "cross-map")
_CHUNK = 2**26  # numbers of a map that are in memory at once while heads are averaged


@attrs.frozen
class Tap:
    """Where an activation is produced.

    Attributes:
        name: as it was asked for; the key of the result.
        path: of the module in the denoiser.
        kind: what of the module: its input, its output, a part of it, or an attention map.
    """

    name: str
    path: str
    kind: str


def official_ids(denoiser: nn.Module) -> dict[str, Tap]:
    """Every activation that a denoiser has, in the order of a pass: official id → tap (arXiv 2410.03558)."""
    kind = families.kind_of(denoiser)
    found = _of_unet(denoiser) if kind in families.UNETS else _of_transformer(denoiser, kind)
    paths = {path for path, _ in denoiser.named_modules()}  # blocks without text have no second attention
    return {tap.name: tap for tap in found if tap.path in paths}


def _of_unet(denoiser: nn.Module) -> Iterable[Tap]:
    modules = dict(denoiser.named_modules())
    yield Tap("unet-in", "conv_in", "in")
    yield Tap("unet-after-conv-in", "conv_in", "out")
    stages = [(f"down-level{i}-", f"down_blocks.{i}") for i in range(len(denoiser.down_blocks))]
    stages.append(("mid-", "mid_block"))
    stages += [(f"up-level{i}-", f"up_blocks.{i}") for i in range(len(denoiser.up_blocks))]
    for stem, place in stages:
        block = modules.get(place)
        if block is None:
            continue
        for r in range(len(getattr(block, "resnets", []) or [])):
            yield Tap(f"{stem}repeat{r}-res-increment", f"{place}.resnets.{r}.conv2", "out")
            yield Tap(f"{stem}repeat{r}-res-out", f"{place}.resnets.{r}", "out")
        for r, vit in enumerate(getattr(block, "attentions", None) or []):
            if vit is None:  # a mid block without attention has a place for it
                continue
            start = stem if stem == "mid-" else f"{stem}repeat{r}-"
            path = f"{place}.attentions.{r}"
            if hasattr(vit, "transformer_blocks"):
                for b in range(len(vit.transformer_blocks)):
                    yield from _of_block(f"{start}vit-block{b}-", f"{path}.transformer_blocks.{b}")
            else:  # UNet2DModel: an attention without a block around it
                yield from _of_attention(f"{start}vit-block0-self-", path, "qkv")
            yield Tap(f"{start}vit-out", path, "out")
        for part in ("downsampler", "upsampler"):
            if getattr(block, f"{part}s", None):
                yield Tap(f"{stem}{part}-out", f"{place}.{part}s.0", "out")
    yield Tap("unet-out", "conv_out", "out")


def _of_block(start: str, path: str) -> Iterable[Tap]:
    yield from _of_attention(f"{start}self-", f"{path}.attn1", "qkv")
    yield Tap(f"{start}cross-q", f"{path}.attn2.to_q", "out")
    yield Tap(f"{start}cross-map", f"{path}.attn2", "map")
    yield Tap(f"{start}ffn-inner", f"{path}.ff.net.0", "out")
    yield Tap(f"{start}out", path, "out")


def _of_attention(start: str, path: str, letters: str) -> Iterable[Tap]:
    for letter in letters:
        yield Tap(f"{start}{letter}", f"{path}.to_{letter}", "out")
    yield Tap(f"{start}map", path, "map")


def _of_transformer(denoiser: Any, kind: str) -> Iterable[Tap]:
    blocks = len(denoiser.transformer_blocks)
    if kind not in families.JOINT:
        for i in range(blocks):
            yield from _of_block(f"vit-block{i}-", f"transformer_blocks.{i}")
        return
    singles = len(getattr(denoiser, "single_transformer_blocks", []))
    for i in range(blocks + singles):
        is_single = i >= blocks
        path = f"single_transformer_blocks.{i - blocks}" if is_single else f"transformer_blocks.{i}"
        start = f"vit-block{i}-"
        for letter in "qkv":
            yield Tap(f"{start}{letter}", f"{path}.attn.to_{letter}", "image")
        yield Tap(f"{start}self-map", f"{path}.attn", "self-map")
        yield Tap(f"{start}cross-map", f"{path}.attn", "cross-map")
        yield Tap(f"{start}attn-out", f"{path}.attn", "image")
        yield Tap(f"{start}norm-out", f"{path}.norm" if is_single else f"{path}.norm1", "image")
        yield Tap(f"{start}out", path, "image")


def resolve(denoiser: nn.Module, names: Sequence[str]) -> list[Tap]:
    """What names stand for, each once, in the order in which they are given.

    Raises:
        ValueError: there are no names.
        KeyError: a name that the denoiser does not have; the message names the nearest that it has.
    """
    if not names:
        raise ValueError("no activation is named; name at least one")
    ids, modules = official_ids(denoiser), dict(denoiser.named_modules())
    taps: dict[str, Tap] = {}
    for name in names:
        for tap in _resolved(name, ids, modules):
            taps.setdefault(tap.name, tap)
    _check_kinds(denoiser, taps.values(), modules)
    return list(taps.values())


def _resolved(name: str, ids: Mapping[str, Tap], modules: Mapping[str, nn.Module]) -> list[Tap]:
    if name in ids:
        return [ids[name]]
    path, _, kind = name.partition("@")
    path = re.sub(r"^(unet|transformer)\.", "", path)
    kind = kind or "out"
    if kind not in KINDS:
        raise KeyError(f"activation {name!r} has the tap @{kind}; allowed are {', '.join(f'@{one}' for one in KINDS)}")
    if path and path in modules:
        return [Tap(name, path, kind)]
    if any(sign in path for sign in "*?["):
        found = [ids[one] for one in fnmatch.filter(ids, name)]
        found += [
            Tap(f"{one}@{kind}" if "@" in name else one, one, kind)
            for one in modules
            if one and fnmatch.fnmatch(one, path)
        ]
        if found:
            return found
        raise KeyError(f"no activation of the model matches {name!r}")
    close = difflib.get_close_matches(name, [*ids, *modules], n=3, cutoff=0.5)
    nearest = f"; the nearest are {', '.join(close)}" if close else ""
    raise KeyError(f"the model has no activation {name!r}{nearest}")


def _check_kinds(denoiser: nn.Module, taps: Iterable[Tap], modules: Mapping[str, nn.Module]) -> None:
    for tap in taps:
        parent, _, leaf = tap.path.rpartition(".")
        attention = modules[tap.path] if tap.kind in MAPS else modules.get(parent) if leaf.startswith("to_") else None
        if getattr(attention, "fused_projections", False):
            raise RuntimeError(
                f"activation {tap.name!r} is never produced while the projections are fused; call unfuse_qkv_projections() first"
            )
        if tap.kind in MAPS and not all(hasattr(attention, one) for one in ("to_q", "to_k", "heads")):
            raise KeyError(f"activation {tap.name!r} is a map of {tap.path}, which is no attention")


class _Done(BaseException):
    """Ends a pass after its last wanted activation; a BaseException, so that no pipeline swallows it."""


def capture(
    denoiser: nn.Module,
    taps: Sequence[Tap],
    sample: Tensor,
    timestep: float,
    condition: Mapping[str, Any],
    *,
    early_exit: bool = True,
    call: Any = families.call_denoiser,
) -> dict[str, Tensor]:
    """One pass, and what it produces on the way.

    Args:
        sample: ``[B, C, h, w]``, noised.
        timestep: as the network is told it.
        condition: keyword arguments of the denoiser's ``forward``.
        early_exit: stop after the last wanted activation.
        call: ``(denoiser, sample, timestep, condition)`` → anything; runs the pass of a module that is not diffusers'.

    Returns:
        name → ``[B, C, h, w]`` (tokens row by row), maps ``[B, heads, N, T]`` or ``[B, N, T]``, in the order of execution.

    Raises:
        RuntimeError: an activation was not produced.
        ValueError: tokens that are no grid.
    """
    recorder = _Recorder(denoiser, taps, sample, condition, early_exit)
    try:
        recorder.attach()
        call(denoiser, sample, timestep, condition)
    except _Done:
        pass
    finally:
        recorder.detach()
    if recorder.left:
        raise RuntimeError(
            f"the pass never produces {', '.join(map(repr, sorted(recorder.left)))}; the module is not executed, or its "
            "processor goes another way"
        )
    return recorder.found


def shapes(
    denoiser: nn.Module, taps: Sequence[Tap], sample: Tensor, condition: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """What one pass would produce, in the order of execution, without computing anything.

    Args:
        sample, condition: as the pass gets them, or on the meta device.

    Raises:
        RuntimeError: an activation is never produced.
    """
    cls: Any = type(getattr(denoiser, "_orig_mod", denoiser))
    config = json.dumps(dict(denoiser.config), sort_keys=True, default=str)
    return dict(_shapes(cls, config, tuple(taps), tuple(sample.shape), _described(condition)))


@functools.lru_cache(maxsize=16)
def _shapes(
    cls: Any, config: str, taps: tuple[Tap, ...], sample: tuple[int, ...], condition: Any
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    with torch.device("meta"):
        empty = cls.from_config(json.loads(config)).eval()
    with torch.no_grad():
        found = capture(empty, taps, torch.empty(sample, device="meta"), 1.0, _on_meta(condition))
    return tuple((name, tuple(value.shape)) for name, value in found.items())


def _described(value: Any) -> Any:
    """Shapes and dtypes of a condition, as something that can be looked up by."""
    if isinstance(value, Mapping):
        return "mapping", tuple((name, _described(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return "list", tuple(_described(item) for item in value)
    if isinstance(value, Tensor):
        return "tensor", (tuple(value.shape), value.dtype)
    return "value", value


def _on_meta(described: Any) -> Any:
    kind, content = described
    if kind == "mapping":
        return {name: _on_meta(item) for name, item in content}
    if kind == "list":
        return [_on_meta(item) for item in content]
    if kind == "tensor":  # in the dtype that a fresh model has
        shape, dtype = content
        return torch.empty(shape, dtype=torch.get_default_dtype() if dtype.is_floating_point else dtype, device="meta")
    return content


class _Recorder:
    """Hooks of one pass, and what they have seen."""

    def __init__(
        self, denoiser: nn.Module, taps: Sequence[Tap], sample: Tensor, condition: Mapping[str, Any], early_exit: bool
    ) -> None:
        self.denoiser, self.taps, self.early_exit = denoiser, taps, early_exit
        self.left = {tap.name for tap in taps}
        self.found: dict[str, Tensor] = {}
        self.default_grid = families.token_grid(denoiser, sample)
        self.grids: dict[str, tuple[int, int]] = {}
        text = condition.get("encoder_hidden_states")
        self.text_tokens = 0 if text is None else int(text.shape[1])
        self.is_joint = families.kind_of(denoiser) in families.JOINT
        self._handles: list[Any] = []

    def attach(self) -> None:
        for tap in self.taps:
            module = self.denoiser.get_submodule(tap.path)
            self._watch_grid(tap.path)
            if tap.kind in MAPS:
                self._watch_map(tap, module)
            elif tap.kind == "in":
                self._handles.append(module.register_forward_pre_hook(self._input_hook(tap), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(tap)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch_grid(self, path: str) -> None:
        """Remember rows and columns of the image that comes into each module around a tap."""
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            around = ".".join(parts[:end])
            if around in self.grids:
                continue
            self.grids[around] = (0, 0)

            def hook(module: nn.Module, args: Any, kwargs: Any, around: str = around) -> None:
                image = args[0] if args else kwargs.get("hidden_states")
                if isinstance(image, Tensor) and image.ndim == 4:
                    self.grids[around] = (int(image.shape[-2]), int(image.shape[-1]))

            self._handles.append(self.denoiser.get_submodule(around).register_forward_pre_hook(hook, with_kwargs=True))

    def _input_hook(self, tap: Tap) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._take(tap, args[0] if args else kwargs["hidden_states"])

        return hook

    def _output_hook(self, tap: Tap) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._take(tap, _chosen(output, tap, module))

        return hook

    def _take(self, tap: Tap, value: Tensor) -> None:
        if tap.name in self.found:  # checkpointing runs a module twice
            return
        self.found[tap.name] = value if tap.kind in MAPS else self._as_map(tap, value)
        self.left.discard(tap.name)
        if self.early_exit and not self.left:
            raise _Done

    def _as_map(self, tap: Tap, value: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` as an image ``[B, C, h, w]``, row by row; images as they are."""
        if value.ndim == 4:
            return value
        if value.ndim != 3:
            raise ValueError(f"activation {tap.name!r} has shape {tuple(value.shape)}; images or tokens are needed")
        if tap.kind == "text":
            return value[:, : self.text_tokens].transpose(1, 2).unsqueeze(-1)
        height, width = self._grid_of(tap.path) or (0, 0)
        count = value.shape[1]
        if height * width and count == height * width + self.text_tokens and self.is_joint:
            value, count = value[:, self.text_tokens :], height * width
        if count != height * width:
            raise ValueError(
                f"activation {tap.name!r} has {count} tokens, and the image around it is {height}×{width}; they are no grid"
            )
        return value.transpose(1, 2).reshape(len(value), -1, height, width)

    def _grid_of(self, path: str) -> tuple[int, int] | None:
        if self.default_grid is not None:
            return self.default_grid
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            grid = self.grids.get(".".join(parts[:end]), (0, 0))
            if grid != (0, 0):
                return grid
        return None

    # Attention maps

    def _watch_map(self, tap: Tap, attention: Any) -> None:
        seen: dict[str, Any] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.clear()
            seen["mask"] = kwargs.get("attention_mask")
            seen["rotary"] = kwargs.get("image_rotary_emb")

        def remember(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                seen[name] = output
                if complete <= set(seen):
                    self._take(tap, _attention_map(attention, seen, tap, self.text_tokens))

            return hook

        parts = ["to_q", "to_k"]
        if self.is_joint and getattr(attention, "add_k_proj", None) is not None:
            parts += ["add_q_proj", "add_k_proj"]
        complete = set(parts)
        self._handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        for name in parts:
            self._handles.append(getattr(attention, name).register_forward_hook(remember(name)))


def _chosen(output: Any, tap: Tap, module: nn.Module) -> Tensor:
    """The wanted part of what a module returns."""
    if hasattr(output, "sample"):
        output = output.sample
    if not isinstance(output, tuple):
        return output
    if tap.kind in ("0", "1"):
        return output[int(tap.kind)]
    if (
        tap.kind in ("image", "text")
        and len(output) > 1
        and all(isinstance(one, Tensor) or one is None for one in output[:2])
    ):
        # A double block returns (text, image), in SD3's last layer (None, image); its attention returns (image, text).
        image_first = hasattr(module, "to_q")
        is_norm = output[1] is None or output[1].ndim != 3
        if is_norm:
            return output[0]
        return output[0] if image_first == (tap.kind == "image") else output[1]
    return output[0]


def _attention_map(attention: Any, seen: Mapping[str, Any], tap: Tap, text_tokens: int) -> Tensor:
    """softmax(q kᵀ / √d) as the attention computes it, from what its projections gave."""
    joint = "add_k_proj" in seen or tap.kind in ("self-map", "cross-map")
    query, key = (_heads(attention, seen[f"to_{letter}"], f"norm_{letter}") for letter in "qk")
    if "add_k_proj" in seen:
        text_q, text_k = (_heads(attention, seen[f"add_{letter}_proj"], f"norm_added_{letter}") for letter in "qk")
        # Rotary embeddings stand for text and image tokens in this order.
        query, key = torch.cat([text_q, query], dim=2), torch.cat([text_k, key], dim=2)
    if seen["rotary"] is not None:
        from diffusers.models.embeddings import apply_rotary_emb

        query = apply_rotary_emb(query, seen["rotary"], sequence_dim=2)
        key = apply_rotary_emb(key, seen["rotary"], sequence_dim=2)
    mask = seen["mask"]
    if mask is not None:
        mask = mask if mask.ndim == 4 else mask.unsqueeze(1)
    scale = getattr(attention, "scale", None) or query.shape[-1] ** -0.5
    if joint:
        probabilities = _softmax(query[:, :, text_tokens:], key, scale, mask)
        return probabilities[..., text_tokens:] if tap.kind != "cross-map" else probabilities[..., :text_tokens]
    if tap.kind == "mean-map":
        return _mean_over_heads(query, key, scale, mask)
    return _softmax(query, key, scale, mask)


def _heads(attention: Any, projected: Tensor, norm: str) -> Tensor:
    """``[B, N, C]`` → ``[B, heads, N, d]``, normalised over d where the attention does so."""
    heads = projected.unflatten(2, (attention.heads, -1)).transpose(1, 2)
    own = getattr(attention, norm, None)
    return heads if own is None else own(heads)


def _softmax(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def _mean_over_heads(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """``[B, N, T]``, a few heads at a time."""
    heads = query.shape[1]
    step = max(1, _CHUNK // max(1, query.shape[0] * query.shape[2] * key.shape[2]))
    total: Any = 0
    for start in range(0, heads, step):
        part = slice(start, start + step)
        some = mask if mask is None or mask.shape[1] == 1 else mask[:, part]
        total = total + _softmax(query[:, part], key[:, part], scale, some).sum(1)
    return total / heads
