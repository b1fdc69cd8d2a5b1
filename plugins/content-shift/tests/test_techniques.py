"""Techniques on tiny models in diffusers' own format: what changes, what must not, and what is refused."""

from __future__ import annotations

import attrs
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    PNDMScheduler,
    SD3ControlNetModel,
    T2IAdapter,
)
from plait import Run
from plait.configuration import configure
from plait.methods import find
from plait_content_shift.content_shift import content_shift, extract, img2img, stacked
from plait_content_shift.control_images import canny, outlines
from plait_content_shift.examples import digits
from plait_content_shift.lora import LowRank, applied
from plait_content_shift.lora_files import read_lora
from plait_content_shift.plugin import ContentShift
from plait_content_shift.techniques import Adapter, Bucket, Control, Lora
from safetensors.torch import load_file, save_file

SD15 = "sd15"


def extractor(*layers: str, **fields):
    return configure(find("extract_feature", "gdf"), {"layers": list(layers) or ["up-level*"], **fields})


@pytest.fixture(scope="module")
def backbone(tiny):
    return tiny(SD15)


@pytest.fixture(scope="module")
def images(backbone):
    return torch.rand(2, 3, backbone.default_size, backbone.default_size, generator=torch.Generator().manual_seed(0))


def features(backbone, images, bucket=None, layers=("unet-in", "*-out"), seed=0, **options):
    options = {"rows": range(len(images)), "seeds": [seed], "timestep": 50, **options}
    (found,) = extract(extractor(*layers), backbone, images, bucket or Bucket(), **options)
    return found


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- ControlNet


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_fresh_controlnet_and_scale_0_change_no_bit(tiny, controlnet, kind):
    backbone = tiny(kind)
    images = torch.rand(2, 3, backbone.default_size, backbone.default_size)
    plain = features(backbone, images)
    assert same(features(backbone, images, Bucket(controls=(Control(controlnet(kind, 0.0)),))), plain)
    assert same(features(backbone, images, Bucket(controls=(Control(controlnet(kind, 0.5), 0.0),))), plain)
    steered = features(backbone, images, Bucket(controls=(Control(controlnet(kind, 0.5)),)))
    changed = [name for name in plain if name.startswith("up-") and not torch.equal(steered[name], plain[name])]
    assert changed
    assert all(torch.equal(steered[name], plain[name]) for name in plain if name.startswith("down-"))


def test_a_controlnet_of_sd3_adds_to_blocks(tiny):
    backbone = tiny("sd3")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SD3ControlNetModel.from_transformer(
            backbone.denoiser, num_layers=2, num_extra_conditioning_channels=0
        ).eval()
    images = torch.rand(2, 3, backbone.default_size, backbone.default_size)
    layers = ("vit-block*-out",)
    control = Control(model.requires_grad_(False))
    control.check(backbone.denoiser)
    plain = features(backbone, images, layers=layers)
    assert same(features(backbone, images, Bucket(controls=(control,)), layers), plain), "its last layers are zero"
    for block in model.controlnet_blocks:
        block.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    steered = features(backbone, images, Bucket(controls=(control, control)), layers)
    assert not torch.equal(list(steered.values())[-1], list(plain.values())[-1])
    with pytest.raises(ValueError, match="SD3ControlNetModel for a UNet2DConditionModel"):
        control.check(tiny(SD15).denoiser)


def test_controlnets_of_sd3_of_other_depths_add_up_and_deeper_ones_are_refused(tiny):
    backbone = tiny("sd3")
    size = backbone.default_size
    call = extractor("vit-block*-out").prepare(
        backbone, torch.rand(1, 3, size, size), rows=range(1), seed=0, prompts=["a horse"], timestep=50
    )

    def of_depth(num_layers):
        with torch.random.fork_rng():
            torch.manual_seed(num_layers)
            model = SD3ControlNetModel.from_config(
                backbone.denoiser.config, num_layers=num_layers, extra_conditioning_channels=0
            )
            for block in model.controlnet_blocks:
                block.weight.data.normal_(0, 0.5)
        return Control(model.eval().requires_grad_(False))

    def out(*controls, given=None):
        bucket = Bucket(controls=controls)
        bucket.check(backbone, 50)
        steered = bucket(backbone, call, 50)
        condition = {**steered.condition, "block_controlnet_hidden_states": given} if given else steered.condition
        return backbone.denoise(steered.sample, steered.timestep, condition), steered.condition

    one, two, three = map(of_depth, (1, 2, 3))
    _, first = out(one)
    shallow, second = out(two)
    _, both = out(one, two)
    blocks = "block_controlnet_hidden_states"
    for a, b, total in zip(first[blocks], second[blocks], both[blocks], strict=True):
        assert torch.equal(a + b, total)
    # Each block gets what the transformer itself would give it of two.
    assert torch.equal(shallow, out(two, given=[second[blocks][0], second[blocks][-1]])[0])
    assert not torch.equal(shallow, out(three)[0])
    with pytest.raises(ValueError, match="num_layers is 4, more than the denoiser's 3; give one of this very denoiser"):
        Control(of_depth(4).model).check(backbone.denoiser)


