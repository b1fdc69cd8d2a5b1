"""Tables of pages hold what is on record, each number in its place."""

import re
import runpy
import statistics
from pathlib import Path

import attrs
import pytest
from plait.recording import read_record

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / "figures" / "tables.py"), run_name="tables")
BENCHMARKS = runpy.run_path(str(ROOT / "figures" / "benchmarks.py"), run_name="benchmarks")
PAGES = TABLES["PAGES"]
ORIGINS = TABLES["read_origins"]()
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# Of presets; held by tests of the package; of another library, in an environment of its own.
UNRECORDED = {
    "| | `small` | `paper` | `full256` |",
    "| order, anchor | ring | grid9 / torus | exp | full |",
    "| | test on chelsea, coffee, flower | test on astronaut, china, rocket |",
    "| | per sample, 1 image | per sample, 16 images | per batch, 1 image | per batch, 16 images |",
}
UNMARKED = re.compile(r"^(?:\|.*\n)+", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=TABLES["name_of"])
def test_tables_of_a_page_are_as_recorded(page):
    assert TABLES["filled"](page, ORIGINS) == page.read_text(encoding="utf-8"), "run python figures/tables.py"


@pytest.mark.parametrize("page", PAGES, ids=TABLES["name_of"])
def test_every_mean_and_spread_of_a_page_is_on_record(page):
    for _, numbers in TABLES["tables_of"](page):
        assert numbers
        assert [text for cell, text in numbers.items() if "±" in text and cell not in ORIGINS] == []
    rest = FENCED.sub("", TABLES["TABLE"].sub("", page.read_text(encoding="utf-8")))
    assert [table for table in UNMARKED.findall(rest) if re.search(r"\d ± \d", table)] == []


@pytest.mark.parametrize("page", PAGES, ids=TABLES["name_of"])
def test_a_number_in_bold_leads_its_column_or_its_row_by_more_than_the_spread(page):
    for _, numbers in TABLES["tables_of"](page):
        for cell in numbers:
            if cell in ORIGINS and in_bold(page, numbers[cell]):
                beside = [other for other in numbers if other in ORIGINS and other != cell and comparable(cell, other)]
                column = [other for other in beside if other.column == cell.column]
                row = [other for other in beside if other.row == cell.row]
                assert any(some and all(exceeds(cell, other) for other in some) for some in (column, row)), cell


def in_bold(page, text):
    return f"**{text}**" in page.read_text(encoding="utf-8")


def comparable(cell, other):
    return ORIGINS[cell].metric == ORIGINS[other].metric


def exceeds(cell, other):
    mine, others = (TABLES["values_of"](ORIGINS[one]) for one in (cell, other))
    if len(mine) != len(others) or len(mine) < 2:
        return True
    gaps = [a - b for a, b in zip(mine, others, strict=True)]
    return abs(statistics.fmean(gaps)) > max(map(statistics.stdev, (mine, others, gaps)))


@pytest.mark.parametrize("page", PAGES, ids=TABLES["name_of"])
def test_a_table_of_numbers_is_on_record_or_known_to_be_on_none(page):
    rest = FENCED.sub("", TABLES["TABLE"].sub("", page.read_text(encoding="utf-8")))
    heads = [
        table.splitlines()[0]
        for table in UNMARKED.findall(rest)
        if sum(bool(re.fullmatch(r" *[-−+]?\d[\d.,]*( / [\d.,]+)* *", cell)) for cell in table.split("|")) > 3
        and "| field" not in table.splitlines()[0]
    ]
    assert [head for head in heads if head not in UNRECORDED] == []


def test_every_place_is_one_on_a_page_and_of_a_record_that_the_page_names():
    known = {cell: records for page in PAGES for records, numbers in TABLES["tables_of"](page) for cell in numbers}
    assert [cell for cell in ORIGINS if cell not in known] == []
    assert [cell for cell, origin in ORIGINS.items() if origin.record not in known[cell]] == []


def test_numbers_of_a_page_are_found_on_record():
    known = {cell: origin for cell, origin in ORIGINS.items() if cell.page == "README.md"}
    assert TABLES["find"]({}, [ROOT / "README.md"]) == known
    assert TABLES["find"](known, [ROOT / "README.md"]) == known


def test_another_number_on_record_is_another_number_on_the_page():
    page = ROOT / "README.md"
    cell = next(cell for cell in ORIGINS if cell.page == "README.md")
    origin = attrs.evolve(ORIGINS[cell], show=".3 ± .3")
    right = TABLES["filled"](page, {cell: origin})
    wrong = TABLES["filled"](page, {cell: attrs.evolve(origin, minus=origin.row)})
    assert right.replace(TABLES["shown"](origin), "0.000 ± 0.000", 1) == wrong


