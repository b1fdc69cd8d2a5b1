import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import plait
import pytest
from click.testing import CliRunner
from plait import PipelineError, PlaitError, hookimpl
from plait.cli import main
from plait.store import Store, own_sizes

PIPELINE = """\
plait: 1
name: demo
description: What it shows.
matrix:
  seed: [0, 1, 2]
  amount: [1, 2]
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  more: {transform: "./toy.py:Add", from: {data: numbers.train}, with: {amount: "${matrix.amount}", witness: witness.txt}}
  score: {evaluate: "./toy.py:Mean", from: {data: {before: numbers.train, after: more}}}
"""


@pytest.fixture
def demo(workplace):
    (workplace / "demo.yaml").write_text(PIPELINE)
    return workplace


def command(*arguments):
    """In this process: what matters is what the command does and says."""
    return CliRunner().invoke(main, arguments)


def cli(*arguments):
    """In a process of its own: what matters is how that ends."""
    return subprocess.run(
        [sys.executable, "-m", "plait.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        # A shell's background job ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_run_and_run_again(demo):
    result = plait.run("demo.yaml")
    assert len(result.labels) == 3 + 6 + 6
    before, after = result["numbers[seed=1]"]["train"], result["more[seed=1,amount=2]"]
    assert after == [x + 2 for x in before]
    assert result["numbers[seed=0]"] != result["numbers[seed=1]"]
    assert len(Path("witness.txt").read_text().split()) == 6
    table = result.tables["score"]
    assert table.index == ["amount", "name"]
    assert len(table.rows) == 4
    number = table.value("mean", amount="2", name="after")
    means = [sum(result[f"more[seed={s},amount=2]"]) / 4 for s in range(3)]
    assert number.mean == pytest.approx(sum(means) / 3)
    assert number.std == pytest.approx((sum((m - sum(means) / 3) ** 2 for m in means) / 2) ** 0.5)
    assert number.best
    again = plait.run("demo.yaml")
    assert len(Path("witness.txt").read_text().split()) == 6
    assert again.tables == result.tables


def test_only_what_changed_runs(demo):
    plait.run("demo.yaml")
    plait.run("demo.yaml", ["matrix.amount=[1,3]"])
    assert len(Path("witness.txt").read_text().split()) == 6 + 3
    plait.run("demo.yaml", ["steps.numbers.with.size=5"])
    assert len(Path("witness.txt").read_text().split()) == 9 + 6
    source = Path("toy.py").read_text()
    Path("toy.py").write_text(source.replace("value + self.amount", "value - self.amount"))
    result = plait.run("demo.yaml", ["matrix.seed=[0]"])
    assert result["more[seed=0,amount=1]"] == [x - 1 for x in result["numbers[seed=0]"]["train"]]


def test_deleted_intermediate_results_are_made_again_only_when_needed(demo):
    result = plait.run("demo.yaml", ["matrix.seed=[0]"])
    store = Store()
    key = next(task.key for task in result.plan.tasks if task.label == "numbers[seed=0]")
    store.remove(key)
    plait.run("demo.yaml", ["matrix.seed=[0]"])
    assert not store.has(key)
    plait.run("demo.yaml", ["matrix.seed=[0]", "matrix.amount=[5]"])
    assert store.has(key)


@pytest.mark.slow
def test_processes_give_the_same(demo):
    result = plait.run("demo.yaml", jobs=2)
    parallel = {label: result[label] for label in result}
    other = plait.run("demo.yaml", store=demo / "other")
    assert parallel == {label: other[label] for label in other}


FAILURES = {
    "plait": "the data is wrong",
    "none": "returned nothing",
    "model": "cannot be saved",
    "other": "ZeroDivisionError: division by zero",
}


# What no codec knows has plugins asked, which a process of its own would import anew.
@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "failures"), [(1, {**FAILURES, "type": "cannot be saved"}), (2, FAILURES)])
def test_failures_skip_what_depends_on_them(workplace, jobs, failures):
    Path("p.yaml").write_text("""\
plait: 1
steps:
  n: {load-data: "./toy.py:Numbers"}
  fine: {evaluate: "./toy.py:Mean", from: {data: n.train}}
""")
    with Path("p.yaml").open("a") as file:
        for how in failures:
            file.write(f'  {how}: {{transform: "./toy.py:Fail", from: {{data: n.train}}, with: {{how: {how}}}}}\n')
            file.write(f'  after-{how}: {{transform: "./toy.py:Add", from: {{data: {how}}}}}\n')
    result = plait.run("p.yaml", jobs=jobs)
    assert set(result.failed) == set(failures)
    assert result.not_run == {f"after-{how}": f"step {how} failed" for how in failures}
    assert "Steps that were not run" in (result.folder / "report.html").read_text()
    assert result["fine"].rows
    report = (result.folder / "report.md").read_text()
    for how, part in failures.items():
        assert part in result.failed[how]
        assert part.split(":")[0] in report


