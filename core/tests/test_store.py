import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import plait.store
import pytest
from plait import PlaitError, StoreError
from plait.store import Store, own_sizes

KEY = "ab" + "0" * 62
SECOND = "cd" + "0" * 62
THIRD = "ef" + "0" * 62


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
    for key in (KEY, SECOND):
        store.put(key, write("hello"), {})
    old = time.time() - 1000
    os.utime(store.folder(KEY) / "meta.json", (old, old))
    dead = tmp_path / "tmp" / f"{KEY}-x"
    dead.mkdir(parents=True)
    alive = tmp_path / "tmp" / f"{THIRD}-y"
    alive.mkdir()
    with store.lock(THIRD):
        assert store.collect(500)[0] == 1
    assert not store.has(KEY)
    assert store.has(SECOND)
    assert not dead.exists()
    assert alive.exists()


def test_collect_leaves_files_that_are_not_the_stores(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, write("hello"), {})
    foreign = [
        tmp_path / name
        for name in (
            "objects/.nfs0001",
            "objects/zz/notes",
            "tmp/Icon",
            "tmp/12",
            "locks/x.txt",
            "runs/readme",
            "runs/a.json",
            "contents/ab/notes",
        )
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("[not json")
    (tmp_path / "tmp" / "folder").mkdir()
    assert store.collect(-1)[0] == 1
    assert all(path.exists() for path in foreign)
    assert (tmp_path / "tmp" / "folder").exists()
    assert list(store.entries()) == []


ON_A_HOST = """
import sys, socket
socket.gethostname = lambda: {host!r}
from pathlib import Path
import plait.store
plait.store.LEASE_SECONDS = 1.0
store = plait.store.Store(Path({root!r}))
with {what}:
    print("held", flush=True)
    sys.stdin.read()
"""


def on_a_host(host, root, what):
    code = ON_A_HOST.format(host=host, root=str(root), what=what)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def short_leases(monkeypatch):
    monkeypatch.setattr(plait.store, "LEASE_SECONDS", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["here", "another-host"])
def test_a_key_is_held_by_one_process_of_all_hosts(tmp_path, short_leases, host):
    store = Store(tmp_path)
    store.put(KEY, write("hello"), {})
    (tmp_path / "tmp" / f"{KEY}-half").mkdir(parents=True)
    host = socket.gethostname() if host == "here" else host
    waits = []
    with on_a_host(host, tmp_path, f"store.lock({KEY!r})") as process:
        assert store.collect(-1)[0] == 0
        assert (tmp_path / "tmp" / f"{KEY}-half").exists()
        threading.Timer(1.5, process.kill).start()
        started = time.monotonic()
        with store.lock(KEY, lambda: waits.append(time.monotonic())):
            assert time.monotonic() - started > 1.4  # a living holder is never robbed, however short the lease
    assert len(waits) == 1
    assert store.collect(-1)[0] == 1
    assert not (tmp_path / "tmp" / f"{KEY}-half").exists()
    assert list((tmp_path / "locks").iterdir()) == []


def killed_while_locking(store, key):
    """A process makes the lock first, then writes its name into it; this one was killed in between."""
    (store.root / "locks").mkdir(parents=True, exist_ok=True)
    lock = store.root / "locks" / f"{key}.lock"
    lock.touch()
    return lock


def test_a_lock_of_a_process_that_was_killed_before_its_name_was_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(plait.store, "NAMELESS_SECONDS", 0.2)
    store, key, waited = Store(tmp_path), "ab" * 32, []
    lock = killed_while_locking(store, key)
    with store.lock(key, lambda: waited.append(1)):
        assert lock.read_text()
    assert waited == [1]
    assert not lock.exists()


def test_a_lock_whose_name_comes_late_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(plait.store, "NAMELESS_SECONDS", 0.3)
    store, key = Store(tmp_path), "ab" * 32
    with store.lock(key):
        name = (lock := store.root / "locks" / f"{key}.lock").read_bytes()
    killed_while_locking(store, key)
    late = threading.Timer(0.1, lock.write_bytes, [name])
    late.start()
    order = []
    end = threading.Timer(1.0, lambda: (order.append("other"), lock.unlink()))
    end.start()
    with store.lock(key):
        order.append("ours")
    assert order == ["other", "ours"]


def test_collect_sweeps_locks_without_a_name_that_are_old(tmp_path):
    store = Store(tmp_path)
    old, new = (killed_while_locking(store, letter * 32) for letter in ("ab", "cd"))
    os.utime(old, (0, 0))
    store.collect(0)
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("host", ["here", "another-host"])
def test_collect_leaves_what_a_run_needs(tmp_path, short_leases, host):
    store = Store(tmp_path)
    for key in (KEY, THIRD):
        store.put(key, write("hello"), {})
    host = socket.gethostname() if host == "here" else host
    with on_a_host(host, tmp_path, f"store.needed('run', [{KEY!r}])") as process:
        assert store.collect(-1)[0] == 1
        assert store.has(KEY)
        process.kill()
        process.wait()
    if host != socket.gethostname():  # nobody here can know whether it is dead, until it has been silent for long
        assert store.collect(-1)[0] == 0
        old = time.time() - 2 * plait.store.ABANDONED_SECONDS
        os.utime(tmp_path / "runs" / "run.lock", (old, old))
    assert store.collect(-1)[0] == 1


def test_collect_sweeps_the_lock_of_a_run_that_was_killed_before_it_said_what_it_needs(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, write("hello"), {})
    old, fresh = tmp_path / "runs" / "old.lock", tmp_path / "runs" / "fresh.lock"
    for lock in (old, fresh):
        lock.parent.mkdir(exist_ok=True)
        lock.touch()
    long_ago = time.time() - 2 * plait.store.ABANDONED_SECONDS
    os.utime(old, (long_ago, long_ago))
    assert store.collect(-1)[0] == 1
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_result_that_another_host_has_finished_is_kept(tmp_path):
    store = Store(tmp_path)

    def late(folder):
        (folder / "x.txt").write_text("late")
        store.put(KEY, write("first"), {})

    store.put(KEY, late, {})
    assert (store.folder(KEY) / "x.txt").read_text() == "first"
    assert list((tmp_path / "tmp").iterdir()) == []


def large(letter, **others):
    """A result with a large file and its small companions."""

    def write(folder):
        (folder / "large.bin").write_bytes(letter.encode() * 10_000)
        for name, text in others.items():
            (folder / name).write_text(text)

    return write


def on_disk(root):
    """Bytes of the files that the store's names lead to, each counted once."""
    found = [path.stat() for path in root.rglob("*") if path.is_file() and path.name != "meta.json"]
    return sum({(facts.st_dev, facts.st_ino): facts.st_size for facts in found}.values())


def test_equal_files_are_one(tmp_path):
    store = Store(tmp_path)
    first = store.put(KEY, large("a", x="first"), {})
    second = store.put(SECOND, large("a", x="second", y="y"), {})
    third = store.put(THIRD, large("b"), {})
    assert (first.folder / "large.bin").samefile(second.folder / "large.bin")
    assert on_disk(tmp_path) == 20_000 + 5 + 6 + 1
    assert second.size == 10_007
    assert own_sizes({"1": [first], "2": [second], "3": [third]}) == {"1": 5, "2": 7, "3": 10_000}
    assert own_sizes({"": [first, second], "3": [third]}) == {"": 10_012, "3": 10_000}
    assert store.verify() == {}
    assert not any((tmp_path / "tmp").iterdir())
    store.remove(KEY)
    assert (second.folder / "large.bin").read_bytes() == b"a" * 10_000
    assert not os.stat(second.folder / "large.bin").st_mode & 0o222
    assert own_sizes({"2": [second]}) == {"2": 10_007}
    store.put(KEY, large("a"), {})
    assert (store.folder(KEY) / "large.bin").samefile(second.folder / "large.bin")
    old = time.time() - 1000
    for key in (KEY, THIRD):
        os.utime(store.folder(key) / "meta.json", (old, old))
    meta = sum((store.folder(key) / "meta.json").stat().st_size for key in (KEY, THIRD))
    assert store.collect(500) == (2, 10_000 + meta)
    assert store.has(SECOND)
    assert store.collect(-1)[0] == 1
    assert on_disk(tmp_path) == 0


def test_a_dropped_result_frees_what_no_other_has(tmp_path):
    store = Store(tmp_path)
    for key in (KEY, SECOND):
        store.put(key, lambda folder: ((folder / "artifact").mkdir(), large("a")(folder / "artifact")), {})
    store.drop(KEY)
    assert on_disk(tmp_path) == 10_000
    store.drop(SECOND)
    assert on_disk(tmp_path) == 0


def test_a_damaged_file_spreads_no_further(tmp_path):
    store = Store(tmp_path)
    first = store.put(KEY, large("a"), {}).folder / "large.bin"
    first.chmod(0o644)
    first.write_bytes(b"a" * 9_999 + b"b")
    second = store.put(SECOND, large("a"), {}).folder / "large.bin"
    assert list(store.verify()) == [KEY]
    store.remove(KEY)
    first = store.put(KEY, large("a"), {}).folder / "large.bin"
    assert store.verify() == {}
    assert first.samefile(second)


def test_equal_files_are_one_while_others_come_and_go(tmp_path):
    keys = [f"{number:064x}" for number in range(4)]
    failed = []

    def come_and_go(key):
        store = Store(tmp_path)
        try:
            for last in (*[False] * 9, True):
                with store.lock(key):
                    store.put(key, large("a"), {})
                if not last:
                    store.remove(key)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=come_and_go, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        Store(tmp_path).collect(1000)
    assert failed == []
    store = Store(tmp_path)
    assert store.verify() == {}
    assert [store.entry(key).size for key in keys] == [10_000] * 4
    store.put(SECOND, large("a"), {})
    store.collect(1000)
    for key in (*keys, SECOND):
        store.remove(key)
    assert on_disk(tmp_path) == 0


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path)
    entries = [store.put(key, large("a"), {}) for key in (KEY, SECOND)]
    assert own_sizes({"1": entries[:1], "2": entries[1:]}) == {"1": 10_000, "2": 10_000}
    assert store.verify() == {}
    assert sorted(path.name for path in store.folder(SECOND).iterdir()) == ["large.bin", "meta.json"]


