"""Partitions of labelled data."""

from functools import partial

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


@given(num_clients=st.integers(2, 20), classes=st.integers(1, 10), seed=st.integers(0, 1000), as_released=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_pathological_client_sees_its_classes_only(num_clients, classes, seed, as_released):
    shards = partition.sampled_pathological(
        LABELS[:300], num_clients, classes, seed, drop_remainder=True, as_released=as_released
    )
    # The released rounding may send a draw to class 0.
    assert all(len(set(LABELS[shard]) - ({0} if as_released else set())) <= classes for shard in shards)
    assert {len(shard) for shard in shards} == {300 // num_clients}


def test_dirichlet_with_a_huge_alpha_is_near_uniform_and_with_a_small_one_is_not():
    even = partition.label_histogram(LABELS, partition.sampled_dirichlet(LABELS, 4, 1e6, 0))
    uneven = partition.label_histogram(LABELS, partition.sampled_dirichlet(LABELS, 4, 0.05, 0))
    assert even.min() > 30  # 50 expected
    assert even.max() < 72
    assert uneven.min() == 0


@pytest.mark.parametrize("alpha", [1e-320, 1e-9, 1e-4, 1e-3, 0.01])
@pytest.mark.parametrize("as_released", [False, True])
def test_with_a_tiny_alpha_a_client_has_one_class_and_any(alpha, as_released):
    labels = np.arange(4000) % 5
    shards = partition.sampled_dirichlet(labels, 80, alpha, 0, as_released=as_released)
    histogram = partition.label_histogram(labels, shards)
    largest = histogram.max(1) / histogram.sum(1)
    assert np.median(largest) == 1
    assert alpha >= 1e-3 or largest.min() == 1
    favourites = np.bincount(histogram.argmax(1), minlength=5)
    assert favourites.min() >= 6  # 16 expected


def test_priors_of_small_alphas_have_the_moments_of_dirichlet():
    """Mean 1/C and variance (1/C)(1 − 1/C)/(C·alpha + 1) of each part."""
    for alpha in (1e-5, 1e-3, 0.02, 0.3, 5.0, 1e150):
        drawn = partition.symmetric_dirichlet(alpha, 3, 4000, np.random.RandomState(0))
        np.testing.assert_allclose(drawn.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(drawn.mean(0), 1 / 3, atol=0.025)
        np.testing.assert_allclose(drawn.var(0), 2 / 9 / (3 * alpha + 1), atol=0.012)


def test_ordinary_priors_are_those_of_numpy():
    ours = partition.symmetric_dirichlet(0.3, 10, 50, np.random.RandomState(4))
    assert (ours == np.random.RandomState(4).dirichlet([0.3] * 10, size=50)).all()


def test_with_a_tiny_alpha_a_disjoint_class_goes_to_one_client():
    labels = np.arange(600) % 30
    histogram = partition.label_histogram(labels, partition.disjoint_dirichlet(labels, 3, 1e-6, 0))
    assert ((histogram > 0).sum(0) == 1).all()
    assert histogram.sum() == 600


def test_classes_without_samples_do_not_matter_where_none_is_drawn():
    labels = np.array([0, 3, 3, 0, 7, 7])
    for shards in (partition.iid(labels, 2, 0), partition.stratified(labels, 2, 0)):
        assert partition.label_histogram(labels, shards).sum(0).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="class 1 has no sample"):
        partition.sampled_dirichlet(labels, 2, 1.0, 0)


@pytest.mark.parametrize(
    "make",
    [
        partial(partition.iid, num_clients=3),
        partial(partition.stratified, num_clients=3),
        partial(partition.sampled_dirichlet, num_clients=3, alpha=1.0),
        partial(partition.disjoint_dirichlet, num_clients=3, alpha=1.0),
        partial(partition.sampled_pathological, num_clients=3, classes_per_client=1),
        partial(partition.disjoint_pathological, num_clients=3, classes_per_client=1),
    ],
)
def test_every_scheme_refuses_what_no_one_can_learn_from(make):
    with pytest.raises(ValueError, match=r"row 2 has label -1; .*leave unlabelled samples out"):
        make(np.array([0, 1, -1, 2]), seed=0)
    with pytest.raises(ValueError, match="num_clients is 3; allowed is 2 to the number of samples, 2"):
        make(np.array([0, 1]), seed=0)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.sampled_dirichlet(np.array([0, 2, 2]), 2, 0.3, 0), "class 1 has no sample"),
        (lambda: partition.iid(LABELS, 1, 0), "num_clients is 1"),
        (lambda: partition.sampled_pathological(LABELS, 5, 11, 0), "classes per client is 11"),
        (lambda: partition.disjoint_pathological(LABELS, 3, 2, 0), "cannot hold 10 classes"),
        (lambda: partition.disjoint_dirichlet(LABELS[:30], 25, 0.01, 0), "left one of 25 clients empty"),
        (
            lambda: partition.disjoint_pathological(np.array([0, 0, 1]), 3, 2, 0),
            "class 0 has 2 samples for the 3 clients",
        ),
    ],
)
def test_impossible_partitions_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