@pytest.mark.slow
def test_exit_codes_and_messages(demo):
    done = cli("run", "demo.yaml")
    assert done.returncode == 0
    assert "report: runs/demo/" in done.stdout
    Path("bad.yaml").write_text(
        PIPELINE.replace("./toy.py:Add", "./toy.py:Fail")
        .replace('{amount: "${matrix.amount}", witness: witness.txt}', "{}")
        .replace("  amount: [1, 2]\n", "")
    )
    done = command("run", "bad.yaml")
    assert done.exit_code == 1
    assert "the data is wrong; use other data" in done.stderr
    assert "Traceback" not in done.stderr
    done = command("run", "demo.yaml", "steps.numbers.with.size=x")
    assert done.exit_code == 2
    assert "size is 'x'" in done.stderr
    assert command("rum").exit_code == 2
    assert "did you mean 'run'" in command("rum").stderr
    assert command("run", "none.yaml").exit_code == 2
    assert "Traceback" in cli("--debug", "run", "none.yaml").stderr


def test_the_package_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "plait", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: plait ")


def test_store_that_cannot_be_written(demo):
    Path("file").write_text("")
    done = command("run", "demo.yaml", "--store", "file/store")
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
    done = command("run", "demo.yaml", "--out", "file/runs")
    assert done.exit_code == 1
    assert "--out" in done.stderr


SLOW = """\
plait: 1
name: slow
steps:
  n: {load-data: "./toy.py:Numbers"}
  slow: {transform: "./toy.py:Slow", from: {data: n.train}, with: {kill_at: 3, interrupt: INTERRUPT}}
  score: {evaluate: "./toy.py:Mean", from: {data: n.train}}
"""


@pytest.mark.slow
def test_resume_after_kill(workplace):
    Path("slow.yaml").write_text(SLOW.replace("INTERRUPT", "false"))
    assert cli("run", "slow.yaml").returncode == -signal.SIGKILL
    result = plait.run("slow.yaml")
    assert result["slow"]["starts"] == ["0", "3"]
    html = (result.folder / "report.html").read_text()
    assert "<polyline" in html
    extras = plait.runner.load_extras(next(t.key for t in result.plan.tasks if t.label == "slow"), result.store)
    assert extras[0].curves[0].y == (0, 1, 4, 9, 16)
    assert not list((Store().root / "scratch").glob("*"))


