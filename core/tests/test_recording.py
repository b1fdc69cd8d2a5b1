from pathlib import Path

import plait
import pytest
from click.testing import CliRunner
from plait import PlaitError
from plait.cli import main
from plait.recording import Record, again, read_record, records_named, to_text

PIPELINE = """\
plait: 1
name: demo
matrix: {seed: [0, 1, 2]}
steps:
  numbers: {load-data: "./toy.py:Numbers", with: {size: 5}}
  score: {evaluate: "./toy.py:Mean", from: {data: {all: numbers.train}}}
"""


def cli(*arguments, code=0):
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def recorded(workplace, monkeypatch):
    (workplace / "demo.yaml").write_text(PIPELINE)
    monkeypatch.setattr("sys.argv", ["plait", "run", "demo.yaml", "--out", "runs", "--quiet"])
    cli("run", "demo.yaml")
    assert cli("record", "last", "demo.csv") == "demo.csv: 1 figures\n"
    return workplace


def test_a_record_says_where_its_figures_come_from(recorded):
    record = read_record(Path("demo.csv"))
    assert set(record.facts) == {"command", "date", "versions", "hardware", "seeds", "packages"}
    assert record.command == ["demo.yaml"]
    assert record.facts["seeds"] == "0, 1, 2"
    (figure,) = record.figures
    number = plait.run("demo.yaml").tables["score"].value("mean")
    assert (figure.text, figure.mean, figure.values) == (number.text, number.mean, number.values)


def test_figures_are_given_again(recorded):
    assert "1 of 1 figures lie within" in cli("reproduce", "demo.csv")
    quick = cli("reproduce", ".", "--quick")
    assert "plait run demo.yaml matrix.seed=[0]" in quick
    assert "1 of 1 figures lie within" in quick
    Path("toy.py").write_text(Path("toy.py").read_text().replace("(self.scale * draw", "(3 + self.scale * draw"))
    assert "on record" in cli("reproduce", "demo.csv", code=1)
    cli("reproduce", "demo.csv", "--write")
    assert read_record(Path("demo.csv")).command == ["demo.yaml"]
    assert "1 of 1 figures lie within" in cli("reproduce", "demo.csv")
    assert "leave out --quick" in cli("reproduce", "demo.csv", "--write", "--quick", code=2)


def test_a_record_that_cannot_be_had_again_stays_and_the_others_are_run(recorded):
    Path("b.yaml").write_text(PIPELINE.replace("./toy.py:Mean", "./gone.py:Mean"))
    Path("b.csv").write_text(Path("demo.csv").read_text().replace("demo.yaml", "b.yaml"))
    broken = "  broken: {transform: './toy.py:Fail', from: {data: numbers.train}}\n"
    Path("a.yaml").write_text(
        PIPELINE.replace("  score:", f"{broken}  score:").replace("all: numbers.train", "all: broken")
    )
    Path("a.csv").write_text(Path("demo.csv").read_text().replace("demo.yaml", "a.yaml"))
    before = Path("a.csv").read_text(), Path("b.csv").read_text()
    told = cli("reproduce", ".", "--write", code=1)
    assert "a.csv stays as it is, since a step failed: broken[seed=0]: " in told
    assert "gone.py" in told
    assert "demo.csv: plait run demo.yaml\n  1 of 1 figures lie within" in told
    assert (Path("a.csv").read_text(), Path("b.csv").read_text()) == before


def test_the_figures_of_a_package(workplace, monkeypatch):
    (workplace / "figures").mkdir()
    facts = {"command": "plait run demo.yaml", "date": "d", "versions": "v", "hardware": "h", "seeds": "0"}
    (workplace / "demo.yaml").write_text(PIPELINE)
    figures = read_record_of(workplace, monkeypatch)
    for name, packages in (("a", "plait-ensir, plait-imaging"), ("b", "plait-imaging"), ("c", "")):
        made = Record({**facts, "packages": packages}, figures)
        (workplace / "figures" / f"{name}.csv").write_text(to_text(made))
    assert [file.stem for file in records_named("imaging", Path("figures"))] == ["a", "b"]
    assert [file.stem for file in records_named("plait-ensir", Path("figures"))] == ["a"]
    assert [file.stem for file in records_named("figures", Path("figures"))] == ["a", "b", "c"]
    assert "figures/a.csv: plait run demo.yaml" in cli("reproduce", "ensir")
    with pytest.raises(
        PlaitError,
        match=r"'ensi' is neither a record of figures nor a package with one.*; those in figures are of plait-ensir, plait-imaging",
    ):
        records_named("ensi", Path("figures"))


def read_record_of(workplace, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plait", "run", "demo.yaml"])
    cli("run", "demo.yaml")
    cli("record", "last", "demo.csv")
    return read_record(Path("demo.csv")).figures


def test_a_figure_that_is_gone_is_told(recorded):
    (one,) = again(read_record(Path("demo.csv")), [])
    assert (one.value, one.within) == (None, False)
    Path("other.csv").write_text("a,b\n")
    with pytest.raises(PlaitError, match="no record of figures; plait record RUN"):
        read_record(Path("other.csv"))
