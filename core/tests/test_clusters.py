"""The executors for clusters, on real local ones: the same results as in one process, whatever dies meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import plait
import pytest
from plait.errors import PlaitError, StoreError
from plait.executors.choice import Execution
from plait.executors.ray import _check_nodes
from plait.executors.same_code import Look, look_around
from plait.executors.slurm import _minutes
from plait.pipeline import load_pipeline
from plait.plan import make_plan
from plait.store import Store

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="Ray is not installed; pip install ray")
pytest.importorskip("submitit", reason="submitit is not installed; pip install submitit")

MARK = "PLAIT_TEST"  # in the environment of a test's processes
PIPELINE = """
plait: 1
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  slow:
    each: {pause: [0.011, 0.012, 0.013, 0.014, 0.015, 0.016, 0.017, 0.018, 0.019, 0.02, 0.021, 0.022]}
    transform: "./toy.py:Slow"
    from: {data: numbers.train}
    with: {pause: "${each.pause}", steps: 20}
    resources: {cpu: 1, memory: 10MiB}
  add: {transform: "./toy.py:Add", from: {data: numbers.test}, with: {amount: 2}}
  score: {evaluate: "./toy.py:Mean", from: {data: {a: add, b: numbers.train}}}
"""
DYING = """
plait: 1
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  dies: {transform: "./suicide.py:Dies", from: {data: numbers.train}}
  once: {transform: "./toy.py:Slow", from: {data: numbers.train}, with: {kill_at: 3}}
  behind: {transform: "./toy.py:Add", from: {data: dies}}
  large: {transform: "./full.py:Large", from: {data: numbers.train}}
  behind-large: {transform: "./toy.py:Add", from: {data: large}}
  score: {evaluate: "./toy.py:Mean", from: {data: numbers.train}}
"""
SUICIDE = """
import os, attrs, plait

@attrs.frozen
class Dies:
    @plait.hookimpl
    def transform(self, data, run):
        os._exit(3)
"""
FULL = """
import resource, attrs, plait

@attrs.frozen
class Large:
    @plait.hookimpl
    def transform(self, data, run):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # the others' results are smaller
        return [0.5] * 50_000
"""


def results(store):
    """Label → the result, without what says how often a step was started."""
    run = plait.run("p.yaml", store=store)
    found = {label: run[label] for label in run}
    return {
        label: value["data"] if isinstance(value, dict) and "starts" in value else value
        for label, value in found.items()
        if "score" not in label
    }


def processes(belongs):
    """Processes of this test's runs whose command line is of a kind; other tests may run beside it."""
    mark = f"{MARK}={Path.cwd()}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or mark not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if belongs(command):
            found.append(int(folder.name))
    return found


def workers():
    """Processes of Ray that carry out a job."""
    steps = (b"ray::slow", b"ray::numbers", b"ray::add", b"ray::score")
    return processes(lambda command: command.startswith(steps))


def start(*arguments):
    command = [sys.executable, "-m", "plait", "run", *arguments]
    # Ray's workers are nice by default, and would wait for whatever else this machine does.
    environment = {**os.environ, MARK: str(Path.cwd()), "RAY_worker_niceness": "0"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it starts with &
    )  # fmt: skip


def test_ray_with_workers_that_are_killed(workplace):
    Path("p.yaml").write_text(PIPELINE)
    process = start("p.yaml", "--executor", "ray", "--retries", "50", "--store", "disturbed")
    draw, killed = random.Random(0), 0
    while process.poll() is None:
        time.sleep(draw.uniform(0.1, 0.5))
        alive = workers()
        if alive and killed < 6:
            os.kill(draw.choice(alive), signal.SIGKILL)
            killed += 1
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert killed > 0
    assert "its worker died; it is tried again" in output
    assert not workers()
    assert len(list(Store(Path("disturbed").absolute()).entries())) == 15
    undisturbed = results("undisturbed")
    again = load_pipeline("p.yaml")
    assert all(Store(Path("disturbed").absolute()).has(task.key) for task in make_plan(again).tasks)
    assert results("disturbed") == undisturbed
    assert Store(Path("disturbed").absolute()).verify() == {}


def test_ray_fails_only_the_steps_whose_worker_dies_or_whose_result_has_no_room(workplace):
    Path("p.yaml").write_text(DYING)
    Path("suicide.py").write_text(SUICIDE)
    Path("full.py").write_text(FULL)
    process = start("p.yaml", "--executor", "ray")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "error: step dies: its worker died" in output
    assert f"error: step large: the store {Store().root} cannot be written (File too large); name another" in output
    assert "2 steps behind these were not run: behind, behind-large" in output
    pipeline = load_pipeline("p.yaml")
    stored = {task.label for task in make_plan(pipeline).tasks if Store().has(task.key)}
    assert stored == {"numbers", "once", "score"}
    assert not any((Store().root / "tmp").iterdir())
    assert not workers()