@pytest.mark.slow
def test_interrupt(workplace):
    Path("slow.yaml").write_text(SLOW.replace("INTERRUPT", "true"))
    done = cli("run", "slow.yaml")
    assert done.returncode == 130
    assert "resumes from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert plait.run("slow.yaml")["slow"]["starts"] == ["0", "3"]


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(workplace):
    Path("p.yaml").write_text("""\
plait: 1
steps:
  n: {load-data: "./toy.py:Numbers"}
  slow: {transform: "./toy.py:Slow", from: {data: n.train}, with: {steps: 10, pause: 0.1}}
  add: {transform: "./toy.py:Add", from: {data: n.train}, with: {witness: witness.txt}}
""")
    processes = [subprocess.Popen([sys.executable, "-m", "plait.cli", "run", "p.yaml", "--quiet"]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert plait.run("p.yaml")["slow"]["starts"] == ["0"]
    assert Path("witness.txt").read_text().split() == ["add"]


@pytest.mark.slow
def test_kill_at_any_moment_leaves_the_store_whole(demo):
    for delay in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3):
        process = subprocess.Popen(
            [sys.executable, "-m", "plait.cli", "run", "demo.yaml", "--quiet"], stdout=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.kill()
        process.wait()
        assert Store().verify() == {}
    assert not plait.run("demo.yaml").failed


class Listener:
    def __init__(self):
        self.seen = []

    @hookimpl
    def step_finished(self, step, seconds):
        self.seen.append(("finished", step))

    @hookimpl
    def step_cached(self, step):
        self.seen.append(("cached", step))

    @hookimpl
    def run_finished(self, failed):
        self.seen.append(("end", failed))


def test_listeners_and_log(demo):
    listener = Listener()
    result = plait.run("demo.yaml", ["matrix.seed=[0]", "matrix.amount=[1]"], listeners=[listener])
    assert listener.seen == [
        ("finished", "numbers[seed=0]"),
        ("finished", "more[seed=0,amount=1]"),
        ("finished", "score[seed=0,amount=1]"),
        ("end", []),
    ]
    events = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["run_started", *["step_started", "step_finished"] * 3, "run_finished"]
    provenance = json.loads((result.folder / "provenance.json").read_text())
    assert provenance["distributions"]["plait"] == plait.__version__
    assert {step["seed"] for step in provenance["steps"]} == {0}


def test_report_again(demo):
    result = plait.run("demo.yaml", ["matrix.seed=[0]"])
    first = (result.folder / "report.html").read_text()
    (result.folder / "report.html").unlink()
    Path("toy.py").write_text(Path("toy.py").read_text() + "# changed since\n")
    done = command("report", str(result.folder))
    assert done.exit_code == 0
    assert (result.folder / "report.html").read_text() == first
    assert command("report", ".").exit_code == 1


def test_plan_says_what_and_why(demo):
    assert "never run" in command("plan", "demo.yaml").stdout
    plait.run("demo.yaml")
    assert "15 in the store, 0 to run" in command("plan", "demo.yaml").stdout
    out = command("plan", "demo.yaml", "steps.numbers.with.size=5").stdout
    assert "changed: field size (4 → 5)" in out
    assert "changed: its inputs (numbers[seed=1])" in out


def test_changed_local_data_is_another_input(workplace):
    Path("m.py").write_text("""
import attrs
from pathlib import Path
from plait import hookimpl
@attrs.frozen
class Read:
    path: Path
    @hookimpl
    def load_data(self, run):
        return self.path.read_text()
""")
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: './m.py:Read', with: {path: ./data.txt}}}")
    Path("data.txt").write_text("one")
    assert plait.run("p.yaml")["a"] == "one"
    Path("data.txt").write_text("three")
    assert plait.run("p.yaml")["a"] == "three"


def test_a_class_that_a_field_names_in_a_file_is_an_input(workplace):
    Path("m.py").write_text("""
import attrs, runpy
from plait import hookimpl
@attrs.frozen
class Ask:
    whom: str
    @hookimpl
    def load_data(self, run):
        path, name = self.whom.split(":")
        return runpy.run_path(path)[name]()
""")
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: './m.py:Ask', with: {whom: 'own.py:answer'}}}")
    Path("own.py").write_text("def answer(): return 'one'")
    assert plait.run("p.yaml")["a"] == "one"
    Path("own.py").write_text("def answer(): return 'three'")
    assert plait.run("p.yaml")["a"] == "three"


def test_what_a_step_writes_beside_its_result_is_no_input(workplace):
    Path("m.py").write_text("""
import attrs
from pathlib import Path
from plait import Report, hookimpl
from plait.fields import output_field
@attrs.frozen
class Write:
    save_to: Path | None = output_field(None, "also written here")
    @hookimpl
    def load_data(self, run):
        if self.save_to is not None:
            self.save_to.mkdir(exist_ok=True)
            (self.save_to / "new.txt").write_text("x")
            with open("runs.txt", "a") as file:
                file.write("ran ")
        return "data"
@attrs.frozen
class Look:
    @hookimpl
    def evaluate(self, data, run):
        return Report(rows=[{"size": len(data)}])
""")
    Path("p.yaml").write_text(
        "plait: 1\nsteps:\n  a: {load-data: './m.py:Write', with: {save_to: ./out}}\n"
        "  b: {evaluate: './m.py:Look', from: {data: a}}"
    )
    plait.run("p.yaml")
    plait.run("p.yaml")
    assert Path("runs.txt").read_text() == "ran "
    (Path("out") / "new.txt").unlink()
    Path("out").rmdir()
    assert "gone: " in command("plan", "p.yaml").stdout
    assert plait.run("p.yaml")["a"] == "data"
    assert Path("runs.txt").read_text() == "ran ran "
    assert Path("out/new.txt").exists()
    assert "2 in the store, 0 to run" in command("plan", "p.yaml").stdout


