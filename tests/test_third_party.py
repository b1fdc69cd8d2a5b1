"""A package of somebody else's: adds an attack, replaces a method by name, wraps evaluations, listens to runs."""

import json

import pytest

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "other-package"
version = "3.1"
dependencies = ["plait>=0.1,<0.2"]
[project.entry-points."plait.attack"]
invert = "other.methods:Invert"
[project.entry-points."plait.ensemble"]
average = "other.methods:FirstOne"
[project.entry-points."plait.plugins"]
audit = "other.methods:Audit"
diary = "other.methods:Diary"
[tool.hatch.build.targets.wheel]
packages = ["other"]
"""
METHODS = '''
import attrs
from plait import hookimpl
from plait.demo.models import images_of
from plait.demo.pictures import with_images

__plait_api__ = "0.1"

@attrs.frozen(kw_only=True)
class Invert:
    """Inverts every image."""

    @hookimpl
    def attack(self, data, run):
        return with_images(data, 1 - images_of(data))

@attrs.frozen(kw_only=True)
class FirstOne:
    """Takes the first candidate."""

    @hookimpl
    def ensemble(self, candidates, run):
        return next(iter(candidates.values()))

class Audit:
    @hookimpl(wrapper=True)
    def evaluate(self, run):
        report = yield
        return attrs.evolve(report, notes=[*report.notes, "seen by the audit"])

class Diary:
    @hookimpl
    def run_finished(self, folder, failed):
        (folder / "diary.txt").write_text(f"{len(failed)} failed")
'''
PIPELINE = """
plait: 1
name: braid
steps:
  digits: {load-data: "plait.demo.methods:Digits"}
  noisy: {transform: "plait.demo.methods:Noise", from: {data: digits.test}}
  inverted: {attack: invert, from: {data: digits.test}}
  fused: {ensemble: AVERAGE, from: {candidates: {inverted: inverted, noisy: noisy}}}
  score: {evaluate: "plait.demo.methods:Error", from: {data: {fused: fused, inverted: inverted}, reference: digits.test}}
"""


@pytest.fixture
def installed(environment, wheels):
    package = environment.work / "other-package"
    (package / "other").mkdir(parents=True)
    (package / "pyproject.toml").write_text(PYPROJECT)
    (package / "other" / "__init__.py").write_text("")
    (package / "other" / "methods.py").write_text(METHODS)
    names = ("plait", "plait_vision", "plait_imaging")
    environment.install(*(next(wheels.glob(f"{name}-*.whl")) for name in names), package)
    return environment


@pytest.mark.slow
def test_a_third_party_package(installed):
    for name in ("average", "other-package/average", "plait-imaging/average"):
        file = installed.work / f"{name.partition('/')[0]}.yaml"
        file.write_text(PIPELINE.replace("AVERAGE", name))
    ambiguous, doctor, other, own, listed, _ = installed.commands(
        "plait run average.yaml",
        "plait doctor",
        "plait run other-package.yaml",
        "plait run plait-imaging.yaml --out own",
        "plait list --json",
    )
    assert ambiguous[0] == 2
    assert "other-package/average or plait-imaging/average" in ambiguous[1]
    assert doctor[0] == 1
    assert "method 'average' of hook ensemble is offered by other-package and plait-imaging" in doctor[1]
    assert "plugin audit of other-package wraps evaluate" in doctor[1]

    assert other[0] == 0, other[1]
    (folder,) = (installed.work / "runs" / "braid").iterdir()
    report = (folder / "report.md").read_text()
    assert "seen by the audit" in report
    rows = [line.split("|")[2].strip() for line in report.splitlines() if line.startswith(("| fused", "| inverted"))]
    assert rows[0] == rows[1]
    assert (folder / "diary.txt").read_text() == "0 failed"

    assert own[0] == 0, own[1]
    known = json.loads(listed[1])
    assert {m["package"] for m in known if m["method"] == "average"} == {"other-package", "plait-imaging"}
