"""Steps that do not fit are refused before anything runs, with line and column; what is not declared is not judged."""

import attrs
import pytest
from plait.contract import declared
from plait.errors import PipelineError
from plait.pipeline import parse_pipeline
from plait.testing import ConformanceError
from plait.testing.checks import Subject, check_contract, subjects
from plait.testing.examples import Example

METHODS = '''
import attrs
from plait import hookimpl, Report

@attrs.frozen(kw_only=True)
class Source:
    """Pairs."""
    labelled: bool = True
    gives = "dataset"
    splits = ("train", "test")
    @property
    def columns_made(self): return ("image", "label") if self.labelled else ("image",)
    @hookimpl
    def load_data(self, run): return {}

@attrs.frozen(kw_only=True)
class Caption:
    """Adds captions."""
    gives = "data"
    columns_needed = "label"
    columns_made = ("captions",)
    @hookimpl
    def transform(self, data, run): return data

@attrs.frozen(kw_only=True)
class Keep:
    """Keeps columns."""
    columns: tuple[str, ...]
    gives = "data"
    @property
    def columns_kept(self): return self.columns
    @hookimpl
    def transform(self, data, run): return data

@attrs.frozen(kw_only=True)
class Partition:
    """Gives every client a share."""
    gives = "clients"
    @hookimpl
    def transform(self, data, run): return [data]

@attrs.frozen(kw_only=True)
class Unknown:
    """Says nothing."""
    @hookimpl
    def transform(self, data, run): return data

@attrs.frozen(kw_only=True)
class Clip:
    """A model."""
    gives = "image-text-model"
    @hookimpl
    def load_model(self, run): return None

@attrs.frozen(kw_only=True)
class Net:
    """A model."""
    gives = "classifier"
    @hookimpl
    def load_model(self, run): return None

@attrs.frozen(kw_only=True)
class Train:
    """Trains."""
    @hookimpl
    def optimize(self, model, data, run): return model

@attrs.frozen(kw_only=True)
class Attack:
    """Attacks."""
    takes = {"model": ("image-text-model", "text-model"), "data": "dataset"}
    columns_needed = {"data": ("captions",)}
    @hookimpl
    def attack(self, model, data, run): return data

@attrs.frozen(kw_only=True)
class Score:
    """Scores."""
    takes = {"model": "classifier"}
    columns_needed = ("label",)
    @hookimpl
    def evaluate(self, model, data, run): return Report()
'''


@pytest.fixture
def plan(tmp_path):
    """The problems of a pipeline whose steps are given as lines."""
    (tmp_path / "m.py").write_text(METHODS)

    def problems(*lines):
        text = "plait: 1\nsteps:\n" + "".join(f"  {line}\n" for line in lines)
        try:
            parse_pipeline(text, folder=tmp_path)
        except PipelineError as error:
            return error.problems
        return []

    return problems


DATA = 'data: {load-data: "./m.py:Source"}'
BARE = 'bare: {load-data: "./m.py:Source", with: {labelled: false}}'
CLIP = 'clip: {load-model: "./m.py:Clip"}'
NET = 'net: {load-model: "./m.py:Net"}'


@pytest.mark.parametrize(
    ("lines", "where", "sentence"),
    [
        ([DATA, NET, 'x: {attack: "./m.py:Attack", from: {model: net, data: said.train}}', 'said: {transform: "./m.py:Caption", from: {data: data}}'],
         "5:39", "'model' of ./m.py:Attack takes an image-text-model or a text-model, and net is a classifier"),
        ([DATA, NET, 'tuned: {optimize: "./m.py:Train", from: {model: net, data: data}}', 'x: {attack: "./m.py:Attack", from: {model: tuned, data: anything}}', 'anything: {transform: "./m.py:Unknown", from: {data: data}}'],
         "6:39", "'model' of ./m.py:Attack takes an image-text-model or a text-model, and tuned is a classifier"),
        ([DATA, CLIP, 'x: {attack: "./m.py:Attack", from: {model: clip, data: data.train}}'],
         "5:52", "./m.py:Attack needs the column 'captions' of 'data', and data.train lacks it; it has image, label"),
        ([BARE, 'x: {transform: "./m.py:Caption", from: {data: bare}}'],
         "4:43", "./m.py:Caption needs the column 'label' of 'data', and bare lacks it; it has image"),
        ([DATA, 'few: {transform: "./m.py:Keep", from: {data: data}, with: {columns: [image]}}', 'x: {transform: "./m.py:Caption", from: {data: few}}'],
         "5:43", "and few lacks it; it has image"),
        ([DATA, 'said: {transform: "./m.py:Caption", from: {data: data}}', 'x: {transform: "./m.py:Caption", from: {data: said.tests}}'],
         "5:43", "said has no split 'tests' (did you mean 'test'?); it has train, test"),
        ([DATA, CLIP, 'parts: {transform: "./m.py:Partition", from: {data: data.train}}', 'x: {attack: "./m.py:Attack", from: {model: clip, data: parts}}'],
         "6:52", "'data' of ./m.py:Attack takes a dataset, and parts is the data of clients"),
        ([DATA, NET, 'x: {evaluate: "./m.py:Score", from: {model: {a: net, b: clip}, data: data}}', CLIP],
         "5:40", "'model' of ./m.py:Score takes a classifier, and clip is an image-text-model"),
    ],
)  # fmt: skip
def test_a_misfit_is_one_sentence_with_its_place(plan, lines, where, sentence):
    problems = plan(*lines)
    assert len(problems) == 1, problems
    assert f":{where}: step x: " in problems[0]
    assert sentence in problems[0]


