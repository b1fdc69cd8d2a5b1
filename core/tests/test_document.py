import pytest
from plait.document import parse, read
from plait.errors import PipelineError


def test_places_are_lines_and_columns():
    document = parse("a: 1\nb:\n  - x\n  - {c: 2}\n", "f.yaml")
    assert document.data == {"a": 1, "b": ["x", {"c": 2}]}
    assert document.where(("b", 1, "c")) == "f.yaml:4:6"
    assert document.where(("b", 1, "missing")) == "f.yaml:4:5"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("on", "on"), ("no", "no"), ("true", True), ("12", 12), ("0o7", "0o7"), ("8/255", "8/255"),
     ("2020-01-01", "2020-01-01"), ("~", None), ("'1'", "1"), ("1_000", "1_000"), (".inf", float("inf")), ("-.5", -0.5)],
)  # fmt: skip
def test_scalars_are_yaml_1_2(text, value):
    assert parse(f"a: {text}").data == {"a": value}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\na: 2", r"duplicate key 'a' \(first on line 1\)"),
        ("a:\n\t- b", "indent with spaces"),
        ("a: !!python/object:os.system x", "is not allowed"),
        ("a: !x y", "is not allowed"),
        ("a: [1, 2", "not YAML"),
        ("? [a]\n: b", "a key has to be a text"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("a: \x00", "not YAML"),
        ("&a [*a]", "too large or nested too deeply"),
        ("[" * 3000, "not YAML|nested"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [{','.join(['*' + ('a' if i == 0 else f'b{i - 1}')] * 10)}]\n" for i in range(9)), "too large"),
    ],
)  # fmt: skip
def test_what_is_refused(text, part):
    with pytest.raises(PipelineError, match=part):
        parse(text, "f.yaml")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PipelineError, match="there is no file"):
        read(tmp_path / "missing.yaml")
    with pytest.raises(PipelineError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")
    with pytest.raises(PipelineError, match="not UTF-8"):
        read(tmp_path / "latin.yaml")


def test_merge_keys():
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: *a, y: 5}\nd: {<<: [*a, *b]}\n"
    data = parse(text).data
    assert data["c"] == {"x": 1, "y": 5}
    assert data["d"] == {"x": 1, "y": 2, "z": 4}
    with pytest.raises(PipelineError, match="<< takes a mapping"):
        parse("a: {<<: 3}")


def test_characters_written_as_two_escapes():
    assert parse('a: "\\uD83D\\uDE00"').data == {"a": "😀"}
    assert parse('"\\uD83D\\uDE00": 1').data == {"😀": 1}
    for text in ('a: "\\uD83D"', '"\\uDE00": 1', 'a: "x\\uDE00\\uD83D"'):
        with pytest.raises(PipelineError, match="half of a character"):
            parse(text)
