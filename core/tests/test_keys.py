"""Results are never stale: what a step is, what made it, and what `plait plan` says of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import plait
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plait import PipelineError
from plait.importing import import_code, local_sources
from plait.pipeline import load_pipeline
from plait.plan import explain, make_plan
from plait.store import Store
from plait.versions import code_of_file, version_of

METHODS = """
import attrs
from pathlib import Path
from plait import Report, hookimpl
from plait.fields import REQUIRED, code_field, field, method_field, path_or_name_field
import helper

@attrs.frozen(kw_only=True)
class Read:
    table: Path = field(REQUIRED, "a table")
    extra: str = path_or_name_field("none", "more rows")
    splits = ("train", "test")
    @hookimpl
    def load_data(self, run):
        rows = [float(x) for x in Path(self.table).read_text().split()]
        return {"train": [x + run.derived_seed() % 7 for x in rows], "test": rows}

@attrs.frozen(kw_only=True)
class Listed:
    table: Path = field(REQUIRED, "a list of files")
    def input_files(self):
        return [self.table.parent / name for name in self.table.read_text().split()]
    @hookimpl
    def load_data(self, run):
        return [Path(file).read_text() for file in self.input_files()]

@attrs.frozen(kw_only=True)
class Scale:
    factor: float = field(1.0, "factor")
    @hookimpl
    def transform(self, data, run):
        return [x * self.factor for x in data]

@attrs.frozen(kw_only=True)
class Twice:
    inner: object = method_field("transform", "what is applied twice")
    shift: float = field(0.0, "added")
    @hookimpl
    def transform(self, data, run):
        return [x + self.shift + helper.ONE for x in self.inner.transform(self.inner.transform(data, run), run)]

@attrs.frozen(kw_only=True)
class Total:
    @hookimpl
    def evaluate(self, data, run):
        data = data if isinstance(data, dict) else {"": data}
        return Report(rows=[{"name": name, "total": float(sum(values))} for name, values in data.items()])
"""

PIPELINE = """\
plait: 1
name: keys
seed: 0
matrix: {factor: [2.0, 3.0]}
steps:
  read: {load-data: "./methods.py:Read", with: {table: table.csv}}
  scaled: {transform: "./methods.py:Scale", from: {data: read.train}, with: {factor: "${matrix.factor}"}}
  twice: {transform: "./methods.py:Twice", from: {data: scaled}, with: {inner: {"./methods.py:Scale": {factor: 2.0}}, shift: 1.0}}
  aside: {transform: "./methods.py:Scale", from: {data: read.test}}
  total: {evaluate: "./methods.py:Total", from: {data: {a: twice, b: aside}}}
"""


@pytest.fixture
def place(workplace):
    (workplace / "methods.py").write_text(METHODS)
    (workplace / "helper.py").write_text("ONE = 1\n")
    (workplace / "table.csv").write_text("1 2 3")
    (workplace / "p.yaml").write_text(PIPELINE)
    return workplace


def to_run(path="p.yaml", overrides=()):
    """Label of every task that is not in the store → the cause that plan names."""
    plan, store = make_plan(load_pipeline(path, overrides)), Store()
    reasons = explain(plan, store)
    return {task.label: reasons[task.label] for task in plan.tasks if not store.has(task.key)}


# -- axes and identity ------------------------------------------------------------------------------------------


def test_an_axis_that_is_reached_through_another_step(place):
    Path("q.yaml").write_text("""\
plait: 1
matrix: {sigma: [1.0, 2.0]}
steps:
  read: {load-data: "./methods.py:Read", with: {table: table.csv}}
  a: {transform: "./methods.py:Scale", from: {data: read.test}, with: {factor: "${matrix.sigma}"}}
  b: {transform: "./methods.py:Scale", from: {data: read.test}, with: {factor: "${steps.a.with.factor}"}}
  c: {transform: "./methods.py:Scale", from: {data: read.test}, with: {factor: "${steps.${name}.with.factor}"}}
  t: {evaluate: "./methods.py:Total", from: {data: {b: b, c: c}}}
