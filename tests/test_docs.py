"""The tutorial does what it says, and the generated pages are those of the code."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import plait
import pytest
import yaml
from click.testing import CliRunner
from plait.cli import main
from plait.errors import PipelineError
from plait.pipeline import load_pipeline, parse_pipeline
from plait.testing import conformance

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_STORE", str(tmp_path / "store"))
    for _, title, content in blocks("write-a-method.md"):
        if title:
            (tmp_path / title).write_text(content)
    return tmp_path


@pytest.mark.slow
def test_the_tutorial(workplace):
    commands = [
        line[2:]
        for language, _, text in blocks("write-a-method.md")
        if language == "console"
        for line in text.splitlines()
    ]
    first = commands[: next(i for i, command in enumerate(commands) if "plait new" in command)]
    assert len(first) == 3
    for command in first:
        program, *words = shlex.split(command)
        assert program == "plait"
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
    assert "all checks passed" in done.output
    report = next(Path("runs/brighten").glob("*/report.md")).read_text()
    assert "| 0.2 | bright |" in report


def test_what_does_not_fit_is_refused_as_the_page_says(workplace):
    (told,) = (text for language, _, text in blocks("write-a-method.md") if language == "text")
    with pytest.raises(PipelineError) as refused:
        load_pipeline(Path("mark.yaml"))
    assert [f"error: {problem}" for problem in refused.value.problems] == told.splitlines()


test_the_methods_of_the_page_keep_what_they_say = pytest.mark.usefixtures("workplace")(
    conformance("./mark.py:Mark", hook="transform")
)


@pytest.mark.slow
def test_a_step_that_trains_on_two_processes(workplace):
    shutil.copy(DOCS / "examples" / "distributed.py", workplace)
    (workplace / "points.py").write_text(
        "import attrs, plait\n\n@attrs.frozen\nclass Points:\n    @plait.hookimpl\n    def load_data(self, run):\n"
        "        x = [i / 7 for i in range(8)]\n        return {'x': x, 'y': [3 * value - 1 for value in x]}\n"
    )
    (workplace / "p.yaml").write_text(blocks("clusters.md")[-1][2])
    run = plait.run("p.yaml")
    assert not run.failed
    layer = run["line"].layer
    assert layer.weight.item() == pytest.approx(3, abs=0.1)
    assert layer.bias.item() == pytest.approx(-1, abs=0.1)


def test_the_stopwatch_is_a_wrapper(workplace):
    import pluggy
    from plait.hookspecs import MethodHooks

    manager = pluggy.PluginManager("plait")
    manager.add_hookspecs(MethodHooks)
    manager.register(runpy.run_path("stopwatch.py")["Stopwatch"]())
    manager.check_pending()
    assert [impl.wrapper for impl in manager.hook.restore.get_hookimpls()] == [True]


def test_the_example_pipeline_is_valid():
    text, each = [content for language, _, content in blocks("pipelines.in.md") if language == "yaml"]
    assert {"noisy.0.4", "error.0.4"} <= set(parse_pipeline(each).cells[0].steps)
    assert len(parse_pipeline(text).cells) == 6
    assert set(yaml.safe_load(text)["steps"]) == {"digits", "model", "trained", "noisy", "score"}


def test_generated_pages_are_up_to_date():
    made = runpy.run_path(str(DOCS / "reference.py"))
    assert (DOCS / "hooks.md").read_text(encoding="utf-8") == made["hooks_page"]()
    assert (DOCS / "pipelines.md").read_text(encoding="utf-8") == made["pipelines_page"]()
    assert (DOCS.parent / "registry.yaml").read_text(encoding="utf-8") == made["registry"]()
    assert (DOCS.parent / "README.md").read_text(encoding="utf-8") == made["readme"]()


@pytest.mark.slow
def test_the_site_builds_without_broken_links(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "hooks" / "index.html").exists()
