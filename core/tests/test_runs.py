import json
from pathlib import Path

import plait
import pytest
from click.testing import CliRunner
from plait import PlaitError
from plait.cli import main
from plait.comparing import compare
from plait.runs import find_run, open_run, past_runs

PIPELINE = """\
plait: 1
name: demo
matrix: {seed: [0, 1, 2]}
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  more: {transform: "./toy.py:Add", from: {data: numbers.train}, with: {amount: 1}}
  score: {evaluate: "./toy.py:Mean", from: {data: {before: numbers.train, after: more}}}
"""


@pytest.fixture
def demo(workplace):
    (workplace / "demo.yaml").write_text(PIPELINE)
    return workplace


def cli(*arguments, code=0):
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


def test_runs_are_listed_and_found_again(demo):
    assert "there are no runs in runs" in cli("runs")
    first, second = plait.run("demo.yaml").folder, plait.run("demo.yaml", ["steps.more.with.amount=2"]).folder
    listed = cli("runs").splitlines()
    assert {line.split()[0] for line in listed} == {first.name, second.name}
    assert all("3 cells    9 steps  fine  score: mean" in line for line in listed)
    assert json.loads(cli("runs", "--json"))[0]["pipeline"] == "demo"
    for name in (first.name, str(first), first.name[:-1]):
        assert find_run(name, Path("runs")) == first
    assert find_run("last", Path("runs")) == find_run("demo", Path("runs")) == past_runs(Path("runs"))[0].folder
    with pytest.raises(PlaitError, match="there is no run 'dem' in runs \\(did you mean 'demo'"):
        find_run("dem", Path("runs"))
    with pytest.raises(PlaitError, match="2 runs begin with '20"):
        find_run("20", Path("runs"))


def test_a_run_is_shown_after_the_fact(demo):
    folder = plait.run("demo.yaml").folder
    (demo / "toy.py").unlink()  # neither the methods nor the store are needed
    shown = cli("show", folder.name)
    assert "fine" in shown
    assert "after" in shown
    assert "n = 3 seeds" in shown
    assert cli("show", "demo", "--format", "markdown").startswith("| name | mean ↑ |\n")
    assert cli("show", "last", "--format", "latex").startswith("\\begin{tabular}")
    assert open_run(folder).tables[0].value("mean", name="after").count == 3


def test_a_run_without_results_says_so(demo):
    folder = plait.run("demo.yaml").folder
    (folder / "results.json").unlink()
    assert "no report" in cli("runs")
    assert f"plait report {folder}" in cli("show", str(folder), code=1)
    cli("report", str(folder))
    assert "fine" in cli("runs")


def test_failures_are_shown(demo):
    Path("demo.yaml").write_text(PIPELINE.replace("Add", "Fail").replace("{amount: 1}", "{}"))
    plait.run("demo.yaml")
    assert "3 failed, 3 not run" in cli("runs")
    assert "step more[seed=0] failed: the data is wrong; use other data" in cli("show", "last")


def test_runs_beside_each_other(demo):
    one = plait.run("demo.yaml").folder
    other = plait.run("demo.yaml", ["steps.more.with.amount=2"]).folder
    document = compare([one, other])
    differs, score = document.tables
    assert (("steps.more.with.amount", "1", "2"), ()) in differs.rows
    assert not [texts for texts, _ in differs.rows if "version of" in texts[0]]
    assert score.metrics == ["mean ↑ · A", "mean ↑ · B", "mean ↑ · B − A"]
    rows = {texts[0]: numbers for texts, numbers in score.rows}
    assert rows["after"][2].text == "▲ +1.000"  # the same seeds: it is 1 for every one
    assert rows["before"][2].text == "≈ +0.000"
    assert "3 of 9 steps" in document.description
    shown = cli("report", str(one), str(other), "--to", "both.html")
    assert "steps.more.with.amount" in shown
    assert "▲ +1.000" in Path("both.html").read_text()


def test_runs_that_hardly_compare(demo):
    one = plait.run("demo.yaml", ["matrix.seed=[0]"]).folder
    Path("other.yaml").write_text(PIPELINE.replace("name: demo", "name: other").replace("score:", "result:"))
    other = plait.run("other.yaml").folder
    document = compare([one, other])
    assert [table.title for table in document.tables] == ["What differs"]
    assert document.notes == ["table score is only in A", "table result is only in B"]
    with pytest.raises(PlaitError, match="named twice"):
        compare([one, one])
    third = plait.run("demo.yaml", ["matrix.seed=[0]", "steps.more.with.amount=3"]).folder
    assert dict(compare([one, third]).tables[1].rows)[("after",)][2].text == "+2.000"  # single values: no spread


def test_a_report_is_written_again_from_the_store_of_its_run(demo, monkeypatch):
    folder = plait.run("demo.yaml", store="elsewhere").folder
    before = (folder / "report.html").read_text()
    cli("report", str(folder))
    assert (folder / "report.html").read_text() == before
    assert "none of the results of" in cli("report", str(folder), "--store", "empty", code=1)
    assert (folder / "report.html").read_text() == before
