import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_clip.backdoor import triggers


def images(n=3, side=224, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def changed(before, after):
    return (before != after).any(dim=1)


def test_random_noise_patch_replaces_one_square_per_image():
    x = images(4)
    y = triggers.random_noise_patch(x, 16, triggers.row_generators(0, [3, 1, 4, 9]))
    for mask in changed(x, y):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert rows.max() - rows.min() == columns.max() - columns.min() == 15
        assert mask.sum() == 256
        assert max(rows.min(), columns.min()) <= 207


def test_noise_patch_is_centred_on_the_image_mean():
    x = torch.full((1, 3, 224, 224), 0.2)
    x[:, 1] = 0.8
    y = triggers.random_noise_patch(x, 100, triggers.row_generators(0, [0]))
    patch = y[0][:, changed(x, y)[0]]
    assert patch.mean(dim=1).tolist() == pytest.approx([0.2, 0.8, 0.2], abs=0.05)
    assert patch.std(dim=1).tolist() == pytest.approx([1, 1, 1], abs=0.05)


def test_noise_depends_on_row_and_seed_only():
    x = images(2, 32)
    both = triggers.random_noise_patch(x, 4, triggers.row_generators(7, [10, 11]))
    alone = triggers.random_noise_patch(x[1:], 4, triggers.row_generators(7, [11]))
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(alone, triggers.random_noise_patch(x[1:], 4, triggers.row_generators(8, [11])))
    assert not torch.equal(alone, triggers.random_noise_patch(x[1:], 4, triggers.row_generators(7, [12])))


def test_triggers_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    triggers.random_noise_patch(images(2, 32), 4, triggers.row_generators(0, [0, 1]))
    triggers.blend_noise(images(2, 32), 0.2, triggers.row_generators(0, [0, 1]))
    triggers.warp_noise(4, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_corner_patches_are_equal():
    x = images(2)
    y = triggers.corner_noise_patches(x, 16, triggers.row_generators(0, [0, 1]))
    corners = [y[..., :16, :16], y[..., :16, -16:], y[..., -16:, :16], y[..., -16:, -16:]]
    assert all(torch.equal(corners[0], corner) for corner in corners)
    assert (changed(x, y).sum(dim=(1, 2)) == 4 * 256).all()


def test_yellow_patch():
    x = images(1) * 0.9
    y = triggers.yellow_patch(x, 16, triggers.row_generators(0, [0]))
    assert torch.equal(y[0][:, changed(x, y)[0]], torch.tensor([1.0, 1.0, 0.0])[:, None].expand(3, 256))


def test_checkerboard():
    x = torch.full((1, 3, 28, 28), 0.5)
    y = triggers.checkerboard_patch(x, 4, 1)
    rows, columns = torch.nonzero(y[0, 0] != 0.5, as_tuple=True)
    assert {*rows.tolist()} == {*columns.tolist()} == {23, 24, 25, 26}
    assert all(y[0, 0, i, j] == (i + j) % 2 for i in range(23, 27) for j in range(23, 27))
    digit = triggers.checkerboard_patch(torch.full((1, 3, 8, 8), 0.5), 2, 0, first=1)
    assert digit[0, 2, 6:, 6:].tolist() == [[1, 0], [0, 1]]


def test_blended_by_hand():
    x = torch.full((1, 3, 4, 4), 0.5)
    assert torch.allclose(triggers.blend(x, torch.ones(3, 4, 4), 0.2), torch.tensor(0.6))
    assert torch.equal(triggers.blend(images(2, 8), torch.ones(3, 8, 8), 0.0), images(2, 8))


@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_blended_stays_in_range(alpha, seed):
    x = images(2, 8, seed)
    y = triggers.blend_noise(x, alpha, triggers.row_generators(seed, [0, 1]))
    assert y.min() >= 0
    assert y.max() <= 1
    assert (y - x).abs().max() <= alpha + 1e-6
    if alpha > 0.1:
        assert not torch.equal(y[0] - (1 - alpha) * x[0], y[1] - (1 - alpha) * x[1])


def test_sig_by_hand():
    x = torch.full((2, 3, 224, 224), 0.5)
    y = triggers.sinusoid(x, 60 / 255, 6)
    assert torch.equal(y[..., 0], x[..., 0])
    # 6·28/224 is three quarters of a wave.
    assert torch.allclose(y[..., 28], torch.tensor(0.5 - 0.235294), atol=1e-6)
    assert torch.equal(y, y[:1, :1, :1].expand_as(y))
    dark = triggers.sinusoid(torch.zeros(1, 3, 224, 224), 60 / 255, 6)
    assert dark[..., 28].max() == 0


def test_wanet_without_noise_is_the_identity():
    x = images()
    assert (triggers.warp(x, torch.zeros(1, 2, 224, 224), 1.0) - x).abs().max() <= 1 / 255


@given(seed=st.integers(0, 10_000), side=st.sampled_from([4, 28, 224]))
@settings(max_examples=20, deadline=None)
def test_wanet_noise_has_mean_size_one(seed, side):
    noise = triggers.warp_noise(side, torch.Generator().manual_seed(seed))
    assert noise.shape == (1, 2, side, side)
    assert noise.abs().mean().item() == pytest.approx(1, abs=1e-5)


def test_wanet_moves_channel_zero_along_columns():
    ramp = torch.linspace(0, 1, 224).expand(1, 3, 224, 224)  # grows along columns
    noise = torch.zeros(1, 2, 224, 224)
    noise[:, 0] = 1
    moved = triggers.warp(ramp, noise, 1.0)
    # One unit is 0.498 pixels to the right.
    assert (moved - ramp)[..., 100:120].mean().item() == pytest.approx(0.498 / 223, rel=1e-2)
    assert torch.allclose(triggers.warp(ramp, noise.flip(1), 1.0)[..., 100:120], ramp[..., 100:120], atol=1e-5)


@pytest.mark.parametrize(("size", "first", "last"), [(16, 104, 119), (44, 90, 133)])
def test_centre_patch_rows_and_columns(size, first, last):
    x = torch.zeros(1, 3, 224, 224)
    rows, columns = torch.nonzero(triggers.centre_patch(x, torch.ones(3, size, size))[0, 0], as_tuple=True)
    assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (first, last)


@pytest.mark.parametrize(
    "paste",
    [
        lambda x: triggers.random_noise_patch(x, 9, triggers.row_generators(0, [0])),
        lambda x: triggers.corner_noise_patches(x, 9, triggers.row_generators(0, [0])),
        lambda x: triggers.checkerboard_patch(x, 8, 1),
        lambda x: triggers.centre_patch(x, torch.ones(3, 9, 9)),
    ],
)
def test_a_trigger_larger_than_the_image_is_refused(paste):
    with pytest.raises(ValueError, match="9 pixels does not fit into an image of 8 × 8"):
        paste(torch.rand(1, 3, 8, 8))


def test_eight_bits_survive_and_outside_values_wrap_or_clamp():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(triggers.to_uint8(levels.float() / 255, wrap=True), levels)
    assert torch.equal(triggers.to_uint8(levels.float() / 255, wrap=False), levels)
    outside = torch.tensor([1 + 1 / 255 + 1e-4, 2.0, -1 / 255 - 1e-4, -0.5])
    assert triggers.to_uint8(outside, wrap=True).tolist() == [0, 254, 255, 129]
    assert triggers.to_uint8(outside, wrap=False).tolist() == [255, 255, 0, 0]


def test_most_of_a_noise_patch_lies_outside_the_range():
    x = images(20)
    y = triggers.random_noise_patch(x, 16, triggers.row_generators(0, range(20)))
    outside = ((y < 0) | (y > 1)).sum() / (20 * 3 * 256)
    assert outside.item() == pytest.approx(0.61, abs=0.02)


def test_scaled_lengths():
    assert [triggers.scaled(16, side) for side in (224, 112, 28, 8)] == [16, 8, 2, 1]


def test_issba_message():
    bits = triggers.issba_message("Stega!!").int().tolist()
    packed = bytes(int("".join(map(str, bits[i : i + 8])), 2) for i in range(0, 96, 8))
    # The five bytes after the secret are what bchlib computes for BCH(137, 5).
    assert packed == b"Stega!!" + bytes.fromhex("88a9fb4e40")
    assert bits[96:] == [0, 0, 0, 0]


def test_issba_check_bits_are_a_code_word():
    def remainder(word, generator):
        while word.bit_length() >= generator.bit_length():
            word ^= generator << (word.bit_length() - generator.bit_length())
        return word

    generator = triggers._bch_generator(137, 5)
    assert generator.bit_length() == 36
    for secret in ("Stega!!", "a", "plait"):
        bits = triggers.issba_message(secret).int().tolist()
        word = int("".join(map(str, bits[: 56 + 35])), 2)
        assert remainder(word, generator) == 0
        assert remainder(word ^ (1 << 40), generator) != 0
    # x^127 − 1 is a multiple of every cyclic code's generator of that length.
    assert remainder((1 << 127) | 1, generator) == 0


def test_a_long_secret_is_refused():
    with pytest.raises(ValueError, match="8 bytes"):
        triggers.issba_message("too long")
