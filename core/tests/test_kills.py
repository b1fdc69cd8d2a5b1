"""Any process of a run may be killed at any moment: nothing lives on, nothing wrong is stored, nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plait.store import Store

pytestmark = pytest.mark.slow

KILLS = 30
# Without torch, whose import would take longer than the run.
METHODS = """
import json, os, time
import attrs, plait

@attrs.frozen(kw_only=True)
class Walk:
    length: int = 12

    @plait.hookimpl
    def transform(self, data, run):
        generator, place, start = run.numpy_generator(), 0.0, 0
        checkpoint = run.folder / "checkpoint"
        if checkpoint.exists():
            start, place, generator.bit_generator.state = json.loads(checkpoint.read_text())
        for step in run.track(range(start, self.length), "walking"):
            place += float(generator.standard_normal()) + sum(data)
            time.sleep(0.01)
            (run.folder / "new").write_text(json.dumps([step + 1, place, generator.bit_generator.state]))
            os.replace(run.folder / "new", checkpoint)
        return [place]
"""
PIPELINE = """
plait: 1
matrix: {seed: [0]}
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  walked:
    each: {length: [10, 12]}
    transform: ./walk.py:Walk
    from: {data: numbers.train}
    with: {length: "${each.length}"}
  on: {transform: "./walk.py:Walk", from: {data: walked.10}}
  score: {evaluate: "./toy.py:Mean", from: {data: {a: on, b: walked.12}}}
"""


def _session(leader: int) -> list[int]:
    """The processes that belong to the session of a process, zombies left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def _start(seeds: str, store: Path, jobs: int, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "plait",
        "run",
        "walk.yaml",
        f"matrix.seed={seeds}",
        "--store",
        str(store),
        "--jobs",
        str(jobs),
        "--quiet",
    ]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it starts with &
        )  # fmt: skip


def _checksums(store: Path) -> dict[str, dict[str, str]]:
    return {e.key: {name: fact["xxh3"] for name, fact in e.meta["files"].items()} for e in Store(store).entries()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_kills(workplace, jobs):
    (workplace / "walk.py").write_text(METHODS)
    (workplace / "walk.yaml").write_text(PIPELINE)
    log, store = workplace / "log.txt", workplace / "disturbed"
    draw = random.Random(jobs)
    seed = killed = 0
    while killed < KILLS:
        process = _start(f"[{seed}]", store, jobs, log)
        time.sleep(draw.uniform(0.3, 1.5))
        alive = _session(process.pid)
        if alive:
            os.kill(draw.choice(alive), draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            killed += 1
        code = process.wait(timeout=60)
        deadline = time.monotonic() + 20
        while (left := _session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"processes {left} outlive the run"
        # A negative code: the signal came before plait could take it, and Python itself says so.
        assert "Traceback" not in log.read_text(errors="replace") or code < 0, log.read_text(errors="replace")
        assert code in (0, 1, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
        seed += code == 0
    seeds = list(range(seed + 1))
    assert _start(f"{seeds}".replace(" ", ""), store, 1, log).wait(timeout=300) == 0, log.read_text()
    assert _start(f"{seeds}".replace(" ", ""), workplace / "undisturbed", 1, log).wait(timeout=300) == 0, (
        log.read_text()
    )
    assert not Store(store).verify()
    assert _checksums(store) == _checksums(workplace / "undisturbed")
