"""State dicts of the models to merge: where they come from, what must hold, task vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Source = nn.Module | Mapping[str, Tensor] | str | Path


def state_of(source: Source) -> State:
    """The state dict of a module, a mapping, a ``.safetensors`` / ``torch.save`` file or a folder with one.

    Raises:
        TypeError: an adapter (LoRA) is still unmerged, or the source is none of these.
        FileNotFoundError: no weights at the path.
    """
    if hasattr(source, "merge_and_unload"):
        raise TypeError(f"{type(source).__name__} carries unmerged adapters; call merge_and_unload() first")
    if isinstance(source, nn.Module):
        return {name: value.detach() for name, value in source.state_dict().items()}
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"an expert is a module, a state dict or a path, not {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
        path = found[0]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def check_states(base: State, experts: Mapping[str, State]) -> list[str]:
    """Refuse experts that are not fine-tuned copies of the base.

    Returns:
        Names of the experts that are bitwise equal to the base.

    Raises:
        ValueError: no expert, another shape, a non-finite weight.
        KeyError: other parameter names.
        TypeError: quantised weights (an entry that is floating-point in one model only).
    """
    if not experts:
        raise ValueError("there is no expert to merge; give at least one fine-tuned model")
    unchanged = []
    for expert, state in {"the base": base, **{f"expert {name!r}": state for name, state in experts.items()}}.items():
        if state.keys() != base.keys():
            missing, surplus = sorted(base.keys() - state.keys())[:3], sorted(state.keys() - base.keys())[:3]
            raise KeyError(f"{expert} is of another architecture than the base: missing {missing}, surplus {surplus}")
        for name, value in state.items():
            if value.shape != base[name].shape:
                raise ValueError(f"{name} is {tuple(value.shape)} in {expert}, {tuple(base[name].shape)} in the base")
            if value.is_floating_point() != base[name].is_floating_point():
                raise TypeError(f"{name} is {value.dtype} in {expert}, {base[name].dtype} in the base; dequantise it")
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"{name} of {expert} holds a value that is not finite")
    for name, state in experts.items():
        if all(torch.equal(value.to(base[key].device), base[key]) for key, value in state.items()):
            unchanged.append(name)
    return unchanged


def task_vectors(base: State, experts: Mapping[str, State], dtype: torch.dtype = torch.float32) -> dict[str, State]:
    """τ_t = θ_t − θ₀ of every floating-point entry, computed in ``dtype``."""
    return {
        expert: {name: task_vector(base[name], state[name], dtype) for name in base if base[name].is_floating_point()}
        for expert, state in experts.items()
    }


def task_vector(base: Tensor, expert: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return expert.to(base.device, dtype) - base.to(dtype)


def fingerprint(state: State) -> str:
    """SHA-256 over names, shapes, types and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