def test_ray_ends_with_ctrl_c(workplace):
    Path("p.yaml").write_text(PIPELINE.replace("steps: 20", "steps: 2000"))
    process = start("p.yaml", "--executor", "ray")
    deadline = time.monotonic() + 120
    while not workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert not workers()
    assert Store().verify() == {}


def test_slurms_local_executor(workplace):
    pipeline = PIPELINE.replace(
        "[0.011, 0.012, 0.013, 0.014, 0.015, 0.016, 0.017, 0.018, 0.019, 0.02, 0.021, 0.022]", "[0.02]"
    )
    Path("p.yaml").write_text(pipeline)
    slurm = Execution(executor="slurm", slurm={"cluster": "local", "time": "0:10:00"})
    run = plait.run("p.yaml", store="slurm", execution=slurm)
    assert not run.failed
    assert "slow.0.02" in run.labels
    log = (run.folder / "log.jsonl").read_text()
    assert '"event": "step_logged", "step": "slow.0.02"' in log
    assert list((run.folder / "slurm").glob("*.events")) == []
    assert results("slurm") == results("here")


def test_a_slurm_job_that_is_preempted_goes_on_from_its_checkpoint(workplace):
    Path("p.yaml").write_text(
        'plait: 1\nsteps:\n  n: {load-data: "./toy.py:Numbers"}\n  slow: {transform: "./toy.py:Slow", from: {data: n.train}, with: {steps: 60, pause: 0.05}}'
    )
    process = start("p.yaml", "--executor", "slurm", "--slurm", "cluster=local")
    done = Path("store/scratch")
    while process.poll() is None and not any(int(file.read_text() or 0) > 5 for file in done.rglob("done")):
        time.sleep(0.05)
    (job,) = processes(lambda command: b"submitit.core._submit" in command)
    os.kill(job, signal.SIGUSR2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    starts = plait.run("p.yaml")["slow"]["starts"]
    assert len(starts) == 2
    assert int(starts[1]) > 5


def test_slurms_debug_executor_fails_a_step_in_a_sentence(workplace):
    Path("p.yaml").write_text(
        'plait: 1\nsteps: {n: {load-data: "./toy.py:Numbers"}, f: {transform: "./toy.py:Fail", from: {data: n.train}}, s: {evaluate: "./toy.py:Mean", from: {data: n.train}}}'
    )
    run = plait.run("p.yaml", execution=Execution(executor="slurm", slurm={"cluster": "debug"}))
    assert list(run.failed) == ["f"]
    assert set(run.labels) == {"n", "s"}


def test_a_store_that_the_first_look_cannot_write(tmp_path):
    (tmp_path / "tmp").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written \(File exists\); name a folder that all nodes share"):
        _check_nodes(None, None, Store(tmp_path))


def test_what_another_machine_would_do_differently(workplace):
    Path("p.yaml").write_text(PIPELINE)
    plan = make_plan(load_pipeline("p.yaml"))
    probe = workplace / "probe"
    look = Look.at(plan, probe)
    assert not look_around(look).sees_store
    probe.write_text("probe")
    there = look_around(look)
    assert there.sees_store
    assert there.code == ()
    Path("toy.py").write_text(Path("toy.py").read_text() + "\n# another version\n")
    assert "toy.py is" in look_around(look).code[0]
    Path("toy.py").unlink()
    assert "there is no file" in look_around(look).code[0]
    lacking = attrs.evolve(look, methods={("transform", "plait-nowhere/nothing"): {}})
    assert "no method 'plait-nowhere/nothing'" in look_around(lacking).code[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"executor": "slurm"}, "there is no Slurm here"),
        ({"executor": "slurm", "slurm": {"cluster": "local", "time": "soon"}}, "time is 'soon'"),
        ({"executor": "slurm", "slurm": {"cluster": "local", "partitoin": "x"}}, "partitoin"),
        ({"executor": "ray", "address": "ray://127.0.0.1:1"}, "cannot be reached"),
        ({"executor": "dask"}, "executor is 'dask'; allowed is one of local, ray, slurm"),
        ({"address": "auto"}, "--address is for --executor ray"),
        ({"executor": "ray", "jobs": 2}, "--jobs is for processes of this machine"),
    ],
)
def test_executors_that_cannot_be_had(workplace, options, sentence, monkeypatch):
    monkeypatch.setenv("RAY_CLIENT_SERVER_MAX_THREADS", "1")
    Path("p.yaml").write_text(PIPELINE)
    with pytest.raises(PlaitError, match=sentence):
        plait.run("p.yaml", execution=Execution(**options))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("4:00:00", 240), ("10:30", 11), ("1-12", 2160), ("2-00:30:00", 2910), ("0:0:30", 1)],
)
def test_times_of_slurm(text, minutes):
    assert _minutes(text) == minutes
