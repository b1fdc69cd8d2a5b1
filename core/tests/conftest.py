from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with the toy methods and a store of its own."""
    (tmp_path / "toy.py").write_bytes(TOY.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("PLAIT_DEBUG", raising=False)
    return tmp_path