name: b
""")
    result = plait.run("q.yaml")
    assert not result.failed
    assert {"b[sigma=1.0]", "b[sigma=2.0]", "c[sigma=2.0]", "t[sigma=2.0]"} <= set(result.labels)
    assert result["b[sigma=2.0]"] == result["c[sigma=2.0]"] == [2.0, 4.0, 6.0]


def test_values_of_equal_text_are_two(place):
    Path("m.py").write_text("""
import attrs
from plait import Report, hookimpl
@attrs.frozen
class Show:
    value: int | str
    @hookimpl
    def evaluate(self, run):
        return Report(rows=[{"kind": type(self.value).__name__, "one": 1.0}])
""")
    Path("q.yaml").write_text(
        'plait: 1\nmatrix: {v: [1, "1"]}\nsteps: {s: {evaluate: "./m.py:Show", with: {value: "${matrix.v}"}}}\n'
    )
    result = plait.run("q.yaml")
    assert result.labels == ["s[v=1]", 's[v="1"]']
    assert [row[0] for row in result.tables["s"].rows] == [("1", "int"), ('"1"', "str")]


def test_cells_that_come_to_the_same_are_one_task(place):
    result = plait.run("p.yaml", ["matrix.factor=[2.0, 2]"])
    assert [label for label in result.labels if label.startswith("scaled")] == ["scaled"]


def test_long_values_have_short_labels(place):
    long = ["x" * 300, "x" * 299 + "y"]
    Path("m.py").write_text("""
import attrs
from plait import Report, hookimpl
@attrs.frozen
class Show:
    value: str
    @hookimpl
    def evaluate(self, run):
        return Report(rows=[{"length": float(len(self.value))}])
