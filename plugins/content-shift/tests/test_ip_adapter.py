"""IP-Adapters on tiny models, in the format of the published files: equal to diffusers, gone after the context, refused."""

from __future__ import annotations

import copy
import functools

import attrs
import pytest
import torch
from PIL import Image
from plait import Run
from plait.configuration import configure
from plait.methods import find
from plait_content_shift.content_shift import extract, img2img
from plait_content_shift.examples import digits
from plait_content_shift.ip_adapter import IpAdapter, read_image_encoder, read_ip_adapter
from plait_content_shift.lora import LowRank
from plait_content_shift.plugin import ContentShift
from plait_content_shift.techniques import Bucket, Control, Lora
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

pytestmark = pytest.mark.slow

WIDTH, PROJECTED, SIDE = 8, 12, 16  # of the image encoder


def extractor(*layers: str, **fields):
    return configure(find("extract_feature", "gdf"), {"layers": list(layers) or ["up-level*"], **fields})


@functools.cache
def tensors_of(kind, tiny_kind, tiny):
    """An IP-Adapter for a tiny model as it lies in a file; random, so that it changes something."""
    generator = torch.Generator().manual_seed(0)
    unet = tiny(tiny_kind).denoiser
    condition = unet.config.cross_attention_dim

    def normal(*shape, spread=0.3):
        return spread * torch.randn(shape, generator=generator)

    found = {}
    places = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(places):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for which in "kv":
            found[f"ip_adapter.{2 * number + 1}.to_{which}_ip.weight"] = normal(channels, condition)
    if kind == "plain":
        projection = {
            "proj.weight": normal(4 * condition, PROJECTED), "proj.bias": normal(4 * condition),
            "norm.weight": 1 + normal(condition), "norm.bias": normal(condition),
        }  # fmt: skip
    elif kind == "full":
        projection = {
            "proj.0.weight": normal(WIDTH, WIDTH), "proj.0.bias": normal(WIDTH),
            "proj.2.weight": normal(condition, WIDTH), "proj.2.bias": normal(condition),
            "proj.3.weight": 1 + normal(condition), "proj.3.bias": normal(condition),
        }  # fmt: skip
    else:
        hidden = 64  # one head of 64
        projection = {
            "latents": normal(1, 3, hidden),
            "proj_in.weight": normal(hidden, WIDTH), "proj_in.bias": normal(hidden),
            "proj_out.weight": normal(condition, hidden), "proj_out.bias": normal(condition),
            "norm_out.weight": 1 + normal(condition), "norm_out.bias": normal(condition),
        }  # fmt: skip
        for layer in range(4):
            start = f"layers.{layer}"
            for norm in ("0.norm1", "0.norm2", "1.0"):
                projection |= {f"{start}.{norm}.weight": 1 + normal(hidden), f"{start}.{norm}.bias": normal(hidden)}
            projection |= {
                f"{start}.0.to_q.weight": normal(64, hidden), f"{start}.0.to_kv.weight": normal(128, hidden),
                f"{start}.0.to_out.weight": normal(hidden, 64),
                f"{start}.1.1.weight": normal(4 * hidden, hidden), f"{start}.1.3.weight": normal(hidden, 4 * hidden),
            }  # fmt: skip
    return found | {f"image_proj.{name}": value for name, value in projection.items()}


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """As on the hub: files, and their image encoder beside them."""
    folder = tmp_path_factory.mktemp("ip-adapters")
    for kind, model in (("plain", "sd15"), ("plus", "sd15"), ("full", "sd15"), ("plain", "sdxl")):
        save_file(tensors_of(kind, model, tiny), folder / f"{kind}_{model}.safetensors")
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=8, projection_dim=PROJECTED, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    Image.effect_mandelbrot((40, 24), (-3, -2.5, 2, 2.5), 50).convert("RGB").save(folder / "prompt.png")
    return folder


@pytest.fixture(scope="session")
def adapter(folder, tiny):
    """(file, options) → an IP-Adapter."""

    def made(name="plain_sd15", **options):
        encoder = read_image_encoder(folder / "image_encoder", tiny("sd15"))
        return IpAdapter(read_ip_adapter(folder / f"{name}.safetensors"), encoder, **options)

    return made


