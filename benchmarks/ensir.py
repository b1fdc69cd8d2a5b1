"""Speed and memory of EnsIR: seconds per megapixel, ratios to the plain average and to a loop over the cells.

    python benchmarks/ensir.py [--height 720 --width 1280 --bin-width 32 --models 3 --references 4 16]

The images are noisy copies of a smooth random one, 8 bit. Ratios compare what ran in this one process. The loop over
the cells is written for this comparison: a mask of the whole image per cell and channel, as EnsIR is usually explained.
Peak memory is that of a process of its own per number of reference images; it has to stay the same.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from plait_ensir.ensir import Estimator
from plait_ensir.gmm import Settings, Table, num_bins
from torch import Tensor


def scene(seed: int, num_models: int, height: int, width: int) -> list[Tensor]:
    """M candidates and the truth, uint8 ``[3, H, W]``."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(1, 3, height // 40 + 2, width // 40 + 2, generator=generator) * 255
    truth = torch.nn.functional.interpolate(rough, size=(height, width), mode="bicubic")[0]
    noisy = [truth + torch.randn(truth.shape, generator=generator) * 10 for _ in range(num_models)]
    return [image.clamp(0, 255).round().to(torch.uint8) for image in (*noisy, truth)]


def average(candidates: list[Tensor]) -> Tensor:
    """The plain average, float32 in [0, 1]."""
    total = candidates[0].float()
    for candidate in candidates[1:]:
        total += candidate
    return total.div_(255 * len(candidates))


def apply_by_cells(table: Table, candidates: list[Tensor]) -> Tensor:
    """The same result as ``table.apply``, cell after cell."""
    b, T = table.settings.bin_width, num_bins(table.settings.bin_width)
    levels = [candidate.float() for candidate in candidates]
    fused = torch.zeros_like(levels[0])
    for cell, bins in enumerate(itertools.product(range(T), repeat=len(candidates))):
        for c in range(3):
            inside = torch.ones_like(levels[0][c], dtype=torch.bool)
            for x, q in zip(levels, bins, strict=True):
                inside &= (x[c] >= q * b) & (x[c] < (q + 1) * b)
            if inside.any():
                fused[c][inside] = sum(w * x[c][inside] for w, x in zip(table.lut[cell, c], levels, strict=True))
    return fused / 255


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Processor time of the fastest of ``repeats`` runs; one thread, so other processes hardly matter."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def peak_mebibytes(arguments: argparse.Namespace, num_references: int) -> float:
    """Peak memory of a process that estimates a table from so many images, made one at a time."""
    command = [sys.executable, __file__, "--only-estimate", str(num_references)]
    for name in ("height", "width", "bin_width", "models"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def estimate(arguments: argparse.Namespace, num_references: int) -> Table:
    estimator = Estimator([str(m) for m in range(arguments.models)], Settings(bin_width=arguments.bin_width))
    for seed in range(num_references):
        *candidates, target = scene(seed, arguments.models, arguments.height, arguments.width)
        estimator.update(candidates, target)
    return estimator.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--bin-width", type=int, default=32)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--references", type=int, nargs="+", default=[4, 16], help="numbers of reference images")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only-estimate", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only_estimate:
        estimate(arguments, arguments.only_estimate)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return

    *candidates, target = scene(0, arguments.models, arguments.height, arguments.width)
    megapixels = arguments.height * arguments.width / 1e6
    estimator = Estimator([str(m) for m in range(arguments.models)], Settings(bin_width=arguments.bin_width))
    updating = seconds(lambda: estimator.update(candidates, target), 3)
    table = estimator.finish()
    fitting = seconds(estimator.finish, 3)
    averaging = seconds(lambda: average(candidates), arguments.repeats)
    applying = seconds(lambda: table.apply(candidates), arguments.repeats)
    fused: list[Tensor] = []
    looping = seconds(lambda: fused.append(apply_by_cells(table, candidates)), 1)
    torch.testing.assert_close(table.apply(candidates), fused[0], atol=1e-5, rtol=0)

    print(
        f"{arguments.width}×{arguments.height}, {arguments.models} models, bin width {arguments.bin_width}, one thread"
    )
    print(f"{'':32}{'s / megapixel':>14}{'× average':>11}{'loop / this':>13}")
    for label, duration in [
        ("plain average", averaging),
        ("apply", applying),
        ("apply, loop over the cells", looping),
        ("estimate, per reference image", updating),
    ]:
        print(f"{label:32}{duration / megapixels:>14.4f}{duration / averaging:>11.1f}{looping / duration:>13.1f}")
    print(f"{'EM of the whole table':32}{fitting:>12.3f} s{fitting / averaging:>11.1f}")
    peaks = {count: peak_mebibytes(arguments, count) for count in arguments.references}
    for count, peak in peaks.items():
        ratio = peak / peaks[arguments.references[0]]
        print(f"peak memory, {count} reference images: {peak:.0f} MiB (× {ratio:.2f})")


if __name__ == "__main__":
    main()
