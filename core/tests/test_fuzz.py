"""Pipelines that are broken in thousands of ways: each is accepted, or refused in sentences of bounded length."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from plait.document import parse
from plait.errors import LONGEST, PipelineError, PlaitError
from plait.pipeline import check, load_pipeline, parse_pipeline
from plait.plan import make_plan

FOLDER = Path(__file__).parent
BASE = """plait: 1
name: toy
seed: 3
matrix:
  seed: [0, 1]
  amount: [0.5]
steps:
  numbers:
    load-data: ./toy.py:Numbers
    with: {size: 3, scale: 8/255, kind: normal}
  more:
    each: {by: [5, 10]}
    transform: ./toy.py:Add
    from: {data: numbers.train}
    with: {amount: "${each.by}"}
  further:
    transform: ./toy.py:Add
    seed: 1
    resources: {gpu: 1}
    from: {data: more.5}
    with:
      amount: "${matrix.amount}"
  score:
    evaluate: ./toy.py:Mean
    from: {data: {before: numbers.train, after: further, all: "more.10"}}
"""
VALUES = (
    "null", "~", "true", "-1", "1e400", "10" * 300, ".nan", "-.inf", "''", '"\\ud800"', '"\\0"', "[]", "{}", "[[[[]]]]", "{a: {b: {c: 1}}}",
    "${matrix.amount}", "${steps.numbers}", "${nowhere}", "${", "$", "${env:HOME}", "${oc.env:HOME}", "builtins:eval", "sys:flags", "os:system",
    "./nothing.py:A", "a.b:c", ":", "::", "x" * 5000, "../../etc", "/", ".", "&a [*a]", "*b", "!!bool maybe", "!!int 3.5", "!!python/object:os.system []",
    "!!binary abc", "!!timestamp 2001-13-45", "!!set {a}", "2001-01-01", "0x1F", "0o17", "1_000", "<<: {a: 1}", "? a", "- 1\n- 2", "|\n  text", "'", '"', "\t", "\x07",
    "é", "\u202e", "😀", "numbers", "more.5", "more.*", "numbers.train.more", "*", "[numbers, more]", "{a: numbers}", "[1, '1']", "2**63", "9223372036854775808",
)  # fmt: skip


def _mutated(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(lines))
        line = lines[at]
        kind = draw.randrange(9)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[draw.randrange(len(lines))])
        elif kind == 2:
            lines[at] = " " * draw.randrange(6) + line.lstrip()
        elif kind == 3 and line:
            place = draw.randrange(len(line))
            lines[at] = (
                line[:place]
                + chr(draw.choice((*range(32, 127), 9, 0, 0xE9, 0x2028)))
                + line[place + draw.randrange(2) :]
            )
        elif kind == 4 and ":" in line:
            lines[at] = f"{line.partition(':')[0]}: {draw.choice(VALUES)}"
        elif kind == 5 and ":" in line:
            lines[at] = f"{' ' * (len(line) - len(line.lstrip()))}{draw.choice(VALUES)}:{line.partition(':')[2]}"
        elif kind == 6:
            words = line.split(" ")
            words[draw.randrange(len(words))] = draw.choice(VALUES)
            lines[at] = " ".join(words)
        elif kind == 7:
            lines.insert(
                at,
                f"{' ' * draw.choice((0, 2, 4, 6))}{draw.choice(('seed', 'with', 'from', 'each', 'steps', 'x'))}: {draw.choice(VALUES)}",
            )
        else:
            other = draw.randrange(len(lines))
            lines[at], lines[other] = lines[other], line
        lines = lines or [""]
    return "\n".join(lines)


def _try(make) -> bool:
    """Whether it is refused; anything but a sentence fails the test."""
    try:
        make_plan(make())
    except PlaitError as error:
        sentences = error.problems if isinstance(error, PipelineError) else [str(error)]
        assert sentences
        assert all(isinstance(sentence, str) and sentence.strip() for sentence in sentences)
        longest = max(map(len, sentences))
        assert longest <= LONGEST, f"a sentence of {longest} characters"
        str(error).encode()
        return True
    return False


@pytest.mark.slow
def test_mutated_files(tmp_path):
    shutil.copy(FOLDER / "toy.py", tmp_path)
    draw = random.Random(0)
    refused = 0
    for number in range(2000):
        text = _mutated(BASE, draw)
        file = tmp_path / "mutated.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            refused += _try(lambda file=file: load_pipeline(file))
        except Exception as error:
            raise AssertionError(f"file {number} ends in {type(error).__name__}: {error}\n{text}") from error
    assert 200 < refused < 2000


@pytest.mark.slow
def test_mutated_overrides():
    draw = random.Random(1)
    document = parse(BASE)
    keys = ("steps.more.with.amount", "steps.more.each.by", "matrix.amount", "matrix.seed", "seed", "name", "steps", "matrix", "plait", "steps.numbers",
            "steps.numbers.load-data", "steps.more.from.data", "steps.score.from", "steps.further.resources", "+matrix.new", "steps.more.with", "+", "")  # fmt: skip
    refused = 0
    for number in range(500):
        key = draw.choice(keys)
        if draw.random() < 0.3 and key:
            at = draw.randrange(len(key))
            key = key[:at] + draw.choice((".", "[0]", "=", " ", "x", "", "${a}", "\u202e")) + key[at + 1 :]
        override = key + draw.choice(("=", "=", "=", "=", "")) + draw.choice(VALUES)
        try:
            refused += _try(lambda override=override: check(document, [override], FOLDER))
        except Exception as error:
            raise AssertionError(f"override {number} ends in {type(error).__name__}: {error}\n{override!r}") from error
    assert 50 < refused < 500


def test_random_bytes(tmp_path):
    draw = random.Random(2)
    for _ in range(200):
        file = tmp_path / "random.yaml"
        file.write_bytes(BASE.encode()[: draw.randrange(len(BASE))] + draw.randbytes(draw.randrange(1, 40)))
        _try(lambda file=file: load_pipeline(file))


def test_the_file_that_is_mutated_is_right():
    plan = make_plan(parse_pipeline(BASE, folder=FOLDER))
    assert len(plan.tasks) > 5
