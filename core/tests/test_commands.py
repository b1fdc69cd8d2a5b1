"""The command line beyond `run`: finding methods, parts of a pipeline, taking results out, drawing, completing."""

import functools
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import datasets
import jsonschema
import plait
import pytest
import torch
from click.testing import CliRunner
from plait.catalogue import offers
from plait.cli import main
from plait.configuration import fields_of
from plait.demo.methods import Noise
from plait.demo.models import Classifier
from plait.document import read
from plait.hookspecs import HOOKS
from plait.methods import find
from plait.pipeline import parse_pipeline
from plait.schema import pipeline_schema
from plait.summaries import summary
from plait.testing.remedies import AFTER_RELOAD, BETWEEN_RUNS, remedy

PIPELINE = """\
plait: 1
name: demo
matrix: {seed: [0, 1]}
steps:
  numbers: {load-data: "./toy.py:Numbers"}
  more: {transform: "./toy.py:Add", from: {data: numbers.train}}
  bad: {transform: "./toy.py:Fail", from: {data: more}}
  behind: {transform: "./toy.py:Add", from: {data: bad}}
  fine: {evaluate: "./toy.py:Mean", from: {data: more}}
"""


@pytest.fixture
def demo(workplace):
    (workplace / "demo.yaml").write_text(PIPELINE)
    return workplace


