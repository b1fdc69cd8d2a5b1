import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plait.errors import PipelineError, PlaitError
from plait.pipeline import load_pipeline, parse_pipeline

GOOD = """\
plait: 1
name: demo
matrix:
  seed: [0, 1]
  amount: [1, 2.5]
steps:
  numbers: {load-data: "./toy.py:Numbers", with: {size: 3, scale: 8/255}}
  more: {transform: "./toy.py:Add", from: {data: numbers.train}, with: {amount: "${matrix.amount}"}}
  score: {evaluate: "./toy.py:Mean", from: {data: {before: numbers.train, after: more}}}
"""


def problems(text, overrides=()):
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text, overrides)
    return caught.value.problems


def test_cells_steps_and_fields(workplace):
    pipeline = parse_pipeline(GOOD)
    assert [cell.values for cell in pipeline.cells] == [{"seed": s, "amount": a} for s in (0, 1) for a in (1, 2.5)]
    cell = pipeline.cells[3]
    assert list(cell.steps) == ["numbers", "more", "score"]
    assert cell.steps["more"].instance.amount == 2.5
    assert cell.steps["more"].seed == 1
    assert cell.steps["numbers"].instance.scale == pytest.approx(8 / 255)
    assert pipeline.axes == {"numbers": {"seed"}, "more": {"seed", "amount"}, "score": {"seed"}}


def test_order_does_not_matter(workplace):
    head, _, steps = GOOD.partition("steps:\n")
    reverse = head + "steps:\n" + "\n".join(reversed(steps.rstrip().split("\n")))
    assert list(parse_pipeline(reverse).cells[0].steps) == ["numbers", "more", "score"]


def test_overrides(workplace):
    pipeline = parse_pipeline(GOOD, ["matrix.seed=[7]", "steps.numbers.with.size=9", "matrix.amount=[3]"])
    assert len(pipeline.cells) == 1
    assert pipeline.cells[0].steps["numbers"].instance.size == 9
    assert pipeline.cells[0].steps["numbers"].seed == 7


