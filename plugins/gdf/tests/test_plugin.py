"""The methods: feature sets of small models, baselines, reports."""

import numpy as np
import pytest
import torch
from plait import Run
from plait.demo.pictures import digits
from plait_diffusion import FeatureSet, Origin, append, image_tensors, small_backbone, warped_digits
from plait_diffusion.plugin import TrainDiffusion
from plait_gdf.baselines import decoder_blocks, dift
from plait_gdf.gdf import Extraction, gdf, legacy_set
from plait_gdf.pictures import colours_of
from plait_gdf.plugin import GDF, ActivationRanking, DDPMSeg, Dift, NoiseReport

LAYERS = ("up-level0-upsampler-out", "up-level1-repeat0-vit-block0-cross-q")


@pytest.fixture(scope="module")
def small():
    return small_backbone([str(digit) for digit in range(10)], 0)


def test_features_of_several_splits(small):
    data = {"train": digits(3), "test": digits(2)}
    found = GDF(layers=LAYERS, dtype="float32", noise_seed=1).extract_feature(small, data, Run())
    assert {name: len(features) for name, features in found.items()} == {"train": 3, "test": 2}
    expected = gdf(small, image_tensors(digits(3), 16), extraction=Extraction(layers=LAYERS), seed=1)
    got = found["train"].read()
    assert all(torch.allclose(got[name], value, atol=1e-5) for name, value in expected.items())


def test_batches_do_not_matter(small):
    sets = [
        GDF(layers=LAYERS, batch_size=size, dtype="float32").extract_feature(small, digits(5), Run()).read()
        for size in (1, 5)
    ]
    assert all(torch.allclose(sets[0][name], sets[1][name], atol=1e-5) for name in LAYERS)


def test_the_origin_says_how_and_refuses_to_mix(small):
    one, other = (
        GDF(layers=LAYERS, timestep=timestep).extract_feature(small, digits(2), Run()) for timestep in (50, 100)
    )
    origin = one.origins[0]
    assert (origin.timestep, origin.prompt, origin.model, origin.dtype) == (50.0, "", "small-digits", "float32")
    assert origin.scheduler["beta_schedule"] == "scaled_linear"
    assert origin.more["image_size"] == 16
    with pytest.raises(ValueError, match="timestep"):
        append(one, other)


def test_a_prompt_for_every_image(small):
    data = digits(3).add_column("caption", ["0", "1", ""])
    found = GDF(layers=LAYERS, prompt_column="caption", dtype="float32", noise_seed=1).extract_feature(
        small, data, Run()
    )
    one = GDF(layers=LAYERS, prompt="1", dtype="float32", noise_seed=1).extract_feature(small, data, Run())
    assert torch.allclose(found.read()[LAYERS[1]][1], one.read()[LAYERS[1]][1], atol=1e-5)
    assert found.origins[0].prompt is None
    with pytest.raises(ValueError, match="prompt_column is 'text'"):
        GDF(layers=LAYERS, prompt_column="text").extract_feature(small, data, Run())


def test_fields_that_contradict_each_other():
    with pytest.raises(ValueError, match="layers is empty"):
        GDF(layers=())
    with pytest.raises(ValueError, match="give one"):
        GDF(layers=LAYERS, preset="pool")
    with pytest.raises(ValueError, match="go together"):
        GDF(attn_min_side=4)


def test_the_two_halves_are_the_whole(small):
    method, images = GDF(layers=LAYERS), image_tensors(digits(2), 16)
    call = method.prepare(small, images, rows=[0, 1], seed=3)
    halves = method.capture(small, call)
    whole = gdf(small, images, extraction=Extraction(layers=LAYERS), seed=3)
    assert all(torch.equal(halves[name], value) for name, value in whole.items())
    assert call.nominal == 50.0
    assert torch.equal(method.prepare(small, images, rows=[0, 1], seed=3, latents=call.latents).sample, call.sample)


@pytest.mark.slow
def test_dift_is_a_late_timestep_without_offset(tiny):
    backbone = tiny("sd15")
    assert dift().prepare(backbone, torch.rand(1, 3, 64, 64), rows=[0], seed=0).timestep == 261
    found = Dift(ensemble_size=2).extract_feature(backbone, digits(2), Run())
    assert found.names == ("up_blocks.1",)
    assert found["up_blocks.1"].shape == (16, 4, 4)


def test_decoder_blocks_are_counted_as_the_paper_does(tiny):
    assert decoder_blocks(tiny("ddpm").denoiser, (0, 2, 3, 5, 11)) == (
        "up-level0-repeat0-res-out",
        "up-level0-upsampler-out",
        "up-level1-repeat0-vit-out",
        "up-level1-upsampler-out",
        "up-level3-repeat2-res-out",
    )
    with pytest.raises(ValueError, match="blocks names 12; the decoder has blocks 0 to 11"):
        decoder_blocks(tiny("ddpm").denoiser, (5, 12))