def cli(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


def test_every_method_has_a_summary_that_is_that_of_its_class():
    for hook in HOOKS:
        for offer in offers(hook):
            assert summary(offer.target), offer
    assert summary("plait.demo.methods:Noise") == Noise.__doc__.splitlines()[0]
    assert summary("no.such.module:Class") == ""
    assert summary("plait.demo.methods:NoSuch") == ""


def test_listing_imports_no_method():
    code = (
        "import sys; from plait.cli import main; main(['list'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_methods_by_word_hook_and_package():
    rows = json.loads(cli("list", "--json"))
    some = rows[0]
    assert set(some) == {"hook", "method", "package", "state", "summary"}
    assert json.loads(
        cli("list", some["method"].upper(), "--hook", some["hook"], "--package", some["package"], "--json")
    )
    assert {row["package"] for row in json.loads(cli("list", "--package", some["package"], "--json"))} == {
        some["package"]
    }
    assert "no installed method with 'qqqq'; plait list --all" in cli("list", "qqqq")
    assert "did you mean 'evaluate'" in cli("list", "--hook", "evaluat", code=2)


def test_a_method_is_shown_in_the_spelling_of_yaml(workplace):
    shown = cli("show", "./toy.py:Numbers")
    assert "maximum: a number or null; default null" in shown
    assert "names: a list of text; default []" in shown
    example = re.search(r"in a pipeline\n +(.*)", shown)[1]
    assert example == "Numbers: {load-data: ./toy.py:Numbers}"
    assert "splits   train, test" in shown
    (workplace / "m.py").write_text(
        "import attrs\nfrom plait import hookimpl\n@attrs.frozen\nclass M:\n    'Does.'\n    k: int\n    on: bool = True\n"
        "    columns_needed = ('image',)\n    columns_made = ('target',)\n    @hookimpl\n    def transform(self, data, run): return data\n"
    )
    shown = cli("show", "./m.py:M")
    assert "on: true or false; default true" in shown
    assert "k: a whole number; required" in shown
    assert "needs    columns of data: image" in shown
    assert "makes    columns target" in shown
    step = shown.splitlines()[-1].strip()
    text = f"plait: 1\nsteps:\n  DATA: {{load-data: './toy.py:Numbers'}}\n  {step.replace('K', '1')}\n"
    assert set(parse_pipeline(text).cells[0].steps) == {"DATA", "M"}


def test_only_what_leads_to_a_step(demo):
    assert "4 steps" in cli("plan", "demo.yaml", "--to", "more")
    cli("run", "demo.yaml", "--to", "more", "--to", "numbers[seed=0]")
    (folder,) = Path("runs/demo").iterdir()
    assert {s["label"] for s in json.loads((folder / "provenance.json").read_text())["steps"]} == {
        f"{name}[seed={seed}]" for name in ("numbers", "more") for seed in (0, 1)
    }
    assert "there is no step 'mor' (did you mean 'more'?)" in cli("run", "demo.yaml", "--to", "mor", code=2)
    assert plait.run("demo.yaml", to=["fine"]).labels[-1] == "fine[seed=1]"
    assert cli("report", str(folder)).startswith("report:")  # the same steps again


def test_the_first_rows_of_every_source(demo):
    whole = plait.run("demo.yaml", to=["more"])
    limited = plait.run("demo.yaml", to=["more"], limit=2)
    assert limited.output("numbers", seed=0)["test"] == whole.output("numbers", seed=0)["test"][:2]
    assert limited.output("more", seed=1) == whole.output("more", seed=1)[:2]
    assert "4 in the store" in cli("plan", "demo.yaml", "--to", "more", "--limit", 2)
    assert "4 in the store" in cli("plan", "demo.yaml", "--to", "more")
    assert "0 in the store" in cli("plan", "demo.yaml", "--to", "more", "--limit", 3)
    cli("run", "demo.yaml", "--limit", 2, "--to", "more")
    text = 'plait: 1\nsteps: {d: {load-data: "plait.demo.methods:Digits"}}'
    assert {name: len(part) for name, part in plait.run(text, limit=3).output("d").items()} == {"train": 3, "test": 3}


def test_only_what_failed(demo):
    cli("run", "demo.yaml", code=1)
    Path("demo.yaml").write_text(PIPELINE.replace("toy.py:Fail", "toy.py:Add"))
    cli("run", "demo.yaml", "--only-failed")
    last = max(Path("runs/demo").iterdir(), key=lambda folder: folder.stat().st_mtime)
    labels = {step["label"] for step in json.loads((last / "provenance.json").read_text())["steps"]}
    assert {label.partition("[")[0] for label in labels} == {"numbers", "more", "bad", "behind"}
    assert "nothing failed in the last run of demo" in cli("run", "demo.yaml", "--only-failed", code=1)


def test_results_are_taken_out(workplace):
    Path("p.yaml").write_text("""\
plait: 1
steps:
  digits: {load-data: "plait.demo.methods:Digits", with: {num_train: 12, num_test: 4}}
  model: {load-model: "plait.demo.methods:SmallClassifier"}
  numbers: {load-data: "./toy.py:Numbers"}
""")
    result = plait.run("p.yaml")
    assert "Classifier.from_pretrained" in cli("export", "p", "model", "out/model")
    again = Classifier.from_pretrained("out/model")
    model = result.output("model").state_dict()
    assert all(torch.equal(value, model[name]) for name, value in again.state_dict().items())
    assert "test: 4 pictures with metadata.csv" in cli("export", result.folder, "digits", "out/digits")
    opened = datasets.load_dataset("imagefolder", data_dir="out/digits/test", split="train")
    digits = result.output("digits")["test"]
    assert opened["label"] == list(digits["label"])
    assert [image.convert("RGB").tobytes() for image in opened["image"]] == [i.tobytes() for i in digits["image"]]
    cli("export", "last", "numbers", "out/numbers")
    assert os.access(next(Path("out/numbers").rglob("*.json")), os.W_OK)
    assert "is not empty; name a new folder" in cli("export", "last", "numbers", "out", code=1)
    assert "no step 'number' (did you mean 'numbers'?)" in cli("export", "last", "number", "o", code=1)


def test_one_of_several_results_is_taken_out(demo):
    plait.run("demo.yaml")
    assert "step more has 2 results; name one: more[seed=0], more[seed=1]" in cli("export", "last", "more", "o", code=1)
    cli("export", "last", "more[seed=1]", "o")
    assert "is not in the store" in cli("export", "last", "bad[seed=0]", "o2", code=1)


def test_a_pipeline_is_drawn(demo):
    lines = cli("graph", "demo.yaml").splitlines()
    assert lines[0] == "numbers  load-data: toy.py:Numbers"
    assert lines[1].startswith("  more  transform:")
    assert lines[1].endswith("← numbers")
    cli("graph", "demo.yaml", "--svg", "g.svg")
    root = ET.parse("g.svg").getroot()
    assert len([part for part in root.iter() if part.tag.endswith("rect")]) == 5
    assert len([part for part in root.iter() if part.get("class") == "e"]) == 4


def completed(line):
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "plait"], capture_output=True, text=True,
        env={**os.environ, "_PLAIT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    )  # fmt: skip
    return [text.partition(",")[2] for text in done.stdout.splitlines() if text]


@pytest.mark.slow
def test_the_shell_completes(demo):
    plait.run("demo.yaml", to=["more"])
    assert "demo" in completed("plait show d")
    assert completed("plait run demo.yaml --to mo") == ["more"]
    assert completed("plait plan demo.yaml matr") == ["matrix.seed="]
    assert completed("plait run demo.yaml steps.num") == ["steps.numbers.with."]
    assert "steps.numbers.with.scale=" in completed("plait run demo.yaml steps.numbers.with.s")
    assert completed("plait export demo more") == ["more[seed=0]", "more[seed=1]"]
    assert completed("plait run none.yaml st") == []


@functools.cache
def validator():
    schema = pipeline_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def errors(step):
    return [
        (".".join(map(str, error.absolute_path)), error.message)
        for error in validator().iter_errors({"plait": 1, "steps": {"a": step}})
    ]


def test_the_schema_is_small_and_its_errors_name_the_field():
    assert len(cli("schema")) < 300_000
    hook, method, fields = next(
        (hook, offer.name, found)
        for hook in HOOKS
        for offer in offers(hook)
        if "batch_size" in (found := fields_of(find(hook, offer.name).cls))
    )
    key = hook.replace("_", "-")
    assert [path for path, _ in errors({key: method, "with": {"batch_size": -1}})][:1] == ["steps.a.with.batch_size"]
    assert any(
        "'batch_sze' was unexpected" in message for _, message in errors({key: method, "with": {"batch_sze": 1}})
    )
    assert errors({key: "${matrix.method}", "with": {"anything": 1}}) == []
    assert errors({key: "./own.py:Method", "with": "${steps.other.with}"}) == []
    assert [path for path, _ in errors({key: method, "fom": {}})] == ["steps.a"]
    assert errors({"frm": 1})
    assert fields


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("pipelines/*.yaml")), ids=lambda file: file.stem)
def test_ready_made_pipelines_fit_the_schema(file):
    validator().validate(read(file).data)


def test_remedies():
    assert remedy("result: gradient of layers.1.weight", AFTER_RELOAD) == ": call zero_grad() before returning"
    assert "call eval()" in remedy("result: train/eval mode of the model", AFTER_RELOAD)
    assert "tuple" in remedy("result.a: tuple and list", AFTER_RELOAD)
    assert "ignore" in remedy("result.rows[0].seconds: 0.1 and 0.2", BETWEEN_RUNS)
    assert "run.generator()" in remedy("result: tensors differ", BETWEEN_RUNS)
