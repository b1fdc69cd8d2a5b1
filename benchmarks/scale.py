"""How planning and running grow with the number of steps, and what a step costs beside its own work.

Ratios within one run; CPU seconds of this process unless said otherwise. The aims: 5,000 steps cost at most 12 times what 500
do in loading, planning and running each; under 2 ms for a stored step and under 10 ms for a computed one.

    python benchmarks/scale.py
    python benchmarks/scale.py --small      # 100 and 1,000 steps
    python benchmarks/scale.py --executors  # 200 cells of about 50 ms in one process, in processes, on Ray
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from plait import codecs
from plait.executors.choice import Execution
from plait.pipeline import load_pipeline
from plait.plan import explain, make_plan
from plait.runner import run_pipeline
from plait.store import Store, own_sizes

METHODS = """
import time
import attrs, plait

@attrs.frozen(kw_only=True)
class Numbers:
    @plait.hookimpl
    def load_data(self, run):
        return [1.0, 2.0]

@attrs.frozen(kw_only=True)
class Add:
    amount: float = 0.0
    seconds: float = 0.0

    @plait.hookimpl
    def transform(self, data, run):
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return [value + self.amount for value in data]

@attrs.frozen(kw_only=True)
class Mean:
    @plait.hookimpl
    def evaluate(self, data, run):
        return plait.Report(rows=[{"mean": sum(data) / len(data)}])