""")
    Path("q.yaml").write_text(
        f'plait: 1\nmatrix: {{v: {json.dumps(long)}}}\nsteps: {{s: {{evaluate: "./m.py:Show", with: {{value: "${{matrix.v}}"}}}}}}\n'
    )
    labels = plait.run("q.yaml").labels
    assert len(set(labels)) == 2
    assert all(len(label) < 60 for label in labels)


@pytest.mark.parametrize("override", ["matrix.factr=[1]", "matrix.seed=[0]"])
def test_an_override_of_an_axis_that_is_not_there(place, override):
    with pytest.raises(PipelineError, match=r"the matrix has no axis .*\+matrix\.\w+=… adds one"):
        load_pipeline("p.yaml", [override])
    assert {"factor", "seed"} == set(load_pipeline("p.yaml", ["+matrix.seed=[0, 1]"]).cells[0].values)


def test_an_axis_that_no_step_uses(place):
    with pytest.raises(PipelineError, match="no step uses matrix axis other"):
        load_pipeline("p.yaml", ["+matrix.other=[1, 2]"])
    with pytest.raises(PipelineError, match="no step uses matrix axis other"):
        load_pipeline("p.yaml", ["+matrix.other=[1]"])


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("8/255", 8 / 255), (".5", 0.5), ("2", 2.0)])
def test_numbers_read_alike_in_file_and_override(place, text, value):
    overridden = load_pipeline("p.yaml", [f"steps.aside.with.factor={text}"])
    Path("q.yaml").write_text(
        PIPELINE.replace("from: {data: read.test}}", f"from: {{data: read.test}}, with: {{factor: {text}}}}}")
    )
    for pipeline in (overridden, load_pipeline("q.yaml")):
        assert pipeline.cells[0].steps["aside"].instance.factor == pytest.approx(value)


@pytest.mark.parametrize("text", ["on", "yes", "1_000", "0o7"])
def test_texts_stay_texts_in_overrides(place, text):
    assert load_pipeline("p.yaml", [f"description={text}"]).data["description"] == text


# -- which code made it -----------------------------------------------------------------------------------------


def test_a_file_with_the_local_modules_that_it_imports(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "inner.py").write_text("from . import leaf\n")
    (tmp_path / "pack" / "leaf.py").write_text("LEAF = 1\n")
    (tmp_path / "late.py").write_text("LATE = 1\n")
    (tmp_path / "stranger.py").write_text("")
    own = tmp_path / "own.py"
    own.write_text("import pack.inner\n\ndef f():\n    import late\n    return late.LATE\n")
    names = {str(path.relative_to(tmp_path)) for path in local_sources(own)}
    assert names == {"own.py", "late.py", "pack/__init__.py", "pack/inner.py", "pack/leaf.py"}
    before = code_of_file(own)
    (tmp_path / "stranger.py").write_text("X = 1\n")
    assert code_of_file(own) == before
    for name in ("late.py", "pack/leaf.py"):
        (tmp_path / name).write_text("X = 2\n")
        changed = code_of_file(own)
        assert changed != before
        before = changed


def test_local_modules_are_found_from_elsewhere_and_are_as_they_are_now(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "beside_it.py").write_text("VALUE = 1\n")
    (project / "own.py").write_text("import beside_it\n\ndef value():\n    return beside_it.VALUE\n")
    monkeypatch.chdir(tmp_path)
    assert import_code("project/own.py").value() == 1
    (project / "beside_it.py").write_text("VALUE = 2\n")
    assert import_code("project/own.py").value() == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "beside_it.py").write_text("VALUE = 3\n")
    shutil.copy(project / "own.py", other)
    first = import_code("project/own.py")
    assert import_code("other/own.py").value() == 3
    assert first.value() == 2


def test_late_imports_of_modules_of_one_name(tmp_path):
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "late_one.py").write_text(f"VALUE = {number}\n")
        (tmp_path / folder / "own.py").write_text("def value():\n    import late_one\n    return late_one.VALUE\n")
    assert import_code("one/own.py", tmp_path).value() == 0
    with pytest.raises(
        ImportError, match=r"'late_one' in .*two has the same name as one in .*one that a function imports"
    ):
        import_code("two/own.py", tmp_path)


def test_a_local_module_that_hides_an_installed_one(tmp_path):
    (tmp_path / "attrs.py").write_text("")
    (tmp_path / "own.py").write_text("import attrs\n")
    with pytest.raises(ImportError, match=r"'attrs' in .* has the same name as one at .*rename it"):
        import_code("own.py", tmp_path)


def _wheel(folder, name, version, files, **entry_points):
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"])
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**content, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    version_of.cache_clear()


def _editable(site, source, roots, how):
    """As pip leaves an editable install behind: hatchling's .pth, or setuptools' finder."""
    info = site / "some_pack-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-pack\nVersion: 1.0\n")
    (info / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}}))
    if how == "pth":
        (site / "_some_pack.pth").write_text("".join(f"{root}\n" for root in roots))
        (info / "RECORD").write_text("_some_pack.pth,,\n")
    elif how == "finder":
        mapping = {root.name: str(root) for root in roots}
        (site / "__editable___some_pack_finder.py").write_text(f"MAPPING: dict[str, str] = {mapping!r}\n")
        (info / "RECORD").write_text("__editable___some_pack_finder.py,,\n")
    else:
        (info / "RECORD").write_text("")


@pytest.mark.parametrize(
    ("layout", "how"), [("src/pack", "pth"), ("pack", "pth"), ("src/pack", "finder"), ("lib/python/pack", "unknown")]
)
def test_an_editable_install_in_any_layout_under_any_path(site, tmp_path, layout, how):
    source = tmp_path / "a folder with % and ä"
    package = source / layout
    package.mkdir(parents=True)
    (source / "tests").mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.txt").write_text("one")
    _editable(site, source, [package if how == "finder" else package.parent], how)

    def now():
        version_of.cache_clear()
        return version_of("some-pack")

    first = now()
    assert first.startswith("1.0+")
    (source / "tests" / "test_it.py").write_text("")
    assert now() == first
    (package / "__init__.py").write_text("X = 1\n")
    second = now()
    (package / "words.txt").write_text("two")
    assert len({first, second, now()}) == 3


@pytest.mark.slow
def test_an_installed_wheel_counts_by_what_it_holds(site, tmp_path):
    versions = []
    for text in ("X = 1\n", "X = 1\n", "X = 2\n"):
        shutil.rmtree(site)
        site.mkdir()
        wheel = _wheel(tmp_path, "some-pack", "1.0", {"pack.py": text})
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel],
            check=True,
        )
        version_of.cache_clear()
        versions.append(version_of("some-pack"))
    assert versions[0] == versions[1] != versions[2]
    assert versions[0].startswith("1.0+")


def test_libraries_are_recorded_and_their_change_is_told(place):
    plait.run("p.yaml")
    entry = next(Store().entries())
    assert entry.meta["libraries"]["torch"]
    for entry in Store().entries():
        meta = {**entry.meta, "libraries": {**entry.meta["libraries"], "torch": "1.0"}}
        os.chmod(entry.folder, 0o755)
        os.chmod(entry.folder / "meta.json", 0o644)
        (entry.folder / "meta.json").write_text(json.dumps(meta))
    plan = make_plan(load_pipeline("p.yaml"))
    assert all("made with torch 1.0, now " in text for text in explain(plan, Store()).values())
    assert to_run() == {}


def test_a_method_whose_result_depends_on_a_library(place):
    source = Path("methods.py").read_text()
    Path("methods.py").write_text(
        source.replace('"""', "").replace("    splits =", '    depends_on_libraries = ("torch",)\n    splits =')
    )
    (task, *_) = [t for t in make_plan(load_pipeline("p.yaml")).tasks if t.step.name == "read"]
    assert list(task.facts["libraries"]) == ["torch"]