def flux_controlnet(denoiser, **changes):
    """With residuals, also of the control image, which a fresh one has none of."""
    own = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    config = {**own, "num_layers": 1, "num_single_layers": 1, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxControlNetModel.from_config(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.startswith("controlnet_"):
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def flux(tiny):
    """The backbone, images and a pass of them."""
    backbone = tiny("flux")
    size = backbone.default_size // 16
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    call = extractor("vit-block*-out", image_size=size).prepare(
        backbone, images, rows=range(2), seed=0, prompts=["a horse", "a red cat"], timestep=50
    )
    return backbone, images, call


FLUX_KINDS = {
    "one block of each": {},
    "none of single stream": {"num_single_layers": 0},
    "as many": {"num_layers": 2, "num_single_layers": 2},
    "without guidance": {"guidance_embeds": False},
    "union": {"num_mode": 3},
    "with an encoder of its own": {"conditioning_embedding_channels": 4, "num_layers": 2, "patch_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLUX_KINDS)
def test_a_controlnet_of_flux_gives_what_the_pipeline_of_diffusers_computes(flux, kind):
    backbone, images, call = flux
    model = flux_controlnet(backbone.denoiser, **FLUX_KINDS[kind])
    mode = 1 if kind == "union" else None
    bucket = Bucket(controls=(Control(model, 0.7, mode=mode),))
    bucket.check(backbone, 50)
    steered = bucket(backbone, call, 50)
    found = backbone.denoise(steered.sample, steered.timestep, steered.condition)

    batch, channels, height, width = call.sample.shape
    vae = backbone.encoder
    shown = canny(images)
    if model.input_hint_block is None:
        latents = (vae.encode(shown * 2 - 1).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        condition = FluxControlNetPipeline._pack_latents(latents, batch, channels, height, width)
    else:
        condition = shown * 2 - 1
    tokens = FluxControlNetPipeline._pack_latents(call.sample, batch, channels, height, width)
    shared = {
        "timestep": torch.full((batch,), float(call.timestep)) / 1000,
        "pooled_projections": call.condition["pooled_projections"],
        "encoder_hidden_states": call.condition["encoder_hidden_states"],
        "txt_ids": torch.zeros(call.condition["encoder_hidden_states"].shape[1], 3),
        "img_ids": FluxControlNetPipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, "cpu", call.sample.dtype
        ),
        "return_dict": False,
    }
    double, single = model(
        hidden_states=tokens,
        controlnet_cond=condition,
        controlnet_mode=None if mode is None else torch.full((batch, 1), mode),
        conditioning_scale=0.7,
        guidance=torch.ones(batch) if model.config.guidance_embeds else None,
        **shared,
    )
    (out,) = backbone.denoiser(
        hidden_states=tokens,
        guidance=torch.ones(batch),
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        controlnet_blocks_repeat=model.input_hint_block is not None,
        **shared,
    )
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    expected = FluxControlNetPipeline._unpack_latents(out, height * scale, width * scale, scale)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, backbone.denoise(call.sample, call.timestep, call.condition), atol=1e-3)


def test_controlnets_of_flux_of_other_depths_add_up(flux):
    backbone, _, call = flux
    short, long = (flux_controlnet(backbone.denoiser, num_layers=n, num_single_layers=n) for n in (1, 2))
    before = backbone.fingerprint()

    def residuals(*models):
        return Bucket(controls=tuple(map(Control, models)))(backbone, call, 50).condition

    one, other, both = residuals(short), residuals(long), residuals(short, long)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        assert len(both[name]) == 2
        for a, b, total in zip(one[name], other[name], both[name], strict=True):
            assert torch.equal(a + b, total)
    assert backbone.fingerprint() == before


def test_a_controlnet_of_flux_that_does_not_fit_is_refused(flux, tiny):
    backbone = flux[0]
    with pytest.raises(ValueError, match="FluxControlNetModel for a SD3Transformer2DModel"):
        Control(flux_controlnet(backbone.denoiser)).check(tiny("sd3").denoiser)
    for wrong, sentence in {
        "joint_attention_dim": "joint_attention_dim is 8 and the denoiser's 16",
        "in_channels": "in_channels is 8 and the denoiser's 16",
        "num_layers": "num_layers is 8, more than the denoiser's 2",
        "num_mode": "the mode is None, and the union ControlNet needs one from 0 to 7",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            Control(flux_controlnet(backbone.denoiser, **{wrong: 8})).check(backbone.denoiser)
    with pytest.raises(ValueError, match="the mode is 1, but the FluxControlNetModel is no union"):
        Control(flux_controlnet(backbone.denoiser), mode=1).check(backbone.denoiser)


def test_a_controlnet_of_flux_from_its_folder(flux, run, tmp_path, controlnet):
    backbone = flux[0]
    flux_controlnet(backbone.denoiser, num_mode=3).save_pretrained(tmp_path / "flux")
    method = ContentShift(extractor=extractor("vit-block*-out"), control=str(tmp_path / "flux"), control_mode=2)
    (control,) = method.bucket(backbone, run).controls
    assert type(control.model) is FluxControlNetModel
    assert control.mode == 2
    controlnet(SD15, 0.5).save_pretrained(tmp_path / "sd15")
    with pytest.raises(ValueError, match="a ControlNetModel; a FluxTransformer2DModel needs a FluxControlNetModel"):
        attrs.evolve(method, control=str(tmp_path / "sd15")).bucket(backbone, run)


def test_residuals_of_several_controlnets_add_up(backbone, images, controlnet):
    one = Control(controlnet(SD15, 0.5))
    twice = features(backbone, images, Bucket(controls=(one, one)))
    double = features(backbone, images, Bucket(controls=(attrs.evolve(one, scale=2.0),)))
    assert all(torch.allclose(twice[name], double[name], atol=1e-4) for name in twice)


def test_the_controlnet_sees_noise_time_and_prompt_of_the_pass(backbone, images, controlnet):
    seen = []
    model = controlnet(SD15, 0.5)
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        features(backbone, images, Bucket(prompt="a horse", controls=(Control(model),)))
    finally:
        handle.remove()
    ((sample, time), arguments) = seen[0]
    call = extractor().prepare(backbone, images, rows=range(2), seed=0, prompts=["a horse"] * 2)
    assert torch.equal(sample, call.sample)
    assert time.tolist() == [51, 51]
    assert torch.equal(arguments["encoder_hidden_states"], call.condition["encoder_hidden_states"].expand(2, -1, -1))
    shown = arguments["controlnet_cond"]
    assert shown.shape == images.shape
    assert {0.0, 1.0} >= set(shown.unique().tolist())
    assert torch.equal(shown[:, :1].expand(-1, 3, -1, -1), shown)


def test_control_images(images):
    square = torch.zeros(1, 3, 32, 32)
    square[..., 8:24, 8:24] = 1
    edges = canny(square)
    assert edges.shape == (1, 3, 32, 32)
    assert edges.sum() > 0
    assert not edges[..., 12:20, 12:20].any()
    assert not canny(torch.full((1, 3, 16, 16), 0.5)).any()
    gradient = outlines(images)
    assert gradient.shape == (2, 1, *images.shape[-2:])
    assert 0 <= float(gradient.min()) <= float(gradient.max()) <= 1


def test_control_that_does_not_fit_is_refused(tiny, backbone, images, controlnet):
    with pytest.raises(
        ValueError,
        match=r"ControlNet's (cross_attention_dim|block_out_channels) is .* give a ControlNet of this very denoiser",
    ):
        Bucket(controls=(Control(controlnet("sdxl", 0.0)),)).check(backbone, 50)
    with pytest.raises(ValueError, match="ControlNetModel is taken for U-Nets"):
        Bucket(controls=(Control(controlnet(SD15, 0.0)),)).check(tiny("flux"), 50)
    small = Control(controlnet(SD15, 0.0), image=lambda pixels: pixels[..., ::2, ::2])
    with pytest.raises(ValueError, match="the control image has shape"):
        features(backbone, images, Bucket(controls=(small,)))
    grey = Control(controlnet(SD15, 0.0), image=outlines)
    with pytest.raises(ValueError, match="the control image has 1 channels and the model takes 3"):
        features(backbone, images, Bucket(controls=(grey,)))
    signed = Control(controlnet(SD15, 0.0), image=lambda pixels: 2 * pixels - 1)
    with pytest.raises(ValueError, match=r"ranges from -.* \[0, 1\] is needed"):
        features(backbone, images, Bucket(controls=(signed,)))


# --- T2I-Adapter

ADAPTERS = {
    "full": ("sd15", "full_adapter", {"channels": [8, 16, 16, 16], "downscale_factor": 8}),
    "light": ("sd15", "light_adapter", {"channels": [8, 16, 16], "downscale_factor": 8}),
    "one channel": ("sd15", "full_adapter", {"channels": [8, 16, 16, 16], "downscale_factor": 8, "in_channels": 1}),
    "sdxl": ("sdxl", "full_adapter_xl", {"channels": [8, 16, 16, 16], "downscale_factor": 16}),
}


def t2i_adapter(name, **changes):
    _, kind, config = ADAPTERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T2IAdapter(adapter_type=kind, **{"num_res_blocks": 1, **config, **changes}).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_what_the_unet_of_diffusers_computes(tiny, name):
    backbone = tiny(ADAPTERS[name][0])
    model = t2i_adapter(name)
    images = torch.rand(2, 3, backbone.default_size, backbone.default_size, generator=torch.Generator().manual_seed(0))
    call = extractor().prepare(backbone, images, rows=range(2), seed=0, prompts=["a horse"] * 2, timestep=50)
    bucket = Bucket(adapters=(Adapter(model, 0.7),))
    bucket.check(backbone, 50)
    before = backbone.fingerprint()
    steered = bucket(backbone, call, 50)
    found = backbone.denoise(steered.sample, steered.timestep, steered.condition)
    shown = canny(images)
    states = [0.7 * state for state in model(shown[:, :1] if model.config.in_channels == 1 else shown)]
    expected = backbone.denoiser(
        call.sample,
        int(call.timestep),
        encoder_hidden_states=call.condition["encoder_hidden_states"].expand(2, -1, -1),
        added_cond_kwargs={
            key: value.expand(2, -1) for key, value in call.condition.get("added_cond_kwargs", {}).items()
        },
        down_intrablock_additional_residuals=states,
    ).sample
    assert not states, "the U-Net has taken all of them"
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, backbone.denoise(call.sample, call.timestep, call.condition), atol=1e-3)
    assert backbone.fingerprint() == before


@pytest.mark.slow
def test_an_adapter_of_scale_0_changes_no_bit_and_several_add_up(backbone, images, controlnet):
    one = Adapter(t2i_adapter("full"))
    none, double = attrs.evolve(one, scale=0.0), attrs.evolve(one, scale=2.0)
    control = Control(controlnet(SD15, 0.5))
    plain = features(backbone, images)
    assert same(features(backbone, images, Bucket(adapters=(none,))), plain)
    alone = features(backbone, images, Bucket(controls=(control,)))
    assert same(features(backbone, images, Bucket(controls=(control,), adapters=(none,))), alone)
    twice = features(backbone, images, Bucket(controls=(control,), adapters=(one, one)))
    expected = features(backbone, images, Bucket(controls=(control,), adapters=(double,)))
    assert all(torch.allclose(twice[name], expected[name], atol=1e-4) for name in plain)
    assert not torch.allclose(twice["unet-out"], alone["unet-out"], atol=1e-3)


@pytest.mark.slow
def test_an_adapter_steers_every_step_and_looks_once(backbone, images):
    looks = []

    def look(pixels):
        looks.append(len(pixels))
        return canny(pixels)

    with_adapter = Bucket(adapters=(Adapter(t2i_adapter("full"), image=look),), denoise_from=53, guidance=2.0)
    given = []
    handle = backbone.denoiser.register_forward_pre_hook(
        lambda m, args, kwargs: given.append(len(kwargs["down_intrablock_additional_residuals"])), with_kwargs=True
    )
    try:
        features(backbone, images, with_adapter)
    finally:
        handle.remove()
    assert looks == [2]
    assert len(given) > 3
    assert set(given) == {4}


def test_after_an_exception_below_an_adapter_the_base_is_as_it_was(backbone, images):
    before = backbone.fingerprint()

    def fail(pixels):
        raise RuntimeError("no edges today")

    bucket = Bucket(loras=(Lora(lora_for(backbone)),), adapters=(Adapter(t2i_adapter("full"), image=fail),))
    with pytest.raises(RuntimeError, match="no edges"):
        features(backbone, images, bucket)
    assert backbone.fingerprint() == before
    assert hooks_of(backbone) == 0


def test_an_adapter_that_does_not_fit_is_refused(tiny, backbone, images):
    with pytest.raises(ValueError, match="a T2IAdapter for a FluxTransformer2DModel"):
        Adapter(t2i_adapter("full")).check(tiny("flux"))
    for wrong in (
        t2i_adapter("sdxl"),
        t2i_adapter("full", channels=[8, 16, 16]),
        t2i_adapter("full", channels=[8, 16, 16, 32]),
        t2i_adapter("full", downscale_factor=4),
    ):
        with pytest.raises(
            ValueError, match=r"features are 8 channels at 1/.*, and the U-Net takes 8 channels at 1/8, 16"
        ):
            Bucket(adapters=(Adapter(wrong),)).check(backbone, 50)
    grey = Bucket(adapters=(Adapter(t2i_adapter("full"), image=outlines),))
    with pytest.raises(ValueError, match="the control image has 1 channels and the model takes 3"):
        features(backbone, images, grey)


def test_an_adapter_of_a_folder(backbone, run, controlnet, tmp_path):
    model = t2i_adapter("light")
    model.save_pretrained(tmp_path / "adapter")
    method = ContentShift(extractor=extractor(), adapter=str(tmp_path / "adapter"), adapter_scale=0.5)
    (adapter,) = method.bucket(backbone, run).adapters
    assert adapter.scale == 0.5
    assert all(torch.equal(a, b) for a, b in zip(adapter.model.parameters(), model.parameters(), strict=True))
    assert method.label == "adapter"
    controlnet(SD15, 0.5).save_pretrained(tmp_path / "control")
    with pytest.raises(
        ValueError, match=r"adapter is .*, a ControlNetModel; a UNet2DConditionModel needs a T2IAdapter"
    ):
        attrs.evolve(method, adapter=str(tmp_path / "control")).bucket(backbone, run)


# --- LoRA


def lora_for(backbone, rank=2, text=True):
    generator = torch.Generator().manual_seed(0)

    def pair(module):
        weight = module.weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator)
        return LowRank(down, up, 1.0)

    weights = {
        "unet": {
            name: pair(module)
            for name, module in backbone.denoiser.named_modules()
            if name.endswith(("attn2.to_q", "ff.net.2", "resnets.0.conv1", "downsamplers.0.conv"))
        }
    }
    if text:
        weights["text_encoder"] = {
            name: pair(module)
            for name, module in backbone.text_encoders["text_encoder"].named_modules()
            if name.endswith("q_proj")
        }
    return weights


def save_lora(weights, path):
    """In peft's names, with alpha."""
    tensors = {}
    for root, parts in weights.items():
        for name, part in parts.items():
            tensors[f"{root}.{name}.lora_A.weight"] = part.down.contiguous()
            tensors[f"{root}.{name}.lora_B.weight"] = part.up.contiguous()
            tensors[f"{root}.{name}.alpha"] = torch.tensor(part.alpha)
    save_file(tensors, path)


def hooks_of(backbone):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.modules())


@pytest.mark.slow
def test_lora_of_scale_0_changes_no_bit_and_nothing_is_left(backbone, images):
    before, plain = backbone.fingerprint(), features(backbone, images)
    weights = lora_for(backbone)
    assert same(features(backbone, images, Bucket(loras=(Lora(weights, 0.0),))), plain)
    changed = features(backbone, images, Bucket(loras=(Lora(weights),)))
    assert not torch.equal(changed["unet-out"], plain["unet-out"])
    assert backbone.fingerprint() == before
    assert hooks_of(backbone) == 0
    assert same(features(backbone, images), plain), "prompts encoded under the LoRA are not remembered"


def test_after_an_exception_the_base_is_as_it_was(backbone, images, controlnet):
    before, names = backbone.fingerprint(), dict(backbone.named_modules()).keys()

    def fail(pixels):
        raise RuntimeError("no edges today")

    bucket = Bucket(loras=(Lora(lora_for(backbone)),), controls=(Control(controlnet(SD15, 0.5), image=fail),))
    with pytest.raises(RuntimeError, match="no edges"):
        features(backbone, images, bucket)
    assert backbone.fingerprint() == before
    assert hooks_of(backbone) == 0
    assert dict(backbone.named_modules()).keys() == names


@pytest.mark.slow
def test_the_low_rank_part_equals_merged_weights(backbone, images):
    """Linear layers and convolutions with strides, against W + scale · alpha / rank · up · down."""
    import copy

    weights, scale = lora_for(backbone), 0.7
    merged = copy.deepcopy(backbone)
    for root, parts in weights.items():
        for name, part in parts.items():
            weight = merged.components[root].get_submodule(name).weight
            delta = (part.up.flatten(1) @ part.down.flatten(1)).view_as(weight)
            weight.data += scale * part.alpha / part.rank * delta
    found = features(backbone, images, Bucket(prompt="a cat", loras=(Lora(weights, scale),)))
    expected = features(merged, images, Bucket(prompt="a cat"))
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3), name


