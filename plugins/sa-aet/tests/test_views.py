import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_sa_aet.randomness import PerImage, ReleasedStreams
from plait_sa_aet.views import ScaledViews, bicubic


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# From 2: of images one pixel wide, interpolate with antialiasing makes something else than of two equal columns.
SIDES = st.tuples(st.integers(2, 40), st.integers(2, 40))


@settings(max_examples=60)
@given(SIDES, SIDES, st.booleans())
def test_matrices_do_what_interpolate_does(before, after, antialias):
    images = pictures(2, 3, *before)
    expected = F.interpolate(images, after, mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close(bicubic(images, after, antialias=antialias), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 1.5])
@pytest.mark.parametrize("antialias", [False, True])
def test_matrices_at_the_size_of_clip(scale, antialias):
    images, size = pictures(1, 3, 224, 224), (int(scale * 224),) * 2
    for start, target in [(images, size), (pictures(1, 3, *size), (224, 224))]:
        expected = F.interpolate(start, target, mode="bicubic", align_corners=False, antialias=antialias)
        torch.testing.assert_close(bicubic(start, target, antialias=antialias), expected, atol=1e-6, rtol=0)


def test_views_by_their_definition():
    images = pictures(2, 3, 12, 10)
    views = ScaledViews((0.5, 1.5), noise_std=0.05)(images, ReleasedStreams(3))
    assert views.shape == (3, 2, 3, 12, 10)
    assert torch.equal(views[0], images)
    rng = ReleasedStreams(3)
    for view, size in zip(views[1:], [(6, 5), (18, 15)], strict=True):
        noisy = images + rng.noise(images.shape, 0.05)
        small = F.interpolate(noisy, size, mode="bicubic", align_corners=False).clamp(0, 1)
        torch.testing.assert_close(
            view, F.interpolate(small, (12, 10), mode="bicubic", align_corners=False), atol=1e-6, rtol=0
        )


def test_scale_one_without_noise_is_the_image_itself():
    images = pictures(2, 3, 9, 7)
    views = ScaledViews((1.0,), noise_std=0)(images, PerImage(0, [0, 1]))
    assert torch.equal(views[1], images)


def test_the_way_back_is_not_clamped():
    images = (pictures(1, 3, 16, 16) > 0.5).float()
    views = ScaledViews((0.75,), noise_std=0)(images, PerImage(0, [0]))
    assert views.min() < 0
    assert views.max() > 1


def test_gradient_flows_through_noise_resizing_and_clamping():
    images = pictures(2, 3, 8, 8).requires_grad_()
    weights = pictures(2, 3, 8, 8, seed=1)
    view = ScaledViews((0.5,), noise_std=0.3)(images, ReleasedStreams(0))[1]
    noisy = images + ReleasedStreams(0).noise(images.shape, 0.3)
    small = F.interpolate(noisy, (4, 4), mode="bicubic", align_corners=False)
    assert ((small < 0) | (small > 1)).any()  # so the clamp stops some of the gradient
    expected = F.interpolate(small.clamp(0, 1), (8, 8), mode="bicubic", align_corners=False)
    slopes = [torch.autograd.grad((seen * weights).sum(), images)[0] for seen in (view, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-6, rtol=0)


def test_refuses_impossible_scales():
    with pytest.raises(ValueError, match="above 0"):
        ScaledViews((0.5, 0.0))
    with pytest.raises(ValueError, match="noise_std"):
        ScaledViews(noise_std=-0.1)
    with pytest.raises(ValueError, match="leaves nothing"):
        ScaledViews((0.1,))(pictures(1, 3, 8, 8), PerImage(0, [0]))


def test_per_image_numbers_do_not_depend_on_the_batch():
    together, second = PerImage(5, ["a", "b", "c"]), PerImage(5, ["b"])
    shape = (3, 4, 4)
    assert torch.equal(together.init((3, *shape), -0.1, 0.1)[1:2], second.init((1, *shape), -0.1, 0.1))
    for _ in range(2):
        assert torch.equal(together.noise((3, *shape), 0.05)[1:2], second.noise((1, *shape), 0.05))
    assert not torch.equal(PerImage(6, ["b"]).noise((1, *shape), 0.05), PerImage(5, ["b"]).noise((1, *shape), 0.05))
    with pytest.raises(ValueError, match="2 images asked from 3"):
        together.init((2, *shape), 0, 1)


def test_distributions_of_both_sources():
    for rng in (PerImage(0, range(4)), ReleasedStreams(0)):
        start, noise = rng.init((4, 3, 64, 64), -0.1, 0.3), rng.noise((4, 3, 64, 64), 0.05)
        assert start.dtype == noise.dtype == torch.float32
        assert start.min() >= -0.1
        assert start.max() <= 0.3
        assert start.mean().item() == pytest.approx(0.1, abs=0.002)
        assert start.std().item() == pytest.approx(0.4 / 12**0.5, abs=0.002)
        assert noise.mean().item() == pytest.approx(0, abs=0.001)
        assert noise.std().item() == pytest.approx(0.05, abs=0.001)


def test_the_released_streams_are_numpys_and_pythons_and_can_be_taken_up_again():
    import json
    import random

    import numpy as np
    from plait_sa_aet.sa_aet import sub

    rng = ReleasedStreams(42)
    np_stream, py_stream = np.random.RandomState(42), random.Random(42)
    assert rng.init((2, 3), -0.5, 0.5).numpy() == pytest.approx(np_stream.uniform(-0.5, 0.5, (2, 3)).astype("float32"))
    assert rng.noise((3, 1), 0.05).numpy() == pytest.approx(np_stream.normal(0, 0.05, (3, 1)).astype("float32"))
    torch.testing.assert_close(rng.triple(sub, 2), torch.tensor([sub(py_stream) for _ in range(2)]))
    state = json.loads(json.dumps(rng.state_dict()))
    expected = rng.noise((3,), 1.0), rng.triple(sub, 1)
    again = ReleasedStreams(0)
    again.load_state_dict(state)
    assert torch.equal(again.noise((3,), 1.0), expected[0])
    assert torch.equal(again.triple(sub, 1), expected[1])