@pytest.mark.parametrize(
    ("override", "part"),
    [("steps.numbrs.with.size=1", "did you mean 'numbers'"), ("size", "path.to.field=value"), ("stps.a=1", "did you mean 'steps'"),
     ("steps.numbers.with.size=x", "size is 'x'"), ("=1", "path.to.field=value"), ("matrix.seed=[", "override")],
)  # fmt: skip
def test_wrong_overrides(workplace, override, part):
    assert part in problems(GOOD, [override])[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["it is empty"]),
        ("- a\n- b", ["it is a list"]),
        ("hello", ["a single value"]),
        ("plait: 2\nsteps: {a: {load-data: './toy.py:Numbers'}}", ["1:1: format 2 is unknown"]),
        ("steps: {a: {load-data: './toy.py:Numbers'}}", ["first line has to be 'plait: 1'"]),
        ("plait: 1", ["at least one step"]),
        ("plait: 1\nsteps: {}", ["at least one step"]),
        ("plait: 1\nstepz: {}", ["did you mean 'steps'", "at least one step"]),
        ("plait: 1\nsteps: {a: 3}", ["step a: it is 3"]),
        ("plait: 1\nsteps: {'a b': {load-data: './toy.py:Numbers'}}", ["step name 'a b' is not allowed"]),
        ("plait: 1\nname: 'a/b'\nsteps: {a: {load-data: './toy.py:Numbers'}}", ["name is 'a/b'"]),
        ("plait: 1\nseed: -1\nsteps: {a: {load-data: './toy.py:Numbers'}}", ["seed is -1"]),
        ("plait: 1\nmatrix: {seed: 3}\nsteps: {a: {load-data: './toy.py:Numbers'}}", ["axis seed is 3"]),
        ("plait: 1\nmatrix: {seed: [a]}\nsteps: {a: {load-data: './toy.py:Numbers'}}", ["whole numbers"]),
        ("plait: 1\nmatrix: {k: [1, 1]}\nsteps: {a: {load-data: './toy.py:Numbers'}}", ["duplicate value"]),
        ("plait: 1\nsteps: {a: {load-dat: './toy.py:Numbers'}}", ["did you mean 'load-data'"]),
        ("plait: 1\nsteps: {a: {}}", ["step a has no hook"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', transform: './toy.py:Add'}}", ["two hooks: load-data, transform"]),
        ("plait: 1\nsteps: {a: {load-data: [x]}}", ["the method is ['x']"]),
        ("plait: 1\nsteps: {a: {load-data: './nothing.py:A'}}", ["there is no file"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Nmbers'}}", ["did you mean 'Numbers'"]),
        ("plait: 1\nsteps: {a: {load-data: 'no.such.module:A'}}", ["cannot be imported"]),
        ("plait: 1\nsteps: {a: {transform: './toy.py:Numbers'}}", ["has no hook transform; it has load_data"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {sze: 3}}}", ["no field 'sze' (did you mean 'size'?)"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {size: '3'}}}", ["size is '3'; allowed is a whole number, [1, 1000]"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {size: 0}}}", ["size is 0; allowed is [1, 1000]"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {size: true}}}", ["size is True"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {scale: .nan}}}", ["scale is nan"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {scale: 1/0}}}", ["scale is '1/0'"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {kind: unform, mode: x, names: a}}}",
         ["kind is 'unform'; allowed is one of uniform, normal", "mode is 'x'", "names is 'a'; allowed is a list of text"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: [1]}}", ["with is [1]"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', from: {data: b}}}", ["there is no step 'b'", "takes no 'data'"]),
        ("plait: 1\nsteps: {a: {transform: './toy.py:Add'}}", ["needs 'data'"]),
        ("plait: 1\nsteps: {a: {transform: './toy.py:Add', from: numbers}}", ["from is 'numbers'"]),
        ("plait: 1\nsteps: {a: {transform: './toy.py:Add', from: {data: a}}}", ["form a cycle: a → a"]),
        ("plait: 1\nsteps: {a: {transform: './toy.py:Add', from: {data: 3}}}", ["3 names no step"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers'}, b: {transform: './toy.py:Add', from: {data: a.tain}}}", ["no split 'tain' (did you mean 'train'?)"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers'}, b: {evaluate: './toy.py:Mean', from: {data: a.test}}, c: {transform: './toy.py:Add', from: {data: b}}}", ["b is a report"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', with: {size: '${matrix.k}'}}}", ["matrix.k"]),
        ("plait: 1\nsteps: {a: {load-data: './toy.py:Numbers', seed: x}}", ["seed is 'x'"]),
        ("plait: 1\nsteps: {a: {load-data: ensir}}", ["'ensir' is not a method of hook load_data"]),
        ("plait: 1\nsteps: {a: {load-data: no-such-method-at-all}}", ["no method 'no-such-method-at-all'"]),
    ],
)  # fmt: skip
def test_every_mistake_is_told_in_a_sentence(workplace, text, parts):
    found = "\n".join(problems(text))
    for part in parts:
        assert part in found
    assert "Traceback" not in found


def test_all_problems_at_once_with_their_places(workplace):
    (workplace / "p.yaml").write_text(
        "plait: 1\nsteps:\n  a: {load-data: './toy.py:Numbers', with: {size: 0, scal: 1}}\n  b: {transform: './toy.py:Add', from: {data: c}}\n"
    )
    with pytest.raises(PipelineError) as caught:
        load_pipeline("p.yaml")
    assert [problem.split(" ")[0] for problem in caught.value.problems] == [
        "p.yaml:3:45:",
        "p.yaml:3:54:",
        "p.yaml:4:41:",
    ]