def test_what_could_not_be_stored_takes_no_space(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plait.store, "_write_synced", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.put(KEY, large("a"), {})
    assert on_disk(tmp_path) == 0


def test_a_limit_on_the_size_of_files(tmp_path):
    code = f"""
import resource
from pathlib import Path
from plait.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
Store(Path({str(tmp_path)!r})).put({KEY!r}, lambda folder: (folder / "x.txt").write_bytes(bytes(10000)), {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StoreError: the store" in done.stderr.splitlines()[-1]
    assert "cannot be written (File too large); name another place with --store" in done.stderr
    assert list(Store(tmp_path).entries()) == []


A_RUN = """
import socket, sys
socket.gethostname = lambda: {host!r}
import plait
run = plait.run("p.yaml", store="shared", out={host!r})
assert not run.failed, run.failed
"""
COLLECT = """
import socket, sys, time
socket.gethostname = lambda: "third"
from pathlib import Path
from plait.store import Store
print("ready", flush=True)
deleted = 0
while select.select([sys.stdin], [], [], 0.01)[0] == []:
    deleted += Store(Path("shared").absolute()).collect(-1)[0]
print(deleted)
"""


@pytest.mark.slow
def test_two_hosts_run_one_pipeline_while_a_third_cleans_up(workplace):
    (workplace / "p.yaml").write_text(
        'plait: 1\nsteps:\n  n: {load-data: "./toy.py:Numbers"}\n  slow:\n    each: {steps: [5, 6, 7, 8, 9, 10]}\n    transform: "./toy.py:Slow"\n'
        '    from: {data: n.train}\n    with: {steps: "${each.steps}", pause: 0.05}\n  s: {evaluate: "./toy.py:Mean", from: {data: n.test}}\n'
    )
    python = [sys.executable, "-c"]
    with subprocess.Popen(
        [*python, "import select" + COLLECT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cleaner:
        assert cleaner.stdout.readline() == "ready\n"
        runs = [subprocess.Popen([*python, A_RUN.format(host=host)]) for host in ("first", "second")]
        assert [run.wait(timeout=300) for run in runs] == [0, 0]
        cleaner.stdin.close()
        cleaner.stdout.read()
    events = [
        json.loads(line)
        for host in ("first", "second")
        for log in (workplace / host).glob("p/*/log.jsonl")
        for line in log.read_text().splitlines()
    ]
    finished = [event["step"] for event in events if event["event"] == "step_finished"]
    assert sorted(finished) == sorted(set(finished))  # nothing was computed twice, nor deleted while a run needed it
    assert len(finished) == 8
    assert {event["event"] for event in events if event.get("step") == finished[0]} >= {"step_finished", "step_cached"}


def test_links_out_of_the_store_stay_as_they_are(tmp_path):
    mine = tmp_path / "mine.bin"
    mine.write_text("of the user's")
    mine.chmod(0o644)
    folder = Store(tmp_path / "store").put(KEY, lambda place: (place / "x.bin").symlink_to(mine), {}).folder
    assert mine.stat().st_mode & 0o777 == 0o644
    assert (folder / "x.bin").read_text() == "of the user's"
