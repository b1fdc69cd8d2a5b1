from collections import Counter
from itertools import product
from random import Random

import numpy as np
import pytest
from plait_sa_aet import sa_aet as triangle


def percents(law, count, seed=0):
    random = Random(seed)
    return np.array([law(random) for _ in range(count)]) * 100


def test_sub_draws_current_below_previous_below_clean():
    drawn = percents(triangle.sub, 20_000)
    rounded = drawn.round().astype(int)
    np.testing.assert_allclose(drawn, rounded, atol=1e-9)
    assert (rounded.sum(axis=1) == 100).all()
    current, clean, previous = rounded.T
    assert (current >= 1).all()
    assert (current < previous).all()
    assert (previous < clean).all()
    assert current.max() <= 32
    assert clean.min() >= 35
    assert previous.max() <= 49
    np.testing.assert_allclose(drawn.mean(axis=0), [11.97, 59.91, 28.12], atol=0.5)


def test_sub_reaches_every_one_of_its_784_triples():
    allowed = {(n1, n2, 100 - n1 - n2) for n1, n2 in product(range(1, 99), repeat=2) if n1 < 100 - n1 - n2 < n2}
    assert len(allowed) == 784
    drawn = {tuple(row) for row in percents(triangle.sub, 40_000).round().astype(int).tolist()}
    assert drawn <= allowed
    assert len(drawn) > 775


def test_full_covers_the_triangle_and_favours_the_current_iterate():
    drawn = percents(triangle.full, 20_000)
    assert (drawn.sum(axis=1).round() == 100).all()
    assert drawn.min() >= 1 - 1e-9
    np.testing.assert_allclose(drawn.mean(axis=0), [49.33, 25.33, 25.33], atol=0.8)


def test_a_first_draw_that_leaves_too_little_becomes_98_1_1():
    class Largest(Random):
        def randint(self, a, b):
            return b

    assert triangle.propose(Largest()) == (98, 1, 1)


def test_sub_accepts_the_expected_share_of_proposals():
    random = Random(0)
    proposals = [triangle.propose(random) for _ in range(20_000)]
    share = np.mean([n1 < n3 < n2 for n1, n2, n3 in proposals])
    assert share == pytest.approx(0.0891, abs=0.007)


def test_uniform_is_dirichlet():
    drawn = percents(triangle.uniform, 20_000) / 100
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    np.testing.assert_allclose(drawn.mean(axis=0), [1 / 3] * 3, atol=0.01)
    np.testing.assert_allclose(drawn.var(axis=0), [1 / 18] * 3, atol=0.002)
    pieces = Counter(tuple(order) for order in drawn.argsort(axis=1).tolist())
    assert len(pieces) == 6
    assert max(pieces.values()) / min(pieces.values()) < 1.15


def test_uniform_sub_is_dirichlet_on_the_piece_of_sub():
    current, clean, previous = (percents(triangle.uniform_sub, 20_000) / 100).T
    assert (current <= previous).all()
    assert (previous <= clean).all()
    np.testing.assert_allclose(current + clean + previous, 1)
    assert (current.mean(), clean.mean(), previous.mean()) == pytest.approx((1 / 9, 11 / 18, 5 / 18), abs=0.005)
