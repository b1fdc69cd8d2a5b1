"""What `plait run --deterministic` costs on a GPU: a training step with and without deterministic kernels.

    python benchmarks/deterministic.py          # needs a CUDA device; half a minute

Both are timed in one process on one model, the free kernels before and after the deterministic ones; shown is the median
of eight, against the faster of the two. Weights and data are random.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from plait.surroundings import deterministic_kernels

DEVICE = "cuda"
Step = Callable[[], None]


def milliseconds(step: Step) -> float:
    step()
    step()  # warm
    found = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return 1000 * statistics.median(found)


def clip() -> Step:
    """ViT-B/32, 128 pairs of 224 × 224, bf16."""
    import open_clip

    model = open_clip.create_model("ViT-B-32").to(DEVICE).train()
    optimizer, loss_fn = torch.optim.AdamW(model.parameters(), 1e-4), open_clip.ClipLoss()
    images, tokens = torch.rand(128, 3, 224, 224, device=DEVICE), torch.randint(1, 40000, (128, 77), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_fn(*model(images, tokens)[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def resnet() -> Step:
    """ResNet-50, 64 images of 224 × 224, bf16."""
    import torchvision

    model = torchvision.models.resnet50().to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = torch.rand(64, 3, 224, 224, device=DEVICE), torch.randint(0, 1000, (64,), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def resizing() -> Step:
    """Two convolutions with a bilinear resize between them, 8 images of 128 × 128."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Upsample(scale_factor=2, mode="bilinear"),
        torch.nn.Conv2d(64, 64, 3, padding=1),
        torch.nn.ConvTranspose2d(64, 3, 2, 2),
    ).to(DEVICE)
    images = torch.rand(8, 3, 128, 128, device=DEVICE, requires_grad=True)
    return lambda: model(images).square().mean().backward()


def graph_network(architecture: str) -> Step:
    """Ten updates with Adam on 100,000 nodes."""
    from plait_graph import NodeObjective, PlainUpdate
    from plait_graph.datasets import csbm_graph
    from plait_graph.models import GNN, seeded
    from plait_graph.splits import split_per_class

    data = csbm_graph(100_000, 10, 64, 10.0, 0.3, 1.5, np.random.default_rng(0))
    data.train_mask, *_ = split_per_class(data.y, 10, 0, torch.Generator().manual_seed(0))
    task = NodeObjective(data, torch.device(DEVICE)).whole
    model = seeded(0, lambda: GNN(architecture=architecture, in_channels=64, num_classes=10)).to(DEVICE).train()
    update = PlainUpdate(model, torch.optim.Adam(model.parameters(), lr=0.01))

    def step() -> None:
        for _ in range(10):
            update.step(task)

    return step


def main() -> None:
    if not torch.cuda.is_available():
        print("there is no CUDA device, and on a CPU nothing changes")
        return
    steps: dict[str, Callable[[], Step]] = {"CLIP ViT-B/32": clip, "ResNet-50": resnet, "resizing": resizing}
    steps |= {name: lambda name=name: graph_network(name) for name in ("gcn", "gat", "sage")}
    for name, make in steps.items():
        step = make()
        free = milliseconds(step)
        with deterministic_kernels():
            deterministic = milliseconds(step)
        free = min(free, milliseconds(step))
        print(f"{name:15} {free:8.2f} ms, deterministic {deterministic:8.2f} ms, {deterministic / free:.2f} times")


if __name__ == "__main__":
    main()
