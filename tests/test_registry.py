"""The catalogue, the entry points and the pipelines agree."""

import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from plait.catalogue import catalogue
from plait.document import read
from plait.hookspecs import HOOKS
from plait.methods import find
from plait.pipeline import load_pipeline

ROOT = Path(__file__).parents[1]
PROJECTS = {path.parent.name: tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
PAPERS = [
    "sa-aet",
    "ensir",
    "wemoe",
    "fgsam",
    "gdf",
    "content-shift",
    "dfedcata",
    "semiddm-weather",
    "ubt",
    "ta-cleaner",
]
KITS = ["vision", "clip", "imaging", "graph", "diffusion", "federated"]


def test_all_papers_and_kits_are_known():
    kinds = {name.removeprefix("plait-"): entry["kind"] for name, entry in catalogue().items()}
    assert {name for name, kind in kinds.items() if kind == "paper"} == set(PAPERS)
    assert {name for name, kind in kinds.items() if kind == "kit"} == set(KITS)
    assert all(entry.get("paper") for entry in catalogue().values() if entry["kind"] == "paper")


def test_released_are_those_that_are_here():
    assert {name for name, entry in catalogue().items() if entry["status"] == "released"} == {
        f"plait-{name}" for name in PROJECTS
    }


@pytest.mark.parametrize("name", PROJECTS)
def test_methods_are_those_of_the_entry_points(name):
    project = PROJECTS[name]["project"]
    assert project["name"] == f"plait-{name}"
    groups = project.get("entry-points", {})
    offered = {hook: sorted(groups[f"plait.{hook}"]) for hook in HOOKS if f"plait.{hook}" in groups}
    assert catalogue()[f"plait-{name}"].get("methods", {}) == offered
    installed = next(d for d in distributions() if d.metadata["Name"] == f"plait-{name}")
    for hook, methods in offered.items():
        assert sorted(ep.name for ep in installed.entry_points if ep.group == f"plait.{hook}") == methods
        for method in methods:
            assert find(hook, f"plait-{name}/{method}").cls.__doc__


# The user's own data: any file will do for a check.
OWN_DATA = {
    "clip-audit-fashion": "steps.fashion.with.folder",
    "clip-fashion": "steps.fashion.with.folder",
    "federated-cifar10": "steps.cifar.with.source",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("pipelines/*.yaml")), ids=lambda path: path.stem)
def test_pipelines_are_valid_and_say_what_they_show(path):
    overrides = [f"{OWN_DATA[path.stem]}={path}"] if path.stem in OWN_DATA else []
    assert load_pipeline(path, overrides).cells
    assert path.read_text().startswith("#")
    assert read(path).data["name"]


def test_every_plugin_has_a_readme_with_both_uses():
    for name in PROJECTS:
        text = (ROOT / "plugins" / name / "README.md").read_text()
        assert "pip install" in text
        assert "```yaml" in text or name == "mlflow"
