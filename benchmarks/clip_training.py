"""Training speed of plait-clip against a plain loop over open_clip's own loss, on the same model and data.

Every number is a ratio of times measured in one process, the two sides taking turns, so that the load of the machine
hits them alike; shown is the median over rounds.

* ``plain loop``: open_clip's model, ClipLoss, AdamW of the same kind, images and full-length tokens ready in memory.
* ``reading loop``: the same, but images decoded and captions tokenised by a DataLoader in every epoch.
* ``captions``: the kit with equal captions encoded once in a batch against every caption encoded, at the share of
  distinct captions that the digits have (batch 128: about 60 distinct).
* ``class head``: the second zero-shot evaluation with an unchanged text tower, the head from memory against encoded.

    python benchmarks/clip_training.py              # about 2 minutes on one core
    python benchmarks/clip_training.py --device cuda --json out.json

Exits with 1 if the kit is slower than the plain loop by more than a tenth, or if a saving saves nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import datasets
import open_clip
import torch
import torchvision.transforms.v2 as transforms
from plait import Run
from plait_clip import prompts, training, zero_shot
from plait_clip.model import OpenClipModel, architectures
from plait_clip.pair_batches import PairLoader
from plait_clip.plugin.data import Digits
from plait_clip.toy_data import DIGIT_NAMES
from torch import Tensor

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
BATCH = 128
BARS = {"plain loop": 0.9, "reading loop": 1.0, "captions": 1.0, "class head": 1.0}


def fresh_model(device: torch.device) -> OpenClipModel:
    torch.manual_seed(0)
    return architectures.from_config(CONFIG).to(device).train()


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    return training.adamw(model, learning_rate=1e-4, weight_decay=0.1)


def kit(model: OpenClipModel, pairs: PairLoader) -> Callable[[int], None]:
    """Trains for some steps with the kit's loop."""
    optimizer = optimizer_of(model)
    per_epoch = len(pairs) // BATCH

    def run(steps: int) -> None:
        training.train(
            model,
            lambda epoch, skip: pairs.batches(BATCH, torch.Generator().manual_seed(epoch), skip=skip),
            training.contrastive_loss,
            optimizer,
            lambda step: 1e-4,
            num_epochs=steps // per_epoch,
            steps_per_epoch=per_epoch,
        )

    return run


def plain(model: OpenClipModel, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Callable[[int], None]:
    """Trains for some steps as one would with open_clip alone."""
    optimizer, loss_fn, inner = optimizer_of(model), open_clip.ClipLoss(), model.model

    def run(steps: int) -> None:
        source = itertools.chain.from_iterable(batches() for _ in itertools.count())
        for images, tokens in itertools.islice(source, steps):
            images, tokens = images.to(model.device), tokens.to(model.device)
            u, v, scale = inner(model.image_input(images), tokens)
            loss = loss_fn(u, v, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                inner.logit_scale.clamp_(0, training.MAX_LOG_SCALE)
            loss.item()

    return run


def ready_batches(model: OpenClipModel, data: datasets.Dataset) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    images, tokens = zip(*(_example(model, row) for row in data), strict=True)
    images, tokens = torch.stack(images), torch.stack(tokens)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            yield images[rows], tokens[rows]

    return batches


def read_batches(model: OpenClipModel, data: datasets.Dataset) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    def collate(rows: list[dict]) -> tuple[Tensor, Tensor]:
        images, tokens = zip(*(_example(model, row) for row in rows), strict=True)
        return torch.stack(images), torch.stack(tokens)

    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True, collate_fn=collate)
    return lambda: iter(loader)


_PREPROCESS = transforms.Compose(
    [
        transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(32),
        transforms.PILToTensor(),
        transforms.ToDtype(torch.float32, scale=True),
    ]
)


def _example(model: OpenClipModel, row: dict) -> tuple[Tensor, Tensor]:
    return _PREPROCESS(row["image"].convert("RGB")), model.tokenize([row["captions"][0]])[0]


def ratio(slow: Callable[[], None], fast: Callable[[], None], rounds: int, device: torch.device) -> float:
    """Median of the time of ``slow`` over that of ``fast``, taking turns; the first round warms up."""
    found = []
    for turn in range(rounds + 1):
        seconds = []
        for side in (slow, fast):
            started = clock(device)
            side()
            seconds.append(clock(device) - started)
        if turn:
            found.append(seconds[0] / seconds[1])
    return statistics.median(found)


def clock(device: torch.device) -> float:
    """Processor time on the CPU (other processes do not count), wall time on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(device: torch.device, rounds: int, wanted: list[str]) -> dict[str, float]:
    data = Digits().load_data(run=Run(seed=0))["train"]
    steps = len(data) // BATCH
    model = fresh_model(device)
    shared, apart = PairLoader(data, model), PairLoader(data, model, share_texts=False)
    ours = kit(model, shared)
    found = {}
    for name, batches in (("plain loop", ready_batches), ("reading loop", read_batches)):
        if name not in wanted:
            continue
        theirs = plain(fresh_model(device), batches(model, data))
        found[name] = ratio(lambda theirs=theirs: theirs(steps), lambda: ours(steps), rounds, device)
    if "captions" in wanted:
        other = kit(fresh_model(device), apart)
        found["captions"] = ratio(lambda: other(steps), lambda: ours(steps), rounds, device)
    if "class head" in wanted:
        templates = prompts.templates("openai-imagenet")
        found["class head"] = ratio(
            lambda: zero_shot.zero_shot_head(model, DIGIT_NAMES, templates, cache=False),
            lambda: zero_shot.zero_shot_head(model, DIGIT_NAMES, templates),
            rounds,
            device,
        )
    started = clock(device)
    ours(steps)
    found["pairs/s of the kit"] = steps * BATCH / (clock(device) - started)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(BARS), default=list(BARS), help="measure only these")
    parser.add_argument("--json", help="write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(torch.device(arguments.device), arguments.rounds, arguments.only)
    for name, value in found.items():
        print(f"{name:20s} {value:10.2f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)
    missed = [name for name in arguments.only if found[name] < BARS[name]]
    for name in missed:
        print(f"{name}: {found[name]:.2f} is below {BARS[name]}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
