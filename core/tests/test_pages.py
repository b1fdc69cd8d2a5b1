"""What the pages for users say is done as they say it."""

import re
from pathlib import Path

import jsonschema
import plait
import pytest
from plait.cli import main
from plait.document import parse
from plait.schema import pipeline_schema

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.slow
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


@pytest.fixture
def with_files(workplace):
    """The files of the pages about models and data."""
    for page in ("your-data.md", "your-models.md"):
        for _, name, code in blocks(page):
            if name:
                # A small architecture in place of a large one.
                (workplace / name).write_text(code.replace('"ViT-B-32"', '"ViT-S-32-alt"'))
    return workplace


def load(hook, name, fields=""):
    """The result of one step, written into the store and read back."""
    run = plait.run(f'plait: 1\nsteps:\n  it: {{{hook}: "./{name}", with: {{{fields}}}}}\n')
    return run.output("it")


def test_sources_of_ones_own(with_files):
    (with_files / "numbers.txt").write_text("1\n2.5\n")
    (with_files / "texts.csv").write_text("text,label\ngood,1\nbad,0\n")
    step = [text for language, _, text in blocks("your-data.md") if language == "yaml"][-1]
    assert list(plait.run(f"plait: 1\nsteps:\n{step}").output("data")["x"]) == [1.0, 2.5]
    pictures = load("load-data", "with_torchvision_data.py:Mine")
    assert pictures[0]["image"].size == (8, 8)
    assert pictures.features["label"].num_classes <= 10
    assert list(load("load-data", "with_texts.py:Mine", "file: texts.csv")["label"]) == [1, 0]
    assert load("load-data", "with_pyg_data.py:Mine").num_nodes == 34


def test_a_model_of_ones_own(with_files):
    pipeline = [text for language, _, text in blocks("your-models.md") if language == "yaml" and "FreshNet" in text][-1]
    assert 0.1 < plait.run(pipeline).tables["score"].value("accuracy").mean <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "cls"),
    [
        ("torchvision", "SqueezeNet"),
        ("timm", "ResNet"),
        ("transformers", "BertForSequenceClassification"),
        ("open_clip", "CLIP"),
        ("diffusers", "UNet2DModel"),
        ("pyg", "GCN"),
    ],
)
def test_five_lines_for_each_library(with_files, library, cls):
    pytest.importorskip("torch_geometric" if library == "pyg" else library)
    fields = ""
    if library == "transformers":
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8)).save_pretrained("bert")
        fields = "folder: bert"
    model = load("load-model", f"with_{library}.py:Net", fields)
    assert type(model).__name__ == cls
    assert next(model.parameters()).requires_grad


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