@pytest.fixture(scope="module")
def images():
    levels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return levels / 255  # of 8 bits, so that both sides see the same


def call_of(backbone, images, **options):
    return extractor().prepare(
        backbone, images, rows=range(len(images)), seed=0, prompts=["a horse"] * len(images), timestep=50, **options
    )


def features(backbone, images, bucket, layers=("unet-in", "*-out"), **options):
    options = {"rows": range(len(images)), "seeds": [0], "timestep": 50, **options}
    (found,) = extract(extractor(*layers), backbone, images, bucket, **options)
    return found


def state_of(backbone):
    """All that an IP-Adapter changes in a U-Net that is its own."""
    unet = backbone.denoiser
    return {
        "fingerprint": backbone.fingerprint(),
        "modules": list(dict(unet.named_modules())),
        "processors": dict(unet.attn_processors),  # compared by identity
        "projection": unet.encoder_hid_proj,
        "config": dict(unet.config),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()),
    }


def picture(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def by_diffusers(backbone, folder, name, call, scale, pictures):
    """A pass of a copy of the pipeline with its own IP-Adapter."""
    pipeline = backbone.with_components(unet=copy.deepcopy(backbone.denoiser)).pipeline()
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name=f"{name}.safetensors", local_files_only=True)
    pipeline.set_ip_adapter_scale(scale)
    seen = [pipeline.prepare_ip_adapter_image_embeds([one], None, "cpu", 1, False)[0] for one in pictures]
    batch = len(call.sample)
    added = {key: value.expand(batch, -1) for key, value in call.condition.get("added_cond_kwargs", {}).items()}
    with torch.no_grad():
        return pipeline.unet(
            call.sample,
            int(call.timestep),
            encoder_hidden_states=call.condition["encoder_hidden_states"].expand(batch, -1, -1),
            added_cond_kwargs={**added, "image_embeds": [torch.cat(seen)]},
        ).sample


def steered(backbone, bucket, call):
    with torch.no_grad(), bucket.weights(backbone) as model:
        one = bucket(model, call, 50)
        return model.denoise(one.sample, one.timestep, one.condition)


@pytest.mark.parametrize("name", ["plain_sd15", "plus_sd15", "full_sd15", "plain_sdxl"])
def test_an_ip_adapter_gives_what_the_pipeline_of_diffusers_computes(tiny, adapter, folder, images, name):
    backbone = tiny(name.rpartition("_")[2])
    call, before = call_of(backbone, images), state_of(backbone)
    bucket = Bucket(ip_adapters=(adapter(name, scale=0.7),))
    bucket.check(backbone, 50)
    found = steered(backbone, bucket, call)
    expected = by_diffusers(backbone, folder, name, call, 0.7, [picture(image) for image in images])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, backbone.denoise(call.sample, call.timestep, call.condition), atol=1e-3)
    assert state_of(backbone) == before
    with bucket.weights(backbone) as model:
        own = dict(model.denoiser.named_parameters())
    assert all(own[name] is value for name, value in backbone.denoiser.named_parameters()), "no weight is copied"


def test_one_image_as_the_prompt_for_all(tiny, adapter, folder, images):
    backbone = tiny("sd15")
    call, pixels = call_of(backbone, images), Image.open(folder / "prompt.png")
    run = Run(folder=folder, on_warning=lambda message: None)
    method = ContentShift(
        extractor=extractor(), ip_adapter=folder / "plain_sd15.safetensors", image_prompt=folder / "prompt.png"
    )
    found = steered(backbone, method.bucket(backbone, run), call)
    expected = by_diffusers(backbone, folder, "plain_sd15", call, 1.0, [pixels] * 2)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, steered(backbone, Bucket(ip_adapters=(adapter(),)), call), atol=1e-3)