def test_what_fits_and_what_is_not_known_passes(plan):
    assert not plan(
        DATA, CLIP, NET,
        'said: {transform: "./m.py:Caption", from: {data: data}}',
        'one: {attack: "./m.py:Attack", from: {model: clip, data: said.train}}',
        'again: {attack: "./m.py:Attack", from: {model: clip, data: one}}',
        'odd: {transform: "./m.py:Unknown", from: {data: bare}}', BARE,
        'two: {attack: "./m.py:Attack", from: {model: clip, data: odd.whatever}}',
        'parts: {transform: "./m.py:Partition", from: {data: said.train}}',
        'three: {attack: "./m.py:Attack", from: {model: clip, data: parts.3}}',
        'score: {evaluate: "./m.py:Score", from: {model: {a: net}, data: {one: one, two: odd}}}',
    )  # fmt: skip


def test_a_cycle_is_told_as_a_cycle(plan):
    assert ["cycle" in p for p in plan('a: {transform: "./m.py:Caption", from: {data: b}}', 'b: {transform: "./m.py:Caption", from: {data: a}}')] == [True]  # fmt: skip


BROKEN = '''
import attrs
from plait import hookimpl
from datasets import Dataset

@attrs.frozen(kw_only=True)
class Source:
    """Numbers."""
    gives = "dataset"
    columns_made = {made}
    splits = {splits}
    @hookimpl
    def load_data(self, run): return {{"train": Dataset.from_dict({{"x": [1, 2]}})}}

@attrs.frozen(kw_only=True)
class Double:
    """Doubles."""
    gives = "data"
    columns_needed = {needed}
    columns_made = {doubled}
    @hookimpl
    def transform(self, data, run):
        if "x" not in data.column_names:
            raise ValueError("there is no column x")
        return data.add_column("y", [2 * x for x in data["x"]])
'''


@pytest.mark.parametrize(
    ("method", "facts", "sentence"),
    [
        ("Source", {}, None),
        ("Double", {}, None),
        ("Source", {"made": ("x", "z")}, "columns_made says 'z', and the result lacks it; it has x"),
        ("Source", {"made": ("z",)}, "columns_made says 'z'"),
        ("Source", {"splits": ("train", "test")}, "splits says train, test, and the result has train"),
        ("Double", {"doubled": ("z",)}, "columns_made says 'z', and the result lacks it; it has x, more, y"),
        ("Double", {"needed": ("x", "w")}, "columns_needed says 'w', which the example's 'data' lacks"),
        ("Double", {"needed": ("w",)}, "columns_needed says 'w', which the example's 'data' lacks"),
        ("Double", {"needed": ("x", "more")}, "columns_needed says 'more', and without it the method runs"),
    ],
)  # fmt: skip
def test_what_a_method_says_is_compared_with_what_it_does(tmp_path, monkeypatch, method, facts, sentence):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    said = {"made": ("x",), "splits": ("train",), "needed": ("x",), "doubled": ("y",), **facts}
    (tmp_path / "broken.py").write_text(BROKEN.format(**{k: repr(v) for k, v in said.items()}))
    data = Dataset.from_dict({"x": [1, 2], "more": [0, 0]})
    arguments = {"data": data} if method == "Double" else {}
    (subject,) = subjects(f"./broken.py:{method}", None, lambda: Example(arguments=arguments))
    assert isinstance(subject, Subject)
    if sentence is None:
        check_contract(subject)
    else:
        with pytest.raises(ConformanceError) as error:
            check_contract(subject)
        assert sentence in str(error.value)


def test_what_concerns_the_result_may_depend_on_the_hook():
    class Both:
        gives = {"extract_feature": "data"}
        columns_made = {"extract_feature": ("score",)}

    assert declared(Both(), "extract_feature").columns_made == ("score",)
    assert declared(Both(), "defend").gives == "model"
    assert declared(Both(), "defend").columns_made is None


def test_a_field_of_that_name_says_nothing_of_the_class():
    @attrs.frozen
    class Named:
        splits: tuple = ("a", "b")

    assert declared(Named, "load_data").splits is None
    assert declared(Named(("c",)), "load_data").splits == ("c",)
    assert declared(Named({"train": [1], "test": [2]}), "load_data").splits == ("train", "test")
