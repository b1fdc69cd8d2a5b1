"""Any process of a run may be killed at any moment: nothing lives on, nothing wrong is stored, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plait.store import Store

pytestmark = pytest.mark.slow

AFRESH = 5  # every so many runs one is a process that starts Python: a kill may come while it imports, too
# Forks a process for every run, which has imported what runs import: starting Python would take most of the time.
SERVER = """
import json, os, sys
import jinja2, numpy, omegaconf, plait.cli, plait.executors.local, plait.report.html, plait.runner
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
log, *sys.argv[1:] = json.loads(line)
for number, file in enumerate((os.devnull, log, log)):
    os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
plait.cli.main()
"""
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


def _words(seeds: list[int], store: Path, jobs: int) -> list[str]:
    listed = ",".join(map(str, seeds))
    return ["run", "walk.yaml", f"matrix.seed=[{listed}]", "--store", str(store), "--jobs", str(jobs), "--quiet"]


def _start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "plait", *words], stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it starts with &
        )  # fmt: skip


class _Forked:
    """A run in a process that the server has forked, as far as it is used like a :class:`subprocess.Popen`."""

    def __init__(self, server: subprocess.Popen[bytes], words: list[str], log: Path) -> None:
        log.write_bytes(b"")
        self._server = server
        server.stdin.write(json.dumps([str(log), *words]).encode() + b"\n")
        self.pid = self.wait(timeout=60)

    def wait(self, timeout: float) -> int:
        """The server's next answer: the exit code."""
        answers, _, _ = select.select([self._server.stdout], [], [], timeout)
        assert answers, "the run does not end"
        return int(self._server.stdout.readline())


@pytest.fixture
def server(workplace):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


def _checksums(store: Path) -> dict[str, dict[str, str]]:
    return {e.key: {name: fact["xxh3"] for name, fact in e.meta["files"].items()} for e in Store(store).entries()}


# All but a few hit a run that has begun.
@pytest.mark.parametrize(("jobs", "kills"), [(1, 30), (2, 24)])
def test_kills(workplace, server, jobs, kills):
    (workplace / "walk.py").write_text(METHODS)
    (workplace / "walk.yaml").write_text(PIPELINE)
    log, store = workplace / "log.txt", workplace / "disturbed"
    draw = random.Random(jobs)
    seed = killed = runs = 0
    while killed < kills:
        words = _words([seed], store, jobs)
        if runs % AFRESH == 0:
            process, latest = _start(words, log), 1.5
        else:
            process, latest = _Forked(server, words, log), 1.0 if jobs > 1 else 0.6
        runs += 1
        time.sleep(draw.uniform(0, latest))
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
    for place in (store, workplace / "undisturbed"):
        assert _Forked(server, _words(seeds, place, 1), log).wait(timeout=300) == 0, log.read_text()
    assert not Store(store).verify()
    assert _checksums(store) == _checksums(workplace / "undisturbed")
