"""Cost of a routed MLP against a plain one, against the straightforward loop, and against fusion-bench.

Every number is a ratio of times measured in one process (on a CPU: of processor time on one thread), the sides taking
turns; shown is the median over rounds (the loop, which takes long, is run once).
One block of ViT-B width (768 → 3072 → 768, router of depth 2, 8 experts), float32, no gradients:

* ``plain``: the MLP itself; ``loop``: for every sample and expert a multiplication and an addition per tensor, then the
  MLP, as the published code does it; ``sample``, ``batch``: this package, routing per sample or per batch.
* ``step``: forward and backward to the routers; ``MiB``: growth of the process's peak memory during it.
* ``rank 32``, ``group``: low-rank task vectors; samples of four kinds sharing merged weights.

Then the merges without data, ``merge`` as a pipeline calls it, on a vision transformer of 38 million weights and four
experts: growth of peak memory over the size of one model, which is the result's own 1 and what the merge needs beside it,
and time over that of adding up the experts' state dicts and dividing, checks of the weights included.

    python benchmarks/wemoe.py                                  # a few minutes on one core
    python benchmarks/wemoe.py --fusion-bench /path/to/python   # also a tower against fusion-bench's own module
    python benchmarks/wemoe.py --device cuda --json out.json

``--fusion-bench`` names the interpreter of an environment with fusion-bench and transformers; both sides report the ratio
to their own plain tower, since they may run on different versions of torch. Last it says whether two aims are met at
16 samples of 50 tokens: per-sample routing 5 times as fast as the loop, batch routing at most 2 plain MLPs. The first
depends on the processor: the loop is bound by memory, and where that is fast beside arithmetic no method reaches it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SHAPES = ((16, 50), (8, 197), (16, 1))
WIDTH, INNER, EXPERTS = 768, 3072, 8
LARGE = {"image_size": 224, "patch_size": 16, "embed_dim": 512, "depth": 12, "num_heads": 8}
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TOWER_BATCHES = (1, 16, 128)


class Block(nn.Module):
    """One MLP under a name that is found."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Loop(nn.Module):
    """Per sample, per expert, per tensor."""

    def __init__(self, base: nn.Module, experts: list[nn.Module], router: nn.Module) -> None:
        super().__init__()
        self.base, self.router = base, router
        self.vectors = [
            {name: p.detach() - dict(base.named_parameters())[name].detach() for name, p in e.named_parameters()}
            for e in experts
        ]

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for sample, coefficients in zip(x, self.router(x), strict=True):
            merged = dict(self.base.named_parameters())
            for coefficient, vector in zip(coefficients, self.vectors, strict=True):
                for name, tau in vector.items():
                    merged[name] = merged[name] + coefficient * tau
            outputs.append(torch.func.functional_call(self.base, merged, (sample[None],)))
        return torch.cat(outputs)


def tuned(base: nn.Module, seed: int) -> nn.Module:
    expert, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in expert.parameters():
            p.add_(2.4e-4 * torch.randn(p.shape, generator=generator).to(p))
    return expert


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of a GPU, or of this process on one CPU core, which other processes do not prolong."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            spent = seconds(run, device)
            if number:
                times[name].append(spent)
    return {name: statistics.median(found) for name, found in times.items()}


def peak_and_seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """By how many MiB the peak of memory exceeds what was in use before, and the time."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent = seconds(run, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20, spent
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before hides what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    spent = seconds(run, device)
    return (_status("VmHWM") - before) / 1024, spent


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def block_figures(rounds: int, device: str) -> list[dict[str, float | str]]:
    from plait_wemoe.upscaling import UpscaleConfig
    from plait_wemoe.wemoe import upscale

    torch.manual_seed(0)
    base = Backbone().to(device).requires_grad_(False)
    experts = {f"t{i}": tuned(base, i) for i in range(EXPERTS)}
    example = torch.randn(1, 2, WIDTH, device=device)
    sample = upscale(base, experts, example, UpscaleConfig())
    grouped = upscale(base, experts, example, UpscaleConfig(compute="group", group_radius=1e-3))
    low = upscale(base, experts, example, UpscaleConfig(delta_storage="lowrank", delta_rank=32))
    sparse = upscale(base, experts, example, UpscaleConfig(prune_ratio=0.9))
    loop = Loop(base, list(experts.values()), sample.routers[0])
    rows = []
    for B, S in SHAPES:
        kinds = torch.randn(4, S, WIDTH, device=device)
        x = kinds.repeat(-(-B // 4), 1, 1)[:B].contiguous()

        def batch(x: Tensor = x) -> Tensor:
            sample.set_routing("batch")
            try:
                return sample(x)
            finally:
                sample.set_routing("sample")

        def step(model: nn.Module, x: Tensor = x) -> None:
            model(x).square().sum().backward()

        with torch.no_grad():
            assert torch.allclose(sample(x), loop(x), atol=1e-4)
            forward = medians(
                {
                    "plain": lambda x=x: base(x),
                    "sample": lambda x=x: sample(x),
                    "batch": batch,
                    "sparse sample": lambda x=x: sparse(x),
                    "rank 32": lambda x=x: low(x),
                    "group": lambda x=x: grouped(x),
                },
                rounds,
                device,
            )
            forward["loop"] = seconds(lambda x=x: loop(x), device)  # long enough to need no rounds
        sample_mib, sample_step = peak_and_seconds(lambda: step(sample), device)
        loop_mib, loop_step = peak_and_seconds(lambda: step(loop), device)
        rows.append(
            {
                "B×S": f"{B}×{S}",
                **{f"{name} / plain": value / forward["plain"] for name, value in forward.items() if name != "plain"},
                "loop / sample": forward["loop"] / forward["sample"],
                "step: loop / sample": loop_step / sample_step,
                "step: MiB loop": loop_mib,
                "step: MiB sample": sample_mib,
            }
        )
    return rows


def static_figures(rounds: int, device: str) -> list[dict[str, float | str]]:
    from plait import Run
    from plait_wemoe import plugin
    from plait_wemoe.heads import CosineHead
    from plait_wemoe.tasks import MultiTaskModel
    from plait_wemoe.vit import seeded_vit

    def model(seed: int) -> MultiTaskModel:
        encoder = tuned(seeded_vit(0, **LARGE), seed).to(device)
        return MultiTaskModel(encoder, {f"t{seed}": CosineHead(torch.randn(2, LARGE["embed_dim"]), 10.0)})

    base, experts = model(9), {f"t{i}": model(i) for i in range(4)}
    states = [expert.encoder.state_dict() for expert in experts.values()]
    size = sum(value.numel() * value.element_size() for value in states[0].values()) / 2**20

    def plain() -> dict[str, Tensor]:
        total = {name: value.clone() for name, value in states[0].items()}
        for state in states[1:]:
            for name, value in state.items():
                total[name] += value
        return {name: value / len(states) for name, value in total.items()}

    methods = {"average": plugin.SimpleAverage(), "task-arithmetic": plugin.TaskArithmetic()}
    run = Run(requested_device=device)
    runs: dict[str, Callable[[], object]] = {
        name: lambda method=method: method.merge(base=base, experts=experts, data=None, run=run)
        for name, method in methods.items()
    }
    times = medians({"plain": plain, **runs}, rounds, device)
    return [
        {
            "merge": name,
            "peak memory / model": peak_and_seconds(one, device)[0] / size,
            "time / adding up": times[name] / times["plain"],
        }
        for name, one in {"plain": plain, **runs}.items()
    ]


def towers() -> tuple[nn.Module, list[nn.Module]]:
    """A CLIP vision tower and fine-tuned copies; transformers is all that it needs."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=224, patch_size=32)).eval()
    return base, [tuned(base, i).eval() for i in range(EXPERTS)]


