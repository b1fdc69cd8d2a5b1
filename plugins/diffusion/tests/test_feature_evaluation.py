"""Evaluations of feature sets: hand-computed scores, protocols, and what is refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait.testing import conformance
from plait_diffusion import FeatureSet, Origin, mask_tensors
from plait_diffusion.correspondence import (
    Aggregation,
    Pair,
    cells,
    correct,
    correspondence_loss,
    match,
    points_of,
    train_aggregation,
    upsampled_norms,
)
from plait_diffusion.features_examples import square_features, write_spair
from plait_diffusion.features_plugin import (
    FeatureCorrespondence,
    FeatureProbe,
    FeatureSegmentation,
    SPair,
)
from plait_diffusion.probe import draws, probe
from plait_diffusion.segmentation import (
    IGNORED,
    Confusion,
    PixelRows,
    Ridge,
    Settings,
    train_pixel_classifiers,
    vote,
    without_small_regions,
)

test_conformance_of_probe = conformance("feature-probe")
test_conformance_of_segmentation = conformance("feature-segmentation")
test_conformance_of_correspondence = conformance("feature-correspondence")
test_conformance_of_spair = conformance("spair")

ORIGIN = Origin(model="toy")


def blobs(count: int, seed: int, distance: float) -> FeatureSet:
    """Three classes as clouds around three corners."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    maps = torch.randn(count, 3, 2, 2, generator=generator)
    maps[torch.arange(count), labels] += distance
    return FeatureSet.of_tensors(datasets.Dataset.from_dict({"label": labels.tolist()}), {"map": maps}, ORIGIN)


# --- probe


def test_a_probe_tells_good_features_from_noise(tmp_path):
    data = {"noise": blobs(300, 0, 0.0), "good": blobs(300, 0, 4.0)}
    reference = {"noise": blobs(90, 1, 0.0), "good": blobs(90, 1, 4.0)}
    report = FeatureProbe(num_labels=60, repeats=3, baseline="noise").evaluate(data, reference, Run(folder=tmp_path))
    assert report.value("accuracy, %", features="good") > 95
    assert 20 < report.value("accuracy, %", features="noise") < 50
    assert report.value("gains, % of draws", features="good") == 100
    assert report.value("gain, points", features="noise") == 0
    pairs = FeatureProbe(num_labels=60, repeats=3, baseline={"good": "noise"}).evaluate(
        data, reference, Run(folder=tmp_path)
    )
    assert "gain, points" not in pairs.rows[0]
    assert pairs.rows[1]["compared with"] == "noise"


def test_a_probe_is_logistic_regression_on_standardised_features():
    train, test = np.array([[0.0], [2.0], [10.0], [12.0]]), np.array([[5.0], [7.0]])
    assert probe(train, np.array([0, 0, 1, 1]), test, np.array([0, 1])) == 1.0
    assert probe(1e6 * train, np.array([0, 0, 1, 1]), 1e6 * test, np.array([1, 1])) == 0.5
    with pytest.raises(ValueError, match="all 2 labelled rows are of class 1"):
        probe(train[:2], np.array([1, 1]), test, np.array([0, 1]))


def test_draws_keep_training_and_test_apart():
    for train, test in draws(20, None, 5, 3, np.random.default_rng(0)):
        assert len(train) == 5
        assert sorted([*train, *test]) == list(range(20))
    assert len(draws(20, 7, None, 5, np.random.default_rng(0))) == 1, "repeats that cannot differ"
    with pytest.raises(ValueError, match="num_labels is 20, of 20 rows, and some must be left"):
        draws(20, None, 20, 1, np.random.default_rng(0))


