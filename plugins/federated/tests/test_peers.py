"""Processes that exchange models with their neighbours only."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from plait_federated.rounds import dfedavg, dfedavgm
from plait_federated.topology import Graph

pytestmark = pytest.mark.slow

EXP = Graph(name="exp", num_clients=4)
SIZES = (9, 9, 5, 9)
# Each of three clients reads its own model and that of the one before it.
CYCLE = Graph(name="custom", num_clients=3, matrix=(np.eye(3) + np.roll(np.eye(3), 1, axis=0)) / 2)


def test_a_peer_process_begins_without_what_reads_data_and_draws_graphs():
    heavy = {"datasets", "matplotlib", "networkx", "pandas", "pyarrow", "sklearn", "torchvision"}
    program = (
        f"import sys, plait_federated.peers, plait_federated.models\nprint({heavy!r} & set(sys.modules) or 'none')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "none"


def test_peers_equal_the_loop_and_send_one_model_an_edge(make_training, make_shards):
    """One rank a client, a directed graph, momentum; tested on the training data."""
    shards = make_shards((9, 5, 9))
    options = {"graph": CYCLE, "shards": shards, "test": (shards.inputs, shards.labels)}
    loop = make_training(dfedavgm(0.9), folder="loop", **options).run()
    seen = []
    peers = make_training(dfedavgm(0.9), folder="peers", engine="peers", **options).run(seen.append)
    torch.testing.assert_close(peers.state["local"], loop.state["local"], atol=1e-5, rtol=0)
    assert [record["round"] for record in seen] == [1, 2, 3]
    for ours, theirs in zip(peers.history, loop.history, strict=True):
        assert ours["bytes"] == theirs["bytes"] == 3 * 1 * 4 * 63  # 1 edge a peer, 63 parameters
        assert ours["gradient_steps"] == theirs["gradient_steps"]
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
        assert ours["consensus_distance"] == pytest.approx(theirs["consensus_distance"], rel=1e-3)
    assert peers.history[-1]["worst_client_accuracy"] == pytest.approx(loop.history[-1]["worst_client_accuracy"])


def test_blocks_in_sequential_order_send_less_and_resume_in_another_engine(make_training, make_shards):
    options = {"graph": EXP, "shards": make_shards(SIZES), "update_order": "sequential", "allow_wavefront": True}
    loop = make_training(dfedavg(), folder="loop", rounds=5, **options).run()
    peers = make_training(dfedavg(), folder="peers", engine="peers", ranks=2, rounds=3, **options).run()
    assert 0 < peers.history[-1]["bytes"] < loop.history[-1]["bytes"]
    resumed = make_training(dfedavg(), folder="peers", rounds=5, **options).run()
    torch.testing.assert_close(resumed.state["local"], loop.state["local"], atol=1e-5, rtol=0)


def test_a_dead_peer_is_named_and_the_run_resumes_from_the_last_whole_round(make_training, tmp_path):
    training = make_training(dfedavg(), folder="broken", rounds=150, engine="peers", ranks=2)
    killer = threading.Thread(target=kill_a_child_once, args=(tmp_path / "broken" / "round-000003",))
    killer.start()
    with pytest.raises(RuntimeError, match=r"peer process \d \(clients .*\) died of SIGKILL, after round \d+"):
        training.run()
    killer.join()
    assert not multiprocessing.active_children()
    seen, rounds = [], 2 + max(int(one.name.removeprefix("round-")) for one in (tmp_path / "broken").glob("round-*"))
    assert rounds < 150
    resumed = make_training(dfedavg(), folder="broken", rounds=rounds, checkpoint_every=rounds).run(seen.append)
    whole = make_training(dfedavg(), folder="whole", rounds=rounds, checkpoint_every=rounds).run()
    assert [record["round"] for record in seen] == list(range(1, rounds + 1))
    torch.testing.assert_close(resumed.state["local"], whole.state["local"], atol=1e-4, rtol=0)


def kill_a_child_once(appeared):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not appeared.exists():
        time.sleep(0.005)
    os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)


def test_the_peer_at_fault_is_named_not_those_that_lost_it(make_training, make_shards):
    shards = make_shards()
    shards.inputs[shards.members[5]] = float("inf")
    training = make_training(engine="peers", ranks=2, shards=shards)
    with pytest.raises(RuntimeError, match=r"peer process 1 \(clients 3, 4, 5\) stopped: .*not finite after round 1"):
        training.run()
