"""What steps ask for bounds what runs beside each other; what need not be kept is dropped."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import plait
import pytest
from click.testing import CliRunner
from plait.cli import main
from plait.errors import PipelineError
from plait.executors import local
from plait.executors.choice import Execution
from plait.interrupts import Interrupts, interrupts
from plait.pipeline import load_pipeline, parse_pipeline
from plait.plan import make_plan
from plait.resources import NOTHING, Resources, machine, parse_resources, sensible_jobs
from plait.scheduling import Progress
from plait.store import Store

CHAIN = """
plait: 1
steps:
  numbers: {load-data: "./toy.py:Numbers", keep: false}
  more: {transform: "./toy.py:Add", from: {data: numbers.train}, with: {amount: 1}, keep: false}
  most: {transform: "./toy.py:Add", from: {data: more}, with: {amount: 2}}
  score: {evaluate: "./toy.py:Mean", from: {data: {a: most, b: numbers.test}}}
"""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, NOTHING),
        ({"gpu": 1}, Resources(gpu=1)),
        ({"cpu": 2.5, "memory": "8GiB"}, Resources(cpu=2.5, memory=8 * 2**30)),
        ({"memory": "500 MB"}, Resources(memory=500_000_000)),
        ({"memory": 1024}, Resources(memory=1024)),
        ({"memory": "1.5kib"}, Resources(memory=1536)),
    ],
)
def test_what_a_pipeline_asks_for(given, wanted):
    assert parse_resources(given) == wanted


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{gpus: 1}", r"there is no resource 'gpus' \(did you mean 'gpu'\?\)"),
        ("{gpu: 0.5}", "gpu is 0.5; allowed is a whole number"),
        ("{gpu: true}", "gpu is True"),
        ("{cpu: -1}", "cpu is -1"),
        ("{cpu: .nan}", "cpu is nan"),
        ("{memory: lots}", "memory is 'lots'; write a number of bytes"),
        ("{memory: 8GX}", "memory is '8GX'"),
        ("[gpu]", r"resources is \['gpu'\]; it is a mapping"),
    ],
)
def test_resources_that_are_none(workplace, given, sentence):
    with pytest.raises(PipelineError, match=sentence) as raised:
        parse_pipeline(f'plait: 1\nsteps:\n  a:\n    load-data: "./toy.py:Numbers"\n    resources: {given}')
    assert raised.value.problems[0].startswith("<text>:5:")


def test_keep_is_true_or_false(workplace):
    with pytest.raises(PipelineError, match="keep is 'no'; allowed is true or false"):
        parse_pipeline('plait: 1\nsteps: {a: {load-data: "./toy.py:Numbers", keep: "no"}}')


def test_jobs_run_beside_each_other_as_far_as_they_fit(monkeypatch):
    monkeypatch.setattr(local, "machine", lambda: Resources(gpu=2, cpu=8, memory=1000))
    executor = local.Processes(8, lambda *_, **__: None, Interrupts())

    def running(*asked):
        executor._workers = [local._Worker(None, None, _job(resources)) for resources in asked]

    running()
    assert executor.has_room_for(Resources(gpu=100))  # alone, whatever it asks for
    running(Resources(gpu=1), NOTHING)
    assert executor.has_room_for(Resources(gpu=1))
    assert not executor.has_room_for(Resources(gpu=2))
    assert executor.has_room_for(Resources(cpu=8))
    running(Resources(memory=600, cpu=4))
    assert not executor.has_room_for(Resources(memory=600))
    assert executor.has_room_for(Resources(memory=400, cpu=4))
    running(Resources(cpu=100))
    assert not executor.has_room_for(Resources(cpu=1))
    assert executor.has_room_for(NOTHING)
    running(*[NOTHING] * 8)
    assert not executor.has_room_for(NOTHING)


class Signalled:
    """A process at whose start another thread of this one takes a Ctrl-C, as threads of libraries do."""

    thread = None

    def __init__(self, **_):
        self.started = False

    def start(self):
        signal.pthread_kill(self.thread.ident, signal.SIGINT)
        time.sleep(0.05)
        self.started = True


@pytest.fixture
def heeds_ctrl_c():
    """A shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_waits_until_a_process_has_started(monkeypatch, heeds_ctrl_c):
    done = threading.Event()
    monkeypatch.setattr(Signalled, "thread", threading.Thread(target=done.wait, daemon=True))
    Signalled.thread.start()
    with interrupts() as asked:
        executor = local.Processes(2, lambda *_, **__: None, asked)
        monkeypatch.setattr(executor, "_context", SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Signalled))
        with pytest.raises(KeyboardInterrupt):
            executor.submit(_job(NOTHING))
        (worker,) = executor._workers
        assert worker.process.started
    done.set()