def test_cache_commands(demo):
    plait.run("demo.yaml")
    *results, total = command("cache", "ls").stdout.splitlines()
    assert "15 results" in total
    sizes = [float(line.split()[1]) for line in results]
    assert sizes == sorted(sizes)
    assert command("cache", "verify").exit_code == 0
    entry = next(Store().entries())
    victim = next(p for p in entry.folder.rglob("*.json") if p.name == "value.json" or p.name == "codec.json")
    victim.write_bytes(victim.read_bytes()[::-1])
    assert command("cache", "verify").exit_code == 1
    assert command("cache", "verify", "--delete").exit_code == 0
    assert "14 results" in command("cache", "ls").stdout
    assert "deleted 14 results" in command("cache", "gc", "--older-than", "0").stdout


def test_what_takes_the_space(workplace):
    Path("p.yaml").write_text(
        'plait: 1\nmatrix: {size: [1, 1000]}\nsteps:\n  n: {load-data: "./toy.py:Numbers", with: {size: "${matrix.size}"}}\n'
        '  small: {transform: "./toy.py:Add", from: {data: n.train}}\n  fails: {transform: "./m.py:Fails", from: {data: n.train}}'
    )
    Path("m.py").write_text(
        "import attrs, plait\n@attrs.frozen\nclass Fails:\n    @plait.hookimpl\n    def transform(self, data, run):\n"
        "        (run.folder / 'checkpoint').write_bytes(bytes(2**20))\n        raise ValueError('no')\n"
    )
    assert command("run", "p.yaml").exit_code == 1
    lines = command("cache", "ls", "--by", "step").stdout.splitlines()
    assert [line.split()[5:] for line in lines[:2]] == [["in", "2", "small"], ["in", "2", "n"]]
    by_method = command("cache", "ls", "--by", "method").stdout.splitlines()
    assert by_method[1].endswith("./toy.py:Numbers")
    entries = list(Store().entries())
    total, own = sum(entry.size for entry in entries), own_sizes({"": entries})[""]
    assert f"4 results, {total / 2**20:.2f} MiB ({own / 2**20:.2f} on the disk" in lines[2]
    assert lines[3].startswith("2 steps that did not finish keep 2.00 MiB")


def test_python_use():
    from plait.methods import find

    add = plait.load(f"{Path(__file__).with_name('toy.py')}:Add", amount=2)
    assert add.transform([1, 2], plait.Run()) == [3, 4]
    with pytest.raises(PlaitError, match="did you mean 'amount'"):
        plait.load(f"{Path(__file__).with_name('toy.py')}:Add", amout=2)
    with pytest.raises(PlaitError, match="no method"):
        plait.load("no-such-method")
    assert find("transform", f"{Path(__file__).with_name('toy.py')}:Add").arguments == {"data": True}
    with pytest.raises(PipelineError):
        plait.run("missing.yaml")


def test_run_draws_are_independent_and_repeatable(tmp_path):
    one, two = plait.Run(seed=1, step="a"), plait.Run(seed=1, step="b")
    assert one.derived_seed() == plait.Run(seed=1, step="a").derived_seed()
    assert (
        len({one.derived_seed(), one.derived_seed("x"), two.derived_seed(), plait.Run(seed=2, step="a").derived_seed()})
        == 4
    )
    assert list(one.track([1, 2, 3], "x")) == [1, 2, 3]
    with pytest.raises(PlaitError, match="unknown to torch"):
        plait.Run(requested_device="quantum").device  # noqa: B018 - the property is what is tested


