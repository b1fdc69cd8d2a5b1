"""Users' own code, named by import path or by file."""

import os
import sys
from pathlib import Path

import pytest
from plait.importing import import_code


@pytest.mark.parametrize("place", ["own_code.py", "own_code"])
def test_both_are_looked_for_from_the_folder(place, tmp_path):
    (tmp_path / "own_code.py").write_text("ANSWER = 42\n")
    assert import_code(place, tmp_path).ANSWER == 42
    # Nothing there hides an installed module.
    assert str(tmp_path) not in sys.path[:-1]
    sys.modules.pop("own_code", None)


@pytest.fixture
def byte_code(monkeypatch):
    """Python keeps byte code, as it does where nobody forbids it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)


def test_an_edited_file_is_another_module(tmp_path, byte_code):
    file = tmp_path / "own.py"
    file.write_text("ANSWER = 1\n")
    first = import_code(str(file))
    assert import_code("own.py", tmp_path) is first
    file.write_text("ANSWER = 2\n")
    assert (import_code(str(file)).ANSWER, first.ANSWER) == (2, 1)
    assert Path(first.__plait_file__) == file.resolve()


def test_an_edit_in_the_second_of_the_last_import_is_seen(tmp_path, byte_code, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "part.py").write_text("from own_package.answer import ANSWER\n")
    answer = tmp_path / "own_package" / "answer.py"
    for number in (1, 2):  # of one size, and of one second unless it changes just then
        answer.write_text(f"ANSWER = {number}\n")
        os.utime(answer, (1_800_000_000, 1_800_000_000))
        found = import_code("own_package.part", tmp_path).ANSWER
        assert found == number
        for name in [name for name in sys.modules if name.startswith("own_package")]:
            del sys.modules[name]  # as another process would find it


def test_a_module_that_fails_is_imported_anew(tmp_path):
    (tmp_path / "own.py").write_text("import pathlib\npathlib.Path(__file__).with_name('data').read_text()\n")
    with pytest.raises(FileNotFoundError, match="data"):
        import_code("own.py", tmp_path)
    (tmp_path / "data").write_text("")
    assert import_code("own.py", tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        import_code("nothing.py", tmp_path)
