"""One step for several values."""

from pathlib import Path

import plait
import pytest
from plait import PipelineError
from plait.pipeline import load_pipeline
from plait.plan import make_plan
from plait.store import Store

PIPELINE = """\
plait: 1
name: each
seed: 3
matrix: {scale: [1.0, 2.0]}
steps:
  numbers: {load-data: "./toy.py:Numbers", with: {scale: "${matrix.scale}"}}
  more:
    each: {amount: [1, 2.5]}
    transform: "./toy.py:Add"
    from: {data: numbers.train}
    with: {amount: "${each.amount}"}
  again:
    each: {amount: [1, 2.5]}
    transform: "./toy.py:Add"
    from: {data: "more.${each.amount}"}
  sources:
    each: {kind: [uniform, normal]}
    load-data: "./toy.py:Numbers"
    with: {kind: "${each.kind}", scale: "${matrix.scale}"}
  one: {evaluate: "./toy.py:Mean", from: {data: {just: again.2.5}}}
  all: {evaluate: "./toy.py:Mean", from: {data: more}}
  parts: {evaluate: "./toy.py:Mean", from: {data: "sources.*.test"}}
  beside: {evaluate: "./toy.py:Mean", from: {data: {before: numbers.train, <<: [more, sources.*.test]}}}
  every:
    each: {amount: [1, 2.5]}
    evaluate: "./toy.py:Mean"
    from: {data: {"before ${each.amount}": "more.${each.amount}", after: "again.${each.amount}"}}
"""


@pytest.fixture
def place(workplace):
    Path("p.yaml").write_text(PIPELINE)
    return workplace


def problems(text, overrides=()):
    Path("q.yaml").write_text(text)
    with pytest.raises(PipelineError) as caught:
        load_pipeline("q.yaml", overrides)
    return caught.value.problems


def test_members_are_gathered_inside_a_cell(place):
    result = plait.run("p.yaml")
    assert not result.failed
    numbers = result["numbers[scale=2.0]"]["train"]
    assert result["more.2.5[scale=2.0]"] == [x + 2.5 for x in numbers]
    assert result["again.1[scale=2.0]"] == pytest.approx([x + 2 for x in numbers])
    assert [row[0] for row in result.tables["all"].rows] == [("1.0", "1"), ("1.0", "2.5"), ("2.0", "1"), ("2.0", "2.5")]
    assert {texts[1] for texts, _ in result.tables["parts"].rows} == {"uniform", "normal"}
    assert [texts[1] for texts, _ in result.tables["beside"].rows][:5] == ["before", "1", "2.5", "uniform", "normal"]
    table = result.tables["every"]
    assert table.index == ["scale", "amount", "name"]
    mean = sum(numbers) / len(numbers)
    assert table.value("mean", scale="2.0", amount="2.5", name="before 2.5").mean == pytest.approx(mean + 2.5)
    assert table.value("mean", scale="2.0", amount="1", name="after").mean == pytest.approx(mean + 2)


def test_another_value_runs_nothing_anew(place):
    plait.run("p.yaml")
    plan = make_plan(load_pipeline("p.yaml", ["steps.more.each.amount=[1, 2.5, 4]"]))
    missing = {task.label for task in plan.tasks if not Store().has(task.key)}
    assert missing == {f"{name}[scale={scale}]" for name in ("more.4", "all", "beside") for scale in ("1.0", "2.0")}
    fewer = make_plan(load_pipeline("p.yaml", ["steps.sources.each.kind=[normal]", "matrix.scale=[1.0]"]))
    assert {t.label for t in fewer.tasks if not Store().has(t.key)} == {"parts[scale=1.0]", "beside[scale=1.0]"}


def test_members_have_streams_of_their_own(place):
    result = plait.run("p.yaml", ["matrix.scale=[1.0]", "steps.sources.with.kind=uniform"])
    assert result["sources.uniform[scale=1.0]"]["train"] != result["sources.normal[scale=1.0]"]["train"]


