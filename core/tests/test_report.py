import base64
import csv
import hashlib
import io
import json
import re

import attrs
import numpy as np
import PIL.Image
import plait
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plait import Report
from plait.report import Curve, Image, Panel, png
from plait.report.charts import MAX_POINTS, chart
from plait.report.document import Repeat, RunReport, StepFacts
from plait.report.html import LIMIT, fragment, fragment_of_report, to_html
from plait.report.pictures import gallery
from plait.report.tables import Table, caption, difference, from_data, marked, number_of, to_data, with_counts
from plait.report.text import markdown

NASTY = "<script>alert(1)</script>|`*_[x](javascript:1)\n# head</textarea>\"'--><!--&amp;"


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
        name=NASTY, description=NASTY, notes=[NASTY], failed={NASTY: NASTY}, steps=[StepFacts(NASTY, NASTY, NASTY, NASTY)],
        repeat=Repeat(NASTY, [(NASTY, NASTY)], {NASTY: NASTY}, {NASTY: 1.0}),
        tables=[Table(NASTY, [NASTY], [], [((NASTY,), ())], {})],
        curves=[(NASTY, [Curve(name=NASTY, x=[0], y=[1], x_label=NASTY), Curve(name="b", x=[0, 1], y=[1, 2])])],
        panels=[(NASTY, Panel(title=NASTY, images=[[picture]]))],
    )  # fmt: skip
    page = to_html(made)
    assert "<script>alert" not in page
    assert "</textarea>" not in page
    assert "<!--" not in page
    scripts = [line[:40] for line in page.splitlines() if line.startswith("<script")]
    assert scripts == ['<script type="application/json">{"Markdo', '<script>"use strict";']
    assert "<script" not in markdown(made)
    assert "<script>alert" not in made.tables[0]._repr_html_()
    assert all(line.count("|") - line.count("\\|") in (0, 2) for line in markdown(made).splitlines())


@given(x=st.lists(st.floats(), min_size=1, max_size=5))
def test_charts_of_any_numbers(x):
    assert "nan" not in chart([Curve(name="c", x=x, y=x)]).svg.lower()
    to_html(document(curves=[("c", [Curve(name="c", x=x, y=x)])]))


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
    assert rows[0]["x n"] == "2"
    assert 'content="default-src &#39;none&#39;' in (result.folder / "report.html").read_text()


def table(values, seeds="012", better="higher", spread="std", form=".2f"):
    """One metric x; row name → a value for each seed."""
    rows = [((name,), (number_of(found, seeds[: len(found)], form, spread),)) for name, found in values.items()]
    return marked(
        with_counts(Table("t", ["m"], ["x"], rows, {"x": better} if better else {}, True, spread, {"x": form}))
    )


def marks(made):
    return {texts[0]: numbers[0].mark for texts, numbers in made.rows}


def test_best_only_where_it_leads_by_more_than_the_spread():
    assert marks(table({"a": [3.0, 3.1, 3.2], "b": [1.0, 1.1, 1.2], "c": [2.0, 2.1, 2.2]})) == {
        "a": "best",
        "b": "",
        "c": "",
    }
    assert marks(table({"a": [3.0, 3.1, 3.2], "b": [1.0, 1.1, 1.2]}, better="lower")) == {"a": "", "b": "best"}
    # The lead of 0.05 is less than the 0.10 by which the leader varies.
    close = table({"ensir": [26.72, 26.82, 26.92], "opening": [26.73, 26.77, 26.81], "median": [23.0, 23.1, 23.0]})
    assert marks(close) == {"ensir": "tie", "opening": "tie", "median": ""}
    wide = table({"a": [60.0, 85.0, 100.0], "b": [0.0, 44.0, 88.0], "c": [0.0, 0.1, 0.2]})
    assert marks(wide) == {"a": "tie", "b": "tie", "c": ""}
    assert "≈ 26.82 ± 0.10" in close.to_markdown()
    assert "ties" in caption(close)


def test_nothing_is_marked_where_nothing_can_be_said():
    single = table({"a": [3.0], "b": [1.0]})
    assert marks(single) == {"a": "", "b": ""}
    assert "n = 1" in caption(single)
    assert marks(table({"a": [3.0, 3.0, 3.0], "b": [3.0, 3.0, 3.0], "c": [3.0, 3.0, 3.0]})) == {
        "a": "",
        "b": "",
        "c": "",
    }
    assert marks(table({"a": [3.0, 3.0], "b": [2.0, 2.0]})) == {"a": "best", "b": ""}  # they never vary
    assert marks(table({"a": [3.0, float("nan")], "b": [2.0, 2.0], "c": [1.0, 1.0]})) == {"a": "", "b": "best", "c": ""}
    assert set(marks(table({"a": [3.0, 3.1], "b": [1.0, 1.1]}, better=None)).values()) == {""}


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=4), min_size=2, max_size=5))
def test_a_best_value_lies_beyond_the_spread_of_all(rows):
    made = table({str(i): values for i, values in enumerate(rows)}, seeds="0123")
    best = [numbers[0] for _, numbers in made.rows if numbers[0].mark == "best"]
    assert len(best) <= 1
    for number in best:
        for _, (other,) in made.rows:
            assert other is number or number.mean - other.mean > max(number.std, other.std)