def test_steps_that_the_matrix_does_not_choose_are_not_run(workplace):
    Path("p.yaml").write_text("""\
plait: 1
matrix: {which: [one, two]}
steps:
  n: {load-data: "./toy.py:Numbers"}
  one: {transform: "./toy.py:Add", from: {data: n.train}, with: {amount: 1, witness: witness.txt}}
  two: {transform: "./toy.py:Add", from: {data: n.train}, with: {amount: 2, witness: witness.txt}}
  three: {transform: "./toy.py:Add", from: {data: n.train}, with: {amount: 3, witness: witness.txt}}
  score: {evaluate: "./toy.py:Mean", from: {data: "${matrix.which}"}}
""")
    plait.run("p.yaml", ["matrix.which=[two]"])
    assert Path("witness.txt").read_text().split() == ["two"]
    plait.run("p.yaml")
    assert Path("witness.txt").read_text().split() == ["two", "one"]


def test_nothing_is_written_into_what_is_stored(workplace):
    Path("m.py").write_text("""
import attrs
import datasets
from plait import hookimpl
@attrs.frozen
class Make:
    @hookimpl
    def load_data(self, run):
        return datasets.Dataset.from_dict({"x": [1, 2, 3]})
@attrs.frozen
class Map:
    @hookimpl
    def transform(self, data, run):
        data.sort("x", reverse=True)
        return data.map(lambda row: {"x": row["x"] + 1}).filter(lambda row: row["x"] > 2)
""")
    Path("p.yaml").write_text(
        "plait: 1\nsteps:\n  a: {load-data: './m.py:Make'}\n  b: {transform: './m.py:Map', from: {data: a}}\n"
    )
    result = plait.run("p.yaml")
    assert result["b"]["x"] == [3, 4]
    for entry in Store().entries():
        files = {str(path.relative_to(entry.folder)) for path in entry.folder.rglob("*") if path.is_file()}
        assert files == {*entry.meta["files"], "meta.json"}
        assert not any(path.stat().st_mode & 0o222 for path in entry.folder.rglob("*"))
    assert Store().verify() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_signals_end_a_run_with_a_report(workplace, number, code, word, jobs):
    Path("slow.yaml").write_text(SLOW.replace("kill_at: 3, interrupt: INTERRUPT", "steps: 1000, pause: 0.05"))
    command = [sys.executable, "-m", "plait.cli", "run", "slow.yaml", "--jobs", jobs]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    log = None
    while log is None or '"step_started", "step": "slow"' not in log.read_text():
        log = next(Path().glob("runs/slow/*/log.jsonl"), None)
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{word}; what is finished is kept" in err
    assert "Traceback" not in err
    report = next(Path().glob("runs/slow/*/report.md")).read_text()
    assert "- slow: the run ended before it" in report
    assert "Failed steps" not in report
    again = plait.run("slow.yaml", ["steps.slow.with.pause=0"])
    assert not again.failed


@pytest.mark.slow
def test_an_interrupt_in_a_destructor_is_not_lost(workplace):
    Path("m.py").write_text("""
import os, signal, time
import attrs
from plait import hookimpl
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
@attrs.frozen
class Swallow:
    @hookimpl
    def load_data(self, run):
        Last()
        for _ in run.track(range(3), "after"):
            pass
        return 1
""")
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: './m.py:Swallow'}}\n")
    assert cli("run", "p.yaml").returncode == 130


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_own_step(workplace):
    Path("p.yaml").write_text("""\
plait: 1
steps:
  n: {load-data: "./toy.py:Numbers"}
  dies: {transform: "./toy.py:Slow", from: {data: n.train}, with: {kill_at: 1}}
  after: {transform: "./toy.py:Add", from: {data: dies}}
  fine: {transform: "./toy.py:Slow", from: {data: n.train}, with: {pause: 0.1}}
  then: {evaluate: "./toy.py:Mean", from: {data: n.train}}
""")
    result = plait.run("p.yaml", jobs=2)
    assert set(result.failed) == {"dies"}
    assert "SIGKILL" in result.failed["dies"]
    assert set(result.not_run) == {"after"}
    assert set(result.labels) == {"n", "fine", "then"}
    assert plait.run("p.yaml", jobs=2)["dies"]["starts"] == ["0", "1"]


