"""Discovery among installed packages: each test writes distributions into a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

METHOD = """
import attrs
from plait import hookimpl
{api}
@attrs.frozen
class M:
    '''Says who it is.'''
    @hookimpl
    def load_data(self, run):
        return {who!r}
"""
WRAPPER = """
from plait import hookimpl, Report
import attrs
class Wrapper:
    @hookimpl(wrapper=True)
    def evaluate(self, run):
        report = yield
        return attrs.evolve(report, notes=[*report.notes, "wrapped"])
class Listener:
    @hookimpl
    def run_finished(self, folder):
        (folder / "heard").write_text("yes")
"""


@pytest.fixture
def site(workplace):
    folder = workplace / "site"
    folder.mkdir()
    return folder


def distribution(site, name, entry_points, version="0.1.0", **modules):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")
    (info / "entry_points.txt").write_text(entry_points)
    for module, code in modules.items():
        (site / f"{module}.py").write_text(code)


def cli(site, *arguments, code="from plait.cli import main; main()"):
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(site / "cache")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


API = '__plait_api__ = "0.1"'


def method(who, api=API):
    return METHOD.format(who=who, api=api)


@pytest.mark.slow
def test_two_packages_offering_one_name(site):
    distribution(site, "plait-a", "[plait.load_data]\nwho = aa:M\n", aa=method("a"))
    distribution(site, "plait-b", "[plait.load_data]\nwho = bb:M\n", bb=method("b"))
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: who}}")
    done = cli(site, "run", "p.yaml")
    assert done.returncode == 2
    assert "offered by 2 packages; write plait-a/who or plait-b/who" in done.stderr
    Path("p.yaml").write_text("plait: 1\nname: p\nsteps: {a: {load-data: plait-b/who}}")
    done = cli(site, "run", "p.yaml")
    assert done.returncode == 0, done.stderr
    value = next(Path("store").rglob("artifact/content/value.json")).read_text()
    assert json.loads(value) == "b"


@pytest.mark.slow
def test_a_plugin_whose_import_raises(site):
    distribution(site, "plait-a", "[plait.load_data]\nwho = aa:M\n", aa="raise RuntimeError('broken inside')")
    assert "who" in cli(site, "list", "--hook", "load-data").stdout
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: who}}")
    done = cli(site, "run", "p.yaml")
    assert done.returncode == 2
    assert "method 'who' of package plait-a cannot be imported: RuntimeError: broken inside" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("api", "part"), [('__plait_api__ = "9.9"', "written for plait API 9.9"), ("", "does not say which plait")]
)
def test_another_api(site, api, part):
    distribution(site, "plait-a", "[plait.load_data]\nwho = aa:M\n", aa=method("a", api))
    done = cli(site, "show", "who")
    assert done.returncode == 1
    assert part in done.stderr


@pytest.mark.slow
def test_wrappers_and_listeners(site):
    distribution(site, "plait-w", "[plait.plugins]\nwrap = ww:Wrapper\nlisten = ww:Listener\n", ww=WRAPPER)
    Path("p.yaml").write_text(
        "plait: 1\nname: p\nsteps:\n  n: {load-data: './toy.py:Numbers'}\n  s: {evaluate: './toy.py:Mean', from: {data: n.train}}\n"
    )
    done = cli(site, "run", "p.yaml")
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs/p").iterdir()
    assert "wrapped" in (folder / "report.md").read_text()
    assert (folder / "heard").read_text() == "yes"
    # The wrapper is part of what makes the result: without it, the step runs again.
    done = subprocess.run([sys.executable, "-m", "plait.cli", "plan", "p.yaml"], capture_output=True, text=True)
    assert "changed: wrapper plait-w/wrap" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--all"], ["--version"]])
def test_listing_imports_no_plugin_and_no_torch(site, arguments):
    bomb = "raise SystemExit('imported')"
    distribution(site, "plait-a", "[plait.load_data]\nwho = aa:M\n[plait.plugins]\nw = aa:M\n", aa=bomb)
    code = f"""
import sys
sys.argv = ["plait", *{arguments!r}]
from plait.cli import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "numpy", "datasets", "omegaconf", "aa", "cattrs") if name in sys.modules]
    assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)}
    )
    assert done.returncode == 0, done.stderr
    assert ("who" in done.stdout) == (arguments[0] == "list")


def without(condition):
    """Code that is ``plait`` where some installed packages are not."""
    return f"""
import importlib.metadata
installed = importlib.metadata.distributions
importlib.metadata.distributions = lambda **chosen: (d for d in installed(**chosen) if not ({condition}))
from plait.cli import main
main()
"""


@pytest.mark.slow
def test_a_method_that_is_not_installed(workplace):
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {extract-feature: gdf, from: {model: m, data: d}}}")
    code = without("d.name == 'plait-gdf'")
    done = subprocess.run([sys.executable, "-c", code, "run", "p.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "method 'gdf' of hook extract_feature is not installed; pip install plait-gdf" in done.stderr


def test_show(workplace):
    done = subprocess.run(
        [sys.executable, "-m", "plait.cli", "show", "./toy.py:Numbers"], capture_output=True, text=True
    )
    assert "size: a whole number, [1, 1000]; default 4" in done.stdout
    assert "how many" in done.stdout


def test_schema_knows_fields(site):
    distribution(
        site,
        "plait-a",
        "[plait.load_data]\nwho = toy_installed:Numbers\n",
        toy_installed=Path("toy.py").read_text() + f"\n{API}\n",
    )
    # The schema imports every method that is installed.
    code = without("d.name.startswith('plait-') and d.name != 'plait-a'")
    done = cli(site, "schema", code=code)
    assert done.returncode == 0, done.stderr
    schema = json.loads(done.stdout)

    def check(step):
        jsonschema.validate({"plait": 1, "steps": {"a": step}}, schema)

    check({"load-data": "who", "with": {"size": 3, "scale": "8/255", "kind": "normal"}})
    check({"load-data": "who", "with": {"size": "${matrix.size}"}})
    for wrong in ({"sze": 3}, {"size": "x"}, {"size": 0}, {"kind": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            check({"load-data": "who", "with": wrong})
