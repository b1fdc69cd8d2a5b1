"""Speed of SemiDDM-Weather's parts: the wavelet transform, inference by steps and tiles, a step of stage 2 against stage 1.

    python benchmarks/semiddm.py [--side 128 --steps 1 2 4]
    python benchmarks/semiddm.py --device cuda --presets paper full256 [--batch 16]

The transform is compared with PyWavelets (the oracle of the tests) and with the product with a dense matrix, as WaveDiff
writes it. Inference takes the preset ``small`` on one square image of ``--side`` pixels: the whole image for several
numbers of steps, and 64-pixel tiles with stride 16 and 4. A training step of stage 2 (8 labelled and 8 unlabelled images)
is compared with one of stage 1. Memory is by how much a process of its own grows.

With ``--presets`` instead: what a training step of each stage of a preset costs (random images, batches of labelled and of
unlabelled ones, without the perceptual terms, whose weights are files of their own), what a photo of 1280 × 720 pixels
does in the preset's tiles, and the most memory that torch allocated on the device.

Ratios compare what ran in this one process, in processor time on one thread; the fastest of three. The transforms have to
agree within 1e-5, else the script ends with status 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pywt
import torch
from plait_semiddm_weather.model import WeatherRestorer
from plait_semiddm_weather.semiddm_weather import semiddm_weather
from plait_semiddm_weather.settings import Architecture, Training, preset
from plait_semiddm_weather.wavelets import SubBands
from torch import Tensor


def fastest(work: Callable[[], Any], repeats: int = 3) -> float:
    """Processor seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def growth(side: int, steps: int) -> float:
    """MiB by which the process grows while it restores one image (Linux); to be called in a fresh process."""
    torch.set_num_threads(1)
    model = WeatherRestorer(Architecture(num_train_timesteps=steps)).eval()
    image = torch.rand(1, 3, side, side)
    model.restore(torch.rand(1, 3, 16, 16), [0])  # libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    model.restore(image, [0])
    return resident("VmHWM") - before


def resident(entry: str) -> float:
    """An entry of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def peak_memory(side: int, steps: int) -> float:
    """:func:`growth` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(growth, (side, steps))