@pytest.mark.slow
def test_no_process_outlives_the_main_one(workplace):
    Path("p.yaml").write_text("""\
plait: 1
matrix: {seed: [0, 1]}
steps:
  n: {load-data: "./toy.py:Numbers"}
  slow: {transform: "./toy.py:Slow", from: {data: n.train}, with: {steps: 1000, pause: 0.1}}
""")
    process = subprocess.Popen(
        [sys.executable, "-m", "plait.cli", "run", "p.yaml", "--jobs", "2"], stderr=subprocess.DEVNULL
    )
    while len(list(Path("store/scratch").glob("*/log.jsonl"))) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()

    def alive():
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if (place / "cwd").resolve() == workplace and int(place.name) != os.getpid():
                    found.append((place / "cmdline").read_bytes())
            except OSError:
                continue
        return found

    for _ in range(100):
        if not alive():
            return
        time.sleep(0.1)
    raise AssertionError(alive())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["method", "import"])
def test_sys_exit_is_a_failure_of_the_step(workplace, where):
    Path("m.py").write_text(f"""
import sys
import attrs
from plait import hookimpl
{"sys.exit(0)" if where == "import" else ""}
@attrs.frozen
class Leave:
    @hookimpl
    def load_data(self, run):
        sys.exit(0)
""")
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: './m.py:Leave'}}\n")
    done = cli("run", "p.yaml")
    assert done.returncode == (2 if where == "import" else 1)
    assert ("SystemExit" if where == "import" else "called sys.exit(0)") in done.stderr


def test_a_report_that_cannot_be_written_loses_nothing(workplace, capfd):
    Path("m.py").write_text("""
from pathlib import Path
import attrs
from plait import Report, hookimpl
@attrs.frozen
class Wide:
    blocked: bool = True
    @hookimpl
    def evaluate(self, run):
        if self.blocked:  # the report cannot be written where a folder is
            (max(Path("runs/p").iterdir()) / "report.md").mkdir()
        return Report(rows=[{"x": 1.0}], title="x" * 500 + "ä" * 500)
""")
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {evaluate: './m.py:Wide'}}\n")
    result = plait.run("p.yaml")
    assert result.labels == ["a"]
    assert f"plait report {result.folder} writes it again" in capfd.readouterr().err
    result = plait.run("p.yaml", ["steps.a.with.blocked=false"])
    assert len(list(result.folder.glob("*.csv"))) == 1


def test_flipped_bytes_are_never_used(demo):
    first = plait.run("demo.yaml", ["matrix.seed=[0]"])
    tables = first.tables
    key = next(task.key for task in first.plan.tasks if task.label == "numbers[seed=0]")
    file = next(path for path in (Store().folder(key) / "artifact").rglob("value.json"))
    file.chmod(0o644)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"0.", b"1.", 1))
    listener = Warned()
    again = plait.run("demo.yaml", ["matrix.seed=[0]", "matrix.amount=[1, 2, 5]"], listeners=[listener])
    assert listener.seen == [
        (
            "numbers[seed=0]",
            "its stored result is damaged (artifact/content/value.json); it is computed anew",
        )
    ]
    assert file.read_bytes() == content
    assert again.tables["score"].value("mean", amount="1", name="after") == tables["score"].value(
        "mean", amount="1", name="after"
    )
    assert Store().verify() == {}


class Warned:
    def __init__(self):
        self.seen = []

    @hookimpl
    def step_warned(self, step, message):
        self.seen.append((step, message))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [0, 1, 4, 12])
def test_a_limit_on_files_ends_in_a_sentence(workplace, kilobytes):
    Path("p.yaml").write_text(
        'plait: 1\nsteps: {n: {load-data: "./toy.py:Numbers", with: {size: 900}}, s: {evaluate: "./toy.py:Mean", from: {data: n.train}}}'
    )
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes} * 1024,) * 2);"
        "from plait.cli import main; sys.argv = ['plait', 'run', 'p.yaml']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said
    assert "Traceback" not in said
    assert "cannot be written (File too large" in said


def test_a_result_that_is_damaged_is_not_read(workplace):
    Path("p.yaml").write_text('plait: 1\nsteps: {n: {load-data: "./toy.py:Numbers"}}')
    result = plait.run("p.yaml")
    entry = next(Store().entries())
    file = max((entry.folder / name for name in entry.meta["files"]), key=lambda path: path.stat().st_size)
    file.chmod(0o644)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"0", b"1"))
    with pytest.raises(
        PlaitError, match=r"n: its stored result is damaged \(artifact/.*\); plait cache verify --delete"
    ):
        result["n"]
    Store().remove(entry.key)
    assert plait.run("p.yaml")["n"]
