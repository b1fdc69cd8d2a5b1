"""Examples that a method is checked on: named on the command line, of the class, built in."""

import pytest
from click.testing import CliRunner
from plait.cli import main
from plait.methods import find
from plait.testing import conformance
from plait.testing.examples import given_example

METHODS = '''
import attrs
from datasets import Dataset
from plait import hookimpl
from plait.fields import REQUIRED, field
from plait.testing import Example


def sums():
    data = Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]]})
    return Example(arguments={"data": data}, empty={"data": data.select([])}, progress=False, device=False)


def nothing():
    return {"data": [1]}


def fails():
    return {}["data"]


@attrs.frozen(kw_only=True)
class Sum:
    """Adds up the numbers of every row."""

    @hookimpl
    def transform(self, data, run):
        if "x" not in data.column_names:
            raise ValueError("the data has no column 'x'")
        if not len(data):
            raise ValueError("the data has no rows")
        return data.add_column("sum", [sum(row) for row in data["x"]])


@attrs.frozen(kw_only=True)
class SumThatKnows(Sum):
    """Adds up the numbers of every row, and says what it can be tried on."""

    @staticmethod
    def example():
        return sums()


@attrs.frozen(kw_only=True)
class Careless:
    """Looks at nothing before it starts."""

    example: str = field("", "a field of that name")

    @hookimpl
    def transform(self, data, run):
        return data.add_column("sum", [sum(row) for row in data["x"]])


@attrs.frozen(kw_only=True)
class Needy:
    """Cannot do without a name."""

    name: str = field(REQUIRED, "of the data")

    @hookimpl
    def load_data(self, run):
        return Dataset.from_dict({"x": [1.0]})
'''


@pytest.fixture
def check(workplace):
    (workplace / "sums.py").write_text(METHODS)

    def run(name, *options):
        return CliRunner().invoke(main, ["check", f"./sums.py:{name}", *options])

    return run


def test_an_example_from_the_command_line(check):
    done = check("Sum", "--example", "./sums.py:sums")
    assert done.exit_code == 0, done.output
    assert "all checks passed" in done.output
    assert check("Sum", "--example", "sums:sums").exit_code == 0


def test_an_example_of_the_class(check):
    assert "all checks passed" in check("SumThatKnows").output
    assert given_example(find("transform", "./sums.py:Careless")) is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Sum", "(data: 7 rows of image, name, label) does not suit this method: the data has no column 'x'; give one"),
        (
            "Careless",
            "the first call ends in ValueError: Column 'x' doesn't exist.; if the built-in example (data: 7 rows",
        ),
        ("Needy", "(no arguments) does not suit this method: "),
    ],
)
def test_a_built_in_example_that_does_not_suit_is_said_once(check, name, sentence):
    done = check(name)
    assert done.exit_code == 1
    assert sentence in done.output
    assert done.output.count("--example") == 1
    assert "1 check failed" in done.output


def test_the_same_in_pytest(check, workplace):
    test = conformance("./sums.py:Sum")
    checks = test.pytestmark[0].args[1]
    with pytest.raises(AssertionError, match="does not suit this method: the data has no column 'x'"):
        test(checks[0])
    with pytest.raises(pytest.skip.Exception):
        test(checks[1])


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        ("./sums.py:sum", "there is no 'sum' in ./sums.py (did you mean"),
        ("./sums.py:Sum", "is not a function that returns a plait.testing.Example"),
        ("./none.py:sums", "cannot be imported"),
        ("sums", "is not of the form package.module:name or ./file.py:name"),
        ("./sums.py:nothing", "returns a dict; it has to return a plait.testing.Example"),
        ("./sums.py:fails", "fails: KeyError: data (sums.py:"),
    ],
)
def test_examples_that_are_none(check, example, sentence):
    done = check("Sum", "--example", example)
    assert done.exit_code == 1
    assert done.output.startswith("error: example")
    assert sentence in done.output
    assert done.output.count("\n") == 1