def dense_transform(image: Tensor) -> Tensor:
    """The Haar transform as products with dense H/2 × H matrices, which are built in every call."""
    side = image.shape[-1]
    low, high = torch.zeros(2, side // 2, side)
    rows = torch.arange(side // 2)
    low[rows, 2 * rows] = low[rows, 2 * rows + 1] = high[rows, 2 * rows] = 0.5**0.5
    high[rows, 2 * rows + 1] = -(0.5**0.5)
    top, bottom = low @ image, high @ image
    return torch.cat([top @ low.T, bottom @ low.T, top @ high.T, bottom @ high.T], dim=1)


class Textures:
    """Random images for training steps."""

    def __init__(self, count: int, pairs: bool, side: int = 64) -> None:
        self.images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        self.pairs, self.domains = pairs, [""] * count

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return (self.images[row] * 0.6 + 0.3, self.images[row]) if self.pairs else self.images[row] * 0.5 + 0.4

    def truth(self, row: int) -> None:
        return None


def transforms() -> bool:
    """Times and agreement of three Haar transforms, forth and back."""
    image = torch.rand(8, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    bands = SubBands()
    array = image.numpy()
    found = bands(image)
    ours = fastest(lambda: bands(image))
    others = {
        "PyWavelets": fastest(lambda: pywt.dwt2(array, "haar", axes=(-2, -1))),
        "dense matrices": fastest(lambda: dense_transform(image)),
    }
    print(f"DWT of 8 × 3 × 256 × 256, ours: {ours * 1e3:.1f} ms")
    for name, seconds in others.items():
        print(f"  {name}: {seconds / ours:.2f} times as long")
    back = fastest(lambda: bands.inverse(found))
    low, details = pywt.dwt2(array, "haar", axes=(-2, -1))
    theirs = fastest(lambda: pywt.idwt2((low, details), "haar", axes=(-2, -1)))
    print(f"IDWT, ours: {back * 1e3:.1f} ms\n  PyWavelets: {theirs / back:.2f} times as long")
    expected = torch.cat([torch.from_numpy(part) for part in (low, *details)], dim=1)
    agree = max(float((found - expected).abs().max()), float((found - dense_transform(image)).abs().max()))
    print(f"largest difference {agree:.1e}")
    return agree < 1e-5


def inference(side: int, steps: list[int]) -> None:
    """Seconds a megapixel by steps, and tiles against the whole image."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    megapixels = side * side / 1e6
    whole: dict[int, float] = {}
    for number in steps:
        model = WeatherRestorer(Architecture(num_train_timesteps=number)).eval()
        whole[number] = fastest(lambda model=model: model.restore(image, [0]))
        memory = peak_memory(side, number)
        print(
            f"{number} steps, whole image: {whole[number] / megapixels:.1f} s a megapixel, memory grows by {memory:.0f} MiB"
        )
    last = steps[-1]
    model = WeatherRestorer(Architecture(num_train_timesteps=last)).eval()
    for stride, repeats in ((16, 3), (4, 1)):
        tiled = fastest(lambda stride=stride: model.restore(image, [0], tile=64, stride=stride), repeats)
        print(f"{last} steps, tiles of 64, stride {stride}: {tiled / whole[last]:.1f} times the whole image")


def training() -> None:
    """A step of stage 2 against one of stage 1; what is done once is taken off by a run with fewer steps."""
    labelled, unlabelled = Textures(16, True), Textures(16, False)
    quick = {"ranker_steps": 1, "checkpoint_every": 10**6}

    def stage(rule: str, model: Any, **lengths: int) -> float:
        settings = Training(rule=rule, **quick, **lengths)
        others = None if rule == "supervised" else unlabelled
        return fastest(lambda: semiddm_weather(labelled, others, Architecture(), settings, model=model), 2)

    first = Training(rule="supervised", num_steps_stage1=1, **quick)
    start = semiddm_weather(labelled, None, Architecture(), first).model
    one = (stage("supervised", start, num_steps_stage1=9) - stage("supervised", start, num_steps_stage1=1)) / 8
    two = (stage("semiddm", start, num_steps_stage2=9) - stage("semiddm", start, num_steps_stage2=1)) / 8
    print(f"training step, stage 1: {one:.2f} s; stage 2: {two / one:.1f} times as long")


def at_full_size(name: str, batch: int, device: str) -> None:
    """Training steps of both stages and one photo, by wall time, with the networks and crops of a preset."""
    once = {"checkpoint_every": 10**6, "scorer": "ranker", "ranker_steps": 1, "curriculum": {}, "images_per_epoch": {}}
    without_files = {"perceptual_weight": 0.0, "contrast": "none", "strong_aug": "blur-erase"}

    def settings(rule: str, num_steps: int) -> tuple[Architecture, Training]:
        lengths = {"num_steps_stage1": num_steps, "num_steps_stage2": num_steps}
        return preset(name, rule=rule, batch_size=batch, **once, **without_files, **lengths)

    architecture, training = settings("supervised", 1)
    labelled, unlabelled = (Textures(2 * batch, pairs, training.crop_size) for pairs in (True, False))
    start = semiddm_weather(labelled, None, architecture, training, device=device).model

    def stage(rule: str, num_steps: int) -> float:
        others = None if rule == "supervised" else unlabelled
        architecture, training = settings(rule, num_steps)
        return wall(
            lambda: semiddm_weather(labelled, others, architecture, training, model=start, device=device), device
        )

    for number, rule in enumerate(("supervised", "semiddm"), start=1):
        stage(rule, 2)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds = (stage(rule, 12) - stage(rule, 2)) / 10
        print(f"{name}: {seconds:.3f} s a training step of stage {number}, batch {batch}, {allocated(device)}")
    model = start.to(device).eval()
    photo = torch.rand(1, 3, 720, 1280, device=device)
    side = training.crop_size

    def restored() -> Tensor:
        return model.restore(photo, [0], tile=side, stride=side // 2)

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(wall(restored, device) for _ in range(2))
    print(f"{name}: {seconds:.2f} s a photo of 1280 × 720, tiles of {side}, stride {side // 2}, {allocated(device)}")


def wall(work: Callable[[], Any], device: str) -> float:
    """Seconds, pending work on the device included."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def allocated(device: str) -> str:
    return "memory not measured" if device == "cpu" else f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def main() -> int:
    """0, or 1 where the transforms disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128, help="side of the image, in pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="numbers of diffusion steps")
    parser.add_argument(
        "--presets", nargs="+", default=[], help="measure these presets' training and restoring instead"
    )
    parser.add_argument("--batch", type=int, default=16, help="labelled, and as many unlabelled, images of a step")
    parser.add_argument("--device", default="cpu", help="of --presets")
    arguments = parser.parse_args()
    for name in arguments.presets:
        at_full_size(name, arguments.batch, arguments.device)
    if arguments.presets:
        return 0
    torch.set_num_threads(1)
    agree = transforms()
    inference(arguments.side, arguments.steps)
    training()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