def test_timesteps_become_a_curve(tmp_path):
    def at(timestep: int) -> FeatureSet:
        features = blobs(60, 0, 1.0)
        origin = Origin(model="toy", timestep=timestep)
        return FeatureSet.of_tensors(features.rows, features.read(), origin)

    sets = {"plain-50": at(50), "plain-200": at(200), "other-50": at(50)}
    report = FeatureProbe(num_labels=30, repeats=1).evaluate(sets, None, Run(folder=tmp_path))
    (curve,) = report.curves
    assert (curve.name, curve.x) == ("plain", (50.0, 200.0))


def test_each_activation_alone(tmp_path):
    features = square_features()
    rows = features.rows.add_column("label", [0, 1, 0, 1, 0, 1])
    features = FeatureSet.of_tensors(rows, features.read(), ORIGIN)
    report = FeatureProbe(num_labels=4, repeats=1, each_activation=True).evaluate(features, None, Run(folder=tmp_path))
    assert [(row["activation"], row["channels"]) for row in report.rows] == [("all", 6), ("pixels", 3), ("half", 3)]


def test_features_of_two_kinds_are_no_training_and_test(tmp_path):
    features = blobs(30, 0, 1.0)
    other = FeatureSet.of_tensors(features.rows, features.read(), Origin(model="toy", timestep=50))
    with pytest.raises(ValueError, match=r"'features' of data and of reference .* timestep is None in one and 50"):
        FeatureProbe().evaluate(features, other, Run(folder=tmp_path))
    again = FeatureSet.of_tensors(features.rows, features.read(), Origin(model="toy", seed=1))
    assert FeatureProbe(num_labels=20, repeats=1).evaluate(features, again, Run(folder=tmp_path)), (
        "another draw of noise"
    )
    with pytest.raises(ValueError, match="data has a and reference b; give the same names"):
        FeatureProbe().evaluate({"a": features}, {"b": features}, Run(folder=tmp_path))
    with pytest.raises(ValueError, match="baseline names 'b'; the sets are a"):
        FeatureProbe(baseline="b").evaluate({"a": features}, None, Run(folder=tmp_path))


# --- segmentation


@settings(max_examples=25, deadline=None)
@given(sides=st.lists(st.integers(1, 6), min_size=1, max_size=3), side=st.integers(1, 9))
def test_rows_of_pixels_equal_the_maps_resized_as_a_whole(sides, side):
    maps = [torch.randn(2, 3, one, one) for one in sides]
    largest = max(sides)
    whole = torch.cat([F.interpolate(one, (largest, largest), mode="nearest") for one in maps], 1)
    whole = F.interpolate(whole, (side, side), mode="bilinear", align_corners=False)
    rows = torch.cat(list(PixelRows(maps, side).batches(7)))
    assert torch.allclose(rows, whole.permute(0, 2, 3, 1).reshape(-1, 3 * len(maps)), atol=1e-5)


