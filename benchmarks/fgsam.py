"""Time of an update relative to Adam: SAM, FGSAM and FGSAM+ on GCN, GAT and GraphSAGE.

All optimizers of a row are timed in one process, taking turns, so that the load of the machine hits them alike; a row
is the median over rounds of the time of ``--updates`` updates, divided by Adam's of the same round. The GNN pass is
PyTorch Geometric's own on the whole graph, recomputing its normalisation; with cached propagation or
neighbourhood batches it is cheaper and FGSAM's advantage smaller. The loss is on 10 labelled nodes a class of a
contextual stochastic block model.

    python benchmarks/fgsam.py                 # 1,000 and 10,000 nodes, about 2 minutes on one core
    python benchmarks/fgsam.py --nodes 100000 --rounds 3     # about 4 minutes on one core

Exits with 1 if a ratio misses its bar: SAM within [1.6, 2.4], FGSAM below 1.3, FGSAM+ below 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from plait_fgsam.baselines import SAM
from plait_fgsam.fgsam import FGSAM, FGSAMPlus
from plait_fgsam.updates import TwoLossUpdate
from plait_graph import NodeObjective, PlainUpdate
from plait_graph.datasets import csbm_graph
from plait_graph.models import GNN, seeded
from plait_graph.splits import split_per_class
from torch import nn

OPTIMIZERS: dict[str, Callable[[nn.Module], object]] = {
    "Adam": lambda model: PlainUpdate(model, torch.optim.Adam(model.parameters(), lr=0.01)),
    "SAM": lambda model: TwoLossUpdate(model, SAM(model.parameters(), lr=0.01)),
    "FGSAM": lambda model: TwoLossUpdate(model, FGSAM(model.parameters(), lr=0.01)),
    "FGSAM+": lambda model: TwoLossUpdate(model, FGSAMPlus(model.parameters(), interval=2, lr=0.01)),
}
BARS = {"SAM": (1.6, 2.4), "FGSAM": (0.0, 1.3), "FGSAM+": (0.0, 1.0)}


def ratios(architecture: str, num_nodes: int, updates: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Optimizer → time relative to Adam; and Adam's milliseconds an update under ``ms``."""
    data = csbm_graph(num_nodes, 10, 64, 10.0, 0.3, 1.5, np.random.default_rng(0))
    data.train_mask, *_ = split_per_class(data.y, 10, 0, torch.Generator().manual_seed(0))
    task = NodeObjective(data, device).whole
    torch.manual_seed(0)
    running = {
        name: make(seeded(0, lambda: GNN(architecture=architecture, in_channels=64, num_classes=10)).to(device).train())
        for name, make in OPTIMIZERS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds + 1):  # the first warms up
        for name, update in running.items():
            started = clock(device)
            for _ in range(updates):
                update.step(task)
            if turn:
                seconds[name].append((clock(device) - started) / updates)
    found = {
        name: statistics.median(a / b for a, b in zip(times, seconds["Adam"], strict=True))
        for name, times in seconds.items()
    }
    return {"ms": 1000 * statistics.median(seconds["Adam"]), **found}


def clock(device: torch.device) -> float:
    """Wall time after pending work on a GPU; CPU time of this process otherwise, which other processes do not raise."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--architectures", nargs="+", default=["gcn", "gat", "sage"])
    parser.add_argument(
        "--updates", type=int, default=4, help="updates a round, at least (even, for FGSAM+'s two kinds)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    rows, missed = [], []
    print(f"{'nodes':>8} {'model':>6} {'Adam ms':>9} {'SAM':>6} {'FGSAM':>6} {'FGSAM+':>6}")
    for num_nodes in options.nodes:
        for architecture in options.architectures:
            updates = max(options.updates, 2 * (20_000 // num_nodes))  # small graphs: long enough to be measured
            row = ratios(architecture, num_nodes, updates, options.rounds, torch.device(options.device))
            rows.append({"nodes": num_nodes, "model": architecture, **row})
            print(
                f"{num_nodes:>8} {architecture:>6} {row['ms']:>9.2f} "
                f"{row['SAM']:>6.2f} {row['FGSAM']:>6.2f} {row['FGSAM+']:>6.2f}",
                flush=True,
            )
            missed += [
                f"{name} {row[name]:.2f} on {architecture}, {num_nodes} nodes"
                for name, (low, high) in BARS.items()
                if not low <= row[name] <= high
            ]
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    for line in missed:
        print(f"missed: {line}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
