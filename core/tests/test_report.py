import csv
import io
import re

import numpy as np
import plait
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plait import Report
from plait.report import Curve, Image, Panel, png
from plait.report.render import RunReport, Table, markdown, to_csv, to_html

NASTY = "<script>alert(1)</script>|`*_[x](javascript:1)\n# head"


def document(**changes):
    parts = {
        "name": "n",
        "description": "",
        "tables": (),
        "curves": (),
        "panels": (),
        "notes": (),
        "steps": (),
        "failed": {},
        "not_run": {},
    }
    return RunReport(**{**parts, **changes})


def test_everything_from_data_is_escaped():
    picture = Image(caption=NASTY, data=png(np.zeros((2, 2, 3), np.uint8)))
    made = document(
        name=NASTY, description=NASTY, notes=[NASTY], failed={NASTY: NASTY}, steps=[(NASTY,) * 4],
        tables=[Table(NASTY, [NASTY], [], [((NASTY,), ())], {})],
        curves=[(NASTY, [Curve(name=NASTY, x=[0], y=[1], x_label=NASTY), Curve(name="b", x=[0, 1], y=[1, 2])])],
        panels=[(NASTY, Panel(title=NASTY, images=[[picture]]))],
    )  # fmt: skip
    assert "<script" not in to_html(made)
    assert "<script" not in markdown(made)
    assert all(line.count("|") - line.count("\\|") in (0, 2) for line in markdown(made).splitlines())


@given(x=st.lists(st.floats(), min_size=1, max_size=5))
def test_charts_of_any_numbers(x):
    html = to_html(document(curves=[("c", [Curve(name="c", x=x, y=x)])]))
    assert "nan" not in html.partition("<svg")[2].lower()


def test_table_of_seeds(workplace):
    (workplace / "m.py").write_text("""
import attrs
from plait import Report, hookimpl
@attrs.frozen
class M:
    k: int = 0
    @hookimpl
    def evaluate(self, run):
        rows = [{"method": "a", "ours": True, "x": run.seed + self.k, "y": float("nan")}, {"method": "b", "ours": False, "x": 10.0}]
        return Report(rows=rows, better={"x": "lower"}, formats={"x": ".1f"}, notes=["one"])
""")
    (workplace / "p.yaml").write_text(
        "plait: 1\nmatrix: {seed: [1, 3], k: [0, 5]}\nsteps: {m: {evaluate: './m.py:M', with: {k: '${matrix.k}'}}}"
    )
    result = plait.run("p.yaml")
    text = (result.folder / "report.md").read_text()
    assert "| k | method | ours | x ↓ | y |" in text
    assert "| 0 | a | yes | **2.0 ± 1.4** | nan |" in text
    assert "| 5 | b | no | 10.0 |  |" in text
    rows = list(csv.DictReader(io.StringIO((result.folder / "m.csv").read_text())))
    assert rows[0]["x"] == "2.0"
    assert rows[0]["x seeds"] == "2"
    assert "content=\"default-src 'none'" in (result.folder / "report.html").read_text()


def test_spread_of_seeds(workplace):
    (workplace / "m.py").write_text("""
import attrs
from plait import Report, hookimpl
@attrs.frozen
class M:
    @hookimpl
    def evaluate(self, run):
        row = {"gain": float(run.seed), "accuracy": float(run.seed), "time": float(run.seed)}
        return Report(rows=[row], formats=dict.fromkeys(row, ".3f"), better={"gain": "higher"},
                      spread={"gain": "standard error", "accuracy": "95 %"})
""")
    (workplace / "p.yaml").write_text("plait: 1\nmatrix: {seed: [1, 3, 5, 7]}\nsteps: {m: {evaluate: './m.py:M'}}")
    text = (plait.run("p.yaml").folder / "report.md").read_text()
    assert "| gain (± standard error) ↑ | accuracy (± 95 %) | time |" in text
    # std of 1, 3, 5, 7: sqrt(20 / 3) = 2.582; half of it; times 3.182, Student's 97.5 % point of 3 degrees of freedom
    assert "| 4.000 ± 1.291 | 4.000 ± 4.109 | 4.000 ± 2.582 |" in text
    one = (plait.run("p.yaml", ["matrix.seed=[1]"]).folder / "report.md").read_text()
    assert "| gain ↑ | accuracy | time |" in one


def test_unknown_spread():
    with pytest.raises(ValueError, match="spread of column 'gain' is 'sem'; allowed is one of 'std', 'standard error'"):
        Report(spread={"gain": "sem"})


def test_csv_of_missing_values():
    assert to_csv(Table("t", ["a"], ["m"], [(("x,y",), (None,))], {})).splitlines()[1] == '"x,y",,,0'


def test_values_of_a_report():
    report = Report(rows=[{"m": "a", "x": 1}, {"m": "b", "x": 2}])
    assert report.value("x", m="b") == 2
    with pytest.raises(ValueError, match="2 rows"):
        report.value("x")


def test_wrong_parts():
    with pytest.raises(ValueError, match="is not PNG"):
        Image(caption="c", data=b"GIF")
    with pytest.raises(ValueError, match="2 x values and 1 y"):
        Curve(name="c", x=[1, 2], y=[1])


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            {"rows": [{"x": 1.0}, {"x": 10**400}]},
            "row 1 of the report, column 'x': the number is beyond what a float can hold",
        ),
        ({"rows": [{"x": "\ud83d"}]}, "row 0 of the report, column 'x': the text holds half of a character"),
        ({"rows": [{"x": np.float32(1)}]}, "the value is a numpy.float32; a text, a bool or a number is needed"),
        ({"rows": [{"x": torch.tensor(1.0)}]}, "the value is a torch.Tensor"),
        ({"rows": [{"x": [1]}]}, "the value is a builtins.list"),
        ({"formats": {"x": "zz"}}, "format of column 'x' is 'zz'; allowed is a format of numbers such as '.2f'"),
        ({"better": {"x": "up"}}, "better of column 'x' is 'up'; allowed is 'higher' or 'lower'"),
    ],
)
def test_what_a_report_would_trip_over_later_is_refused_at_once(facts, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Report(**facts)


def test_cells_that_a_spreadsheet_would_execute_are_escaped():
    table = Table("t", ["name"], ["x"], [(["=HYPERLINK(1)"], [None]), (["-1"], [None]), (["plain"], [None])], {})
    assert [line.split(",")[0] for line in to_csv(table).splitlines()[1:]] == ["'=HYPERLINK(1)", "'-1", "plain"]
