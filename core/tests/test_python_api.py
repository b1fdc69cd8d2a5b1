import json
import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import nbclient
import nbformat
import plait
import pytest
from plait import PipelineError
from plait.calling import hook_caller
from plait.displays import TimeLeft
from plait.plan import make_plan
from plait.runner import load_any

TEXT = """\
plait: 1
name: demo
matrix: {seed: [0, 1, 2], amount: [1, 2.5]}
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  more: {transform: "./toy.py:Add", from: {data: numbers.train}, with: {amount: "${matrix.amount}"}}
  several:
    each: {by: [1, 10]}
    transform: "./toy.py:Add"
    from: {data: numbers.train}
    with: {amount: "${each.by}"}
  score: {evaluate: "./toy.py:Mean", from: {data: {before: numbers.train, after: more}}}
"""
MAPPING = {
    "plait": 1,
    "name": "mapped",
    "steps": {
        "n": {"load-data": "./toy.py:Numbers", "with": {"size": 3, "names": ("a", "b")}},
        "s": {"evaluate": "./toy.py:Mean", "from": {"data": "n.train"}},
    },
}


@pytest.mark.slow
def test_pipelines_from_text_a_mapping_and_a_file(workplace):
    Path("demo.yaml").write_text(TEXT)
    results = [plait.run(source, ["matrix.seed=[0]"]) for source in ("demo.yaml", Path("demo.yaml"), TEXT)]
    assert len({tuple(task.key for task in result.plan.tasks) for result in results}) == 1
    assert len(plait.run(MAPPING).output("n")["train"]) == 3
    assert len(plait.run(MAPPING, ["steps.n.with.size=2"]).output("n")["train"]) == 2
    with pytest.raises(PipelineError, match=r"<text>:2:1: .*stepz"):
        plait.run("plait: 1\nstepz: {}")
    with pytest.raises(PipelineError, match=r"a file could not say: .* is a object; write plain values"):
        plait.run({**MAPPING, "seed": object()})
    with pytest.raises(PipelineError, match=r"no file demo2\.yaml"):
        plait.run("demo2.yaml")


def test_outputs_by_step_and_axes(workplace):
    result = plait.run(TEXT)
    numbers = result.output("numbers", seed=1)["train"]
    assert result.output("more", seed=1, amount=2.5) == [x + 2.5 for x in numbers]
    assert [one.axes["amount"] for one in result.outputs("more", seed=0)] == ["1", "2.5"]
    assert len(result.outputs("several", seed=0)) == 2
    assert len(result.outputs("several.10")) == 3
    assert len(result.outputs(seed=0)) == 1 + 2 + 2 + 2
    assert result.outputs("more", seed=9) == []
    assert [one.load() for one in result.outputs("numbers")][1]["train"] == numbers
    with pytest.raises(KeyError, match=r"6 results of step 'more' match {}; name one by its axes"):
        result.output("more")
    with pytest.raises(KeyError, match=r"no step 'mor' \(did you mean 'more'"):
        result.outputs("mor")
    with pytest.raises(KeyError, match="step numbers does not depend on 'amount'; it depends on seed"):
        result.outputs("numbers", amount=1)


def test_short_representations(workplace):
    result = plait.run(TEXT)
    assert repr(result).startswith("Result(demo: 21 of 21 steps finished, tables 'score'; runs/demo/")
    assert "n = 3" in result._repr_html_()
    assert repr(result.plan) == "Plan(demo: 21 steps, 6 cells)"
    assert "<td>more[seed=0,amount=2.5]</td>" in result.plan._repr_html_()
    assert repr(result.tables["score"]).splitlines()[1].split() == ["amount", "name", "mean", "↑"]
    assert repr(result.output("score", seed=0, amount=1)) == "Report(2 rows)"
    failed = plait.run(TEXT.replace("Add", "Fail").replace("""with: {amount: "${matrix.amount}"}""", "").replace(
        """    with: {amount: "${each.by}"}\n""", "    with: {how: '${each.by}'}\n").replace("by: [1, 10]", "by: [plait, none]").replace(", amount: [1, 2.5]", ""))  # fmt: skip
    assert "failed" in repr(failed)
    assert "the data is wrong" in failed._repr_html_()


def test_time_left():
    now = [0.0]
    left = TimeLeft(["a[seed=0]", "a[seed=1]", "b"], clock=lambda: now[0])
    assert left.seconds is None
    left.start("a[seed=0]")
    assert left.seconds is None
    now[0] = 10.0
    left.end("a[seed=0]", 10.0)
    assert left.seconds is None  # nothing is known about b
    left.start("b")
    now[0] = 12.0
    left.progress("b", 1, 4)
    assert left.seconds == pytest.approx(10 + 6)
    left.end("b", 8.0)
    left.start("a[seed=1]")
    now[0] = 15.0
    assert left.seconds == pytest.approx(7)
    left.end("a[seed=1]", 9.0)
    assert left.seconds == 0