def _job(resources):
    from plait.work import Job

    return Job("label", "key", "step", "transform", "method", {}, {}, 0, {}, Path(), Path(), None, resources)


def test_the_first_task_of_the_plan_that_fits_starts(workplace):
    Path("p.yaml").write_text(
        'plait: 1\nsteps:\n  a: {load-data: "./toy.py:Numbers", resources: {gpu: 1}}\n  b: {load-data: "./toy.py:Numbers"}\n'
        '  c: {load-data: "./toy.py:Numbers", resources: {gpu: 1}}\n  d: {load-data: "./toy.py:Numbers"}'
    )
    progress = Progress(make_plan(load_pipeline("p.yaml")), set())
    taken = [progress.next_ready(lambda resources: resources.gpu == 0).step.name for _ in range(2)]
    assert taken == ["b", "d"]
    assert progress.next_ready(lambda resources: resources.gpu == 0) is None
    assert [progress.next_ready().step.name for _ in range(2)] == ["a", "c"]


def test_results_that_need_not_be_kept(workplace):
    Path("p.yaml").write_text(CHAIN)
    run = plait.run("p.yaml")
    store = Store()
    keys = {task.step.name: task.key for task in run.plan.tasks}
    assert {name for name, key in keys.items() if store.has(key)} == {"most", "score"}
    assert not (store.folder(keys["more"]) / "artifact").exists()
    assert store.verify() == {}
    assert list(run.tables)
    first = run["most"]

    again = plait.run("p.yaml")  # nothing runs for what is dropped
    assert '"event": "step_started"' not in (again.folder / "log.jsonl").read_text()
    assert [table.rows for table in again.tables.values()] == [table.rows for table in run.tables.values()]

    shown = CliRunner().invoke(main, ["plan", "p.yaml"]).output
    assert "= numbers  load-data: ./toy.py:Numbers()  not needed (its result was not to be kept)" in shown
    assert "2 in the store, 0 to run, 2 not needed" in shown

    Path("p.yaml").write_text(CHAIN.replace("amount: 2", "amount: 3"))
    third = plait.run("p.yaml")  # what is needed again is made again
    assert third["most"] == pytest.approx([value + 1 for value in first])
    assert {task.step.name for task in third.plan.tasks if store.has(task.key)} == {"most", "score"}

    Path("p.yaml").write_text(CHAIN.replace(", keep: false", ""))  # keeping makes no other result
    fourth = plait.run("p.yaml")
    assert {task.step.name: task.key for task in fourth.plan.tasks} == keys


def test_what_another_run_needs_is_not_dropped(workplace):
    Path("p.yaml").write_text(CHAIN)
    plan = make_plan(load_pipeline("p.yaml"))
    keys = {task.step.name: task.key for task in plan.tasks}
    with Store().needed("another", [keys["numbers"]]):
        plait.run("p.yaml")
    assert Store().has(keys["numbers"])
    assert not Store().has(keys["more"])


@pytest.mark.slow
def test_a_sensible_number_of_processes(workplace):
    assert 1 <= sensible_jobs(1000) <= machine().cpu
    assert sensible_jobs(1) == 1
    Path("p.yaml").write_text(CHAIN)
    assert not plait.run("p.yaml", execution=Execution(jobs="auto")).failed
