import errno
import json
import os
import subprocess
import sys
import time

import pytest
from plait import PlaitError
from plait.store import Store

KEY = "ab" + "0" * 62


def write(text):
    return lambda folder: (folder / "x.txt").write_text(text)


def test_put_and_entry(tmp_path):
    store = Store(tmp_path)
    assert not store.has(KEY)
    store.put(KEY, write("hello"), {"label": "a"})
    entry = store.entry(KEY)
    assert (entry.folder / "x.txt").read_text() == "hello"
    assert entry.meta["label"] == "a"
    assert entry.size == 5
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        (folder / "x").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.put(KEY, fail, {})
    assert not store.has(KEY)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "part"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "name another place"), (errno.EACCES, "--store")],
)
def test_disk_errors_are_told(tmp_path, number, part):
    def fail(folder):
        raise OSError(number, os.strerror(number))

    with pytest.raises(PlaitError, match=part):
        Store(tmp_path).put(KEY, fail, {})


def test_a_store_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaitError, match="cannot be written"):
        Store(tmp_path / "file" / "store").put(KEY, write("x"), {})


def test_a_truncated_file_is_not_a_result(tmp_path):
    store = Store(tmp_path)
    folder = store.put(KEY, write("hello"), {}).folder
    (folder / "x.txt").write_text("hell")
    assert not store.has(KEY)
    assert store.verify() == {KEY: "incomplete"}
    store.put(KEY, write("hello"), {})
    assert store.has(KEY)
    assert store.verify() == {}


def test_verify_finds_flipped_bytes(tmp_path):
    store = Store(tmp_path)
    folder = store.put(KEY, write("hello"), {}).folder
    (folder / "x.txt").write_text("hellO")
    assert store.has(KEY)
    assert store.verify() == {KEY: "changed: x.txt"}
    store.remove(KEY)
    assert store.verify() == {}


def test_broken_meta_is_no_result(tmp_path):
    store = Store(tmp_path)
    folder = store.put(KEY, write("hello"), {}).folder
    for text in ("", "[]", "{", json.dumps({"files": None})):
        (folder / "meta.json").write_text(text)
        assert store.entry(KEY) is None


def test_collect(tmp_path):
    store = Store(tmp_path)
    other = "cd" + "0" * 62
    for key in (KEY, other):
        store.put(key, write("hello"), {})
    old = time.time() - 1000
    os.utime(store.folder(KEY) / "meta.json", (old, old))
    dead = tmp_path / "tmp" / "999999999-x"
    dead.mkdir(parents=True)
    alive = tmp_path / "tmp" / f"{os.getpid()}-y"
    alive.mkdir()
    assert store.collect(500)[0] == 1
    assert not store.has(KEY)
    assert store.has(other)
    assert not dead.exists()
    assert alive.exists()


def test_collect_leaves_what_another_process_holds(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, write("hello"), {})
    code = f"""
import sys
from plait.store import Store
from pathlib import Path
with Store(Path({str(tmp_path)!r})).lock({KEY!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert store.collect(-1)[0] == 0
        process.kill()
    assert store.collect(-1)[0] == 1
