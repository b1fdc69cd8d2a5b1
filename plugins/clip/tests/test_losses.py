import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from plait_clip.losses import clip_loss, cosines, sigmoid_loss


def test_two_orthonormal_pairs():
    torch.testing.assert_close(clip_loss(torch.eye(2), torch.eye(2), 1.0), torch.tensor(math.log(1 + math.exp(-1))))
    assert abs(float(clip_loss(torch.eye(2), torch.eye(2), 1.0)) - 0.313262) < 1e-6
    assert clip_loss(torch.eye(2), torch.eye(2), 100.0) < 1e-6


@given(size=st.integers(2, 9), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_equal_texts_make_the_image_half_log_b(size, seed):
    draw = torch.Generator().manual_seed(seed)
    images, text = torch.randn(size, 6, generator=draw), torch.randn(1, 6, generator=draw).expand(size, 6)
    logits = 7 * cosines(images, text)
    half = torch.nn.functional.cross_entropy(logits, torch.arange(size))
    torch.testing.assert_close(half, torch.tensor(math.log(size)))


@given(size=st.integers(1, 9), scale=st.floats(0.5, 50), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_losses_agree_with_open_clip(size, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    u, v = torch.randn(size, 6, generator=draw), torch.randn(size, 6, generator=draw)
    un, vn = (torch.nn.functional.normalize(x, dim=-1) for x in (u, v))
    torch.testing.assert_close(clip_loss(u, v, scale), ClipLoss()(un, vn, torch.tensor(scale)), rtol=1e-4, atol=1e-5)
    bias = torch.tensor(-3.0)
    theirs = SigLipLoss()(un, vn, torch.tensor(scale), bias)
    torch.testing.assert_close(sigmoid_loss(u, v, scale, bias), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip_loss(u, v, scale, bias), clip_loss(u, v, scale), rtol=1e-4, atol=1e-5)


def test_cosines_are_exact_under_autocast():
    u, v = torch.randn(5, 64), torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = cosines(u, v)
    torch.testing.assert_close(found, cosines(u, v), rtol=0, atol=0)
