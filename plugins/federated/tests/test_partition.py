"""Partitions of labelled data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_federated import partition

LABELS = np.random.RandomState(0).randint(0, 10, 2000)


@pytest.mark.parametrize("seed", [0, 3])
def test_sampled_shards_are_equal_and_seeded(seed):
    first = partition.sampled_dirichlet(LABELS, 30, 0.3, seed)
    again = partition.sampled_dirichlet(LABELS, 30, 0.3, seed)
    other = partition.sampled_dirichlet(LABELS, 30, 0.3, seed + 1)
    assert [len(shard) for shard in first] == [66 + 20] + [66] * 29  # client 0 takes the remainder
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first[1:], other[1:], strict=True))


@given(num_clients=st.integers(2, 20), classes=st.integers(1, 10), seed=st.integers(0, 1000), exact_rng=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_pathological_client_sees_its_classes_only(num_clients, classes, seed, exact_rng):
    shards = partition.sampled_pathological(
        LABELS[:300], num_clients, classes, seed, drop_remainder=True, exact_rng=exact_rng
    )
    # The released rounding may send a draw to class 0.
    assert all(len(set(LABELS[shard]) - ({0} if exact_rng else set())) <= classes for shard in shards)
    assert {len(shard) for shard in shards} == {300 // num_clients}


def test_dirichlet_with_a_huge_alpha_is_near_uniform_and_with_a_small_one_is_not():
    even = partition.label_histogram(LABELS, partition.sampled_dirichlet(LABELS, 4, 1e6, 0))
    uneven = partition.label_histogram(LABELS, partition.sampled_dirichlet(LABELS, 4, 0.05, 0))
    assert even.min() > 30  # 50 expected
    assert even.max() < 72
    assert uneven.min() == 0


def test_a_class_that_runs_out_is_used_again():
    labels = np.array([0] * 5 + [1] * 95)
    shards = partition.sampled_dirichlet(labels, 2, 1e6, 0)
    used = np.concatenate(shards)
    assert (labels[used] == 0).sum() > 30
    assert len(set(used[labels[used] == 0])) == 5


def test_the_first_draws_equal_a_hand_written_walk():
    """Quotas and class lists are filled and read from their ends."""
    labels = np.array([0, 1, 0, 1, 1, 0])
    shards = partition.sampled_dirichlet(labels, 2, 1.0, 5)
    random = np.random.RandomState(5)
    order = random.permutation(6)
    cumulative = np.cumsum(random.dirichlet([1.0, 1.0], size=2), axis=1)
    client = random.randint(2)
    label = int(random.uniform() > cumulative[client, 0])
    assert shards[client][-1] == [row for row in order if labels[row] == label][-1]


@given(num_clients=st.integers(2, 12), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_disjoint_partitions_use_every_sample_once(num_clients, seed):
    classes = max(2, -(-10 // num_clients))
    for shards in (
        partition.disjoint_dirichlet(LABELS, num_clients, 1.0, seed),
        partition.disjoint_pathological(LABELS, num_clients, classes, seed),
        partition.iid(LABELS, num_clients, seed),
        partition.stratified(LABELS, num_clients, seed),
    ):
        assert (np.sort(np.concatenate(shards)) == np.arange(len(LABELS))).all()
    histogram = partition.label_histogram(LABELS, partition.disjoint_pathological(LABELS, num_clients, classes, seed))
    assert ((histogram > 0).sum(1) == classes).all()
    even = partition.label_histogram(LABELS, partition.stratified(LABELS, num_clients, seed))
    assert (even.max(0) - even.min(0)).max() <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.sampled_dirichlet(np.array([0, 2, 2]), 2, 0.3, 0), "class 1 has no sample"),
        (lambda: partition.iid(LABELS, 1, 0), "num_clients is 1"),
        (lambda: partition.sampled_pathological(LABELS, 5, 11, 0), "classes per client is 11"),
        (lambda: partition.disjoint_pathological(LABELS, 3, 2, 0), "cannot hold 10 classes"),
        (lambda: partition.disjoint_dirichlet(LABELS[:30], 25, 0.01, 0), "left one of 25 clients empty"),
    ],
)
def test_impossible_partitions_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