@pytest.fixture
def record(tmp_path):
    record = tmp_path / "a.csv"
    record.write_text(
        "# figures of a run of plait\ntable,row,metric,text,mean,std,seeds,values\n"
        "score,a,accuracy,0.500 ± 0.100,0.5,0.1,0 1 2,0.4 0.5 0.6\n"
        "score,b,accuracy,-0.100 ± 0.300,-0.1,0.3,0 1 2,-0.4 -0.1 0.2\n",
        encoding="utf-8",
    )
    return record


def test_a_table_above_another_with_the_same_rows_keeps_its_own_numbers(tmp_path, monkeypatch, record):
    monkeypatch.setitem(TABLES["filled"].__globals__, "ROOT", tmp_path)
    page, one = tmp_path / "page.md", f"<!-- figures: {record} -->\n\n| | accuracy |\n| --- | --- |\n| a | 0.1 |\n"
    page.write_text(one, encoding="utf-8")
    ((_, numbers),) = TABLES["tables_of"](page)
    origins = dict.fromkeys(numbers, TABLES["Origin"](str(record), "score", "a", "accuracy"))
    other = one.replace("accuracy |", "of others |").replace("0.1", "0.3")
    page.write_text(f"{other}\n{one}", encoding="utf-8")
    assert TABLES["filled"](page, origins) == f"{other}\n{one.replace('0.1', '0.500 ± 0.100')}"
    page.write_text(f"{one}\n{one}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 tables of page\.md have the head \| \| accuracy \|; name a column"):
        TABLES["tables_of"](page)


@pytest.mark.parametrize(
    ("show", "shown"),
    [
        ("text", "0.500 ± 0.100"),
        ("+text", "+0.500 ± 0.100"),
        (".1", "0.5"),
        ("0.2", ".50"),
        ("%.0", "50"),
        ("+0.1 ± .2", "+.5 ± 0.10"),
    ],
)
def test_a_number_is_shown_as_asked(record, show, shown):
    origin = TABLES["Origin"](str(record), "score", "a", "accuracy", show=show)
    assert TABLES["shown"](origin) == shown


def test_differences_averages_and_single_seeds(record):
    def shown(row, **more):
        return TABLES["shown"](TABLES["Origin"](str(record), "score", row, "accuracy", **more))

    assert shown("b") == "−0.100 ± 0.300"
    assert shown("a & b", show=".3 ± .3") == "0.200 ± 0.200"
    assert shown("a", minus="b", show="+.2") == "+0.60"
    assert shown("a", minus="b", seed="2", show="+.2") == "+0.40"
    with pytest.raises(ValueError, match=r"has no 'accuracy' of 'c' in its table 'score'"):
        shown("c")


@pytest.mark.parametrize("record", sorted(ROOT.glob("figures/*.csv")), ids=lambda path: path.stem)
def test_a_record_says_what_it_comes_from(record):
    facts = read_record(record).facts
    assert all(facts[name] for name in ("command", "date", "versions", "hardware", "seeds"))
    assert (ROOT / read_record(record).command[0]).is_file()


@pytest.mark.parametrize("record", sorted(ROOT.glob("figures/benchmarks/*.csv")), ids=lambda path: path.stem)
def test_a_record_of_a_benchmark_says_what_it_comes_from(record):
    facts = read_record(record).facts
    assert facts["command"] == f"python {BENCHMARKS['COMMANDS'][record.stem]}"
    assert (ROOT / facts["command"].split()[1]).is_file()
    assert all(facts[name] for name in ("date", "versions", "hardware"))


def test_numbers_that_a_benchmark_prints_have_a_place_each():
    printed = "apply   0.0240  1,000\nname, 16 images\napply   0.5  -3e-05\nv1.2 x86\n"
    assert [(figure.row, figure.metric, figure.mean) for figure in BENCHMARKS["figures"]("b", printed)] == [
        ("apply # #", "1", 0.024),
        ("apply # #", "2", 1000.0),
        ("name, # images", "1", 16.0),
        ("apply # # (2)", "1", 0.5),
        ("apply # # (2)", "2", -3e-05),
    ]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/results/*.md")), ids=lambda path: path.stem)
def test_a_page_of_results_is_found_from_its_readme_and_on_the_site(page):
    assert f"../../docs/results/{page.name}" in (ROOT / "plugins" / page.stem / "README.md").read_text(encoding="utf-8")
    assert f": results/{page.name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
