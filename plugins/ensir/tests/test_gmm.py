"""The algorithm: values worked out by hand, and properties that hold for any image."""

import itertools
import math
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_ensir.ensir import Estimator, ensir, estimate, learn
from plait_ensir.gmm import (
    EMPTY,
    FAILED,
    FEW,
    FITTED,
    Settings,
    Table,
    agreement_weights,
    bins,
    cell_index,
    fit_mixtures,
    num_bins,
)
from plait_ensir.pth import load_pth, save_pth

float64 = torch.float64


def image(*levels: float) -> torch.Tensor:
    """A grey image ``[1, 1, W]`` in [0, 1] from levels."""
    return torch.tensor(levels, dtype=torch.float32).view(1, 1, -1) / 255


def grey(levels: torch.Tensor) -> torch.Tensor:
    return levels.to(torch.uint8).view(1, 1, -1)


def scene(seed: int, num_models: int = 3, size: int = 64, channels: int = 3, noise: float = 8) -> list[torch.Tensor]:
    """M noisy restorations and the truth, uint8 ``[C, size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(1, channels, 6, 6, generator=generator)
    truth = torch.nn.functional.interpolate(rough, size=(size, size), mode="bilinear")[0] * 255
    noises = torch.randn(num_models, channels, size, size, generator=generator) * noise
    noises += torch.linspace(-noise, noise, num_models).view(-1, 1, 1, 1)
    return [(truth + n).clamp(0, 255).round().to(torch.uint8) for n in (*noises, torch.zeros_like(truth))]


def mixture(histogram: dict[float, int], mean, variance, start=None, dtype=float64, **options):
    value, count = (torch.tensor([list(numbers)], dtype=dtype) for numbers in (histogram.keys(), histogram.values()))
    start = start or [1 / len(mean)] * len(mean)
    return fit_mixtures(value, count, *(torch.tensor([t], dtype=dtype) for t in (mean, variance, start)), **options)


def close(tensor, expected, tolerance=1e-8):
    torch.testing.assert_close(tensor.flatten().double(), torch.tensor(expected, dtype=float64), atol=tolerance, rtol=0)


class TestCells:
    def test_bins_by_hand(self):
        levels = torch.tensor([0, 31, 32, 255])
        for x in (levels.to(torch.uint8), levels.float()):
            assert bins(x, 32).tolist() == [0, 0, 1, 7]
        cell = cell_index([torch.tensor([x], dtype=torch.uint8) for x in (40, 70, 200)], 32)
        assert cell.tolist() == [(1 * 8 + 2) * 8 + 6] == [86]
        assert num_bins(50) == 6
        assert num_bins(256) == 1
        assert bins(levels.to(torch.uint8), 256).tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("bin_width", range(1, 257))
    def test_eight_bit_round_trip_bins_like_integer_division(self, bin_width):
        levels = torch.arange(256)
        through_float = (levels.float() / 255) * 255
        assert torch.equal(bins(through_float, bin_width).long(), levels // bin_width)
        assert torch.equal(bins(levels.to(torch.uint8), bin_width).long(), levels // bin_width)

    @pytest.mark.parametrize("bin_width", [1, 7, 32, 50, 255, 256])
    def test_values_at_and_beyond_the_ends_stay_in_the_end_bins(self, bin_width):
        assert bins(torch.tensor([-3.0, 255.0, 256.0, 300.0]), bin_width).tolist() == [
            0,
            255 // bin_width,
            num_bins(bin_width) - 1,
            num_bins(bin_width) - 1,
        ]


class TestStartingWeights:
    def test_by_hand(self):
        # Candidates [10, 20], [10, 20], [10, 23]: distances from the average 0, 1, 1, 2 over two samples.
        table = estimate([image(10, 20), image(10, 20), image(10, 23)], image(10, 20), settings=Settings(bin_width=32))
        close(table.lut[0, 0], [0.4011121, 0.4011121, 0.1977758], 1e-6)
        close(agreement_weights(torch.tensor([[0.5, 0.5, 2.0]]).double()), [0.4011121, 0.4011121, 0.1977758], 1e-7)

    @given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=50))
    def test_two_models_start_even(self, pairs):
        x, y = (image(*column) for column in zip(*pairs, strict=True))
        table = estimate([x, y], x, settings=Settings(min_samples=math.inf))
        assert (table.lut == 0.5).all()

    def test_identical_candidates_start_even(self):
        x = image(*range(0, 250, 10))
        table = estimate([x] * 3, x)
        assert (table.lut == torch.tensor(1 / 3)).all()

    def test_uniform_start(self):
        x, y, z = image(10, 20), image(10, 20), image(10, 23)
        table = estimate([x, y, z], x, settings=Settings(initial_weights="uniform"))
        assert (table.lut == torch.tensor(1 / 3)).all()

    def test_default_weight_is_every_cells_start(self):
        *x, y = scene(0)
        table = estimate(x, y, settings=Settings(default_weight=(1, 0, 0), min_samples=math.inf))
        filled = table.count > 0
        assert filled.any()
        assert (table.lut[filled] == torch.tensor([1.0, 0, 0])).all()


class TestEM:
    def test_one_update_by_hand(self):
        fit = mixture({0: 2, 2: 1}, [0, 2], [1, 1], max_iterations=1)
        close(fit.weight, [0.62693269, 0.37306797])
        close(fit.variance, [0.23744919, 0.67055705])
        close(fit.log_likelihood, [-1.00094538])
        assert fit.updates.tolist() == [1]

    def test_one_update_around_the_frozen_means_by_hand(self):
        fit = mixture({0: 2, 2: 1}, [0, 2], [1, 1], max_iterations=1, variance_center="frozen")
        close(fit.weight, [0.62693269, 0.37306797])
        close(fit.variance, [0.25351675, 0.85205683])
        close(fit.log_likelihood, [-1.05399142])

    histogram = MappingProxyType({96: 40, 100: 60, 104: 40, 120: 30, 124: 30})

    def test_to_the_end_by_hand(self):
        fit = mixture(self.histogram, [98, 122], [16, 9])
        close(fit.weight, [0.70000001, 0.30000000])
        close(fit.variance, [9.14285814, 4.00000100], 1e-7)
        assert fit.updates.tolist() == [2]
        assert not fit.failed.any()
        frozen = mixture(self.histogram, [98, 122], [16, 9], variance_center="frozen")
        close(frozen.variance, [13.14286030, 4.00000100], 1e-7)
        assert frozen.updates.tolist() == [2]

    def test_likelihood_falls_around_the_responsibility_mean_and_rises_around_the_frozen_one(self):
        def gain(center):
            first, second = (
                mixture(self.histogram, [98, 122], [16, 9], max_iterations=n, variance_center=center) for n in (1, 2)
            )
            return (second.log_likelihood - first.log_likelihood).item()

        assert gain("responsibility-mean") == pytest.approx(-3.6e-7, abs=5e-8)
        assert gain("frozen") > 0

    @pytest.mark.slow
    @settings(max_examples=200, deadline=None)
    @given(
        st.dictionaries(st.integers(0, 255), st.integers(1, 60), min_size=2, max_size=40),
        st.lists(st.tuples(st.floats(0, 255), st.floats(0.5, 500)), min_size=2, max_size=4),
    )
    def test_frozen_means_never_lose_likelihood(self, histogram, components):
        mean, variance = zip(*components, strict=True)
        last = -math.inf
        for n in range(1, 12):
            fit = mixture(histogram, mean, variance, max_iterations=n, tolerance=0, variance_center="frozen")
            if fit.failed.any():
                return
            assert fit.log_likelihood.item() >= last - 1e-6
            last = fit.log_likelihood.item()

    @pytest.mark.slow
    @settings(max_examples=100, deadline=None)
    @given(
        st.dictionaries(st.integers(0, 255), st.integers(1, 60), min_size=2, max_size=40),
        st.lists(st.tuples(st.floats(0, 255), st.floats(0.5, 500)), min_size=2, max_size=4),
        st.sampled_from(["frozen", "responsibility-mean"]),
    )
    def test_histogram_equals_samples_and_weights_sum_to_one_plus_epsilon(self, histogram, components, center):
        mean, variance = zip(*components, strict=True)
        samples = [value for value, count in histogram.items() for _ in range(count)]
        parameters = [torch.tensor([t], dtype=float64) for t in (mean, variance, [1 / len(mean)] * len(mean))]
        y = torch.tensor([samples], dtype=float64)
        by_sample = fit_mixtures(y, torch.ones_like(y), *parameters, max_iterations=20, variance_center=center)
        by_histogram = mixture(histogram, mean, variance, max_iterations=20, variance_center=center)
        torch.testing.assert_close(by_histogram.weight, by_sample.weight, atol=1e-9, rtol=0)
        assert torch.equal(by_histogram.failed, by_sample.failed)
        if not by_histogram.failed.any():
            assert by_histogram.weight.sum().item() == pytest.approx(1 + len(mean) * 1e-6 / len(samples), abs=1e-9)
            assert (by_histogram.weight > 0).all()

    def test_groups_of_a_batch_do_not_touch_each_other(self):
        generator = torch.Generator().manual_seed(0)
        value = torch.arange(256.0, dtype=float64).expand(7, -1)
        count = torch.randint(0, 5, (7, 256), generator=generator).double()
        mean = torch.rand(7, 3, generator=generator, dtype=float64) * 255
        variance = torch.rand(7, 3, generator=generator, dtype=float64) * 400 + 1
        variance[3, 1] = 0
        start = torch.full((7, 3), 1 / 3, dtype=float64)
        together = fit_mixtures(value, count, mean, variance, start)
        assert together.failed.tolist() == [False, False, False, True, False, False, False]
        assert len(set(together.updates.tolist())) > 2
        for g in range(7):
            alone = fit_mixtures(*(t[g : g + 1] for t in (value, count, mean, variance, start)))
            torch.testing.assert_close(alone.weight[0], together.weight[g], atol=1e-12, rtol=0)
            assert alone.updates[0] == together.updates[g]

    @pytest.mark.parametrize("dtype", [torch.float32, float64])
    def test_dying_component_keeps_the_start(self, dtype):
        fit = mixture({254: 60, 255: 60}, [254.5, 200], [0.25, 4], start=[0.3, 0.7], dtype=dtype)
        assert fit.failed.tolist() == [True]
        close(fit.weight, [0.3, 0.7], 1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, float64])
    def test_component_that_dies_late_keeps_the_start(self, dtype):
        # The first update leaves the second component a variance near 0.25, 19.5 levels from its frozen mean.
        distant = mixture({100: 500, 101: 500}, [100.5, 120], [100, 40], start=[0.6, 0.4], dtype=dtype)
        assert distant.failed.tolist() == [True]
        assert distant.updates.item() > 1
        close(distant.weight, [0.6, 0.4], 1e-7)

    def test_zero_weight_is_a_dead_component(self):
        fit = mixture({100: 50, 110: 50}, [100, 110], [9, 9], start=[1.0, 0.0])
        assert fit.failed.tolist() == [True]
        close(fit.weight, [1, 0])


class TestTable:
    def test_many_samples_are_fitted_and_few_are_not(self):
        generator = torch.Generator().manual_seed(1)
        x, y, z, truth = torch.randint(0, 32, (4, 100), generator=generator)
        fitted = estimate([grey(x), grey(y), grey(z)], grey(truth))
        assert (fitted.count[0, 0], fitted.source[0, 0]) == (100, FITTED)
        few = estimate([grey(x[:99]), grey(y[:99]), grey(z[:99])], grey(truth[:99]))
        assert (few.count[0, 0], few.source[0, 0]) == (99, FEW)
        start = estimate(
            [grey(x[:99]), grey(y[:99]), grey(z[:99])], grey(truth[:99]), settings=Settings(min_samples=1e9)
        )
        assert torch.equal(few.lut, start.lut)

    @pytest.mark.slow
    def test_matches_em_of_the_cells_own_samples(self):
        *x, y = scene(3)
        table = estimate(x, y)
        cell = cell_index(x, 32)
        checked = 0
        for c, r in itertools.product(range(3), range(512)):
            inside = cell[c] == r
            n = int(inside.sum())
            assert table.count[r, c] == n
            if n < 100:
                continue
            models = torch.stack([image[c][inside].double() for image in x])
            distance = (models - models.mean(0)).square().mean(1)
            samples = y[c][inside].double()[None]
            fit = fit_mixtures(
                samples,
                torch.ones_like(samples),
                models.mean(1)[None],
                models.var(1, correction=0)[None],
                agreement_weights(distance[None]),
            )
            close(table.lut[r, c], fit.weight[0].tolist(), 1e-6)
            assert table.updates[r, c] == fit.updates[0]
            checked += 1
        assert checked > 5

    def test_constant_candidate_and_dying_component_keep_the_start(self):
        generator = torch.Generator().manual_seed(2)
        moving = torch.randint(0, 32, (200,), generator=generator)
        constant = torch.full((200,), 7)
        for dtype in ("float32", "float64"):
            table = estimate([grey(moving), grey(constant)], grey(moving), settings=Settings(dtype=dtype))
            assert table.source[0, 0] == FAILED
            assert table.lut[0, 0].tolist() == [0.5, 0.5]
            high = torch.randint(254, 256, (3, 200), generator=generator)
            low = torch.randint(199, 202, (200,), generator=generator)
            table = estimate([grey(high[0]), grey(low)], grey(high[1]), settings=Settings(dtype=dtype))
            assert table.source[7 * 8 + 6, 0] == FAILED
            assert table.lut[7 * 8 + 6, 0].tolist() == [0.5, 0.5]

    def test_constant_candidate_between_the_levels_keeps_the_start(self):
        moving = torch.rand(1, 20, 50, generator=torch.Generator().manual_seed(0)) * 0.1
        table = estimate([moving, torch.full_like(moving, 0.0513)], moving)
        assert table.source[0, 0] == FAILED

    def test_empty_cells_take_the_weights_before_them(self):
        # R fills cells 0 and 2 (bins (0, 0) and (0, 2)); G and B are elsewhere: (7, 7).
        x = torch.tensor([[0, 10], [255, 250], [255, 240]], dtype=torch.uint8).view(3, 1, 2)
        y = torch.tensor([[3, 80], [255, 250], [250, 240]], dtype=torch.uint8).view(3, 1, 2)
        z = torch.tensor([[9, 11], [230, 250], [255, 249]], dtype=torch.uint8).view(3, 1, 2)
        table = estimate([x, y, z], x)
        cells = [cell_index([t[0, 0, n : n + 1] for t in (x, y, z)], 32).item() for n in range(2)]
        assert cells == [0, 2 * 8]
        for r, c in itertools.product(range(512), range(3)):
            if table.source[r, c] != EMPTY:
                continue
            flat = r * 3 + c
            assert torch.equal(table.lut.flatten(0, 1)[flat], table.lut.flatten(0, 1)[flat - 1])
        assert torch.equal(table.lut[0, 1], table.lut[0, 0])
        assert not torch.equal(table.lut[0, 0], table.lut[16, 0])
        uniform = estimate([x, y, z], x, settings=Settings(empty_cells="uniform"))
        assert (uniform.lut[uniform.source == EMPTY] == torch.tensor(1 / 3)).all()

    def test_empty_first_cell_is_uniform(self):
        table = estimate([image(200, 200), image(210, 220), image(220, 231)], image(200, 210))
        assert table.source[0, 0] == EMPTY
        assert (table.lut[0, 0] == torch.tensor(1 / 3)).all()
        assert not torch.equal(table.lut[-1, 0], table.lut[0, 0])

    def test_order_of_samples_and_images_does_not_matter(self):
        scenes = [scene(seed) for seed in range(3)]
        names = ["a", "b", "c"]
        tables = []
        for order in ([0, 1, 2], [2, 0, 1]):
            estimator = Estimator(names)
            for n in order:
                *x, y = scenes[n]
                estimator.update([image.flip(-1) if order[0] else image for image in x], y.flip(-1) if order[0] else y)
            tables.append(estimator.finish())
        torch.testing.assert_close(tables[0].lut, tables[1].lut, atol=1e-7, rtol=0)
        assert torch.equal(tables[0].count, tables[1].count)

    def test_portions_batches_and_floats_give_the_same_table(self):
        scenes = [scene(seed) for seed in range(4)]
        batch = [torch.stack(images) for images in zip(*scenes, strict=True)]
        whole = estimate(batch[:-1], batch[-1])
        as_float = estimate([x.float() / 255 for x in batch[:-1]], batch[-1].float() / 255)
        assert torch.equal(whole.lut, as_float.lut)
        assert whole.num_images == as_float.num_images == 4
        assert torch.equal(whole.apply(batch[:-1])[1], whole.apply(scenes[1][:-1]))

    def test_permuting_models_permutes_the_table(self):
        *x, y = scene(5)
        table, permuted = estimate(x, y), estimate([x[2], x[0], x[1]], y)
        filled = table.count > 0
        lut = table.lut.masked_fill(~filled.unsqueeze(2), 0).view(8, 8, 8, 3, 3)
        other = permuted.lut.masked_fill(permuted.count.unsqueeze(2) == 0, 0).view(8, 8, 8, 3, 3)
        torch.testing.assert_close(lut.permute(2, 0, 1, 3, 4)[..., [2, 0, 1]], other, atol=1e-7, rtol=0)

    def test_twice_the_reference_changes_only_cells_that_reach_the_minimum(self):
        *x, y = scene(6)
        once = estimate(x, y)
        twice = estimate([torch.stack([image] * 2) for image in x], torch.stack([y] * 2))
        enough = once.count >= 100
        torch.testing.assert_close(once.lut[enough], twice.lut[enough], atol=1e-6, rtol=0)
        assert (once.source[(once.count >= 50) & ~enough] == FEW).all()
        assert (twice.source[(once.count >= 50) & ~enough] != FEW).all()
        assert ((once.count >= 50) & ~enough).any()

    def test_truth_between_the_levels(self):
        *x, y = scene(7)
        y = (y.float() + 0.25) / 255
        shifted = estimate(x, y, settings=Settings(bin_width=256))
        samples = (y * 255)[1].double().flatten()[None]
        models = torch.stack([image[1].double().flatten() for image in x])
        fit = fit_mixtures(
            samples,
            torch.ones_like(samples),
            models.mean(1)[None],
            models.var(1, correction=0)[None],
            agreement_weights((models - models.mean(0)).square().mean(1)[None]),
        )
        close(shifted.lut[0, 1], fit.weight[0].tolist(), 1e-6)

    def test_shared_channels_pool_their_samples(self):
        *x, y = scene(8)
        shared = estimate(x, y, settings=Settings(channels="shared"))
        pooled = estimate([image.reshape(1, -1, 64) for image in x], y.reshape(1, -1, 64))
        assert torch.equal(shared.lut, pooled.lut)
        assert shared.apply(x).shape == (3, 64, 64)
        close(shared.apply(x), pooled.apply([image.reshape(1, -1, 64) for image in x]).flatten().tolist())

    def test_busiest_mixtures(self):
        *x, y = scene(9)
        estimator = Estimator(["a", "b", "c"])
        estimator.update(x, y)
        table = estimator.finish()
        first, second = estimator.busiest(2)
        assert first.count.sum() == table.count[table.source == FITTED].max()
        assert first.count.sum() >= second.count.sum()
        close(first.weight, table.lut.view(8, 8, 8, 3, 3)[(*first.bins, first.channel)].tolist(), 1e-6)
        assert first.bins[0] * 32 <= first.mean[0] < first.bins[0] * 32 + 32


class TestFusing:
    def test_by_hand(self):
        lut = torch.tensor([0.2, 0.3, 0.5]).expand(512, 1, 3)
        nothing = torch.zeros(512, 1)
        table = Table(lut, nothing, nothing, nothing, models="abc", settings=Settings(), num_images=0)
        fused = table.apply([image(40), image(70), image(200)])
        assert fused.item() * 255 == pytest.approx(129, abs=1e-4)
        eight_bit = [torch.tensor(x, dtype=torch.uint8).view(1, 1, 1) for x in (40, 70, 200)]
        assert table.apply(eight_bit).item() == pytest.approx(fused.item(), abs=1e-7)

    @pytest.mark.parametrize("bin_width", [1, 7, 16, 32, 50, 255, 256])
    def test_every_sample_is_the_weighted_sum_of_its_cell(self, bin_width):
        *x, y = scene(10, num_models=2)
        table = estimate(x, y, settings=Settings(bin_width=bin_width))
        T = num_bins(bin_width)
        a, b = (image.long() for image in x)
        weights = table.lut[(a // bin_width) * T + b // bin_width, torch.arange(3).view(3, 1, 1)]
        expected = weights[..., 0] * a + weights[..., 1] * b
        torch.testing.assert_close(table.apply(x) * 255, expected, atol=1e-3, rtol=0)

    def test_identical_candidates_come_back(self):
        *_, y = scene(11)
        table = estimate([y] * 3, y)
        assert (table.source == FITTED).any()
        torch.testing.assert_close(table.apply([y] * 3), y.float() / 255, atol=1e-4 / 255, rtol=0)

    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([32, 50, 128]))
    def test_fused_stays_between_the_candidates(self, seed, num_models, bin_width):
        *x, y = scene(seed, num_models, size=24)
        fused = estimate(x, y, settings=Settings(bin_width=bin_width, min_samples=20)).apply(x) * 255
        low, high = torch.stack(x).float().aminmax(dim=0)
        assert (fused >= low - 1e-3).all()
        assert (fused <= high + 1e-3).all()

    @pytest.mark.parametrize("bin_width", [1, 3, 32, 50, 254, 255, 256])
    def test_white_stays_white(self, bin_width):
        white = torch.ones(1, 4, 4)
        table = estimate([white, white], white, settings=Settings(bin_width=bin_width))
        torch.testing.assert_close(table.apply([white, white]), white, atol=1e-5, rtol=0)

    def test_values_out_of_range_are_binned_at_the_border_and_kept(self):
        half = torch.full((4, 1, 2), 0.5)
        table = Table(
            half.view(4, 1, 2),
            *torch.zeros(3, 4, 1),
            models="ab",
            settings=Settings(bin_width=128),
            num_images=0,
        )
        out = [torch.tensor([-0.1, 1.2]).view(1, 1, 2), torch.tensor([0.2, 1.4]).view(1, 1, 2)]
        close(table.apply(out), [0.05, 1.3], 1e-6)
        strict = Settings(clip_input=False)
        with pytest.raises(ValueError, match=r"from -0\.1 to 1\.2"):
            estimate(out, out[0].clamp(0, 1), settings=strict)
        for bad in (math.nan, math.inf, -math.inf):
            broken = [torch.tensor([bad, 0.5]).view(1, 1, 2), out[1]]
            with pytest.raises(ValueError, match="NaN or infinity"):
                table.apply(broken)
            with pytest.raises(ValueError, match="NaN or infinity"):
                estimate(broken, out[1])

    def test_usage_counts_the_groups_of_the_test_images(self):
        *x, y = scene(12)
        table = estimate(x, y)
        assert torch.equal(table.usage(x), table.count)
        shared = estimate(x, y, settings=Settings(channels="shared"))
        assert shared.usage(x).sum() == 3 * 64 * 64


class TestWhole:
    def test_is_learning_then_fusing(self):
        *known, truth = scene(18)
        *new, _ = scene(19)
        table = estimate(known, truth, ["a", "b", "c"])
        learned = []
        fused = ensir(
            [new, known], [(*known, truth)], ["a", "b", "c"], on_learned=lambda estimator, t: learned.append(t)
        )
        assert torch.equal(learned[0].lut, table.lut)  # before the first image is fused
        for image, expected in zip(fused, (table.apply(new), table.apply(known)), strict=True):
            assert torch.equal(image, expected)

    def test_a_table_takes_the_place_of_the_reference(self):
        *known, truth = scene(20)
        table = learn([(*known, truth)], "abc")
        used = torch.zeros_like(table.count)
        (fused,) = ensir([known], table, "abc", on_fusing=lambda table, images: used.add_(table.usage(images)))
        assert torch.equal(fused, table.apply(known))
        assert torch.equal(used, table.count)

    def test_what_does_not_fit_is_refused_before_anything_is_fused(self):
        *known, truth = scene(21)
        reference = [(*known, truth)]
        for arguments, words in [
            (([known], reference, ["a"]), "at least 2 models"),
            (([known], reference, ["a", "b"]), "3 candidates were given for 2 models"),
            (([known], [], ["a", "b", "c"]), "no reference images"),
            (([known], learn(reference, "abc"), "bac"), "same models in the same order"),
            (([known], learn(reference, "abc"), "abc", Settings(bin_width=64)), "set bin_width to 32"),
        ]:
            with pytest.raises(ValueError, match=words):
                ensir(*arguments)


class TestRefusals:
    def test_settings(self):
        with pytest.raises(ValueError, match="bin_width is 0"):
            Settings(bin_width=0)
        with pytest.raises(ValueError, match="sum 1"):
            Settings(default_weight=(0.5, 0.6))
        with pytest.raises(ValueError, match="sum 1"):
            Settings(default_weight=(math.nan, 1.0))
        with pytest.raises(ValueError, match="at least 2 models"):
            Estimator(["alone"])
        with pytest.raises(ValueError, match="2 numbers for 3 models"):
            Estimator(["a", "b", "c"], Settings(default_weight=(0.5, 0.5)))
        with pytest.raises(ValueError, match="larger bin_width"):
            Estimator("abcd", Settings(bin_width=3))

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"channels": "share"}, "channels is 'share'; allowed is 'separate' or 'shared'"),
            ({"initial_weights": "even"}, "initial_weights is 'even'; allowed is 'agreement' or 'uniform'"),
            ({"variance_center": "froze"}, "variance_center is 'froze'"),
            ({"empty_cells": "last"}, "empty_cells is 'last'"),
            ({"dtype": "float16"}, "dtype is 'float16'; allowed is 'float64' or 'float32'"),
            ({"min_samples": 1}, "min_samples is 1; allowed is a number from 2 on"),
            ({"min_samples": math.nan}, "min_samples is nan"),
            ({"max_iterations": 0}, "max_iterations is 0"),
            ({"tolerance": -1e-9}, "tolerance is -1e-09"),
            ({"tolerance": math.nan}, "tolerance is nan"),
            ({"epsilon": 0}, "epsilon is 0"),
        ],
    )
    def test_misspelt_choices_and_numbers_that_no_table_is_made_with(self, fields, words):
        with pytest.raises(ValueError, match=words):
            Settings(**fields)

    def test_a_misspelt_choice_of_em_alone(self):
        one = torch.ones(1, 2)
        with pytest.raises(ValueError, match="variance_center is 'froze'; allowed is"):
            fit_mixtures(one, one, one, one, one / 2, variance_center="froze")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_floats_that_round_the_levels(self, dtype):
        levels = torch.arange(256).float().view(1, 16, 16) / 255
        table = estimate([levels, levels], levels)
        with pytest.raises(
            ValueError, match=f"a has dtype {str(dtype)[6:]}, which rounds the 8-bit levels; give uint8"
        ):
            estimate([levels.to(dtype), levels], levels, ["a", "b"])
        with pytest.raises(ValueError, match="1 has dtype"):
            table.apply([levels, levels.to(dtype)])
        assert torch.equal(table.apply([levels.double(), levels]), table.apply([levels, levels]))

    def test_floats_on_the_255_scale(self):
        *x, y = scene(16, num_models=2)
        table = estimate(x, y)
        for scale in (lambda image: image.float(), lambda image: image.float() + 0.25):
            with pytest.raises(
                ValueError, match=r"target has values from .*, as on the 0–255 scale; give uint8, or divide"
            ):
                estimate(x, scale(y))
            with pytest.raises(ValueError, match=r"1 has values from .*, as on the 0–255 scale"):
                table.apply([x[0], scale(x[1])])
        dark = torch.tensor([[[0.0, 0.0, 1.0, 2.0]]])
        with pytest.raises(ValueError, match="as on the 0–255 scale"):
            estimate([dark, dark], dark)
        # A bright image that a network overshoots is none of these.
        bright = torch.full((1, 4, 4), 1.02)
        assert estimate([bright, bright], bright).count.sum() == 16

    @pytest.mark.parametrize("settings", [Settings(), Settings(channels="shared"), Settings(clip_input=False)])
    def test_a_refused_portion_leaves_nothing_behind(self, monkeypatch, settings):
        monkeypatch.setattr("plait_ensir.ensir._UPDATE_BLOCK", 50)
        a, b, y = (image.float() / 255 for image in scene(17, num_models=2, size=16))
        broken = y.clone()
        broken[-1, -1, -1] = math.nan
        estimator = Estimator(["a", "b"], settings)
        for refused in ([[a, b], broken], [[broken, b], y], [[a, b[:1]], y], [[a, b.half()], y], [[a, 255 * b], y]):
            with pytest.raises(ValueError, match=r"NaN|shape|dtype|255"):
                estimator.update(*refused)
            with pytest.raises(ValueError, match="no reference images"):
                estimator.finish()
        estimator.update([a, b], y)
        with pytest.raises(ValueError, match="NaN"):
            estimator.update([a, b], broken)
        alone = estimate([a, b], y, ["a", "b"], settings)
        for name, buffer in estimator.finish().state_dict().items():
            assert torch.equal(buffer, alone.state_dict()[name]), name

    def test_tables_that_hold_no_numbers(self):
        table = estimate([torch.zeros(1, 2, 2)] * 2, torch.zeros(1, 2, 2))
        about = {"models": "ab", "settings": table.settings, "num_images": 1}
        with pytest.raises(ValueError, match="the table holds NaN or infinity"):
            Table(table.lut * math.nan, table.count, table.source, table.updates, **about)
        with pytest.raises(ValueError, match=r"source has shape \[3, 1\]; expected \[64, 1\]"):
            Table(table.lut, table.count, table.source[:3], table.updates, **about)

    def test_images(self):
        x = torch.zeros(3, 4, 4)
        with pytest.raises(ValueError, match=r"b has shape \[3, 4, 5\] and a \[3, 4, 4\]"):
            estimate([x, torch.zeros(3, 4, 5)], x, ["a", "b"])
        with pytest.raises(ValueError, match="target has shape"):
            estimate([x, x], torch.zeros(3, 5, 4))
        with pytest.raises(ValueError, match="1 candidates were given for 2"):
            Estimator("ab").update([x], x)
        with pytest.raises(ValueError, match="dtype"):
            estimate([x.long(), x.long()], x.long())
        with pytest.raises(ValueError, match="no reference images"):
            Estimator("ab").finish()
        table = estimate([x, x], x)
        with pytest.raises(ValueError, match="3 channels and the candidates have 1"):
            table.apply([x[:1], x[:1]])
        with pytest.raises(ValueError, match="3 candidates"):
            table.apply([x, x, x])


class TestFiles:
    def test_saved_table_is_the_same_bit_for_bit(self, tmp_path):
        *x, y = scene(13)
        choice = Settings(default_weight=(0.1, 0.3, 0.6), min_samples=50, channels="shared", variance_center="frozen")
        table = estimate(x, y, ["swinir", "srformer", "mambair"], choice)
        table.save(tmp_path / "table.safetensors")
        table.save_pretrained(tmp_path / "folder")
        for again in (Table.load(tmp_path / "table.safetensors"), Table.from_pretrained(tmp_path / "folder")):
            assert again.models == table.models
            assert again.settings == table.settings
            assert again.num_images == 1
            for name, buffer in table.state_dict().items():
                assert again.state_dict()[name].dtype == buffer.dtype
                assert torch.equal(again.state_dict()[name], buffer)
            assert torch.equal(again.apply(x), table.apply(x))

    def test_no_em_at_all_survives_saving(self, tmp_path):
        table = estimate([image(1), image(2)], image(1), settings=Settings(min_samples=math.inf))
        table.save(tmp_path / "t.safetensors")
        assert Table.load(tmp_path / "t.safetensors").settings == table.settings

    def test_another_use_is_refused(self):
        table = estimate([image(1), image(2)], image(1), ["a", "b"])
        table.check(["a", "b"], 32)
        for models, bin_width, words in [
            (["b", "a"], 32, "order"),
            (["a"], 32, "order"),
            (["a", "b", "c"], 32, "order"),
            (["a", "b"], 64, "bin_width"),
        ]:
            with pytest.raises(ValueError, match=words):
                table.check(models, bin_width)

    def test_other_files_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        (tmp_path / "text").write_text("not a table")
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        for name in ("text", "other.safetensors"):
            with pytest.raises(ValueError, match="not an EnsIR table"):
                Table.load(tmp_path / name)

    @pytest.mark.slow
    @pytest.mark.parametrize(("bin_width", "num_models"), [(32, 3), (50, 2), (64, 4), (256, 2)])
    def test_authors_format_there_and_back(self, tmp_path, bin_width, num_models):
        *x, y = scene(14, num_models)
        table = estimate(x, y, settings=Settings(bin_width=bin_width))
        save_pth(table, tmp_path / "table.pth")
        again = load_pth(tmp_path / "table.pth", table.models)
        assert again.settings.bin_width == bin_width
        assert torch.equal(again.lut, table.lut)
        assert torch.equal(again.apply(x), table.apply(x))

    @pytest.mark.slow
    def test_authors_format(self, tmp_path):
        *x, y = scene(15)
        table = estimate(x, y)
        save_pth(table, tmp_path / "table.pth")
        entries = torch.load(tmp_path / "table.pth", weights_only=True)
        assert list(entries)[:9] == [(0, 0, 32 * n) for n in range(8)] + [(0, 32, 0)]
        assert [tuple(channel.shape) for channel in entries[0, 32, 64]] == [(3,)] * 3
        assert torch.equal(entries[32, 64, 192][1], table.lut[86, 1])
        with pytest.raises(ValueError, match="table of 3 models, and 2 are named"):
            load_pth(tmp_path / "table.pth", ["a", "b"])
        del entries[0, 32, 64]
        torch.save(entries, tmp_path / "holes.pth")
        with pytest.raises(ValueError, match="lacks some cells"):
            load_pth(tmp_path / "holes.pth", ["a", "b", "c"])
        torch.save(torch.zeros(3), tmp_path / "tensor.pth")
        (tmp_path / "text.pth").write_text("nothing")
        (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
        for name, words in (
            ("tensor", "not a table of the authors' code"),
            ("text", "not a file of weights"),
            ("lfs", "Git LFS pointer"),
            ("none", "not a file"),
        ):
            with pytest.raises(ValueError, match=rf"{name}\.pth is .*{words}"):
                load_pth(tmp_path / f"{name}.pth", ["a", "b", "c"])
