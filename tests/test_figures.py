"""Tables of pages that name a record hold what is on record."""

import re
from pathlib import Path

import pytest
from plait.recording import read_record

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"<!-- figures: (\S+) -->\n+((?:\|.*\n)+)")
NUMBER = re.compile(r"[-+]?[\d.]+ ± [\d.e-]+")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("plugins/*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
TABLES = [(page, record, table) for page in PAGES for record, table in MARKED.findall(page.read_text(encoding="utf-8"))]


def test_the_first_table_of_the_readme_is_on_record():
    assert ROOT / "README.md" in [page for page, _, _ in TABLES]


@pytest.mark.parametrize(("page", "record", "table"), TABLES, ids=lambda part: str(part)[:40])
def test_a_table_is_as_recorded(page, record, table):
    known = {figure.text for figure in read_record(ROOT / record).figures}
    shown = NUMBER.findall(table.replace("−", "-"))
    assert shown
    assert [text for text in shown if not {text, text.removeprefix("+")} & known] == []


@pytest.mark.parametrize("record", sorted(ROOT.glob("figures/*.csv")), ids=lambda path: path.stem)
def test_a_record_says_what_it_comes_from(record):
    facts = read_record(record).facts
    assert all(facts[name] for name in ("command", "date", "versions", "hardware", "seeds"))
    assert (ROOT / read_record(record).command[0]).is_file()


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/results/*.md")), ids=lambda path: path.stem)
def test_a_page_of_results_is_found_from_its_readme_and_on_the_site(page):
    assert f"../../docs/results/{page.name}" in (ROOT / "plugins" / page.stem / "README.md").read_text(encoding="utf-8")
    assert f": results/{page.name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