def test_lora_files_of_all_kinds(backbone, tmp_path):
    weights = lora_for(backbone)
    save_lora(weights, tmp_path / "peft.safetensors")
    tensors = load_file(tmp_path / "peft.safetensors")
    kohya, diffusers = {}, {}
    for key, tensor in tensors.items():
        root, _, rest = key.partition(".")
        stem = rest.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight").removesuffix(".alpha")
        part = rest[len(stem) :]
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[root]
        name = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight", ".alpha": ".alpha"}[part]
        kohya[prefix + stem.replace(".", "_") + name] = tensor
        diffusers[f"{root}.{stem}" + part.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")] = tensor
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(diffusers, tmp_path / "diffusers.safetensors")
    for file in ("peft", "kohya", "diffusers"):
        read = read_lora(tmp_path / f"{file}.safetensors", backbone.components)
        assert {root: set(parts) for root, parts in read.items()} == {
            root: set(parts) for root, parts in weights.items()
        }
        assert all(torch.equal(read[r][n].down, weights[r][n].down) for r in weights for n in weights[r])
        assert {part.alpha for parts in read.values() for part in parts.values()} == {1.0}
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}
    save_file(without, tmp_path / "plain.safetensors")
    assert next(iter(read_lora(tmp_path / "plain.safetensors", backbone.components)["unet"].values())).alpha == 2


