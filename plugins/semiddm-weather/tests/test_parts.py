"""Losses, augmentation, bank, scorers, batches, tiles: hand-computed values and properties."""

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_semiddm_weather import losses
from plait_semiddm_weather.augmentation import random_crop, strong, turn_hue
from plait_semiddm_weather.bank import Bank, Gates, content_distance, passes
from plait_semiddm_weather.sampling import Batches
from plait_semiddm_weather.scorers import (
    NaturalStatistics,
    Ranker,
    RankerSettings,
    asymmetric_gaussian,
    checked,
    fit_ranker,
    identity_of,
    natural_features,
    pyiqa_scorer,
)
from plait_semiddm_weather.semiddm_weather import learning_rate_factor, unsupervised_weight, update_teacher
from plait_semiddm_weather.tiling import restore_tiled, tile_starts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Losses


def test_reconstruction_by_hand():
    half, one = torch.full((1, 3, 2, 2), 0.5), torch.ones(1, 3, 2, 2)
    assert losses.reconstruction_loss(half, one).item() == pytest.approx(0.8 * 0.5 + 0.2 * 0.25)


def test_r1_of_a_linear_discriminator_is_the_square_of_its_weights():
    weights = torch.randn(3, 4, 4, generator=generator())
    real = torch.randn(5, 3, 4, 4, generator=generator(1), requires_grad=True)
    penalty = losses.r1_penalty((real * weights).sum(dim=(1, 2, 3)), real, gamma=0.3)
    assert penalty.item() == pytest.approx(0.15 * weights.square().sum().item(), rel=1e-5)


def test_contrast_is_zero_at_the_positive_and_finite_at_the_negative():
    a, p = (torch.rand(1, 3, 8, 8, generator=generator(n)) for n in (1, 2))
    contrast = losses.wavelet_contrast()
    assert contrast(p, p, a).item() == 0
    assert 1e4 < contrast(a, p, a).item() < math.inf
    assert contrast(0.5 * (a + p), p, a).item() == pytest.approx(1, rel=1e-3)