def test_miou_by_hand():
    confusion = Confusion.of(3)
    confusion.add(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [2, 2]]))
    assert confusion.scores()["mIoU"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert confusion.scores()["aAcc"] == 0.75
    confusion.add(torch.tensor([IGNORED]), torch.tensor([1]))
    assert confusion.scores()["aAcc"] == 0.75
    assert Confusion.of(3).scores() == {"mIoU": 0.0, "aAcc": 0.0, "mAcc": 0.0}


def test_small_regions_are_left_out_image_by_image():
    masks = torch.tensor([[[0, 0, 0, 1]], [[1, 1, 1, IGNORED]]])
    assert without_small_regions(masks, 2).tolist() == [[[0, 0, 0, IGNORED]], [[1, 1, 1, IGNORED]]]


def test_a_vote_goes_to_the_smallest_of_equals():
    def always(label: int) -> torch.nn.Module:
        layer = torch.nn.Linear(1, 3)
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = F.one_hot(torch.tensor(label), 3).float()
        return layer

    assert vote([always(2), always(1)], torch.zeros(1, 1)).tolist() == [1]
    assert vote([always(2), always(1), always(2)], torch.zeros(1, 1)).tolist() == [2]


def test_ridge_is_the_closed_form_and_ignores_pixels_without_class():
    rows, labels = torch.randn(50, 4).double(), torch.randint(0, 3, (50,))
    ridge = Ridge(4, 3)
    ridge.add(rows[:20].float(), labels[:20])
    ridge.add(rows[20:].float(), labels[20:])
    ridge.add(torch.full((3, 4), 1e3), torch.full((3,), IGNORED))
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    x = (rows - mean) / scale
    y = F.one_hot(labels, 3).double()
    weights = torch.linalg.solve(x.T @ x / 50 + 0.1 * torch.eye(4).double(), x.T @ (y - y.mean(0)) / 50)
    expected = (x @ weights + y.mean(0)).argmax(1)
    assert torch.equal(ridge.solve(0.1)(rows.float()), expected)


@pytest.mark.slow
def test_both_classifiers_find_squares(tmp_path):
    features = square_features()
    values = features.read()
    # Grey lies between dark and bright: the MLP bends, and ridge needs to be told.
    told = FeatureSet.of_tensors(features.rows, {**values, "contrast": (values["pixels"] - 0.5).abs()}, ORIGIN)
    for classifier, data in (("mlp", features), ("ridge", told)):
        method = FeatureSegmentation(
            classifier=classifier,
            num_train=3,
            repeats=1,
            side=16,
            num_models=3,
            num_epochs=4,
            batch_size=32,
            num_panels=1,
        )
        report = method.evaluate(data, None, Run(folder=tmp_path))
        assert report.rows[0]["mIoU, %"] > 75, classifier
        assert len(report.panels) == 1


def test_finished_networks_are_not_trained_again(tmp_path):
    features = square_features(2)
    pixels, masks = PixelRows(list(features.read().values()), 8), mask_tensors(features.rows, "mask", 8)

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(len(name))

    def train(track) -> list[torch.nn.Module]:
        with Run(folder=tmp_path).loop(FeatureSegmentation(), "x") as loop:
            return train_pixel_classifiers(
                pixels, masks, 3, Settings(num_models=3, num_epochs=1), generator, checkpoint=loop, track=track
            )

    whole = train(iter)
    begun: list[int] = []

    def killed(numbers):
        for number in numbers:
            if number == 2:
                raise KeyboardInterrupt
            yield number

    def counted(numbers):
        begun.extend(numbers)
        return numbers

    with pytest.raises(KeyboardInterrupt):
        train(killed)
    again = train(counted)
    assert begun == [2]
    rows = pixels.rows(torch.arange(20))
    assert all(torch.equal(a(rows), b(rows)) for a, b in zip(whole, again, strict=True))


def test_classifiers_of_pixels_that_run_away_or_see_a_single_pixel_are_refused():
    features = square_features(2)
    pixels, masks = PixelRows(list(features.read().values()), 8), mask_tensors(features.rows, "mask", 8)

    def train(masks, **options):
        settings = Settings(num_models=1, num_epochs=2, min_pixels=0, **options)
        return train_pixel_classifiers(pixels, masks, 3, settings, lambda name: torch.Generator().manual_seed(0))

    with pytest.raises(FloatingPointError, match=r"the loss is nan in step \d+; lower learning_rate"):
        train(masks, learning_rate=1e37)
    alone = torch.full_like(masks, IGNORED)
    with pytest.raises(ValueError, match="no pixel of the training images has a class"):
        train(alone)
    alone[0, 0, 0] = 1
    with pytest.raises(ValueError, match="one pixel of the training images has a class"):
        train(alone)


def test_masks_are_pictures_of_class_numbers():
    rows = datasets.Dataset.from_dict(
        {"mask": [Image.new("RGB", (4, 4))]}, features=datasets.Features({"mask": datasets.Image()})
    )
    with pytest.raises(ValueError, match=r"mask of row 0 has shape \[4, 4, 3\]"):
        mask_tensors(rows, "mask", 4)
    with pytest.raises(ValueError, match="no column 'mask' with masks but a"):
        mask_tensors(datasets.Dataset.from_dict({"a": [1]}), "mask", 4)


# --- correspondence


def pair(source, target, size=(200, 300), box=(0, 0, 300, 200)) -> Pair:
    points = [torch.tensor(points, dtype=torch.float32) for points in (source, target)]
    return Pair(source="a", target="b", source_points=points[0], target_points=points[1], source_size=size, target_size=size, target_box=box)  # fmt: skip


def test_pck_by_hand():
    there = pair([[0, 0]], [[0, 0]], box=(10, 10, 130, 170))  # a box of 120 × 160 in an image 300 × 200
    assert [part.item() for part in correct(torch.tensor([[0.0, 0.0]]), there)] == [True, True]
    assert [part.item() for part in correct(torch.tensor([[0.0, 30.0]]), there)] == [True, False]
    assert [part.item() for part in correct(torch.tensor([[0.0, 30.1]]), there)] == [False, False]


def test_points_and_cells():
    points = torch.tensor([[0.0, 0.0], [299.0, 199.0], [150.0, 50.0]])
    numbers = cells(points, (200, 300), 10)
    assert numbers.tolist() == [0, 99, 25]
    assert points_of(numbers, (200, 300), 10).tolist() == [[0, 0], [270, 180], [150, 40]]


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), side=st.integers(1, 12))
def test_lengths_of_interpolated_vectors(height, width, side):
    grid = torch.randn(4, height, width)
    whole = F.interpolate(grid[None], (side, side), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(upsampled_norms(grid, side), whole.norm(dim=0), atol=1e-4)


def test_matching_equals_matching_of_upsampled_maps():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 8, 6, 6, generator=generator)
    two = pair([[10, 20], [200, 100], [299, 199]], [[0, 0]] * 3)
    ups = [F.interpolate(x[None], (24, 24), mode="bilinear", align_corners=False)[0] for x in (source, target)]
    a, b = (F.normalize(x.flatten(1), dim=0) for x in ups)
    expected = (a[:, cells(two.source_points, (200, 300), 24)].T @ b).argmax(1)
    assert torch.equal(match(source, target, two, 24), points_of(expected, (200, 300), 24))