def test_differences_are_paired_by_seed():
    one, other = (number_of(v, ("0", "1", "2"), ".2f", "std") for v in ([1.0, 5.0, 9.0], [0.5, 4.4, 8.6]))
    paired = difference(one, other, table({"a": [1.0]}), "x")
    assert paired.count == 3
    assert paired.mean == pytest.approx(0.5)
    assert paired.spread == pytest.approx(0.1)
    assert paired.text == "+0.50 ± 0.10"
    assert paired.exceeds is False  # less than what both vary by
    apart = difference(one, number_of([0.5, 4.4, 8.6], ("3", "4", "5"), ".2f", "std"), table({"a": [1.0]}), "x")
    assert apart.count == 0
    assert apart.spread == pytest.approx((4**2 + 4.0509**2) ** 0.5, rel=1e-3)
    assert difference(one, number_of([1.0], ("0",), ".2f", "std"), table({"a": [1.0]}), "x").exceeds is None


def test_n_stands_beside_each_value_where_it_differs():
    made = table({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0]})
    assert [numbers[0].text for _, numbers in made.rows] == ["2.00 ± 1.00 (n = 3)", "1.50 ± 0.71 (n = 2)"]
    assert "n = 3 seeds" in caption(table({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 4.0]}))


def test_intervals_need_three_values():
    assert number_of([1.0, 3.0], "01", ".2f", "95 %").text == "2.00"
    # std of 1, 3, 5, 7: sqrt(20 / 3) = 2.582; half of it; times 3.182, Student's 97.5 % point of 3 degrees of freedom
    assert number_of([1.0, 3.0, 5.0, 7.0], "0123", ".3f", "95 %").text == "4.000 ± 4.109"
    assert number_of([1.0, 3.0, 5.0, 7.0], "0123", ".3f", "standard error").text == "4.000 ± 1.291"
    assert number_of([1.0, 3.0, 5.0, 7.0], "0123", ".3f", "std").text == "4.000 ± 2.582"


def test_one_kind_of_spread_a_table():
    assert Report(spread={"gain": "95 %", "accuracy": "95 %"}).spread == "95 %"
    assert Report(spread="standard error").spread == "standard error"
    with pytest.raises(ValueError, match="'95 %' for gain and 'std' for accuracy; a table has one kind of ±"):
        Report(spread={"gain": "95 %", "accuracy": "std"})
    with pytest.raises(ValueError, match="spread of column 'gain' is 'sem'; allowed is one of 'std', 'standard error'"):
        Report(spread={"gain": "sem"})


def test_a_table_in_other_formats():
    made = table({"a & b_1": [3.0, 3.1, 3.2], "c": [1.0, 1.1, 1.2]})
    assert "a \\& b\\_1 & \\textbf{3.10 $\\pm$ 0.10} \\\\" in made.to_latex()
    assert made.to_latex().startswith("\\begin{tabular}{lr}\n\\toprule\nm & x $\\uparrow$ \\\\\n")
    assert made.to_markdown().splitlines()[2] == "| a & b\\_1 | **3.10 ± 0.10** |".replace("&", "&amp;")
    frame = made.to_pandas()
    assert list(frame.columns) == ["m", "x", "x std", "x n"]
    assert frame["x n"].tolist() == [3, 3]
    assert "* 3.10 ± 0.10" in repr(made)
    assert fragment(made).count("<tr") == 3
    assert from_data(json.loads(json.dumps(to_data(made)))) == attrs.evolve(
        made, rows=[(list(texts), list(numbers)) for texts, numbers in made.rows]
    )


def test_tables_of_numbers_that_are_not_finite_come_back():
    made = table({"a": [float("nan"), 1.0, 2.0], "b": [float("inf"), 1.0, 2.0]})
    assert [n[0].text for _, n in from_data(json.loads(json.dumps(to_data(made)))).rows] == ["nan", "inf"]


