"""The method on small models of every shape: sets and pools, extraction, the attention feature, properties, ranking."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_diffusion import official_ids
from plait_gdf.gdf import (
    POOL_SD15,
    POOL_SDXL,
    PRESETS,
    XL_T,
    Extraction,
    Ranked,
    aggregate,
    attention_feature,
    candidate_pool,
    choose,
    family_of,
    gdf,
    heuristic_set,
    layers_of,
    legacy_set,
    list_activations,
    noise_report,
    pooled,
    rank_activations,
    stored,
)

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def full_size():
    """SD 1.5 and SDXL at their own size, without memory for their weights."""
    with torch.device("meta"):
        return {
            "sd15": diffusers.UNet2DConditionModel(**SD15),
            "sdxl": diffusers.UNet2DConditionModel(**SDXL),
        }


def channels(denoiser, names):
    """Output channels by what the modules say of themselves."""
    total = 0
    for name in names:
        module = denoiser.get_submodule(official_ids(denoiser)[name].path)
        weights = [one for one in (getattr(module, "out_channels", None), getattr(module, "out_features", None)) if one]
        total += weights[0] if weights else module.norm1.weight.shape[0]  # a transformer block keeps its width
    return total


class TestSets:
    def test_channel_totals_of_the_presets(self, full_size):
        sd15, sdxl = full_size["sd15"], full_size["sdxl"]
        assert channels(sd15, PRESETS["sd15"]) == 3520
        assert channels(sdxl, PRESETS["sdxl"]) == 3840
        assert channels(sd15, PRESETS["sd15_amalgam"]) + 2 * 77 == 3034
        assert channels(sdxl, PRESETS["pgv2_amalgam"]) == 1280
        assert channels(sd15, legacy_set(sd15)) == 3520
        assert channels(sdxl, legacy_set(sdxl)) == 2240
        assert sum((3840, 3034, 1280)) == 8154
        assert [preset for _, preset in XL_T] == ["sdxl", "sd15_amalgam", "pgv2_amalgam"]

    def test_legacy_sets_are_the_published_ones(self, full_size):
        assert legacy_set(full_size["sd15"]) == (
            "up-level0-upsampler-out",
            "up-level1-upsampler-out",
            "up-level2-upsampler-out",
            "up-level3-repeat2-vit-out",
        )
        assert legacy_set(full_size["sdxl"]) == (
            "up-level0-upsampler-out",
            "up-level1-upsampler-out",
            "up-level2-repeat2-res-out",
        )

    def test_sizes_of_pools_and_taxonomy(self, full_size):
        assert len(POOL_SDXL) == len(set(POOL_SDXL)) == 63
        assert len(POOL_SD15) == len(set(POOL_SD15)) == 33
        assert layers_of("pool_sd15", full_size["sd15"]) == POOL_SD15
        for name, pool, rule, total in (("sdxl", POOL_SDXL, 66, 612), ("sd15", POOL_SD15, 34, 197)):
            ids = official_ids(full_size[name])
            found = candidate_pool(full_size[name])
            assert len(ids) == total
            assert len(found) == rule
            assert set(pool) < set(found) < set(ids)

    def test_what_the_published_pools_leave_out(self, full_size):
        assert set(candidate_pool(full_size["sd15"])) - set(POOL_SD15) == {"up-level1-upsampler-out"}
        assert set(candidate_pool(full_size["sdxl"])) - set(POOL_SDXL) == {
            "up-level1-upsampler-out",
            "up-level1-repeat2-vit-block0-self-q",
            "up-level1-repeat2-vit-block1-self-q",
        }

    def test_presets_are_chosen_by_the_model(self, tiny):
        assert layers_of("auto", tiny("sd15").denoiser) == PRESETS["sd15"]
        assert layers_of("auto", tiny("sdxl").denoiser) == PRESETS["sdxl"]
        for kind in ("ddpm", "flux", "pixart"):
            with pytest.raises(ValueError, match="no recipe is published"):
                layers_of("auto", tiny(kind).denoiser)

    def test_stable_diffusion_2_has_no_recipe(self):
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**{**SD15, "cross_attention_dim": 1024})
        with pytest.raises(ValueError, match="no recipe is published"):
            layers_of("auto", unet)

    def test_transformers_have_a_heuristic_and_no_legacy_set(self, tiny):
        assert heuristic_set(tiny("pixart").denoiser) == ("vit-block1-self-q", "vit-block1-out")
        assert heuristic_set(tiny("flux").denoiser) == (
            "vit-block1-q",
            "vit-block1-out",
            "vit-block2-q",
            "vit-block2-out",
        )
        assert candidate_pool(tiny("sd3").denoiser) == heuristic_set(tiny("sd3").denoiser)
        with pytest.raises(ValueError, match="which is of U-Nets"):
            legacy_set(tiny("flux").denoiser)

    def test_families(self):
        assert family_of("up-level1-repeat0-vit-block0-self-v") == "increment"
        assert family_of("vit-block3-q") == "self-attention"
        assert family_of("up-level1-repeat0-vit-out") == "inter-module"
        assert family_of("mid-vit-block0-cross-map") == "score map"
        assert family_of("unet-out") == "noise prediction"

    @pytest.mark.slow
    def test_listing_computes_nothing_and_knows_shapes(self, tiny):
        listed = list_activations(tiny("sd15"))
        assert len(listed) == 197
        assert listed[0].name == "unet-in"
        assert sum(one.in_pool for one in listed) == 34
        assert {one.shape for one in list_activations(tiny("sd15"), "up_blocks.1.*attn2.to_q")} == {(1, 16, 2, 2)}


class TestExtraction:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "pixart", "flux"])
    def test_every_kind_of_model(self, tiny, images, kind):
        backbone = tiny(kind)
        preset = "auto" if kind in ("sd15", "sdxl") else "heuristic"
        extraction = Extraction(layers=layers_of(preset, backbone.denoiser), image_size=64, prompt="a photo of the cat")
        shapes = extraction.check(backbone)
        found = gdf(backbone, images, extraction=extraction)
        assert {name: (1, *value.shape[1:]) for name, value in found.items()} == shapes
        assert all(torch.isfinite(value).all() for value in found.values())
        assert all(len(value) == 3 for value in found.values())

    def test_early_exit_changes_no_bit(self, tiny, images):
        layers = PRESETS["sd15"]
        fast, full = (
            gdf(tiny("sd15"), images, extraction=Extraction(layers=layers, early_exit=early)) for early in (True, False)
        )
        assert all(torch.equal(fast[name], full[name]) for name in full)

    def test_order_is_that_of_execution(self, tiny, images):
        layers = tuple(reversed(PRESETS["sd15"]))
        found = gdf(tiny("sd15"), images, extraction=Extraction(layers=layers))
        assert list(found) == [
            "up-level1-repeat1-vit-block0-cross-q",
            "up-level1-repeat2-res-out",
            "up-level2-repeat1-vit-block0-cross-q",
            "up-level3-repeat0-vit-block0-self-k",
        ]

    def test_noise_belongs_to_the_image_and_not_to_its_batch(self, tiny, images):
        backbone, extraction = tiny("sd15"), Extraction(layers=("unet-in", "up-level1-repeat2-res-out"))
        together = gdf(backbone, images[:2], extraction=extraction, seed=7)
        for row in range(2):
            alone = gdf(backbone, images[row : row + 1], extraction=extraction, seed=7, rows=[row])
            for name, value in alone.items():
                assert torch.allclose(value, together[name][row : row + 1], atol=1e-5)
        other = gdf(backbone, images[:2], extraction=extraction, seed=8)
        assert not torch.equal(other["unet-in"], together["unet-in"])
        assert {name: value.shape for name, value in other.items()} == {
            name: value.shape for name, value in together.items()
        }

    def test_what_the_network_sees_is_the_noised_latent(self, tiny, images):
        backbone, extraction = tiny("sd15"), Extraction(layers=("unet-in",))
        call = extraction.prepare(backbone, images, rows=range(3), seed=1)
        found = extraction.capture(backbone, call)["unet-in"]
        assert torch.equal(found, call.sample)
        assert call.timestep == 51
        assert torch.allclose(call.sample, 0.950524**0.5 * call.latents + (1 - 0.950524) ** 0.5 * call.noise, atol=1e-5)
        clean = extraction.prepare(backbone, images, rows=range(3), seed=1, noise=False)
        assert torch.equal(clean.sample, clean.latents)

    def test_an_ensemble_is_the_mean_of_its_draws(self, tiny, images):
        backbone, extraction = tiny("sd15"), Extraction(layers=("unet-in",), sample_posterior=False)
        once, four = (gdf(backbone, images, extraction=extraction, ensemble_size=size)["unet-in"] for size in (1, 4))
        call = extraction.prepare(backbone, images, rows=range(3), seed=0)
        signal = 0.950524**0.5 * call.latents
        assert float((four - signal).std()) == pytest.approx(float((once - signal).std()) / 2, rel=0.25)

    def test_moments_are_cached(self, tiny, images, tmp_path):
        backbone = tiny("sd15")
        plain = gdf(backbone, images, extraction=Extraction(layers=PRESETS["sd15"]))
        cached = Extraction(layers=PRESETS["sd15"], cache=tmp_path)
        first = gdf(backbone, images, extraction=cached)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3
        calls = []
        handle = backbone.encoder.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            second = gdf(backbone, images, extraction=cached)
        finally:
            handle.remove()
        assert calls == []
        for name, value in plain.items():
            assert torch.equal(value, first[name])
            assert torch.equal(value, second[name])

    def test_prompts_matter_and_are_encoded_once(self, tiny, images):
        backbone = tiny("sd15")
        layers = ("up-level3-repeat2-vit-out",)
        cat = gdf(backbone, images, extraction=Extraction(layers=layers, prompt="a cat"))
        dog = gdf(backbone, images, extraction=Extraction(layers=layers, prompt="a dog"))
        mixed = gdf(backbone, images, extraction=Extraction(layers=layers), prompts=["a cat", "a dog", "a cat"])
        assert not torch.equal(cat[layers[0]], dog[layers[0]])
        assert torch.allclose(mixed[layers[0]][1], dog[layers[0]][1], atol=1e-5)
        assert torch.allclose(mixed[layers[0]][2], cat[layers[0]][2], atol=1e-5)

    def test_long_prompts_are_not_cut(self, tiny, images):
        long = " ".join(["a photo of the cat"] * 20)
        extraction = Extraction(layers=PRESETS["sd15"], prompt=long)
        condition = tiny("sd15").condition([long], 64)
        assert condition["encoder_hidden_states"].shape[1] == 102  # 100 words, start and end
        assert gdf(tiny("sd15"), images, extraction=extraction)
        with pytest.raises(ValueError, match="100 words"):
            Extraction(layers=PRESETS["sdxl"], prompt=long).check(tiny("sdxl"))

    def test_pooling_of_features(self, tiny, images):
        layers = ("up-level3-repeat0-vit-block0-self-k",)
        plain, halved = (
            gdf(tiny("sd15"), images, extraction=Extraction(layers=layers, feature_resize=by))[layers[0]]
            for by in (1, 2)
        )
        assert torch.allclose(halved, torch.nn.functional.avg_pool2d(plain, 2), atol=1e-6)

    def test_pooling_by_hand(self):
        tokens = torch.arange(16.0).view(1, 1, 4, 4)
        assert pooled(tokens, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]

    def test_half_precision_is_close(self, tiny, images):
        for dtype in (torch.float16, torch.bfloat16):
            plain = gdf(tiny("sd15"), images, extraction=Extraction(layers=PRESETS["sd15"]))
            half = gdf(tiny("sd15"), images, extraction=Extraction(layers=PRESETS["sd15"]), dtype=dtype)
            for name, value in plain.items():
                assert half[name].dtype == dtype
                assert float((half[name].float() - value).norm() / value.norm()) < 1e-2

    def test_a_half_precision_model_is_close(self, tiny, images):
        from plait_diffusion.toy_models import tiny_backbone

        backbone = tiny_backbone("sdxl")
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            getattr(backbone, part).to(torch.bfloat16)
        plain = gdf(tiny("sdxl"), images)
        half = gdf(backbone, images)  # its VAE is of those that need float32, and gets it
        for name, value in plain.items():
            assert float((half[name].float() - value).norm() / value.norm()) < 5e-2

    def test_values_that_do_not_fit_are_told(self):
        assert stored("x", torch.tensor([1.0]), torch.float16).dtype == torch.float16
        with pytest.raises(FloatingPointError, match=r"'x' reaches 7e\+04.*bfloat16"):
            stored("x", torch.tensor([7e4]), torch.float16)
        with pytest.raises(FloatingPointError, match="NaN or infinity"):
            stored("x", torch.tensor([float("nan")]), None)

    def test_aggregation(self):
        features = {"a": torch.zeros(2, 3, 4, 4), "b": torch.ones(2, 5, 8, 8)}
        assert aggregate(features).shape == (2, 8, 8, 8)
        assert aggregate(features, 16, "bilinear").shape == (2, 8, 16, 16)


class TestRefusals:
    def test_all_before_the_first_pass(self, tiny):
        backbone = tiny("sd15")
        with pytest.raises(KeyError, match="the nearest are up-level1-repeat1-vit-block0-cross-q"):
            Extraction(layers=("up-level1-repeat1-vit-block0-cros-q",)).check(backbone)
        with pytest.raises(ValueError, match="no activation is named"):
            Extraction(layers=()).check(backbone)
        with pytest.raises(ValueError, match="timestep is 0"):
            Extraction(layers=("unet-in",), timestep=0).check(backbone)
        with pytest.raises(ValueError, match="timestep is 1000"):
            Extraction(layers=("unet-in",), timestep=1000).check(backbone)
        with pytest.raises(ValueError, match="multiples of 64"):
            Extraction(layers=("unet-in",), image_size=100).check(backbone)
        with pytest.raises(RuntimeError, match="never produces"):
            Extraction(layers=("up_blocks.1.attentions",)).check(backbone)
        with pytest.raises(ValueError, match="feature_resize is 0"):
            Extraction(layers=("unet-in",), feature_resize=0).check(backbone)
        with pytest.raises(ValueError, match="no such maps"):
            Extraction(layers=("unet-in",), attention_maps=("up_cross",)).check(tiny("ddpm"))

    def test_maps_above_the_limit(self, tiny):
        layers = ("down-level0-repeat0-vit-block0-self-map",)  # 2 heads · 64² · 4 bytes
        assert Extraction(layers=layers, map_limit=2 * 64**2 * 4).check(tiny("sd15"))
        with pytest.raises(MemoryError, match="the limit is"):
            Extraction(layers=layers, map_limit=2 * 64**2 * 4).check(tiny("sd15"), batch_size=2)

    def test_images_of_another_range(self, tiny, images):
        for wrong, match in (
            (images * 255, r"\[0, 1\] is needed"),
            ((images * 255).byte(), "divide 8-bit levels by 255"),
            (images[:, :1], "shape"),
        ):
            with pytest.raises(ValueError, match=match):
                tiny("sd15").moments(wrong)


class TestAttentionFeature:
    def test_sizes_and_channels(self, tiny, images):
        extraction = Extraction(
            layers=PRESETS["sd15_amalgam"], attention_maps=("up_cross",), attn_sides=(2, 4), image_size=64
        )
        found = gdf(tiny("sd15"), images, extraction=extraction)
        assert list(found)[-1] == "attn"
        assert found["attn"].shape == (3, 2 * 77, 8, 8)
        # Every pixel's probabilities sum to one, size by size.
        assert torch.allclose(found["attn"].unflatten(1, (2, 77)).sum(2), torch.ones(3, 2, 8, 8), atol=1e-5)

    def test_by_hand(self):
        coarse = torch.arange(4.0).view(1, 4, 1)
        fine = torch.arange(16.0).view(1, 16, 1)
        found = attention_feature([coarse, fine, fine + 2], (4, 4), (2, 4), 4)
        assert torch.equal(found[0, 0], torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]))
        assert torch.equal(found[0, 1], torch.arange(16.0).view(4, 4) + 1)
        with pytest.raises(ValueError, match="no attention map has a side between 8 and 16"):
            attention_feature([coarse], (4, 4), (8, 16), 4)

    @given(height=st.integers(1, 6), width=st.integers(1, 6))
    @settings(max_examples=20, deadline=None)
    def test_grids_need_not_be_square(self, height, width):
        tokens = torch.arange(height * width, dtype=torch.float32).view(1, -1, 1)
        found = attention_feature([tokens], (height, width), (1, 6), max(height, width))
        expected = tokens.view(1, 1, height, width)
        side = max(height, width)
        assert torch.equal(found, torch.nn.functional.interpolate(expected, (side, side), mode="nearest"))


class TestProperties:
    def test_of_made_up_features(self):
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(64, 2, 4, 4, generator=draw)
        flat = torch.randn(64, 2, 1, 1, generator=draw).expand(-1, -1, 4, 4) + 0
        place = torch.randn(1, 2, 4, 4, generator=draw).expand(64, -1, -1, -1) + 0
        coarse = torch.nn.functional.interpolate(
            torch.randn(64, 2, 2, 2, generator=draw), scale_factor=2, mode="nearest"
        )

        def features(number):
            noise = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(100 + number))
            every = {
                "image": image,
                "half": image + noise,
                "noise": noise,
                "flat": flat,
                "place": place,
                "coarse": coarse,
            }
            for start in (0, 32):
                yield {name: value[start : start + 32] for name, value in every.items()}

        found = {one.name: one for one in noise_report(features, draws=4)}
        assert found["image"].noise == 0
        assert found["half"].noise == pytest.approx(0.5, abs=0.05)
        assert found["noise"].noise == pytest.approx(1, abs=0.05)
        assert found["place"].locality == pytest.approx(1, abs=1e-9)
        assert found["image"].locality < 0.1
        assert found["coarse"].coarse == pytest.approx(1, abs=1e-9)
        assert found["image"].coarse == pytest.approx(0.2, abs=0.05)  # 3 of 15 degrees of freedom
        assert (found["image"].channels, found["image"].side) == (2, 4)

    def test_one_draw_is_not_enough(self):
        with pytest.raises(ValueError, match="draws is 1"):
            noise_report(lambda draw: [], draws=1)


class TestRanking:
    def test_within_each_resolution_best_first(self):
        scores = {"a": 0.2, "b": 0.5, "c": 0.9, "d": 0.1}
        ranking = rank_activations(
            {"c": (8, 10), "a": (4, 20), "b": (4, 20), "d": (8, 10)}, {"simple": scores.__getitem__}
        )
        assert [one.name for one in ranking] == ["b", "a", "c", "d"]
        assert choose(ranking) == ("b", "c")

    def test_one_for_each_data_set(self):
        ranking = [
            Ranked("a", 4, 20, {"simple": 0.9, "complex": 0.1}),
            Ranked("b", 4, 20, {"simple": 0.2, "complex": 0.6}),
            Ranked("c", 8, 10, {"simple": 0.5, "complex": 0.5}),
        ]
        assert choose(ranking) == ("a", "b", "c")
        assert choose(ranking, max_channels=30) == ("a", "c")

    def test_nothing_to_rank(self):
        with pytest.raises(ValueError, match="nothing to rank"):
            rank_activations({}, {"one": lambda name: 0.0})


def test_no_gradient_and_no_hook_is_left(tiny, images):
    backbone = tiny("sd15")
    gdf(backbone, images)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