def tower_ratios(routed: nn.Module, set_routing: Callable[[str], object], rounds: int) -> dict[str, float]:
    """Time of the routed tower over that of the plain one, by routing and batch."""
    plain, _ = towers()
    found = {}
    with torch.no_grad():
        for routing in ("sample", "batch"):
            set_routing(routing)
            for size in TOWER_BATCHES:
                x = torch.randn(size, 3, 224, 224)
                times = medians({"plain": lambda x=x: plain(x), "routed": lambda x=x: routed(x)}, rounds, "cpu")
                found[f"{routing}, batch {size}"] = times["routed"] / times["plain"]
    return found


def own_tower(rounds: int) -> dict[str, float]:
    from plait_wemoe.upscaling import UpscaleConfig
    from plait_wemoe.wemoe import upscale

    base, experts = towers()
    named = {f"t{i}": expert for i, expert in enumerate(experts)}
    model = upscale(base, named, torch.randn(1, 3, 224, 224), UpscaleConfig()).eval()
    return tower_ratios(model, model.set_routing, rounds)


def peer_tower(rounds: int) -> dict[str, float]:
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    base, experts = towers()
    routed = copy.deepcopy(base)
    layers = next(module for name, module in routed.named_modules() if name.endswith("encoder.layers"))
    mixtures = []
    for index, layer in enumerate(layers):
        parts = []
        for model in (base, *experts):
            found = next(module for name, module in model.named_modules() if name.endswith("encoder.layers"))
            parts.append(copy.deepcopy(found[index].mlp))
        layer.mlp = WeightEnsemblingMoE(TOWER["hidden_size"], parts[0], parts[1:], 0.3, batch_first=True)
        mixtures.append(layer.mlp)

    def set_routing(mode: str) -> None:
        for mixture in mixtures:
            mixture.batch_reduce = mode == "batch"

    return tower_ratios(routed, set_routing, rounds)


def show(rows: list[dict[str, float | str]]) -> None:
    for name in rows[0]:
        cells = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for row in rows]
        print(f"{name:26s}" + "".join(f"{cell:>12s}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fusion-bench", metavar="PYTHON", help="interpreter of an environment with fusion-bench")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.as_peer:
        print(json.dumps(peer_tower(arguments.rounds)))
        return 0
    rows = block_figures(arguments.rounds, arguments.device)
    show(rows)
    merges = static_figures(arguments.rounds, arguments.device)
    print()
    show(merges)
    figures: dict[str, object] = {"block": rows, "merge": merges}
    if arguments.fusion_bench:
        command = [arguments.fusion_bench, __file__, "--as-peer", "--rounds", str(arguments.rounds)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peer, own = json.loads(answer.splitlines()[-1]), own_tower(arguments.rounds)
        figures["tower"] = [
            {
                "tower / plain tower": name,
                "this package": own[name],
                "fusion-bench": peer[name],
                "quotient": peer[name] / own[name],
            }
            for name in own
        ]
        print()
        show(figures["tower"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print()
    for sentence in aims(rows[0]):
        print(sentence)
    return 0


def aims(row: Mapping[str, float | str]) -> list[str]:
    """What was aimed at, at the first shape, and whether it is met here."""
    speed, cost = float(row["loop / sample"]), float(row["batch / plain"])
    return [
        f"per-sample routing is {speed:.1f} times as fast as the loop; the aim of 5 is {'' if speed >= 5 else 'not '}met here",
        f"batch routing costs {cost:.1f} plain MLPs; the aim of at most 2 is {'' if cost <= 2 else 'not '}met here",
    ]


if __name__ == "__main__":
    sys.exit(main())