def test_the_page_runs_its_own_script_only():
    page = to_html(document(tables=[table({"a": [1.0, 2.0]})]))
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.search("<script>(.*)</script>\n</body>", page, re.DOTALL)[1]
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    for text in (script, style):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy.replace("&#43;", "+")
    assert "unsafe" not in policy
    assert " style=" not in page  # the policy would ignore it
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_what_is_copied_is_what_the_table_says():
    made = table({"<b>": [1.0, 2.0], "c": [0.0, 0.1]})
    page = to_html(document(tables=[made]))
    data = json.loads(re.search('<script type="application/json">(.*?)</script>', page)[1])
    assert {"Markdown", "LaTeX", "CSV"} == set(data)
    for name, text in (("Markdown", made.to_markdown()), ("LaTeX", made.to_latex()), ("CSV", made.to_csv())):
        assert data[name]["head"] + "".join(data[name]["rows"]) + data[name]["foot"] == text


def noise(size, seed=0):
    return Image(caption="c", data=png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)))


@pytest.mark.slow
def test_a_page_with_many_pictures_stays_small():
    panels = [(f"step {i}", Panel(title="t", images=[[noise(300, i), noise(300, i + 1)]])) for i in range(12)]
    made = document(panels=panels)
    small, full = to_html(made), to_html(made, full=True)
    assert len(small.encode()) <= LIMIT < len(full.encode())
    assert small.count("data:image/webp") == 24
    assert full.count("data:image/png") == 24
    assert "plait report --full" in small
    assert "plait report --full" not in full


def test_panels_that_cannot_be_made_small_enough_are_left_out():
    panels = [("s", Panel(title="t", images=[[noise(60, i)]])) for i in range(5)]
    kept = gallery(panels, limit=40_000)
    assert 0 < len(kept.panels) < 5
    assert "panels are left out" in kept.note


def test_small_pictures_and_drawings_keep_their_pixels():
    drawing = np.zeros((200, 200, 3), np.uint8)
    drawing[50:60] = (255, 0, 0)
    ((_, _, [[tiny, drawn]]),) = gallery(
        [("s", Panel(title="t", images=[[noise(8), Image(caption="d", data=png(drawing))]]))], limit=10**6
    ).panels
    assert tiny.pixels
    assert tiny.url.startswith("data:image/png")
    again = PIL.Image.open(io.BytesIO(base64.b64decode(drawn.url.partition(",")[2]))).convert("RGB")
    assert np.array_equal(np.asarray(again), drawing)


def test_lines_of_several_seeds_have_one_colour():
    curves = [Curve(name=f"seed={s},lr={lr} loss", x=[0, 1], y=[s, lr]) for s in (0, 1) for lr in (1, 2)]
    made = chart(curves)
    assert made.legend == [(0, "lr=1 loss"), (1, "lr=2 loss")]
    assert made.svg.count("line k0") == made.svg.count("line k1") == 2


def test_long_curves_keep_their_extremes():
    y = [0.0] * 5000
    y[1234], y[4321] = 7.0, -7.0
    made = chart([Curve(name="c", x=range(5000), y=y)])
    values = json.loads(re.search('data-values="([^"]*)"', made.svg)[1])
    assert len(values) <= MAX_POINTS
    assert [1234, 7] in values
    assert [4321, -7] in values
    assert "points" in made.note


def test_how_to_repeat_it(workplace):
    (workplace / "p.yaml").write_text(
        "plait: 1\nname: p\nmatrix: {seed: [3, 4]}\nsteps: {n: {load-data: './toy.py:Numbers'}, m: {evaluate: './toy.py:Mean', from: {data: n.train}}}"
    )
    result = plait.run("p.yaml")
    page = (result.folder / "report.html").read_text()
    assert "How to repeat it" in page
    assert "<dt>seeds</dt><dd>3, 4</dd>" in page
    assert "computing them took" in page
    assert "<dt>hardware</dt>" in page
    assert f"pytest=={pytest.__version__}" in page
    data = json.loads((result.folder / "results.json").read_text())
    assert (data["cells"], data["steps"], data["failed"]) == (2, 4, {})


def test_reports_in_a_notebook():
    report = Report(
        rows=[{"m": NASTY, "x": 1.0, "ok": True}, {"m": "b", "x": 2.0, "ok": False}], title="t", better={"x": "higher"},
        curves=[Curve(name="c", x=[0, 1], y=[0, 1])], panels=[Panel(title=NASTY, images=[[noise(8)]])], notes=[NASTY],
    )  # fmt: skip
    assert repr(report) == "Report('t': 2 rows, 1 curves, 1 panels)"
    html = fragment_of_report(report)
    assert "<script>alert" not in html
    assert "<svg" in html
    assert "data:image/png" in html


def test_csv_of_missing_values():
    assert Table("t", ["a"], ["m"], [(("x,y",), (None,))], {}).to_csv().splitlines()[1] == '"x,y",,,0'


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
    assert [line.split(",")[0] for line in table.to_csv().splitlines()[1:]] == ["'=HYPERLINK(1)", "'-1", "plain"]
