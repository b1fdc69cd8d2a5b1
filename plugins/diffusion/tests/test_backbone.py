"""One object for every model: saving, loading, storing without copies, prompts, latents."""

import copy
import json
import os
import shutil

import diffusers
import plait
import pytest
import torch
from plait import codecs
from plait.errors import PlaitError
from plait_diffusion import Backbone, load_backbone, small_backbone
from plait_diffusion.toy_models import tiny_backbone

KINDS = ("sd15", "sdxl", "sd3", "pixart", "flux", "ddpm", "dit")


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny):
    """A tiny Stable Diffusion 1.5 in diffusers' own layout, as a user has it."""
    folder = tmp_path_factory.mktemp("models") / "sd15"
    tiny("sd15").pipeline().save_pretrained(folder)
    return folder


def stored(backbone, folder):
    codecs.save(backbone, folder)
    for file in folder.rglob("*"):  # as the store does
        if file.is_file():
            file.chmod(0o444)
    return folder


def plain(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def weights(folder):
    return sorted(folder.rglob("*.safetensors"))


class TestFolders:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_and_loaded(self, tiny, tmp_path, kind):
        backbone = tiny(kind)
        backbone.save_pretrained(tmp_path)
        again = Backbone.from_pretrained(tmp_path)
        assert again.fingerprint() == backbone.fingerprint()
        assert plain(again.scheduler.config) == plain(backbone.scheduler.config)
        assert type(again.scheduler) is type(backbone.scheduler)
        assert not any(module.training for module in again.modules())
        assert not any(parameter.requires_grad for parameter in again.parameters())

    @pytest.mark.parametrize("kind", ["sd15", "pixart"])
    def test_diffusers_opens_what_is_stored(self, tiny, tmp_path, kind):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(stored(tiny(kind), tmp_path / "a") / "content")
        assert type(pipeline).__name__ == tiny(kind).pipeline_name
        state = getattr(pipeline, tiny(kind).denoiser_name).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in tiny(kind).denoiser.state_dict().items())

    @pytest.mark.slow
    def test_a_folder_of_diffusers(self, source, tiny):
        backbone = load_backbone(str(source))
        assert backbone.fingerprint() == tiny("sd15").fingerprint()
        assert backbone.name == "sd15"

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_bare_denoisers(self, tiny, tmp_path, kind):
        tiny(kind).denoiser.save_pretrained(tmp_path)
        backbone = load_backbone(str(tmp_path))
        assert type(backbone.denoiser) is type(tiny(kind).denoiser)
        flow = kind in ("sd3", "flux")
        assert type(backbone.scheduler).__name__ == ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler")
        side = backbone.size_multiple * 2
        channels = backbone.denoiser.config.in_channels // (4 if kind == "flux" else 1)
        with torch.no_grad():
            out = backbone.denoise(torch.zeros(2, channels, side, side), 50.0, backbone.condition([""], side))
        assert torch.isfinite(out).all()
        if kind not in ("ddpm", "dit"):  # models without text
            with pytest.raises(ValueError, match="no text encoder"):
                backbone.condition(["a cat"], side)

    def test_the_scheduler_beside_a_bare_denoiser(self, tiny, tmp_path):
        tiny("ddpm").denoiser.save_pretrained(tmp_path / "unet")
        tiny("ddpm").scheduler.save_pretrained(tmp_path / "scheduler")
        tiny("sd15").scheduler.save_pretrained(tmp_path / "other")
        assert type(load_backbone(str(tmp_path)).scheduler).__name__ == "DDPMScheduler"
        given = load_backbone(str(tmp_path), scheduler=str(tmp_path / "other"))
        assert type(given.scheduler).__name__ == "PNDMScheduler"
        with pytest.raises(ValueError, match=r"without scheduler_config\.json"):
            load_backbone(str(tmp_path), scheduler=str(tmp_path / "unet"))

    @pytest.mark.slow
    def test_dtypes_survive(self, source, tmp_path):
        half = load_backbone(str(source), dtype=torch.float16)
        assert half.dtype == torch.float16
        half.scheduler.register_to_config(steps_offset=0)
        codecs.save(half, tmp_path / "a")
        again = codecs.load(tmp_path / "a")
        assert {value.dtype for value in again.parameters()} == {torch.float16}
        assert again.scheduler.config.steps_offset == 0
        assert again.fingerprint() == half.fingerprint()
        half.save_pretrained(tmp_path / "b")
        assert load_backbone(str(tmp_path / "b")).dtype == torch.float16
        assert load_backbone(str(tmp_path / "b"), dtype=torch.float32).dtype == torch.float32

    @pytest.mark.slow
    def test_the_dtype_of_the_files_is_kept(self, source, tmp_path):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            source, torch_dtype=torch.float16, safety_checker=None
        )
        pipeline.save_pretrained(tmp_path / "half")
        pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
        assert load_backbone(str(tmp_path / "half")).dtype == torch.float16
        assert load_backbone(str(tmp_path / "variant"), variant="fp16").dtype == torch.float16

    def test_what_is_no_model(self, tmp_path):
        with pytest.raises(ValueError, match="neither a folder nor owner/name"):
            load_backbone(str(tmp_path / "nothing"))
        with pytest.raises(ValueError, match=r"neither model_index\.json nor config\.json"):
            load_backbone(str(tmp_path))
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        with pytest.raises(ValueError, match="holds a AutoencoderKL; known denoisers are UNet2DConditionModel"):
            load_backbone(str(tmp_path))
        (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
        with pytest.raises(ValueError, match="which diffusers does not have"):
            load_backbone(str(tmp_path))

    def test_the_hub_without_a_network(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="plait/no-such-model cannot be fetched from the hub"):
            load_backbone("plait/no-such-model")

    def test_a_damaged_file(self, source, tmp_path):
        shutil.copytree(source, tmp_path / "cut")
        file = tmp_path / "cut/unet/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(ValueError, match="diffusers cannot load"):
            load_backbone(str(tmp_path / "cut"))


class TestStoring:
    @pytest.mark.slow
    def test_a_pipeline_that_moved_with_its_model_reads_it_where_it_is_now(self, source, tmp_path):
        """The key of a path below the pipeline does not name where it lies, and a reference does."""
        shutil.copytree(source, tmp_path / "before" / "sd15")
        text = "plait: 1\nsteps: {model: {load-model: diffusion, with: {source: ./sd15}}}\n"
        (tmp_path / "before" / "p.yaml").write_text(text)
        runs = {"store": tmp_path / "store", "out": tmp_path / "runs"}
        first = plait.run(tmp_path / "before" / "p.yaml", **runs).output("model").fingerprint()
        (tmp_path / "before").rename(tmp_path / "after")
        assert plait.run(tmp_path / "after" / "p.yaml", **runs).output("model").fingerprint() == first

    @pytest.mark.slow
    def test_unchanged_weights_of_the_user_are_referred_to(self, source, tmp_path):
        backbone = load_backbone(str(source))
        folder = stored(backbone, tmp_path / "a")
        assert weights(folder) == []
        again = codecs.load(folder)
        assert again.fingerprint() == backbone.fingerprint()
        about = json.loads((folder / "content/plait.json").read_text())
        assert about["components"]["unet"]["weights"]["folder"] == str(source / "unet")
        assert all(os.access(file, os.W_OK) for file in weights(source))
        # … and by the next step too
        assert weights(stored(again, tmp_path / "b")) == []
        assert codecs.load(tmp_path / "b").fingerprint() == backbone.fingerprint()

    def test_unchanged_weights_of_a_result_are_linked(self, tmp_path):
        first = stored(small_backbone(["a", "b"], 0), tmp_path / "a")
        again = codecs.load(first)
        second = stored(again, tmp_path / "b")
        for one, other in zip(weights(first), weights(second), strict=True):
            assert os.path.samefile(one, other)
        for file in first.rglob("*"):
            file.chmod(0o755)
        shutil.rmtree(first)
        assert codecs.load(second).fingerprint() == again.fingerprint()

    @pytest.mark.slow
    def test_shards(self, source, tmp_path):
        shutil.copytree(source, tmp_path / "source")
        shutil.rmtree(tmp_path / "source/unet")
        whole = load_backbone(str(source))
        whole.denoiser.save_pretrained(tmp_path / "source/unet", max_shard_size="300KB")
        backbone = load_backbone(str(tmp_path / "source"))
        assert len(backbone.weight_files["unet"].files) > 1
        folder = stored(backbone, tmp_path / "a")
        assert weights(folder) == []
        assert codecs.load(folder).fingerprint() == whole.fingerprint()

    @pytest.mark.slow
    def test_what_changed_is_written_and_the_rest_is_not(self, source, tmp_path):
        backbone = load_backbone(str(source))
        unet = copy.deepcopy(backbone.denoiser)
        with torch.no_grad():
            next(unet.parameters()).add_(1)
        folder = stored(backbone.with_components(unet=unet), tmp_path / "a")
        assert [file.parent.name for file in weights(folder)] == ["unet"]
        assert torch.equal(next(codecs.load(folder).denoiser.parameters()), next(unet.parameters()))

    @pytest.mark.slow
    def test_a_change_in_place_is_seen(self, source, tmp_path):
        backbone = load_backbone(str(source))
        with torch.no_grad():
            next(backbone.encoder.parameters()).mul_(2)
        folder = stored(backbone, tmp_path / "a")
        assert [file.parent.name for file in weights(folder)] == ["vae"]
        assert codecs.load(folder).fingerprint() == backbone.fingerprint()

    @pytest.mark.slow
    def test_a_changed_configuration_is_kept(self, source, tmp_path):
        backbone = load_backbone(str(source))
        backbone.encoder.register_to_config(scaling_factor=0.5)
        folder = stored(backbone, tmp_path / "a")
        assert codecs.load(folder).encoder.config.scaling_factor == 0.5
        assert [file.parent.name for file in weights(folder)] == ["vae"]

    def test_what_a_configuration_does_not_say_is_refused(self, source, tmp_path):
        backbone = load_backbone(str(source))
        backbone.denoiser.fuse_qkv_projections()
        with pytest.raises(PlaitError, match="unet cannot be stored"):
            codecs.save(backbone, tmp_path / "a")

    @pytest.mark.slow
    def test_files_that_changed_or_went_away_are_told(self, source, tmp_path):
        copied = tmp_path / "copy"
        shutil.copytree(source, copied)
        folder = stored(load_backbone(str(copied)), tmp_path / "a")
        unet = copied / "unet/diffusion_pytorch_model.safetensors"
        kept = unet.read_bytes()
        unet.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(PlaitError, match=r"weights of unet .* was changed since"):
            codecs.load(folder)
        unet.unlink()
        with pytest.raises(PlaitError, match=r"weights of unet .* is gone"):
            codecs.load(folder)
        unet.write_bytes(kept)
        assert codecs.load(folder).fingerprint() == load_backbone(str(copied)).fingerprint()


class TestParts:
    def test_a_backbone_needs_denoiser_and_scheduler(self, tiny):
        with pytest.raises(ValueError, match="a unet or a transformer"):
            Backbone({"scheduler": tiny("sd15").scheduler})
        with pytest.raises(ValueError, match="the denoiser is a Linear"):
            Backbone({"unet": torch.nn.Linear(1, 1), "scheduler": tiny("sd15").scheduler})
        with pytest.raises(ValueError, match="takes 4 channels and the VAE gives 16; models for inpainting"):
            tiny("sd15").with_components(vae=tiny("sd3").encoder)

    @pytest.mark.parametrize(("kind", "factor", "shift"), [("sd15", 0.18215, 0.0), ("sd3", 1.5305, 0.0609)])
    def test_latents_are_shifted_and_scaled(self, tiny, kind, factor, shift):
        backbone = tiny(kind)
        images = torch.rand(2, 3, 64, 64)
        moments = backbone.moments(images)
        with torch.no_grad():
            mean = backbone.encoder.encode(images * 2 - 1).latent_dist.mean
        assert torch.allclose(backbone.latents(moments), (mean - shift) * factor, atol=1e-6)
        draws = [backbone.latents(moments, [torch.Generator().manual_seed(seed) for seed in (3, 4)]) for _ in range(2)]
        assert torch.equal(*draws)
        assert not torch.equal(draws[0], backbone.latents(moments))

    def test_decoding_goes_back(self, tiny):
        backbone = small_backbone(["a"], 0)
        grey = torch.rand(2, 1, 16, 16).expand(-1, 3, -1, -1)
        assert torch.allclose(backbone.decode(backbone.latents(backbone.moments(grey))), grey, atol=1e-6)
        decoded = tiny("sd15").decode(torch.zeros(1, 4, 8, 8))
        assert decoded.shape == (1, 3, 64, 64)

    def test_latents_with_statistics_for_every_channel(self):
        backbone = tiny_backbone("sd15")
        backbone.encoder.register_to_config(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 1.0, 2.0])
        raw = torch.ones(1, 4, 2, 2)
        from plait_diffusion.vae import scaled

        expected = (raw[0, :, 0, 0] - torch.arange(4.0)) * 0.18215 / torch.tensor([1.0, 2, 1, 2])
        assert torch.allclose(scaled(backbone.encoder, raw)[0, :, 0, 0], expected)

    def test_prompts_are_encoded_as_the_pipeline_does(self, tiny):
        pipeline = tiny("sdxl").pipeline()
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                "a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        condition = tiny("sdxl").condition(["a cat", "a cat"], 64)
        assert torch.equal(condition["encoder_hidden_states"], embeds)
        assert torch.equal(condition["added_cond_kwargs"]["text_embeds"], pooled)
        assert condition["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]

    def test_each_prompt_is_encoded_once(self):
        backbone = tiny_backbone("sd15")
        calls = []
        backbone.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            backbone.condition(["a cat", "a dog", "a cat"], 64)
        assert len(calls) == 2

    def test_prompts_of_the_small_model_are_classes(self):
        backbone = small_backbone(["cat", "dog"], 0)
        table = backbone.class_tokens.table
        assert torch.equal(backbone.condition(["dog", ""], 16)["encoder_hidden_states"][:, 0], table[1:])
        with pytest.raises(ValueError, match="knows the classes cat, dog"):
            backbone.condition(["horse"], 16)

    def test_sizes(self, tiny):
        assert (tiny("sd15").size_multiple, tiny("sdxl").size_multiple, tiny("flux").size_multiple) == (64, 32, 16)
        assert (tiny("sd15").default_size, tiny("ddpm").default_size) == (64, 32)
        with pytest.raises(ValueError, match="image_size is 72; the model takes multiples of 16"):
            tiny("flux").check_size(72)

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        small_backbone(["a"], 0)
        tiny_backbone("ddpm")
        assert torch.equal(before, torch.get_rng_state())
