"""Wheels are enough: in fresh environments outside the checkout, and in what they require."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text())["project"]
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}


def value(report: str, table: str, row: str) -> float:
    """The number in the first column of a row of a table in a report."""
    lines = report.partition(f"## {table}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^\| {row} \| \**([\d.]+)", lines, re.MULTILINE)
    assert found, lines
    return float(found[1])


@pytest.mark.slow
def test_the_quickstart_runs_from_wheels(environment, wheels):
    """The small-scale check of EnsIR (Sun et al., NeurIPS 2024): better than what it is compared with."""
    names = ("plait-0", "plait_vision-", "plait_imaging-", "plait_ensir-")
    environment.install(*(next(wheels.glob(f"{name}*.whl")) for name in names))
    (environment.work / "quickstart.yaml").write_text((ROOT / "pipelines" / "quickstart.yaml").read_text())
    table = "chelsea-coffee-flower"
    environment.run("plait", "run", "quickstart.yaml", "matrix.seed=[0]", "--to", table)
    (folder,) = (environment.work / "runs" / "quickstart").iterdir()
    report = (folder / "report.md").read_text()
    ensir = value(report, table, "ensir")
    assert ensir >= value(report, table, "average") + 1
    assert ensir >= value(report, table, "least-squares") + 0.3
    assert ensir >= max(value(report, table, name) for name in ("median", "opening", "total-variation", "wavelet"))
    assert "data:image/webp;base64" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_every_plugin_loads_from_its_wheel(environment, wheels):
    environment.install(*sorted(wheels.glob("*.whl")))
    synonyms = "from plait_clip.backdoor.synonyms import open_synonyms; print(*open_synonyms(None)('car'), sep=',')"
    doctor, installed, (failed, said) = environment.commands(
        "plait doctor", f"plait install ensir --from {wheels}", then=synonyms
    )
    assert [line for line in doctor[1].splitlines() if line.startswith("wrong")] == []
    assert doctor[0] == 0
    assert installed[0] == 1  # this environment has no pip
    assert "pip could not install plait-ensir" in installed[1]
    assert not failed, said
    assert "automobile" in said.split(",")


def requirements(project) -> set[str]:
    extras = [r for several in project.get("optional-dependencies", {}).values() for r in several]
    return {
        re.split(r"[ ;<>=!~\[]", r, maxsplit=1)[0].lower().replace("_", "-")
        for r in [*project["dependencies"], *extras]
    }


@pytest.fixture(scope="module")
def owners():
    """Module → the packages that it comes from."""
    return packages_distributions()


@pytest.mark.parametrize("name", PROJECTS)
def test_what_a_plugin_imports_it_requires(name, owners):
    project = PROJECTS[name]
    assert any(requirement.startswith("plait>=0.1,<0.2") for requirement in project["dependencies"])
    allowed = requirements(project) | {"attrs"}  # comes with plait: its methods are attrs classes
    for file in (ROOT / "plugins" / name / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for module in modules:
                top = module.partition(".")[0]
                if top in sys.stdlib_module_names or top == f"plait_{name.replace('-', '_')}":
                    continue
                packages = {owner.lower().replace("_", "-") for owner in owners.get(top, [top])} | {
                    top.replace("_", "-")
                }
                assert packages & allowed, (
                    f"{file.name} imports {module}, and {project['name']} requires none of {packages}"
                )