def test_nested_methods(workplace):
    text = """\
plait: 1
steps:
  n: {load-data: "./toy.py:Numbers"}
  s:
    transform: "./toy.py:Several"
    from: {data: n.train}
    with: {steps: ["./toy.py:Add", {"./toy.py:Add": {amount: 2}}], last: {"./toy.py:Add": {amount: 1/2}}}
"""
    instance = parse_pipeline(text).cells[0].steps["s"].instance
    assert [step.amount for step in (*instance.steps, instance.last)] == [1.0, 2.0, 0.5]
    wrong = problems(text.replace("amount: 2", "amout: 2").replace("{amount: 1/2}", "3"))
    assert "did you mean 'amount'" in wrong[0]
    assert "last: it is" in wrong[1]


def test_a_field_with_the_name_of_a_hook_is_no_hook(workplace):
    from plait.methods import find

    (workplace / "m.py").write_text(
        "import attrs\nfrom plait import hookimpl\n@attrs.frozen\nclass M:\n    attack: int = 1\n"
        "    @hookimpl\n    def load_data(self, run):\n        return self.attack\n"
    )
    assert find("load_data", "./m.py:M").cls(attack=3).load_data(None) == 3
    with pytest.raises(PlaitError, match="has no hook attack; it has load_data"):
        find("attack", "./m.py:M")


CLASS = """
import attrs
from plait import hookimpl
{decorator}
class M:
    {mark}
    def transform(self, {arguments}):
        return data
"""


@pytest.mark.parametrize(
    ("decorator", "mark", "arguments", "part"),
    [
        ("@attrs.frozen", "@hookimpl", "data, run=None", "has a default"),
        ("@attrs.frozen", "@hookimpl", "dta, run", "did you mean 'data'"),
        ("@attrs.frozen", "@hookimpl", "*data", "any number of arguments"),
        ("@attrs.frozen", "", "data, run", "put @plait.hookimpl above it"),
        ("", "@hookimpl", "data, run", "not an attrs class"),
        ("raise OSError('no luck')", "@hookimpl", "data, run", "OSError: no luck"),
        ("syntax error", "@hookimpl", "data, run", "SyntaxError"),
    ],
)
def test_method_classes_that_are_wrong(workplace, decorator, mark, arguments, part):
    (workplace / "m.py").write_text(CLASS.format(decorator=decorator, mark=mark, arguments=arguments))
    text = (
        "plait: 1\nsteps:\n  n: {load-data: './toy.py:Numbers'}\n  a: {transform: './m.py:M', from: {data: n.train}}\n"
    )
    found = problems(text)
    assert len(found) == 1
    assert part in found[0]


WORDS = st.sampled_from(
    ["plait", "name", "seed", "matrix", "steps", "from", "with", "data", "load-data", "transform", "evaluate", "./toy.py:Numbers",
     "./toy.py:Add", "numbers", "numbers.train", "size", "${matrix.k}", "${", "${steps}", "???", "1/0", "&a", "*a", "!!int", "\t", "~",
     "${oc.env:HOME}", "${steps.a}", "\u2028", "a.b.c", "..", "", "- ", "{}", "[]", ": ", "1e999", "9" * 400]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def only_plait_errors(text):
    try:
        parse_pipeline(text)
    except PlaitError:
        return


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, len(GOOD)), removed=st.integers(0, 12), inserted=WORDS | st.text(max_size=6))
def test_mutated_pipelines_raise_nothing_else(workplace, position, removed, inserted):
    only_plait_errors(GOOD[:position] + inserted + GOOD[position + removed :])


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=VALUES, steps=VALUES, matrix=VALUES)
def test_random_pipelines_raise_nothing_else(workplace, data, steps, matrix):
    import yaml

    content = data if not isinstance(data, dict) else {**data, "plait": 1, "steps": steps, "matrix": matrix}
    only_plait_errors(yaml.safe_dump(content, allow_unicode=True))
    if isinstance(steps, dict):
        only_plait_errors(
            yaml.safe_dump({"plait": 1, "steps": {"a": steps, "numbers": {"load-data": "./toy.py:Numbers", **steps}}})
        )