# -- inputs that are files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["table.csv", "./table.csv", "../{name}/table.csv", "{here}/table.csv"])
def test_a_file_counts_however_it_is_spelled(place, spelling):
    spelling = spelling.format(name=place.name, here=place)
    override = [f"steps.read.with.table={spelling}"]
    plait.run("p.yaml", override)
    assert to_run("p.yaml", override) == {}
    Path("table.csv").write_text("4 5 6")
    assert set(to_run("p.yaml", override)) == {t.label for t in make_plan(load_pipeline("p.yaml")).tasks}


def test_paths_are_relative_to_the_pipeline(place, tmp_path_factory, monkeypatch):
    result = plait.run("p.yaml", store=place / "store")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = plait.run(place / "p.yaml", store=place / "store")
    assert [task.key for task in again.plan.tasks] == [task.key for task in result.plan.tasks]


def test_a_moved_folder_is_the_same_work(place, tmp_path_factory):
    before = [task.key for task in make_plan(load_pipeline("p.yaml")).tasks]
    moved = tmp_path_factory.mktemp("moved") / "x"
    shutil.copytree(place, moved)
    assert [task.key for task in make_plan(load_pipeline(moved / "p.yaml")).tasks] == before


def test_a_missing_file_is_told_before_the_run(place):
    with pytest.raises(PipelineError, match=r"p\.yaml:6:\d+: step read: table is .*nothing\.csv.* no such file"):
        load_pipeline("p.yaml", ["steps.read.with.table=nothing.csv"])
    with pytest.raises(PipelineError, match=r"extra is '\./more', and there is no file or folder"):
        load_pipeline("p.yaml", ["steps.read.with.extra=./more"])


def test_a_name_that_is_also_a_folder(place):
    Path("more").mkdir()
    pipeline = load_pipeline("p.yaml", ["steps.read.with.extra=more"])
    assert pipeline.cells[0].steps["read"].instance.extra == str(place / "more")
    assert (
        load_pipeline("p.yaml", ["steps.read.with.extra=owner/name"]).cells[0].steps["read"].instance.extra
        == "owner/name"
    )