def test_a_moved_map_is_matched_by_its_translation():
    wide = torch.randn(16, 8, 9, generator=torch.Generator().manual_seed(0))
    points = [[x, y] for x in range(1, 7) for y in range(8)]
    moved = pair(points, points, size=(8, 8), box=(0, 0, 8, 8))
    found = match(wide[:, :, :8], wide[:, :, 1:], moved, 8)
    assert torch.equal(found, moved.source_points - torch.tensor([1.0, 0.0]))


def test_the_loss_is_that_of_all_pairs_of_cells():
    source, target = torch.randn(4, 5, 5), torch.randn(4, 5, 5)
    two = pair([[1, 1], [4, 2]], [[2, 2], [0, 3]], size=(5, 5))
    a, b = (F.normalize(x.flatten(1), dim=0) for x in (source, target))
    similar = a.T @ b / 0.07
    here, there = cells(two.source_points, (5, 5), 5), cells(two.target_points, (5, 5), 5)
    expected = (F.cross_entropy(similar[here], there) + F.cross_entropy(similar.T[there], here)) / 2
    assert torch.allclose(correspondence_loss(source, target, two), expected, atol=1e-5)


def test_training_helps_and_goes_on_after_a_kill(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    images = {"a": torch.randn(6, 4, 4, generator=generator)}
    images["b"] = torch.einsum("cd,dhw->chw", mixing, images["a"])  # nothing looks alike until it is undone
    points = [[x, y] for x in range(4) for y in range(4)]
    same = pair(points, points, size=(4, 4), box=(0, 0, 4, 4))

    def train(steps, folder, stop=None):
        def track(numbers):
            for number in numbers:
                if number == stop:
                    raise KeyboardInterrupt
                yield number

        with Run(folder=folder).loop(FeatureSegmentation(), "x") as loop:
            return train_aggregation(
                images.__getitem__, [same], 6, torch.Generator().manual_seed(1), learning_rate=0.02, num_epochs=steps,
                checkpoint=loop, track=track, save_every=10,
            )  # fmt: skip

    whole = train(60, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(60, tmp_path / "b", stop=25)
    again = train(60, tmp_path / "b")
    assert torch.equal(whole.layer.weight, again.layer.weight)
    untrained = Aggregation(6, None, torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = [
            correspondence_loss(m(images["a"][None])[0], m(images["b"][None])[0], same) for m in (untrained, whole)
        ]
    assert losses[1] < losses[0] / 2
    images["b"] = images["b"] * float("inf")
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step 0; lower learning_rate"):
        train(1, tmp_path / "c")


def test_spair_is_read_and_pixels_match(tmp_path):
    folder = write_spair(tmp_path / "SPair-71k")
    run = Run(folder=tmp_path / "run")
    parts = SPair(folder=folder, parts=("test", "val")).load_data(run)
    assert list(parts) == ["images", "test", "val"]
    assert parts["images"]["name"] == [f"cat/{i}" for i in range(4)]
    assert parts["test"][0]["target_points"] == [[10, 10], [18, 16]]
    images = torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in parts["images"]["image"]]
    )
    patches = F.unfold(images, 5, padding=2).view(4, 75, 32, 32) - 0.5
    features = FeatureSet.of_tensors(parts["images"], {"patches": patches}, ORIGIN)
    report = FeatureCorrespondence(grid=32, match_side=32, num_panels=1).evaluate(
        {"patches": features}, parts["test"], run
    )
    assert report.value("PCK img, %", features="patches") == 100
    assert report.value("PCK bbox, %", features="patches") == 100


def test_spair_in_part(tmp_path):
    folder = write_spair(tmp_path / "SPair-71k", images=6, splits=("test",))
    parts = SPair(folder=folder, pairs_per_category=2).load_data(Run(folder=tmp_path / "run"))
    assert len(parts["test"]) == 2
    used = {row[side] for row in parts["test"] for side in ("source", "target")}
    assert set(parts["images"]["name"]) == used
    with pytest.raises(ValueError, match=r"trn\.txt is missing; there are test"):
        SPair(folder=folder, parts=("trn",)).load_data(Run(folder=tmp_path / "run"))


def test_wrong_spair_ends_in_a_sentence(tmp_path):
    folder = write_spair(tmp_path / "SPair-71k", splits=("test",))
    file = next((folder / "PairAnnotation" / "test").glob("*.json"))
    file.write_text(file.read_text().replace('"trg_kps": [[10, 10], ', '"trg_kps": ['))
    with pytest.raises(ValueError, match="marks 2 points in the source and 1 in the target"):
        SPair(folder=folder).load_data(Run(folder=tmp_path / "run"))
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not an annotation of a pair"):
        SPair(folder=folder).load_data(Run(folder=tmp_path / "run"))
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        SPair(folder=folder).load_data(Run(folder=tmp_path / "run"))


def test_pairs_without_features_are_refused(tmp_path):
    folder = write_spair(tmp_path / "SPair-71k", splits=("test",))
    parts = SPair(folder=folder).load_data(Run(folder=tmp_path / "run"))
    features = FeatureSet.of_tensors(parts["images"].select([0]), {"map": torch.zeros(1, 2, 4, 4)}, ORIGIN)
    with pytest.raises(ValueError, match="image 'cat/1', which a pair names, has no features"):
        FeatureCorrespondence().evaluate(features, parts["test"], Run(folder=tmp_path))
    with pytest.raises(ValueError, match="matching by trained needs pairs as test, train"):
        FeatureCorrespondence(aggregation="trained").evaluate(features, parts["test"], Run(folder=tmp_path))