def test_lora_that_does_not_fit_lists_what_is_wrong(tiny, backbone, tmp_path):
    save_lora(lora_for(backbone), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({**tensors, "unet.no.such.lora_A.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the model: unet.no.such.lora_A.weight"):
        read_lora(tmp_path / "b.safetensors", backbone.components)
    save_file(
        {key: value for key, value in tensors.items() if not key.endswith("q_proj.lora_B.weight")},
        tmp_path / "c.safetensors",
    )
    with pytest.raises(ValueError, match=r"without up"):
        read_lora(tmp_path / "c.safetensors", backbone.components)
    first = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({**tensors, first: torch.zeros(2, 3)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="give a LoRA of this very model"):
        read_lora(tmp_path / "d.safetensors", backbone.components)
    save_file({"x.weight": torch.zeros(1)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the model: x.weight"):
        read_lora(tmp_path / "e.safetensors", backbone.components)


def test_loras_stand_on_each_other_and_leave(backbone):
    weights = lora_for(backbone, text=False)
    with applied(backbone.components, weights, 1.0), applied(backbone.components, weights, 1.0):
        assert hooks_of(backbone) == 2 * len(weights["unet"])
    assert hooks_of(backbone) == 0


# --- denoising in several steps


def calls_of(backbone, images, bucket, nominal=50):
    times = []
    handle = backbone.denoiser.register_forward_pre_hook(lambda m, args: times.append(float(args[1].flatten()[0])))
    try:
        found = features(backbone, images, bucket, timestep=nominal)
    finally:
        handle.remove()
    return times, found


@pytest.mark.slow
def test_60_to_50_with_pndm_calls_the_network_12_times(backbone, images, controlnet):
    pndm = backbone.with_components(
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
        )
    )
    bucket = Bucket(controls=(Control(controlnet(SD15, 0.5)),), denoise_from=60)
    times, found = calls_of(pndm, images, bucket)
    assert times == [float(t) for t in range(61, 49, -1)]
    assert calls_of(pndm, images, Bucket())[0] == [51.0]
    assert found["unet-in"].shape[0] == 2, "the features of the last pass alone"


def test_steps_are_the_schedulers_own(backbone, images):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = backbone.with_components(scheduler=DDIMScheduler(**betas, steps_offset=1, clip_sample=False))
    times, found = calls_of(ddim, images, Bucket(denoise_from=53))
    begin = extractor().prepare(ddim, images, rows=range(2), seed=0, timestep=53)
    scheduler = DDIMScheduler.from_config(ddim.scheduler.config)
    scheduler.set_timesteps(1000)
    x = begin.sample
    for time in times[:-1]:
        x = scheduler.step(ddim.denoise(x, time, begin.condition), int(time), x).prev_sample
    assert times[-1] <= 50 < times[-2]
    assert torch.allclose(found["unet-in"], x, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_other_schedulers_too(tiny, kind):
    backbone = tiny(kind)
    images = torch.rand(1, 3, backbone.default_size, backbone.default_size)
    layer = ("unet-in",) if kind == "sdxl" else ("vit-block0-out",)
    (found,) = extract(extractor(*layer), backbone, images, Bucket(denoise_from=53), rows=[0], seeds=[0], timestep=50)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def test_denoise_from_outside_its_range_is_refused(backbone):
    for wrong in (50, 101):
        with pytest.raises(ValueError, match=f"denoise_from is {wrong}; with timestep 50 allowed is 51 to 100"):
            Bucket(denoise_from=wrong).check(backbone, 50)


def test_denoising_without_a_technique_warns(backbone, tmp_path):
    warnings = []
    run = Run(folder=tmp_path, on_warning=warnings.append)
    ContentShift(extractor=extractor(), denoise_from=60).bucket(backbone, run)
    assert "lets the image drift" in warnings[0]


def test_guidance_changes_the_way_not_the_last_pass(backbone, images):
    plain = features(backbone, images, Bucket(prompt="a horse"))
    assert same(features(backbone, images, Bucket(prompt="a horse", guidance=5.0)), plain)
    walked = features(backbone, images, Bucket(prompt="a horse", denoise_from=52))
    guided = features(backbone, images, Bucket(prompt="a horse", denoise_from=52, guidance=5.0))
    assert not torch.equal(walked["unet-in"], guided["unet-in"])


# --- noise, draws and buckets


def test_buckets_share_noise_and_latents_or_draw_their_own(backbone, images):
    names = ("unet-in",)
    one = features(backbone, images, Bucket(), names)
    other = features(backbone, images, Bucket(prompt="a horse"), names)
    assert torch.equal(one["unet-in"], other["unet-in"])
    assert not torch.equal(one["unet-in"], features(backbone, images, Bucket(), names, seed=1)["unet-in"])


def test_the_fields_say_which_noise(tmp_path):
    run = Run(folder=tmp_path, seed=3)
    plain, same_noise, other = (ContentShift(extractor=extractor(), noise=number) for number in (0, 0, 1))
    assert plain.seeds(run) == same_noise.seeds(run) != other.seeds(run)
    assert len(set(attrs.evolve(plain, num_draws=4).seeds(run))) == 4
    assert attrs.evolve(plain, num_draws=4).seeds(run)[0] == plain.seeds(run)[0]


@pytest.mark.slow
def test_draws_in_one_pass_equal_draws_one_by_one(backbone, images, controlnet):
    bucket = Bucket(controls=(Control(controlnet(SD15, 0.5)),), prompt="a horse")
    layers = extractor("up-level0*", "unet-in", sample_posterior=False)
    options = {"rows": range(2), "timestep": 50}
    together = extract(layers, backbone, images, bucket, seeds=[0, 1, 2], **options)
    for seed, found in enumerate(together):
        (alone,) = extract(layers, backbone, images, bucket, seeds=[seed], **options)
        for name in alone:
            assert torch.allclose(found[name], alone[name], atol=1e-4), name


def test_passes_at_two_timesteps_are_not_stacked(backbone, images):
    prepare = extractor().prepare
    calls = [prepare(backbone, images, rows=range(2), seed=0, timestep=t) for t in (50, 60)]
    with pytest.raises(ValueError, match="different timesteps"):
        stacked(calls)


def test_the_whole_method_in_one_call(backbone, images, controlnet):
    buckets = {"plain": Bucket(), "again": Bucket()}
    layers = extractor("up-level0-upsampler-out", "up-level1-upsampler-out")
    options = {"rows": range(2), "seed": 0, "timestep": 50}
    shared = content_shift(layers, backbone, images, buckets, share_noise=True, **options)
    alone = content_shift(layers, backbone, images, {"plain": Bucket()}, **options)
    assert torch.allclose(shared, alone, atol=1e-6)
    own = content_shift(layers, backbone, images, buckets, **options)
    assert not torch.allclose(own, alone, atol=1e-3)


# --- Img2Img


def test_img2img_from_no_noise_is_the_image(tiny):
    backbone = tiny("ddpm")
    images = torch.rand(2, 3, backbone.default_size, backbone.default_size)
    noise = torch.randn(2, 3, backbone.default_size, backbone.default_size)
    drawn = img2img(backbone, images, Bucket(), noise, start=1, num_steps=1)
    far = img2img(backbone, images, Bucket(), noise, start=900, num_steps=2)
    assert (drawn - images).abs().mean() < (far - images).abs().mean()
    assert drawn.shape == images.shape
    assert 0 <= float(far.min()) <= float(far.max()) <= 1


@pytest.mark.slow
def test_img2img_is_ddim(backbone, images):
    images = images[:1]
    latents = backbone.latents(backbone.moments(images))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    drawn = img2img(backbone, images, Bucket(prompt="a cat"), noise, start=100, num_steps=5, latents=latents)
    scheduler = DDIMScheduler.from_config(
        backbone.scheduler.config, steps_offset=0, set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(50)
    condition = backbone.condition(["a cat"], images.shape[-1])
    x = scheduler.add_noise(latents, noise, torch.tensor(100))
    for time in range(100, 0, -20):
        prediction = backbone.denoise(x, time, condition)
        if time == 20:  # straight to the clean image
            abar = scheduler.alphas_cumprod[time]
            x = (x - (1 - abar).sqrt() * prediction) / abar.sqrt()
        else:
            x = scheduler.step(prediction, time, x).prev_sample
    assert torch.allclose(drawn, backbone.decode(x), atol=1e-4)


# --- the method


@pytest.fixture
def run(tmp_path):
    return Run(folder=tmp_path, step="x", on_warning=lambda message: None)


def named(data, shift=0):
    names = data.features["label"].names
    return data.add_column("caption", [names[(label + shift) % len(names)] for label in data["label"]])


@pytest.mark.slow
def test_texts_that_name_the_class_are_refused(run, backbone):
    data = named(digits(4))
    method = ContentShift(extractor=extractor(), caption_column="caption")
    with pytest.raises(ValueError, match="the text of row 0 names the image's class"):
        method.texts(data)
    assert attrs.evolve(method, allow_label_prompts=True).texts(data) == data["caption"]
    wrong = named(digits(4), 5)
    assert method.texts(wrong) == wrong["caption"]
    assert (
        ContentShift(extractor=extractor(), caption_column="label", allow_label_prompts=True).texts(data)
        == data["caption"]
    )


@pytest.mark.slow
def test_captions_of_a_table(run, tmp_path):
    data = digits(2).add_column("name", ["a", "b"])
    (tmp_path / "captions.csv").write_text('name,caption\na,"a big house, red"\nb,a tree\n')
    method = ContentShift(extractor=extractor(), captions=tmp_path / "captions.csv")
    assert method.texts(data) == ["a big house, red", "a tree"]
    with pytest.raises(ValueError, match="has no caption for 'c'"):
        method.texts(digits(1).add_column("name", ["c"]))
    (tmp_path / "captions.csv").write_text("name,caption\na,x\na,y\n")
    with pytest.raises(ValueError, match="line 3: a second caption for 'a'"):
        method.texts(data)


@pytest.mark.slow
def test_attention_features_take_one_prompt(run, backbone):
    data = digits(1).remove_columns("label").add_column("text", ["some words"])
    method = ContentShift(
        extractor=extractor("up-level0*", attention_maps=["up_cross"], attn_min_side=1, attn_max_side=64),
        caption_column="text",
    )
    with pytest.raises(ValueError, match="the attention feature needs one prompt for all"):
        method.extract_feature(backbone, data, run)


@pytest.mark.slow
def test_features_are_the_mean_of_draws_and_know_their_techniques(run, backbone):
    data = digits(2)
    gdf = extractor("up-level0-upsampler-out")
    one = ContentShift(extractor=gdf, num_draws=2, dtype="float32", prompt="a horse")
    found = one.extract_feature(backbone, data, run)
    from plait_diffusion import image_tensors

    images = image_tensors(data, backbone.default_size)
    draws = extract(gdf, backbone, images, Bucket(prompt="a horse"), rows=range(2), seeds=one.seeds(run), timestep=50)
    expected = sum(draw["up-level0-upsampler-out"] for draw in draws) / 2
    assert torch.allclose(found.read()["up-level0-upsampler-out"], expected, atol=1e-5)
    assert found.origins[0].prompt == "a horse"
    assert found.origins[0].more["techniques"]["num_draws"] == 2


def test_wrong_fields_end_in_a_sentence(backbone, run):
    with pytest.raises(ValueError, match="canny_low is 200 and canny_high 100"):
        ContentShift(extractor=extractor(), canny_low=200, canny_high=100)
    with pytest.raises(ValueError, match="prompt and caption_column are both given"):
        ContentShift(extractor=extractor(), prompt="a", caption_column="b")
    vision = configure(find("extract_feature", "vision"), {})
    with pytest.raises(ValueError, match="extractor is VisionFeatures, which has no prepare"):
        ContentShift(extractor=vision)
    with pytest.raises(ValueError, match="control is own, but the model has no ControlNet"):
        ContentShift(extractor=extractor(), control="own", control_image="outlines").bucket(backbone, run)


@pytest.mark.slow
def test_the_users_own_technique(backbone, run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import attrs\n\n\ndef halve(call):\n    return attrs.evolve(call, sample=call.sample / 2)\n")
    method = ContentShift(extractor=extractor("unet-in"), function=f"{file}:halve", dtype="float32")
    plain = attrs.evolve(method, function=None)
    found, expected = (one.extract_feature(backbone, digits(2), run).read()["unet-in"] for one in (method, plain))
    assert torch.equal(found, expected / 2)
    with pytest.raises(
        ValueError,
        match=r"there is no .nothing. in",
    ):
        attrs.evolve(method, function=f"{file}:nothing").bucket(backbone, run)


def test_a_controlnet_of_a_folder(backbone, run, controlnet, tmp_path):
    controlnet(SD15, 0.5).save_pretrained(tmp_path / "control")
    method = ContentShift(extractor=extractor(), control=str(tmp_path / "control"))
    (control,) = method.bucket(backbone, run).controls
    assert all(
        torch.equal(a, b) for a, b in zip(control.model.parameters(), controlnet(SD15, 0.5).parameters(), strict=True)
    )
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="cannot be read as a ControlNetModel"):
        attrs.evolve(method, control=str(tmp_path / "nothing")).bucket(backbone, run)