def test_labels_products_and_values_from_elsewhere(place):
    Path("q.yaml").write_text("""\
plait: 1
matrix: {which: [[small], [small, large]]}
steps:
  n:
    each: {size: {small: 2, large: 5}, kind: [uniform, normal]}
    load-data: "./toy.py:Numbers"
    with: {size: "${each.size}", kind: "${each.kind}"}
  t: {each: {size: "${matrix.which}"}, evaluate: "./toy.py:Mean", from: {data: {a: "n.${each.size}-normal.train"}}, with: {title: "${each.size}!"}}
""")
    pipeline = load_pipeline("q.yaml")
    assert list(pipeline.cells[0].steps) == [
        "n.small-uniform",
        "n.small-normal",
        "n.large-uniform",
        "n.large-normal",
        "t.small",
    ]
    assert list(pipeline.cells[1].steps)[-2:] == ["t.small", "t.large"]
    assert pipeline.cells[0].steps["n.large-normal"].instance.size == 5
    assert pipeline.cells[0].steps["t.small"].instance.title == "small!"
    result = plait.run("q.yaml")
    assert "t.small" in result.labels
    assert len(result["n.large-normal"]["train"]) == 5


STEP = 'plait: 1\nsteps:\n  n:\n    each: {%s}\n    load-data: "./toy.py:Numbers"\n    with: {size: "${each.size}"}\n  t: {evaluate: "./toy.py:Mean", from: {data: %s}}\n'


@pytest.mark.parametrize(
    ("each", "data", "sentence"),
    [
        ("", "n", "q.yaml:4:5: step n: each is {}; it has to be a mapping name → list of values"),
        (
            "size: 3",
            "n",
            "q.yaml:4:12: step n: each size is 3; it has to be a list of values, or a mapping label → value",
        ),
        ("size: [2, 2]", "n", "step n: each size has the value 2 twice; keep one"),
        ("siz: [2]", "n", "q.yaml:6:12: step n: ${each.size} names nothing; each has siz"),
        ("size: [2], k: ['x.', y]", "n", "give it a short label: {label: value}"),
        ("a: ['x-y', x], size: ['y-1', 1]", "n", "each makes two steps n.x-y-1"),
        ("size: [2, 3]", "n.4", "q.yaml:7:41: step t: n has no '4'; it has 2, 3"),
        ("size: [2, 0]", "n", "q.yaml:6:12: step n.0: size is 0; allowed is [1, 1000]"),
        ("size: [2, 3]", "m", "step t: there is no step 'm'"),
        ("size: '${matrix.none}'", "n", "none"),
    ],
)
def test_mistakes_have_their_place(workplace, each, data, sentence):
    assert any(sentence in problem for problem in problems(STEP % (each, data))), problems(STEP % (each, data))


@pytest.mark.slow
def test_each_in_the_schema_and_in_plan(place):
    import jsonschema
    from plait.document import parse
    from plait.schema import pipeline_schema

    jsonschema.validate(parse(PIPELINE).data, pipeline_schema())


def test_one_part_of_a_result_is_replaced(workplace):
    text = """
plait: 1
steps:
  numbers: {load-data: "./toy.py:Numbers", with: {size: 3}}
  changed: {transform: "./toy.py:Add", from: {data: numbers.train}, with: {amount: 5}}
  again: {transform: "./together.py:Same", from: {data: {<<: numbers, train: changed}}}
  more: {transform: "./together.py:Same", from: {data: {<<: [numbers, again], other: again.test}}}
  wrong: {transform: "./together.py:Same", from: {data: {<<: changed, x: numbers.test}}}
"""
    (workplace / "together.py").write_text(
        "import attrs\nfrom plait import hookimpl\n@attrs.frozen\nclass Same:\n    'Gives it back.'\n    gives = 'data'\n"
        "    @hookimpl\n    def transform(self, data, run): return dict(data)\n"
    )
    result = plait.run(text, to=["more"])
    numbers, again, more = (result.output(name) for name in ("numbers", "again", "more"))
    assert again == {"train": [n + 5 for n in numbers["train"]], "test": numbers["test"]}
    assert list(again) == ["train", "test"]
    assert more == {**again, "other": numbers["test"]}
    failed = plait.run(text).failed
    assert "<<: changed is one whole; << takes the parts of a result that has some" in str(failed)
    with pytest.raises(PipelineError, match="numbers has no split 'tset'"):
        plait.run(text.replace("x: numbers.test", "x: numbers.tset"))
    with pytest.raises(PipelineError, match="again has no split 'third'"):
        plait.run(text.replace("again.test", "again.third"))
    # What is replaced is part of the key.
    other = plait.run(text.replace("amount: 5", "amount: 6"), to=["again"])
    assert other.output("again")["train"] == [n + 6 for n in numbers["train"]]
