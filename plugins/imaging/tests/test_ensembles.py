"""Ensembles of restored images: values by hand, properties, bad input."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from plait import Run
from plait.report import Report
from plait_imaging.ensembles import (
    ZZPM,
    Average,
    BestSingle,
    InverseMSE,
    LeastSquares,
    PixelMedian,
    RangeLeastSquares,
    Regressor,
    Scenes,
    make_regressor,
    pixel_median,
    zzpm_weights,
)
from plait_imaging.images import encode_png, read_batches, read_floats

KINDS = ("hist-gradient-boosting", "gradient-boosting", "ada-boost", "bagging", "extra-trees", "random-forest")


def dataset(images, names=None, **columns):
    """A dataset of uint8 images ``[3, H, W]``."""
    names = names or [f"scene-{n}" for n in range(len(images))]
    rows = {"image": [{"bytes": encode_png(image), "path": None} for image in images], "name": names}
    features = {"image": Image(), "name": Value("string")}
    for column, more in columns.items():
        rows[column] = [{"bytes": encode_png(image), "path": None} for image in more]
        features[column] = Image()
    return Dataset.from_dict(rows, Features(features))


def flat(*levels, size=(4, 4)):
    """A dataset of one-coloured images."""
    return dataset([torch.full((3, *size), level, dtype=torch.uint8) for level in levels])


def rough(seed, num=2, size=(16, 20)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, *size), generator=generator, dtype=torch.uint8)


def noisy(truth, sigma, seed, bias=0):
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)) * sigma + bias
    return (truth.float() + noise).clamp(0, 255).round().to(torch.uint8)


def problem(seed):
    """Three models of different quality and the truth, as mapping of datasets with and without target."""
    truth = (rough(seed) // 2) + 64
    models = {"good": noisy(truth, 3, 1), "biased": noisy(truth, 3, 2, bias=30), "bad": noisy(truth, 40, 3)}
    candidates = {name: dataset(images) for name, images in models.items()}
    return candidates, {**candidates, "target": dataset(truth)}, truth


def unrounded(result):
    return torch.stack([image for _, images in read_floats(result) for image in images]) * 255


def rounded(result):
    return torch.stack([image for _, images in read_batches(result) for image in images])


def mse(result, truth):
    return (unrounded(result) - truth.float()).square().mean().item()


class TestByHand:
    candidates = property(lambda self: {"a": flat(10), "b": flat(20), "c": flat(60)})

    def test_average(self):
        result = Average(keep_float=True).ensemble(candidates=self.candidates, reference=None, run=Run())
        assert unrounded(result).allclose(torch.tensor(30.0), atol=1e-4)
        assert (rounded(result) == 30).all()
        assert result["name"] == ["scene-0"]

    def test_unrounded_values_are_kept(self):
        result = Average(keep_float=True).ensemble(candidates={"a": flat(10), "b": flat(11)}, reference=None, run=Run())
        assert unrounded(result).allclose(torch.tensor(10.5), atol=1e-4)
        assert (rounded(result) == 10).all()

    def test_unrounded_values_are_not_stored_unasked(self):
        result = Average().ensemble(candidates={"a": flat(10), "b": flat(11)}, reference=None, run=Run())
        assert set(result.column_names) == {"image", "name"}

    def test_median(self):
        result = PixelMedian(keep_float=True).ensemble(candidates=self.candidates, reference=None, run=Run())
        assert unrounded(result).allclose(torch.tensor(20.0), atol=1e-4)
        even = {**self.candidates, "d": flat(30)}
        result = PixelMedian(keep_float=True).ensemble(candidates=even, reference=None, run=Run())
        assert unrounded(result).allclose(torch.tensor(25.0), atol=1e-4)

    @pytest.mark.parametrize("num_models", [2, 3, 4, 5])
    def test_median_is_numpys(self, num_models):
        images = rough(0, num_models).float()
        assert np.array_equal(pixel_median(images).numpy(), np.median(images.numpy(), axis=0))

    def test_zzpm(self):
        # Average 30; squared distances 400, 100, 900.
        exponents = [1 / (1e-3 + d) for d in (400, 100, 900)]
        weights = [math.exp(e) / sum(map(math.exp, exponents)) for e in exponents]
        images = torch.tensor([10.0, 20, 60]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
        assert zzpm_weights(images).tolist() == pytest.approx(weights, abs=1e-6)
        result = ZZPM(keep_float=True).ensemble(candidates=self.candidates, reference=None, run=Run())
        expected = sum(w * x for w, x in zip(weights, (10, 20, 60), strict=True))
        assert unrounded(result).allclose(torch.tensor(expected), atol=1e-3)

    def test_zzpm_prefers_candidates_that_agree(self):
        images = torch.full((3, 3, 2, 2), 100.0)
        images[2] += 1
        weights = zzpm_weights(images)
        assert weights[0] == weights[1]
        assert weights[0] > 0.49

    def test_inverse_mse(self):
        # Squared errors 4 and 16 against a truth of 12: weights 0.8 and 0.2.
        reference = {"a": flat(10), "b": flat(16), "target": flat(12)}
        run = Run()
        result = InverseMSE(keep_float=True).ensemble(
            candidates={"a": flat(100), "b": flat(200)}, reference=reference, run=run
        )
        assert unrounded(result).allclose(torch.tensor(120.0), atol=1e-4)
        assert [row["weight"] for row in run.reports[0].rows] == pytest.approx([0.8, 0.2])

    def test_least_squares(self):
        # 10 a + 20 b = 30 and 30 a + 10 b = 40: both weights are 1.
        reference = {"a": flat(10, 30), "b": flat(20, 10), "target": flat(30, 40)}
        candidates = {"a": flat(50), "b": flat(70)}
        result = LeastSquares(keep_float=True).ensemble(candidates=candidates, reference=reference, run=Run())
        assert unrounded(result).allclose(torch.tensor(120.0), atol=1e-3)

    def test_least_squares_with_sum_one(self):
        # Errors (1, -1) and (-3, -3), uncorrelated: weights inverse to 1 and 9.
        reference = {"a": flat(11, 9), "b": flat(7, 7), "target": flat(10, 10)}
        result = LeastSquares(keep_float=True, sum_to_one=True).ensemble(
            candidates={"a": flat(100), "b": flat(200)}, reference=reference, run=Run()
        )
        assert unrounded(result).allclose(torch.tensor(110.0), atol=1e-3)

    def test_range_least_squares(self):
        # Dark: 10 a + 20 b = 30 and 30 a + 10 b = 40, both weights 1. Bright: 200 a + 100 b = 200 and
        # 100 a + 200 b = 250, weights 1/2 and 1. Means 15, 20 and 150, 150; of 45 and 150 in the test.
        reference = {"a": flat(10, 30, 200, 100), "b": flat(20, 10, 100, 200), "target": flat(30, 40, 200, 250)}
        candidates = {"a": flat(50, 140), "b": flat(40, 160)}
        run = Run()
        method = RangeLeastSquares(keep_float=True, bin_width=128, min_samples=1)
        dark, bright = unrounded(method.ensemble(candidates=candidates, reference=reference, run=run))
        assert dark.allclose(torch.tensor(90.0), atol=1e-3)
        assert bright.allclose(torch.tensor(230.0), atol=1e-3)
        assert run.reports[0].rows[1] == {
            "levels": "128–255", "samples": 96, "learned from": "its own samples",
            "a": pytest.approx(0.5), "b": pytest.approx(1),
        }  # fmt: skip

    def test_ranges_are_half_open(self):
        levels = [0, 31, 32, 255]
        images = torch.tensor([levels, levels], dtype=torch.float32)
        assert RangeLeastSquares(keep_float=True)._ranges(images).tolist() == [0, 0, 1, 7]
        # The mean of 31 and 32 lies below 32, that of 32 and 32 does not.
        assert RangeLeastSquares(keep_float=True)._ranges(torch.tensor([[31, 32], [32, 32]])).tolist() == [0, 1]

    def test_best_single(self):
        reference = {"a": flat(11, 60), "b": flat(12, 52), "target": flat(10, 50)}
        result = BestSingle(keep_float=True).ensemble(
            candidates={"a": flat(1), "b": flat(2)}, reference=reference, run=Run()
        )
        assert (rounded(result) == 2).all()

    def test_best_single_goes_by_psnr_per_image(self):
        # Mean squared errors (1, 400) and (81, 256): a has the better mean PSNR and the worse pooled error.
        reference = {"a": flat(11, 70), "b": flat(19, 66), "target": flat(10, 50)}
        result = BestSingle(keep_float=True).ensemble(
            candidates={"a": flat(1), "b": flat(2)}, reference=reference, run=Run()
        )
        assert (rounded(result) == 1).all()


class TestLearning:
    def test_least_squares_has_the_smallest_error_of_all_global_weights(self):
        candidates, reference, truth = problem(0)
        errors = {
            method: mse(method.ensemble(candidates=candidates, reference=reference, run=Run()), truth)
            for method in (
                LeastSquares(keep_float=True),
                LeastSquares(keep_float=True, sum_to_one=True),
                InverseMSE(keep_float=True),
                BestSingle(keep_float=True),
                Average(keep_float=True),
                ZZPM(keep_float=True),
            )
        }
        assert errors[LeastSquares(keep_float=True)] == min(errors.values())
        assert (
            errors[LeastSquares(keep_float=True)]
            < errors[LeastSquares(keep_float=True, sum_to_one=True)]
            < errors[Average(keep_float=True)]
        )

    def test_one_range_is_plain_least_squares(self):
        candidates, reference, _ = problem(0)
        plain, ranges = (
            unrounded(method.ensemble(candidates=candidates, reference=reference, run=Run()))
            for method in (LeastSquares(keep_float=True), RangeLeastSquares(keep_float=True, bin_width=256))
        )
        torch.testing.assert_close(ranges, plain, atol=1e-3, rtol=0)

    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10**6), width=st.integers(1, 256), least=st.integers(1, 300))
    def test_ranges_are_never_worse_than_one_on_the_reference_itself(self, seed, width, least):
        candidates, reference, truth = problem(seed)
        method = RangeLeastSquares(keep_float=True, bin_width=width, min_samples=least)
        plain, ranges = (
            mse(one.ensemble(candidates=candidates, reference=reference, run=Run()), truth)
            for one in (LeastSquares(keep_float=True), method)
        )
        assert ranges <= plain * (1 + 1e-5)

    def test_models_that_fail_in_different_ranges(self):
        truth = rough(0)
        models = {
            "dark": torch.where(truth < 128, truth, noisy(truth, 20, 1)),
            "bright": torch.where(truth < 128, noisy(truth, 20, 2), truth),
        }
        candidates = {name: dataset(images) for name, images in models.items()}
        reference = {**candidates, "target": dataset(truth)}
        plain, ranges = (
            mse(method.ensemble(candidates=candidates, reference=reference, run=Run()), truth)
            for method in (LeastSquares(keep_float=True), RangeLeastSquares(keep_float=True, min_samples=1))
        )
        assert ranges < plain / 2

    def test_ranges_without_enough_of_their_own_have_the_weights_of_all(self):
        # All reference samples lie below 64, and a is b between 32 and 63.
        reference = {"a": flat(10, 20, 40), "b": flat(20, 10, 40), "target": flat(18, 12, 44)}
        plain, ranges = Run(), Run()
        candidates = {"a": flat(200), "b": flat(220)}
        expected = LeastSquares(keep_float=True).ensemble(candidates=candidates, reference=reference, run=plain)
        method = RangeLeastSquares(keep_float=True, min_samples=1)
        result = method.ensemble(candidates=candidates, reference=reference, run=ranges)
        torch.testing.assert_close(unrounded(result), unrounded(expected), atol=1e-3, rtol=0)
        learned = [row["learned from"] for row in ranges.reports[0].rows]
        assert learned == ["its own samples"] + ["all samples"] * 7
        assert ranges.reports[0].rows[1]["samples"] == 48
        few = Run()
        RangeLeastSquares(keep_float=True).ensemble(candidates=candidates, reference=reference, run=few)
        assert {row["learned from"] for row in few.reports[0].rows} == {"all samples"}

    def test_scenes_are_added_up_one_at_a_time(self):
        truth = (rough(0, num=3) // 2) + 64
        models = [noisy(truth, 10, 1), noisy(truth, 20, 2)]
        one, two = ({"a": dataset(models[0][s]), "b": dataset(models[1][s]), "target": dataset(truth[s])}
                    for s in ([0, 1, 2], [2, 0, 1]))  # fmt: skip
        candidates = {"a": one["a"], "b": one["b"]}
        first, second = (
            unrounded(RangeLeastSquares(keep_float=True).ensemble(candidates=candidates, reference=known, run=Run())) for known in (one, two)
        )  # fmt: skip
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        "method",
        [
            LeastSquares(keep_float=True),
            LeastSquares(keep_float=True, sum_to_one=True),
            RangeLeastSquares(keep_float=True),
            InverseMSE(keep_float=True),
            BestSingle(keep_float=True),
        ],
    )
    def test_perfect_and_equal_models(self, method):
        truth = rough(1)
        reference = {"perfect": dataset(truth), "poor": dataset(noisy(truth, 20, 0)), "target": dataset(truth)}
        candidates = {name: reference[name] for name in ("perfect", "poor")}
        assert mse(method.ensemble(candidates=candidates, reference=reference, run=Run()), truth) < 1e-4
        twins = {"a": dataset(truth), "b": dataset(truth)}
        result = method.ensemble(candidates=twins, reference={**twins, "target": dataset(truth)}, run=Run())
        assert mse(result, truth) < 1e-4

    @pytest.mark.parametrize("kind", KINDS)
    def test_regressors_learn_what_an_average_cannot(self, kind):
        candidates, reference, truth = problem(2)
        method = Regressor(keep_float=True, kind=kind, max_samples=2000)
        result = method.ensemble(candidates=candidates, reference=reference, run=Run())
        average = Average(keep_float=True).ensemble(candidates=candidates, reference=None, run=Run())
        assert mse(result, truth) < mse(average, truth)

    def test_regressors_see_every_sample_once(self):
        truth = rough(3, num=3)
        reference = {"a": dataset(truth), "b": dataset(255 - truth), "target": dataset(truth // 2)}
        for limit, drawn in ((None, truth.numel()), (10**9, truth.numel()), (500, 500)):
            inputs, targets, total = Regressor(keep_float=True, max_samples=limit)._draw(
                Scenes.of_reference(reference), Run()
            )
            assert (len(targets), total) == (drawn, truth.numel())
            assert np.array_equal(inputs[:, 0], 255 - inputs[:, 1])
            assert np.array_equal(inputs[:, 0] // 2, targets)
        assert 0.2 < (inputs[:, 0] < 85).mean() < 0.47

    def test_the_subset_is_seeded_and_told(self):
        candidates, reference, _ = problem(4)
        run = Run(seed=1)
        method = Regressor(keep_float=True, max_samples=300)
        first, second = (method.ensemble(candidates=candidates, reference=reference, run=r) for r in (run, Run(seed=1)))
        assert torch.equal(unrounded(first), unrounded(second))
        assert "300 of 1920 reference samples" in run.reports[0].notes[0]
        other = method.ensemble(candidates=candidates, reference=reference, run=Run(seed=2))
        assert not torch.equal(unrounded(first), unrounded(other))
        everything = Run()
        Regressor(keep_float=True, max_samples=None).ensemble(
            candidates=candidates, reference=reference, run=everything
        )
        assert everything.reports == []

    def test_predictions_are_those_of_scikit_learn(self):
        candidates, reference, truth = problem(5)
        result = Regressor(keep_float=True, max_samples=None).ensemble(
            candidates=candidates, reference=reference, run=Run()
        )
        x = np.stack([rounded(candidates[model]).flatten() for model in candidates], axis=1)
        seed = Run().derived_seed("regressor") % 2**32
        # Samples in the order of the stream: scene by scene.
        regressor = make_regressor("hist-gradient-boosting", seed).fit(x, truth.flatten())
        expected = torch.from_numpy(regressor.predict(x)).float().view(truth.shape)
        torch.testing.assert_close(unrounded(result), expected, atol=1e-3, rtol=0)


class TestInput:
    def test_one_dataset_with_a_column_per_model(self):
        candidates, reference, truth = problem(6)
        wide = dataset(
            truth,
            **{f"image_{name}": rounded(data) for name, data in candidates.items()},
            target=truth,
        )
        for method in (Average(keep_float=True), LeastSquares(keep_float=True)):
            long = method.ensemble(candidates=candidates, reference=reference, run=Run())
            short = method.ensemble(candidates=wide, reference=wide, run=Run())
            assert torch.equal(unrounded(long), unrounded(short))
            assert set(short.column_names) == {"image", "image_float", "name", "target"}

    def test_target_may_be_a_column_of_the_models(self):
        candidates, reference, truth = problem(7)
        with_target = {name: dataset(rounded(data), target=truth) for name, data in candidates.items()}
        one = InverseMSE(keep_float=True).ensemble(candidates=candidates, reference=reference, run=Run())
        other = InverseMSE(keep_float=True).ensemble(candidates=candidates, reference=with_target, run=Run())
        assert torch.equal(unrounded(one), unrounded(other))

    def test_scenes_of_different_sizes(self):
        images = [torch.full((3, 4, 6), 10, dtype=torch.uint8), torch.full((3, 8, 5), 20, dtype=torch.uint8)]
        result = Average(keep_float=True).ensemble(
            candidates={"a": dataset(images), "b": dataset(images)}, reference=None, run=Run()
        )
        assert [image.shape for _, batch in read_floats(result) for image in batch] == [(3, 4, 6), (3, 8, 5)]

    def test_inputs_stay_as_they_are(self):
        candidates, reference, _ = problem(8)
        before = {name: rounded(data) for name, data in reference.items()}
        LeastSquares(keep_float=True).ensemble(candidates=candidates, reference=reference, run=Run())
        assert all(torch.equal(before[name], rounded(data)) for name, data in reference.items())

    def test_refusals(self):
        a, b = flat(1), flat(2)
        cases = [
            ({"a": a}, None, "at least 2"),
            ([a, b], None, "not a mapping of models"),
            ({}, None, "names no model"),
            (a, None, "names no model"),
            ({"a": a.select([]), "b": b.select([])}, None, "a of candidates has no images"),
            ({"a": a, "b": b}, {"target": a}, "names no model"),
            ({"a": a, "b": flat(2, size=(4, 5))}, None, "4×5"),
            ({"a": a, "b": dataset(rough(0), ["scene-0", "other"])}, None, "other"),
            ({"a": a, "b": b}, {"a": a, "b": b}, "no target"),
            ({"a": a, "b": b}, {"b": b, "a": a, "target": a}, "same order"),
            ({"a": a, "b": b}, {"a": a, "c": b, "target": a}, "models a, c and candidates a, b"),
            ({"a": a, "b": b}, {"a": a, "b": b, "target": flat(1, size=(5, 4))}, "5×4"),
        ]
        for candidates, reference, words in cases:
            with pytest.raises(ValueError, match=words):
                InverseMSE(keep_float=True).ensemble(
                    candidates=candidates, reference=reference or {"a": a, "b": b}, run=Run()
                )

    def test_sizes_within_one_dataset(self):
        small, large = (torch.zeros(3, size, 4, dtype=torch.uint8) for size in (4, 5))
        wide = dataset([small], image_a=[small], image_b=[large])
        with pytest.raises(ValueError, match="image scene-0 is 5×4 pixels in b and 4×4 in a"):
            Average(keep_float=True).ensemble(candidates=wide, reference=None, run=Run())

    def test_fields(self):
        with pytest.raises(ValueError, match="max_samples is 0"):
            Regressor(keep_float=True, max_samples=0)
        with pytest.raises(ValueError, match="bin_width is 257"):
            RangeLeastSquares(keep_float=True, bin_width=257)

    def test_weights_are_reported(self):
        candidates, reference, _ = problem(9)
        run = Run()
        InverseMSE(keep_float=True).ensemble(candidates=candidates, reference=reference, run=run)
        (report,) = run.reports
        assert isinstance(report, Report)
        assert [row["model"] for row in report.rows] == ["good", "biased", "bad"]
        assert sum(row["weight"] for row in report.rows) == pytest.approx(1)
        assert report.value("weight", model="good") > report.value("weight", model="bad")


def test_a_misspelt_regressor():
    with pytest.raises(ValueError, match="kind is 'forest'; allowed is one of hist-gradient-boosting"):
        Regressor(keep_float=True, kind="forest")