def test_vgg_features_read_torchvisions_weights_and_refuse_others(tmp_path):
    layers = {"features.0.weight": torch.randn(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    layers |= {"features.2.weight": torch.randn(64, 64, 3, 3) * 0.05, "features.2.bias": torch.zeros(64)}
    file = tmp_path / "vgg.pth"
    torch.save(layers, file)
    features = losses.VGGFeatures(16, file, (1, 3))
    image = torch.rand(1, 3, 8, 8, generator=generator())
    first, second = features(image)
    relu = torch.nn.functional.relu
    expected = relu(torch.nn.functional.conv2d(image, layers["features.0.weight"], padding=1))
    assert torch.allclose(first, expected, atol=1e-5)
    assert second.shape == (1, 64, 8, 8)
    assert losses.PerceptualLoss(features)(image, image).item() == 0
    with pytest.raises(ValueError, match=r"does not hold VGG16: features\.5\.weight is missing"):
        losses.VGGFeatures(16, file, (1, 6))
    with pytest.raises(ValueError, match="never downloaded"):
        losses.VGGFeatures(19, None, (1,))
    with pytest.raises(ValueError, match="is not a file"):
        losses.VGGFeatures(19, tmp_path / "none.pth", (1,))


# Weight and teacher


def test_the_weight_of_the_unsupervised_part():
    values = [unsupervised_weight(epoch, 0.08, 250) for epoch in range(301)]
    assert values[0] == pytest.approx(0.000539, abs=1e-6)
    assert values[125] == pytest.approx(0.022920, abs=1e-6)
    assert values[250] == values[300] == 0.08
    assert values == sorted(values)
    assert unsupervised_weight(0, 0.08, 0) == 0.08


def test_the_teacher_is_first_a_running_mean():
    teacher, student = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    torch.nn.init.zeros_(teacher.weight)
    torch.nn.init.ones_(student.weight)
    seen = []
    for update in range(1, 251):
        update_teacher(teacher, student, update, 0.996)
        seen.append(teacher.weight.item())
    assert seen[2] == pytest.approx(0.75)
    assert seen[248] == pytest.approx(249 / 250, abs=1e-4)
    assert 1 - seen[249] == pytest.approx((1 - seen[248]) * 0.996, rel=1e-2)
    same = teacher.weight.detach().clone()
    update_teacher(teacher, teacher, 300, 0.996)
    assert torch.allclose(teacher.weight, same, rtol=1e-6)


def test_learning_rates():
    assert learning_rate_factor("constant", 7, 10, 0.1) == 1
    assert learning_rate_factor("cosine", 0, 10, 0.1) == 1
    assert learning_rate_factor("cosine", 10, 10, 0.1) == pytest.approx(0.1)


# Bank


@pytest.mark.parametrize(
    ("teacher", "student", "best", "distance", "taken"),
    [
        (8, 7, 7, 0.05, True),
        (8, 7, 7, 0.15, False),
        (8, 8, 7, 0.05, False),
        (8, 7, 8, 0.05, False),
        (8, 7, 9, 0.05, False),
        (math.nan, 7, 7, 0.05, False),
        (math.inf, 7, 7, 0.05, False),
    ],
)
def test_truth_table_of_the_gates(teacher, student, best, distance, taken):
    one = [torch.tensor([float(value)]) for value in (teacher, student, best, distance)]
    assert passes(Gates(), *one)[0].tolist() == [taken]


def test_gates_can_be_left_out():
    one = [torch.tensor([value]) for value in (8.0, 9.0, 7.0, 0.9)]
    assert not passes(Gates(content=None), *one)[0].item()
    assert passes(Gates(beats_student=False, content=None), *one)[0].item()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), keys=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_best_score_never_falls_and_other_rows_stay(seed, keys):
    draw = generator(seed)
    bank = Bank.of(torch.rand(6, 3, 4, 4, generator=draw), torch.rand(6, generator=draw), "any")
    images, best = bank.images.clone(), bank.best_score.clone()
    rows = torch.tensor(keys)
    candidates, scores = torch.rand(len(keys), 3, 4, 4, generator=draw), torch.rand(len(keys), generator=draw)
    zeros = torch.zeros(len(keys))
    taken, _ = passes(Gates(content=None, beats_student=False), scores, zeros, bank.best_score[rows], zeros)
    bank.replace(rows, candidates, scores, taken)
    assert (bank.best_score >= best).all()
    untouched = torch.tensor([row for row in range(6) if row not in rows[taken].tolist()], dtype=torch.long)
    assert torch.equal(bank.images[untouched], images[untouched])
    assert torch.equal(bank.best_score[untouched], best[untouched])
    for row in set(rows[taken].tolist()):  # of several candidates for one image the best is kept
        assert bank.best_score[row] == scores[taken][rows[taken] == row].max().double()


def test_a_bank_can_be_scored_anew_and_comes_back_from_its_state():
    bank = Bank.of(torch.rand(3, 3, 4, 4, generator=generator()), torch.zeros(3), "first")
    bank.rescore(lambda images: images.mean(dim=(1, 2, 3)), "second", batch_size=2)
    assert bank.scorer == "second"
    assert torch.allclose(bank.best_score.float(), bank.get(torch.arange(3)).mean(dim=(1, 2, 3)))
    again = Bank.from_state(bank.state_dict())
    assert torch.equal(again.images, bank.images)
    assert torch.equal(again.best_score, bank.best_score)


@pytest.mark.parametrize("kind", ["l1", "low-band", "ssim"])
def test_content_distances(kind):
    image = torch.rand(2, 3, 16, 16, generator=generator())
    assert torch.allclose(content_distance(kind, image, image), torch.zeros(2), atol=1e-5)
    moved = image + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    distance = content_distance(kind, image, moved)
    assert distance[0] < distance[1]
    if kind != "ssim":
        assert torch.allclose(distance, torch.tensor([0.1, 0.2]), atol=1e-5)
    else:
        from skimage.metrics import structural_similarity

        expected = 1 - structural_similarity(
            image[0].double().numpy(), moved[0].double().numpy(), data_range=1, channel_axis=0
        )
        assert distance[0].item() == pytest.approx(expected, abs=1e-3)


# Scorers


def textures(count, seed=0, side=32):
    rough = torch.rand(count, 3, side // 4, side // 4, generator=generator(seed))
    return torch.nn.functional.interpolate(rough, size=side, mode="bicubic").clamp(0, 1)


@pytest.mark.slow
def test_the_ranker_has_the_size_of_the_page_and_learns_to_tell_clean_from_hazy():
    assert sum(parameter.numel() for parameter in Ranker().parameters()) == 33_185
    clean = textures(24)
    hazy = clean * 0.5 + 0.45
    ranker = fit_ranker(
        clean, hazy, (clean + hazy)[None] / 2, RankerSettings(num_steps=30), generator(), torch.device("cpu")
    )
    unseen = textures(20, seed=5)
    with torch.no_grad():
        assert (ranker(unseen) > ranker(unseen * 0.5 + 0.45)).float().mean() >= 0.9
    few = [
        fit_ranker(clean, hazy, hazy[None], RankerSettings(num_steps=2), generator(seed), torch.device("cpu"))
        for seed in (0, 0, 1)
    ]
    assert identity_of(few[0]) == identity_of(few[1]) != identity_of(few[2])


def test_the_ranker_can_be_fitted_on_restorations():
    clean = textures(8)
    for pairs in ("restorations", "both"):
        ranker = fit_ranker(
            clean, clean * 0.5, torch.stack([clean * 0.7, clean * 0.8]), RankerSettings(num_steps=2, pairs=pairs),
            generator(), torch.device("cpu"),
        )  # fmt: skip
        assert ranker(clean).shape == (8,)


def test_statistics_of_clean_images_prefer_clean_images():
    clean = torch.nn.functional.avg_pool2d(torch.rand(40, 3, 64, 64, generator=generator()), 3, 1, 1)
    scorer = NaturalStatistics().fit(clean[:30])
    unseen = clean[30:]
    assert natural_features(unseen).shape == (10, 36)
    noisy = (unseen + 0.2 * torch.randn(unseen.shape, generator=generator(2))).clamp(0, 1)
    assert (scorer(unseen) > scorer(noisy)).float().mean() >= 0.9
    with pytest.raises(ValueError, match="at least 2"):
        NaturalStatistics().fit(clean[:1])


def test_shape_of_a_gaussian_is_two():
    shape, left, right, centre = asymmetric_gaussian(
        torch.randn(1, 200, 200, generator=generator(), dtype=torch.float64)
    )
    assert shape.item() == pytest.approx(2, abs=0.1)
    assert left.item() == pytest.approx(right.item(), rel=0.03)
    assert abs(centre.item()) < 0.05


def test_scorers_that_return_something_else_are_refused():
    with pytest.raises(ValueError, match=r"scorer mine returned \(2, 3\) for 2 images"):
        checked(lambda images: images.mean(dim=(2, 3)), torch.rand(2, 3, 4, 4), "mine")
    with pytest.raises(ValueError, match=r"scorer pyiqa:niqe needs|which is never downloaded"):
        pyiqa_scorer("niqe", None, torch.device("cpu"))


# Augmentation


@pytest.mark.parametrize("strength", ["none", "mild", "official"])
def test_strong_augmentation_is_seeded_and_keeps_range_and_place(strength):
    images = torch.rand(6, 3, 16, 16, generator=generator())
    one, other = (strong(images, strength, generator(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == images.shape
    assert 0 <= one.min() <= one.max() <= 1
    assert (strength == "none") == torch.equal(one, images)


def test_hue_is_turned_as_pillow_does():
    image = torch.rand(3, 8, 8, generator=generator())
    expected = torch.empty_like(image)
    for row, column in np.ndindex(8, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
        expected[:, row, column] = torch.tensor(colorsys.hsv_to_rgb((hue + 0.2) % 1, saturation, value))
    assert torch.allclose(turn_hue(image, 0.2), expected, atol=1e-5)


def test_pairs_are_cut_and_turned_together():
    image = torch.rand(3, 9, 11, generator=generator())
    for seed in range(6):
        one, other = random_crop((image, image + 1), 4, generator(seed))
        assert one.shape == (3, 4, 4)
        assert torch.allclose(one + 1, other)
    with pytest.raises(ValueError, match="9×11 pixels and crop_size 16"):
        random_crop((image,), 16, generator())


# Batches


def test_every_epoch_shows_every_row_once():
    batches = Batches([""] * 10, 3, seed=1)
    first, second = (torch.cat([batches[step] for step in range(start, start + 3)]) for start in (0, 3))
    assert len(set(first.tolist())) == 9
    assert len(set(second.tolist())) == 9
    assert first.tolist() != second.tolist()
    assert batches.steps(4) == 12
    assert torch.equal(Batches([""] * 10, 3, seed=1)[5], batches[5])
    assert torch.equal(batches[1], first[3:6])


def test_few_rows_are_repeated():
    assert sorted(Batches(["", ""], 4)[0].tolist()) == [0, 0, 1, 1]


def test_the_curriculum_lets_weathers_join():
    domains = ["drops"] * 4 + ["rain"] * 4 + ["snow"] * 20
    batches = Batches(
        domains, 4, curriculum={"drops": 0, "rain": 1, "snow": 2}, per_epoch={"snow": 8}, by_epoch=True, seed=3
    )
    seen = [[domains[row] for row in batches[step].tolist()] for step in range(3 + 4 + 4)]
    assert set(seen[0]) == {"drops"}
    assert {name for one in seen[1:3] for name in one} == {"drops", "rain"}
    third = [name for one in seen[3:7] for name in one]
    assert third.count("snow") == 8
    assert [batches.epoch(step) for step in (0, 1, 2, 3, 6, 7)] == [0, 1, 1, 2, 2, 3]
    assert batches.steps(3) == 7
    drawn = {
        tuple(sorted(row for step in steps for row in batches[step].tolist() if row >= 8))
        for steps in (range(3, 7), range(7, 11))
    }
    assert len(drawn) == 2, "other snow is drawn for another epoch"


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="no image to train on"):
        Batches([], 4)
    with pytest.raises(ValueError, match="names 'hail'"):
        Batches(["rain"], 1, curriculum={"hail": 0})
    with pytest.raises(ValueError, match="no image for the first step"):
        Batches(["rain"], 1, curriculum={"rain": 2})


# Tiles


def test_starts_of_tiles():
    assert tile_starts(70, 64, 4) == [0, 4, 6]
    assert tile_starts(64, 64, 4) == [0]
    assert tile_starts(72, 64, 4) == [0, 4, 8]
    assert tile_starts(10, 64, 4) == [0]


@settings(max_examples=20, deadline=None)
@given(height=st.integers(3, 40), width=st.integers(3, 40), tile=st.integers(2, 20), average=st.booleans())
def test_tiles_of_a_pointwise_restorer_are_the_whole(height, width, tile, average):
    image = torch.rand(3, height, width, generator=generator(height))
    stride = max(1, tile // 3)
    found = restore_tiled(lambda tiles, numbers: 1 - tiles, image, tile, stride, average=average, batch_size=5)
    assert torch.allclose(found, 1 - image, atol=1e-5)


def test_strides_that_leave_gaps_are_refused():
    with pytest.raises(ValueError, match="stride is 9 and tile 8"):
        restore_tiled(lambda tiles, numbers: tiles, torch.rand(3, 20, 20), 8, 9)
