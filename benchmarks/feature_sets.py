"""Feature sets: peak memory of writing and of reading them, against the number of images.

Each size runs in a process of its own: features of random images are written batch by batch, saved as a step's result is,
opened, and pooled. No model is run, so that what is measured is the sets alone.

    python benchmarks/feature_sets.py                        # 200, 2,000 images; half a minute on one core
    python benchmarks/feature_sets.py --images 200 20000     # 8 GB on disk

Exits with 1 if ten times the images take more than 1.1 times the memory, or if saving copies the shards.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BAR = 1.1
CHANNELS, SIDES = 160, (16, 32)  # 0.4 MB an image in half precision


def measure(num_images: int) -> dict[str, float]:
    import datasets
    import torch
    from plait import Run
    from plait_diffusion import Origin, open_features, save_features, write_features

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = datasets.Dataset.from_dict({"name": [str(number) for number in range(num_images)]})

        def compute(start: int, batch: datasets.Dataset) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(start)
            return {f"at {s}": torch.randn(len(batch), CHANNELS, s, s, generator=generator) for s in SIDES}

        begin = time.process_time()
        run = Run(folder=folder / "run")
        written = write_features(run, None, data, Origin(model="none"), compute, batch_size=8, dtype=torch.float16)
        save_features(written, folder / "saved")
        linked = all(file.stat().st_nlink == 2 for file in (folder / "saved").glob("*.safetensors"))
        pooled = open_features(folder / "saved").pooled().concat()
        total = sum(float(batch["concat"].sum()) for batch in pooled.batches(8))
        seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "images": num_images,
        "peak, MiB": peak,
        "ms an image": 1000 * seconds / num_images,
        "linked": linked,
        "sum": total,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return 0
    rows = []
    for count in arguments.images:
        command = [sys.executable, __file__, "--one", str(count)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(
            f"{count:>6} images: peak {rows[-1]['peak, MiB']:.0f} MiB, {rows[-1]['ms an image']:.1f} ms an image (processor time)"
        )
    ratio = rows[-1]["peak, MiB"] / rows[0]["peak, MiB"]
    print(
        f"memory: × {ratio:.2f} for × {arguments.images[-1] / arguments.images[0]:g} images; shards linked: {all(r['linked'] for r in rows)}"
    )
    return int(ratio > BAR or not all(row["linked"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