def test_a_run_of_ones_own_shows_warnings_and_progress_on_a_terminal(tmp_path):
    (tmp_path / "own.py").write_text(
        "import plait\nrun = plait.Run()\nrun.warn('mind this')\nfor _ in run.track(range(3), 'counting'): pass\n"
    )
    piped = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "mind this" in piped.stderr
    assert "counting" not in piped.stderr
    with_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, 'own.py'])))"
    shown = subprocess.run([sys.executable, "-c", with_terminal], cwd=tmp_path, capture_output=True, text=True)
    assert "counting 3/3" in shown.stdout
    with pytest.warns(UserWarning, match="mind this"):
        plait.Run().warn("mind this")


NOISY = """
import logging, sys, warnings
import attrs
from plait import hookimpl
@attrs.frozen
class Noisy:
    @hookimpl
    def load_data(self, run):
        warnings.warn("a library's warning")
        logging.getLogger("library").warning("a library's log")
        for i in range(3):
            sys.stderr.write(f"\\rbar {i}")
        sys.stderr.write("\\n")
        return 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_libraries_write_goes_to_the_log(workplace, jobs):
    Path("noisy.py").write_text(NOISY)
    Path("p.yaml").write_text("plait: 1\nsteps: {n: {load-data: './noisy.py:Noisy'}}")
    command = [sys.executable, "-m", "plait", "run", "p.yaml", "--jobs", jobs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "reading p.yaml" in done.stderr
    assert "library" not in done.stderr
    assert "bar" not in done.stderr
    (log,) = Path("runs").glob("p/*/log.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (said,) = [event["text"] for event in events if event["event"] == "step_said"]
    assert "a library's warning" in said
    assert "a library's log" in said
    assert said.splitlines()[-1] == "bar 2"


@pytest.mark.slow
def test_in_a_notebook(workplace):
    Path("demo.yaml").write_text(TEXT)
    cells = [
        "import plait",
        "result = plait.run('demo.yaml')",
        "result",
        "result.tables['score']",
        "result.tables['score'].to_pandas()",
        "result.plan",
        "result.output('score', seed=0, amount=1)",
        "for i in plait.Run().track(range(3), 'counting'): pass",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells]
    (line,) = [output for output in outputs[1] if output.output_type == "display_data"]  # written over and over
    assert "21 of 21 steps" in line["data"]["text/plain"]
    for shown, part in (
        (2, "report.html"),
        (3, "<table>"),
        (4, "mean std"),
        (5, "more[seed=0,amount=1]"),
        (6, "after"),
    ):
        assert part in outputs[shown][0]["data"]["text/html"]
    assert "counting 3/3" in "".join(output["text"] for output in outputs[7])


def test_a_plan_needs_no_run(workplace):
    assert len(make_plan(load_any(TEXT)).tasks) == 21


@pytest.mark.slow
def test_on_a_terminal(workplace):
    Path("p.yaml").write_text(
        TEXT.replace("amount: [1, 2.5]", "amount: [1]").replace('"./toy.py:Add", from: {data: numbers.train}, with', '"./toy.py:Add", from: {data: slow.data}, with')
        .replace("  more:", '  slow: {transform: "./toy.py:Slow", from: {data: numbers.train}, with: {steps: 4, pause: 0.3}}\n  more:')
    )  # fmt: skip
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'plait', 'run', 'p.yaml'])))"
    done = subprocess.run(
        [sys.executable, "-c", spawn], capture_output=True, text=True, env={**os.environ, "COLUMNS": "150"}
    )
    assert done.returncode == 0, done.stdout
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    assert shown.startswith("reading p.yaml")
    assert re.search(r"whole run .* so far, about .* left", shown)
    assert re.search(r"slow\[seed=0\]  counting .* so far", shown)
    assert re.search(r"\+ score\[seed=0.*\]  [0-9.]+ s  mean \d", shown)  # the main figure beside a finished evaluation


def test_optional_arguments_of_a_hook_may_be_left_out_in_python():
    @attrs.frozen
    class Fuses:
        """Fuses."""

        @plait.hookimpl
        def merge(self, base, experts, data: dict | None, run):
            return base, experts, data, run

    assert Fuses().merge(1, [2], run=3) == (1, [2], None, 3)
    assert Fuses().merge(1, run=3, experts=[2]) == (1, [2], None, 3)
    assert Fuses().merge(1, [2], {"a": 4}, 3) == (1, [2], {"a": 4}, 3)
    with pytest.raises(TypeError, match="base"):
        Fuses().merge(experts=[2], run=3)
    assert hook_caller("merge", Fuses())(base=1, experts=2, data=None, run=4) == (1, 2, None, 4)
