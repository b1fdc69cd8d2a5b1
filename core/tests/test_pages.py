"""What the pages for users say is done as they say it."""

import re
from pathlib import Path

import jsonschema
import plait
from plait.cli import main
from plait.document import parse
from plait.schema import pipeline_schema

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def test_the_python_page(workplace, capsys):
    space = {}
    for language, _, code in blocks("python.md"):
        if language == "python":
            exec(compile(code, "python.md", "exec"), space)
    shown = capsys.readouterr().out
    assert "Result(noise: 21 of 21 steps finished, tables 'score'; runs/noise/" in shown
    assert "\\begin{tabular}{llr}" in shown
    assert "noisy[seed=0,sigma=0.4]" in shown
    assert len(space["frame"]) == 4


def test_a_source_of_ones_own(workplace):
    ((_, name, code),) = [block for block in blocks("your-data.md") if block[1]]
    (workplace / name).write_text(code)
    (workplace / "numbers.txt").write_text("1\n2.5\n")
    step = [text for language, _, text in blocks("your-data.md") if language == "yaml"][-1]
    assert list(plait.run(f"plait: 1\nsteps:\n{step}").output("data")["x"]) == [1.0, 2.5]


def test_a_model_of_ones_own(workplace):
    ((_, name, code),) = [block for block in blocks("your-models.md") if block[1]]
    (workplace / name).write_text(code)
    pipeline = [text for language, _, text in blocks("your-models.md") if language == "yaml"][-1]
    assert 0.1 < plait.run(pipeline).tables["score"].value("accuracy").mean <= 1


def test_commands_and_their_options_exist():
    text = (DOCS / "command-line.md").read_text() + (DOCS / "reports.md").read_text()
    named = set(re.findall(r"plait (?:--debug )?([a-z]+)\b", text))
    assert named - {"plait"} <= set(main.commands)
    options = {option for command in main.commands.values() for part in command.params for option in part.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) - {"--debug"} <= options


def test_every_step_on_the_pages_fits_its_method():
    validator = jsonschema.Draft202012Validator(pipeline_schema())
    for page in ("your-data.md", "your-models.md"):
        for language, _, text in blocks(page):
            if language == "yaml":
                data = parse(text if text.startswith("plait:") else f"plait: 1\nsteps:\n{text}").data
                assert [error.message for error in validator.iter_errors(data)] == []
