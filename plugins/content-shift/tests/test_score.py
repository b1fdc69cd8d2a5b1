"""Contours and the score of content shift, and the guideline's interval."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_content_shift.content_shift import Score, contours, guideline


def test_contours_by_hand():
    assert not contours(torch.full((1, 3, 4, 6), 2.5)).any()
    ramp = torch.arange(6.0).expand(1, 1, 5, 6) + 2 * torch.arange(5.0)[:, None]
    assert torch.allclose(contours(ramp)[0, 1:-1, 1:-1], torch.zeros(3, 4), atol=1e-5)
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 1
    found = contours(point)[0]
    assert found[2, 2] == 4
    assert [float(found[y, x]) for y, x in ((1, 2), (3, 2), (2, 1), (2, 3))] == [1.0] * 4
    assert float((found - contours(torch.zeros(1, 1, 5, 5))[0]).abs().sum()) == 8


def test_contours_are_lengths_over_channels():
    point = torch.zeros(1, 2, 5, 5)
    point[0, 0, 2, 2], point[0, 1, 2, 2] = 3, 4
    assert contours(point)[0, 2, 2] == pytest.approx(20)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5))
def test_contours_of_any_size_are_those_of_half_precision_too(height, width):
    features = torch.randn(2, 3, height, width).half()
    assert torch.equal(contours(features), contours(features.float()))
    assert contours(features).shape == (2, height, width)


def test_score_of_the_reference_and_of_the_anchor():
    generator = torch.Generator().manual_seed(0)
    anchor, reference = torch.randn(2, 4, 3, 6, 6, generator=generator)
    for kind in ("matched", "plain"):
        equal, same = Score(kind), Score(kind)
        equal.add(anchor, reference, reference, reference)
        same.add(anchor, anchor, reference, reference)
        assert equal.value() == 1
        assert same.value() == 0


def test_score_without_any_shift_is_zero():
    nothing = torch.zeros(1, 2, 4, 4)
    score = Score()
    score.add(nothing, nothing, nothing, nothing)
    assert not score.is_defined
    assert score.value() == 0


def test_a_technique_that_moves_features_without_noise_is_condemned_by_the_plain_reference_alone():
    generator = torch.Generator().manual_seed(0)
    plain, technique, noise = torch.randn(3, 8, 3, 6, 6, generator=generator)
    anchor = plain + 0.5 * noise
    moved, steered = plain + 2 * technique, plain + 2 * technique + 0.1 * noise
    matched, literal = Score("matched"), Score("plain")
    for score in (matched, literal):
        score.add(anchor, steered, plain, moved)
    assert matched.value() > 0.5
    assert literal.value() < -1


def test_the_mean_is_taken_before_the_ratio():
    plain = torch.zeros(2, 1, 5, 5)
    anchor, features = plain.clone(), plain.clone()
    anchor[0, 0, 2, 2], anchor[1, 0, 2, 2] = 1, 3
    features[0, 0, 2, 2], features[1, 0, 2, 2] = 1, 0
    together, apart = Score("plain"), Score("plain")
    together.add(anchor, features, plain, plain)
    for row in range(2):
        apart.add(anchor[row : row + 1], features[row : row + 1], plain[:1], plain[:1])
    assert together.value() == apart.value() == pytest.approx((32 - 8) / 32)


def test_the_guideline_accepts_what_is_clearly_closer():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(64, generator=generator)
    better = guideline(reference, reference - 0.1, generator)
    assert better.accepted
    assert better.low == pytest.approx(0.1)
    assert better.closer == 1
    noise = 0.5 * torch.randn(64, generator=generator)
    assert not guideline(reference, reference + noise - noise.mean(), generator).accepted
    assert not guideline(reference, reference + 0.1, generator).accepted