def test_files_that_a_list_names(place):
    Path("list.txt").write_text("one.txt two.txt")
    Path("one.txt").write_text("1")
    Path("two.txt").write_text("2")
    Path("q.yaml").write_text('plait: 1\nsteps: {l: {load-data: "./methods.py:Listed", with: {table: list.txt}}}\n')
    plait.run("q.yaml")
    assert to_run("q.yaml") == {}
    Path("two.txt").write_text("22")
    assert to_run("q.yaml") == {"l": "changed: file 2 files listed for Listed"}
    Path("two.txt").unlink()
    with pytest.raises(plait.PlaitError, match=r"two\.txt, which is listed, cannot be read"):
        make_plan(load_pipeline("q.yaml"))


def test_a_folder_counts_with_what_lies_behind_links(place):
    (place / "far").mkdir()
    (place / "far" / "a").write_text("1")
    (place / "data").mkdir()
    (place / "data" / "link").symlink_to(place / "far")
    (place / "far" / "loop").symlink_to(place / "data")
    Path("m.py").write_text("""
import attrs
from pathlib import Path
from plait import hookimpl
@attrs.frozen
class Count:
    folder: Path
    @hookimpl
    def load_data(self, run):
        return len(list(self.folder.iterdir()))
""")
    Path("q.yaml").write_text('plait: 1\nsteps: {l: {load-data: "./m.py:Count", with: {folder: data}}}\n')
    plait.run("q.yaml")
    (place / "far" / "a").write_text("22")
    assert to_run("q.yaml") == {"l": "changed: file ./data"}


# -- everything at once: one change, exactly the steps below it, exactly that cause ------------------------------

CHANGES = {
    "field": (lambda n: f"steps.aside.with.factor={n}", {"aside", "total"}, r"field factor \(.*\)"),
    "nested field": (
        lambda n: f"steps.twice.with.inner={{'./methods.py:Scale': {{factor: {n}}}}}",
        {"twice", "total"},
        r"field inner \(.*\)",
    ),
    "axis": (lambda n: f"matrix.factor=[{n}.5, {n}.25]", {"scaled", "twice", "total"}, r"field factor \(.*\)"),
    "seed": (lambda n: f"seed={n}", {"read", "scaled", "twice", "aside", "total"}, r"seed \(.*\)"),
    "split": (lambda n: "steps.aside.from.data=read.train", {"aside", "total"}, "its inputs"),
    "file": ("table.csv", {"read", "scaled", "twice", "aside", "total"}, r"file \./table\.csv"),
    "source": ("methods.py", {"read", "scaled", "twice", "aside", "total"}, r"code of methods\.py"),
    "local module": ("helper.py", {"read", "scaled", "twice", "aside", "total"}, r"code of methods\.py"),
}


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3, unique=True),
    number=st.integers(4, 10**6),
)
def test_one_change_at_a_time(place, changes, number):
    for entry in list(Store().entries()):
        Store().remove(entry.key)
    for name, text in (("methods.py", METHODS), ("helper.py", "ONE = 1\n"), ("table.csv", "1 2 3")):
        Path(name).write_text(text)
    overrides = []
    plait.run("p.yaml", overrides)
    for change in changes:
        what, below, cause = CHANGES[change]
        if callable(what):
            overrides = [*overrides, what(number)]
        else:
            path = Path(what)
            path.write_text(path.read_text() + (f" {number}" if what.endswith(".csv") else f"\n# {number}\n"))
        reasons = to_run("p.yaml", overrides)
        assert {label.partition("[")[0] for label in reasons} == below
        first = min(below, key=["read", "scaled", "twice", "aside", "total"].index)
        for label, reason in reasons.items():
            if label.partition("[")[0] == first:
                assert re.fullmatch(rf"changed: {cause}", reason), reason
            else:
                assert re.fullmatch(rf"changed: ({cause}(; )?)?(its inputs \(.+\))?", reason), reason
        plait.run("p.yaml", overrides)
        assert to_run("p.yaml", overrides) == {}