"""


def write_pipeline(folder: Path, num_steps: int) -> Path:
    """Cells of ten steps each, one behind the other."""
    (folder / "methods.py").write_text(METHODS)
    lines = ["plait: 1", f"matrix: {{part: [{', '.join(map(str, range(num_steps // 10)))}]}}", "steps:"]
    lines.append('  n: {load-data: "./methods.py:Numbers"}')
    for i in range(9):
        before = f"a{i - 1}" if i else "n"
        lines.append(
            f'  a{i}: {{transform: "./methods.py:Add", from: {{data: {before}}}, with: {{amount: "${{matrix.part}}"}}}}'
        )
    lines.append('  m: {evaluate: "./methods.py:Mean", from: {data: a8}}')
    path = folder / f"steps-{num_steps}.yaml"
    path.write_text("\n".join(lines))
    return path


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of this process, and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def growth(folder: Path, small: int, large: int) -> None:
    """Loading, planning, running and explaining for two numbers of steps."""
    load_pipeline(write_pipeline(folder, 10))  # imports
    times: dict[str, list[float]] = {}
    for num_steps in (small, large):
        path, store = write_pipeline(folder, num_steps), Store(folder / f"store-{num_steps}")
        loading, pipeline = seconds(lambda path=path: load_pipeline(path))
        planning, plan = seconds(lambda pipeline=pipeline: make_plan(pipeline))
        running, _ = seconds(lambda pipeline=pipeline, store=store: run_pipeline(pipeline, store, folder / "runs"))
        again, _ = seconds(lambda pipeline=pipeline, store=store: run_pipeline(pipeline, store, folder / "runs"))
        changed = make_plan(load_pipeline(path, ["steps.a0.with.amount=0.5"]))
        explaining, _ = seconds(lambda changed=changed, store=store: explain(changed, store))
        tasks = len(plan.tasks)
        print(
            f"{tasks:5d} steps: load {loading:.2f} s, plan {planning:.2f} s, run {running:.2f} s ({1000 * running / tasks:.1f} ms a step), "
            f"all stored {again:.2f} s ({1000 * again / tasks:.2f} ms a step), explain a change {explaining:.2f} s"
        )
        measured = {"load": loading, "plan": planning, "run": running, "all stored": again, "explain": explaining}
        for name, value in measured.items():
            times.setdefault(name, []).append(value)
    print(
        f"{large // small} times the steps cost: "
        + ", ".join(f"{name} {b / a:.1f} ×" for name, (a, b) in times.items())
    )


def checksums(folder: Path) -> None:
    """What comparing a result with its checksums costs, against loading it and reading every value."""
    store, key = Store(folder / "store-data"), "ab" * 32
    images = np.random.default_rng(0).integers(0, 256, (20_000, 3 * 32 * 32), dtype=np.uint8)

    def save(place: Path) -> None:
        Dataset.from_dict({"image": list(images)}).save_to_disk(place / "artifact")

    entry = store.put(key, save, {})
    os.sync()
    comparing = min(seconds(lambda: store.changed_files(key))[0] for _ in range(5))
    data = Dataset.load_from_disk(str(entry.folder / "artifact")).with_format("numpy")
    loading = min(seconds(lambda: [batch["image"].sum() for batch in data.iter(256)])[0] for _ in range(3))
    print(
        f"checksums of {entry.size / 2**20:.0f} MiB of images: {comparing:.3f} s, {comparing / loading:.1%} of loading them in batches"
    )


def columns(folder: Path) -> None:
    """What a dataset adds to the store whose large column was there before, and what it costs beside one file for all."""
    store, first, second = Store(folder / "store-columns"), "00" * 32, "11" * 32
    images = np.random.default_rng(0).integers(0, 256, (5_000, 3 * 64 * 64), dtype=np.uint8)
    labels = np.arange(5_000)
    data = Dataset.from_dict({"image": [image.tobytes() for image in images], "label": labels})
    store.put(first, lambda place: codecs.save(data, place / "artifact"), {})
    passed_on = codecs.load(store.folder(first) / "artifact").add_column("double", 2 * labels)
    ways: dict[str, Callable[[Path], None]] = {
        "in one file": lambda place: passed_on.save_to_disk(place / "artifact"),
        "by column": lambda place: codecs.save(passed_on, place / "artifact"),
    }
    disable_progress_bars()
    taken, added = {}, {}
    for name, save in ways.items():
        times = []
        for _ in range(7):
            store.remove(second)
            times.append(seconds(lambda save=save: store.put(second, save, {}))[0])
        taken[name] = min(times)
        entries = {key: [entry] for key in (first, second) if (entry := store.entry(key))}
        added[name] = own_sizes(entries)[second] / 2**20
    size = entries[first][0].size / 2**20
    print(
        f"a dataset with one more column than one of {size:.0f} MiB: adds {added['by column']:.2f} MiB stored by column,"
        f" {added['in one file']:.0f} MiB in one file; storing it costs {taken['by column'] / taken['in one file']:.2f} ×"
    )


def executors(folder: Path) -> None:
    """200 cells of about 50 ms of work: wall time of the run on each executor."""
    (folder / "methods.py").write_text(METHODS)
    parts = ", ".join(map(str, range(200)))
    (folder / "cells.yaml").write_text(
        f'plait: 1\nmatrix: {{part: [{parts}]}}\nsteps:\n  n: {{load-data: "./methods.py:Numbers"}}\n'
        '  a: {transform: "./methods.py:Add", from: {data: n}, with: {amount: "${matrix.part}", seconds: 0.05}}\n'
    )
    pipeline = load_pipeline(folder / "cells.yaml")
    kinds = {"one process": Execution(), "2 processes": Execution(jobs=2), "Ray": Execution(executor="ray")}
    first = None
    for name, execution in kinds.items():
        start = time.perf_counter()
        run_pipeline(pipeline, Store(folder / f"store-{name[:1]}"), folder / "runs", execution)
        wall = time.perf_counter() - start
        first = first or wall
        print(f"200 cells of 50 ms, {name}: {wall:.1f} s with its start, {first / wall:.2f} × one process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="100 and 1,000 steps")
    parser.add_argument("--executors", action="store_true", help="also the executors, which takes a minute or two")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        growth(folder, *((100, 1000) if arguments.small else (500, 5000)))
        checksums(folder)
        columns(folder)
        if arguments.executors:
            executors(folder)


if __name__ == "__main__":
    main()