def test_scale_0_changes_no_bit_and_features_have_the_same_names(tiny, adapter, images):
    backbone = tiny("sd15")
    plain = features(backbone, images, Bucket())
    none = features(backbone, images, Bucket(ip_adapters=(adapter(scale=0.0),)))
    assert list(none) == list(plain)
    assert all(torch.equal(none[name], plain[name]) for name in plain)
    prompted = features(backbone, images, Bucket(ip_adapters=(adapter(),)))
    assert list(prompted) == list(plain)
    assert not torch.allclose(prompted["unet-out"], plain["unet-out"], atol=1e-3)


def test_several_add_up_and_stand_beside_controlnet_and_lora(tiny, adapter, controlnet, images):
    backbone = tiny("sd15")
    before = state_of(backbone)
    twice = features(backbone, images, Bucket(ip_adapters=(adapter(), adapter())))
    double = features(backbone, images, Bucket(ip_adapters=(adapter(scale=2.0),)))
    assert all(torch.allclose(twice[name], double[name], atol=1e-4) for name in twice)

    parts = {
        name: LowRank(torch.randn(2, module.in_features), torch.randn(module.out_features, 2), 1.0)
        for name, module in backbone.denoiser.named_modules()
        if name.endswith("attn2.to_q")
    }
    lora, control = Lora({"unet": parts}), Control(controlnet("sd15", 0.5))
    alone = features(backbone, images, Bucket(controls=(control,), loras=(lora,)))
    none = features(backbone, images, Bucket(controls=(control,), loras=(lora,), ip_adapters=(adapter(scale=0.0),)))
    assert all(torch.equal(none[name], alone[name]) for name in alone)
    assert state_of(backbone) == before