def test_ddpm_seg_shares_one_noise(tiny):
    method = DDPMSeg(blocks=(5,), timesteps=(50, 150), dtype="float32")
    twice = digits(2).select([0, 0])
    found = method.extract_feature(tiny("ddpm"), twice, Run())
    assert found.names == ("t50/up-level1-upsampler-out", "t150/up-level1-upsampler-out")
    assert all(torch.allclose(value[0], value[1], atol=1e-5) for value in found.read().values())
    with pytest.raises(ValueError, match="unconditional"):
        DDPMSeg(blocks=(5,), prompt_column="name").extract_feature(tiny("ddpm"), twice, Run())


def test_the_ranking_finds_the_informative_activation():
    draw = torch.Generator().manual_seed(0)
    rows = digits(240)
    labels = torch.nn.functional.one_hot(torch.tensor(rows["label"]), 10).float()
    tensors = {
        "up-level0-repeat0-res-out": labels[..., None, None] + 0.3 * torch.randn(240, 10, 4, 4, generator=draw),
        "up-level0-repeat0-vit-out": torch.randn(240, 10, 4, 4, generator=draw),
        "up-level0-upsampler-out": torch.randn(240, 10, 8, 8, generator=draw),
    }
    features = FeatureSet.of_tensors(rows, tensors, Origin(model="made up"))
    method = ActivationRanking(
        num_labels=100,
        num_validation=100,
        max_side=4,
        against={"legacy": ("*upsampler-out",)},
        singles={"alone": ("*",)},
    )
    run = Run()
    report = method.evaluate(features, features, run)
    assert [row["activation"] for row in run.reports[0].rows] == [
        "up-level0-repeat0-res-out",
        "up-level0-repeat0-vit-out",
    ]
    assert "chosen of 2: up-level0-repeat0-res-out" in report.notes[0]
    accuracy = {row["activations"]: row["test accuracy, %"] for row in report.rows}
    assert accuracy["chosen"] == accuracy["alone"] > 95
    assert accuracy["legacy"] < 70
    gains = {row["activations"]: row["gain, points"] for row in report.rows}
    assert gains["legacy"] == 0
    assert gains["chosen"] == accuracy["chosen"] - accuracy["legacy"]
    with pytest.raises(ValueError, match="'nothing', which the features do not have"):
        ActivationRanking(against={"x": ("nothing",)}, num_labels=50, num_validation=50).evaluate(
            features, features, Run()
        )
    with pytest.raises(ValueError, match="more than the 240 images"):
        ActivationRanking(num_labels=200, num_validation=300).evaluate(features, features, Run())


@pytest.mark.slow
def test_a_report_has_bars_and_colours(small):
    report = NoiseReport(layers=("up-level0-*",), num_images=4, draws=2, batch_size=3).evaluate(small, digits(5), Run())
    assert [panel.title for panel in report.panels] == [
        "Noise along the network",
        "Principal components of activations",
    ]
    assert report.rows[-1]["activation"] == "median of up-level0"
    assert "4 images, 2 draws" in report.notes[0]


def test_colours_are_principal_components():
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(2, 1, 4, 4, generator=draw)
    colours = colours_of(torch.cat([one, 2 * one, torch.zeros_like(one)], dim=1))
    assert colours.shape == (2, 3, 4, 4)
    red, line = colours[:, 0].flatten().numpy(), one.flatten().numpy()
    assert np.corrcoef(red, line)[0, 1] > 0.95
    assert colours_of(torch.randn(1, 2, 4, 4, generator=draw)).shape == (1, 3, 4, 4)


@pytest.mark.slow
def test_noise_falls_along_the_network_and_comes_back(small):
    data = warped_digits()
    trained = TrainDiffusion(num_steps=40, batch_size=32).optimize(small, data["train"], Run())
    report = NoiseReport(num_images=12, pictures=False).evaluate(trained, data["test"], Run())
    noise = {
        row["activation"].removeprefix("median of "): row["noise / variance"]
        for row in report.rows
        if row["family"] == "level"
    }
    # A ninth or less of either; in an untrained network it is a third to a half.
    assert noise["up-level0"] < noise["down-level0"] / 5
    assert noise["up-level0"] < noise["up-level2"] / 5
    assert min(noise, key=noise.get) in ("mid", "up-level0")
    assert legacy_set(trained.denoiser)[-1] == "up-level2-repeat1-res-out"
