"""Makes merged.safetensors: small models, and what mergekit merges of them; see README.md.

With a second argument it writes there also what is not kept: DARE as mergekit rescales it.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mergekit.sparsify
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

NAMES = ("base", "a", "b", "c")
DENSITY = 0.6  # of DARE
# Name of the merge → mergekit's method, what every expert is given, what the merge is given.
MERGES = {
    "linear": ("linear", {"weight": 1.0}, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.4}, {}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}, {"lambda": 0.7}),
    "ties, not normalised": ("ties", {"weight": 0.3, "density": 0.2}, {"normalize": False}),
    "ties, density 1": ("ties", {"weight": 1.0, "density": 1.0}, {"lambda": 0.7}),
    "dare_linear, not rescaled": ("dare_linear", {"weight": 0.8, "density": DENSITY}, {"rescale": False}),
    "dare_ties, not rescaled": ("dare_ties", {"weight": 0.8, "density": DENSITY}, {"rescale": False}),
    "dare_linear": ("dare_linear", {"weight": 0.8, "density": DENSITY}, {}),
}
IN_BFLOAT16 = ("linear", "task_arithmetic", "ties")
NOT_KEPT = ("dare_linear",)  # rescaled to the L1 norm, and not by 1/density: only the difference is told


def models(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    found = {"base": {name: value.clone() for name, value in base.state_dict().items()}}
    for name in NAMES[1:]:
        found[name] = {n: v + 0.1 * torch.randn(v.shape) for n, v in found["base"].items()}
    for name, state in found.items():
        for kind in (torch.float32, torch.bfloat16):
            model = transformers.LlamaForCausalLM(config)
            model.load_state_dict(state)
            model.to(kind).save_pretrained(folder / str(kind) / name)
    return found


def masks(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """What plait_wemoe's DARE draws with seed 0: expert by expert, tensors by name."""
    generator = torch.Generator().manual_seed(0)
    return {
        expert: {
            name: torch.rand(states[expert][name].shape, generator=generator) >= 1 - DENSITY
            for name in sorted(states[expert])
        }
        for expert in NAMES[1:]
    }


def with_masks(states: dict[str, dict[str, torch.Tensor]]) -> None:
    """Have mergekit's DARE drop the same entries, which it knows by the task vector that it is given."""
    kept = {
        (states[expert][name] - states["base"][name]).numpy().tobytes(): mask
        for expert, of_expert in masks(states).items()
        for name, mask in of_expert.items()
    }

    def bernoulli(tensor, density, rescale_norm=None):
        mask = kept[tensor.numpy().tobytes()].to(tensor.dtype)
        return mergekit.sparsify.rescaled_masked_tensor(tensor, mask, rescale_norm)

    mergekit.sparsify.bernoulli = bernoulli


def merged(folder: Path, name: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
    method, of_expert, shared = MERGES[name]
    place = folder / str(kind)
    config = {
        "merge_method": method,
        "models": [{"model": str(place / expert), "parameters": of_expert} for expert in NAMES[1:]],
        "parameters": shared,
        "dtype": "float32",
        "out_dtype": str(kind).removeprefix("torch."),
    }
    if method != "linear":
        config["base_model"] = str(place / "base")
    with tempfile.TemporaryDirectory() as out:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(json.dumps(config))), out, options)
        return {n: v for file in Path(out).glob("*.safetensors") for n, v in load_file(file).items()}


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        states = models(Path(scratch))
        with_masks(states)
        found = {f"{name}/{n}": v for name, state in states.items() for n, v in state.items()}
        for name in MERGES:
            for kind in (torch.float32, torch.bfloat16) if name in IN_BFLOAT16 else (torch.float32,):
                of = f"{name}, bfloat16" if kind == torch.bfloat16 else name
                found |= {f"{of}/{n}": v for n, v in merged(Path(scratch), name, kind).items()}
    versions = {package: version(package) for package in ("mergekit", "torch", "transformers")}
    plain = {
        name: value.contiguous()
        for name, value in found.items()
        if not name.startswith(tuple(f"{n}/" for n in NOT_KEPT))
    }
    save_file(plain, target, {**versions, "merges": json.dumps({n: m for n, m in MERGES.items() if n not in NOT_KEPT})})
    if len(sys.argv) > 2:
        save_file(found, sys.argv[2])


if __name__ == "__main__":
    main(sys.argv[1])