def test_it_looks_once_and_the_unconditional_pass_sees_no_image(tiny, adapter, images):
    backbone = tiny("sd15")
    one, given = adapter(), []
    bucket = Bucket(ip_adapters=(one,), denoise_from=53, guidance=2.0)
    looks = []
    handle = one.encoder.register_forward_hook(lambda module, args, output: looks.append(len(args[0])))
    with bucket.weights(backbone) as model:
        watch = model.denoiser.register_forward_pre_hook(
            lambda m, args, kwargs: given.append(kwargs["added_cond_kwargs"]["image_embeds"][0].abs().sum() > 0),
            with_kwargs=True,
        )
    try:
        features(backbone, images, bucket)
    finally:
        handle.remove()
        watch.remove()
    assert looks == [2]
    assert [bool(is_seen) for is_seen in given] == [True, False] * (len(given) // 2) + [True]
    assert len(given) > 3


def test_after_an_exception_the_base_is_as_it_was(tiny, adapter, images):
    backbone = tiny("sd15")
    before = state_of(backbone)

    def fail(call):
        raise RuntimeError("no idea today")

    with pytest.raises(RuntimeError, match="no idea"):
        features(backbone, images, Bucket(ip_adapters=(adapter(),), functions=(fail,)))
    broken = attrs.evolve(adapter(), weights={"image_proj": {}, "ip_adapter": {}})
    with pytest.raises(KeyError):
        features(backbone, images, Bucket(ip_adapters=(broken,)))
    assert state_of(backbone) == before


def test_img2img_is_drawn_with_it(tiny, adapter, images):
    backbone = tiny("sd15")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, prompted = (
        img2img(backbone, images, bucket, noise, start=400, num_steps=2)
        for bucket in (Bucket(), Bucket(ip_adapters=(adapter(),)))
    )
    assert not torch.allclose(plain, prompted, atol=1e-3)


# --- what does not fit


def test_models_that_take_none_and_other_shapes_are_refused(tiny, adapter, folder):
    for kind, said in (("flux", "FluxTransformer2DModel"), ("ddpm", "UNet2DModel"), ("sd3", "SD3Transformer2DModel")):
        with pytest.raises(ValueError, match=f"for a {said}.*: IP-Adapter is taken for pipelines of SD 1.x and SDXL"):
            Bucket(ip_adapters=(adapter(),)).check(tiny(kind), 50)
    with pytest.raises(ValueError, match=r"lacks ip_adapter.33.to_k_ip.weight, with 32 tensors for the model's"):
        Bucket(ip_adapters=(adapter(),)).check(tiny("sdxl"), 50)
    weights = adapter().weights
    wide = {**weights, "ip_adapter": {**weights["ip_adapter"], "1.to_k_ip.weight": torch.zeros(8, 5)}}
    with pytest.raises(
        ValueError, match=r"ip_adapter.1.to_k_ip.weight of .* is \[8, 5\], and the model needs \[8, 16\]"
    ):
        attrs.evolve(adapter(), weights=wide).check(tiny("sd15"))
    other = {**weights, "image_proj": {**weights["image_proj"], "proj.weight": torch.zeros(64, 7)}}
    with pytest.raises(ValueError, match="takes 7 numbers of an image and its image encoder gives 12"):
        attrs.evolve(adapter(), weights=other).check(tiny("sd15"))
    short = {**weights, "image_proj": {**weights["image_proj"], "norm.weight": torch.zeros(5)}}
    with pytest.raises(ValueError, match="gives tokens of 5 numbers, and the model takes 16"):
        attrs.evolve(adapter(), weights=short).check(tiny("sd15"))


def test_files_that_are_no_ip_adapters_are_refused(folder, tiny, tmp_path):
    def refused(tensors, match):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=match):
            read_ip_adapter(tmp_path / "x.safetensors")

    tensors = load_file(folder / "plain_sd15.safetensors")
    refused({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is no IP-Adapter.*: lora_unet_x")
    refused({**tensors, "more.weight": torch.zeros(1)}, "is no IP-Adapter.*: more.weight")
    refused({n: v for n, v in tensors.items() if n.startswith("image")}, "it has no ip_adapter")
    refused({**tensors, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(1)}, "is an IP-Adapter of faces")
    unknown = {n: v for n, v in tensors.items() if n.startswith("ip_adapter")} | {"image_proj.mystery": torch.zeros(1)}
    refused(unknown, "projects images by mystery, which is not known")
    torch.save({"image_proj": {"proj.weight": torch.zeros(1)}, "ip_adapter": {}}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin"):
        read_ip_adapter(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="which cannot be read as CLIP's vision model"):
        read_image_encoder(tmp_path / "none", tiny("sd15"))
    bare = read_image_encoder(folder / "image_encoder", tiny("sd15"))
    bare.save_pretrained(
        tmp_path / "bare",
        state_dict={n: v for n, v in bare.state_dict().items() if not n.startswith("visual_projection")},
    )
    with pytest.raises(ValueError, match=r"which lacks visual_projection\.weight"):
        read_image_encoder(tmp_path / "bare", tiny("sd15"))
    tiny("sd15").text_encoders["text_encoder"].save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="a model of kind clip_text_model; give CLIP's vision model with projection"):
        read_image_encoder(tmp_path / "text", tiny("sd15"))


def test_the_step_says_what_it_was_shown(folder, tiny, tmp_path):
    backbone, data = tiny("sd15"), digits(2)
    run = Run(folder=tmp_path, step="x", on_warning=lambda message: None)
    method = ContentShift(
        extractor=extractor("up-level0-upsampler-out", attention_maps=["up_cross"], attn_min_side=1, attn_max_side=64),
        ip_adapter=folder / "plain_sd15.safetensors",
        ip_adapter_scale=0.5,
        dtype="float32",
    )
    assert method.label == "ip_adapter"
    found = method.extract_feature(backbone, data, run)
    assert {"up-level0-upsampler-out", "attn"} <= set(found.names)
    techniques = found.origins[0].more["techniques"]
    assert techniques["ip_adapter"] == "plain_sd15.safetensors"
    assert (techniques["ip_adapter_scale"], techniques["image_prompt"]) == (0.5, None)
    with pytest.raises(ValueError, match="image_prompt is for an IP-Adapter, and none is given"):
        ContentShift(extractor=extractor(), image_prompt=folder / "prompt.png")
    (tmp_path / "wrong.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"wrong\.png"):
        attrs.evolve(method, image_prompt=tmp_path / "wrong.png").bucket(backbone, run)
