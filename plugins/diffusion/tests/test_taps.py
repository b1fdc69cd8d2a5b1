"""Activations by name, on models of five shapes: hooks against what the modules themselves compute."""

import pytest
import torch
from plait_diffusion import capture, official_ids, resolve, shapes
from plait_diffusion.taps import Tap

KINDS = ("sd15", "sdxl", "sd3", "pixart", "flux", "ddpm", "dit")


@pytest.fixture(scope="module", params=KINDS)
def passed(request, tiny):
    """(backbone, its ids, what a pass of two images gave, sample, timestep, condition)."""
    backbone = tiny(request.param)
    size = 32 if request.param == "ddpm" else 64
    latents = backbone.latents(
        backbone.moments(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)))
    )
    level = backbone.noise_level(50)
    sample = level.signal * latents + level.noise * torch.randn(
        latents.shape, generator=torch.Generator().manual_seed(2)
    )
    condition = backbone.condition(["a photo" if backbone.text_encoders else ""], size)
    ids = official_ids(backbone.denoiser)
    with torch.no_grad():
        found = capture(backbone.denoiser, list(ids.values()), sample, level.timestep, condition)
    return backbone, ids, found, sample, level.timestep, condition


def test_every_activation_is_produced_and_the_pass_is_not_changed(passed):
    backbone, ids, found, sample, timestep, condition = passed
    assert set(found) == set(ids)
    with torch.no_grad():
        plain = backbone.denoise(sample, timestep, condition)
        seen = []

        def call(denoiser, *arguments):
            from plait_diffusion.families import call_denoiser

            seen.append(call_denoiser(denoiser, *arguments))

        capture(backbone.denoiser, list(ids.values()), sample, timestep, condition, early_exit=False, call=call)
    assert torch.equal(seen[0], plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.denoiser.modules())


@pytest.mark.slow
def test_the_dry_run_knows_order_and_shapes(passed):
    backbone, ids, found, sample, _, condition = passed
    expected = {name: (2, *value.shape[1:]) for name, value in found.items()}
    assert list(shapes(backbone.denoiser, list(ids.values()), sample, condition).items()) == list(expected.items())


def test_rows_of_maps_sum_to_one(passed):
    _, _, found, *_ = passed
    for name, value in found.items():
        if name.endswith("-self-map"):
            cross = found.get(name.replace("-self-map", "-cross-map"))
            total = value.sum(-1)
            if (
                name.startswith("vit-block")
                and cross is not None
                and cross.shape[2] == value.shape[2]
                and "vit-block0-q" in found
            ):
                total = total + cross.sum(-1)  # one softmax over the tokens of text and image
            assert torch.allclose(total, torch.ones_like(total), atol=1e-5), name


def test_early_exit_gives_the_same_bits_and_stops(passed):
    backbone, ids, found, sample, timestep, condition = passed
    order = [name for name in found if not name.endswith("-map")]
    wanted = [order[2], order[len(order) // 2]]
    later = ids[order[-1]].path
    calls = []
    handle = backbone.denoiser.get_submodule(later).register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.no_grad():
            some = capture(backbone.denoiser, [ids[name] for name in reversed(wanted)], sample, timestep, condition)
    finally:
        handle.remove()
    assert list(some) == wanted  # in the order of execution
    assert all(torch.equal(some[name], found[name]) for name in wanted)
    assert calls == []


def test_totals(tiny):
    assert len(official_ids(tiny("sd15").denoiser)) == 197
    assert len(official_ids(tiny("sdxl").denoiser)) == 612


@pytest.mark.parametrize("passed", ["sd15", "sdxl"], indirect=True)
def test_residuals_and_projections_add_up(passed):
    backbone, _, found, sample, timestep, condition = passed
    unet = backbone.denoiser
    vit = "up-level1-repeat0-"
    block = unet.up_blocks[1]
    last = len(block.attentions[0].transformer_blocks) - 1
    paths = ["up_blocks.1.resnets.0@in", "up_blocks.1.attentions.0@in", "up_blocks.1.resnets.0.conv2"]
    with torch.no_grad():
        raw = capture(unet, resolve(unet, paths), sample, timestep, condition)
        resnet = block.resnets[0]
        shortcut = resnet.conv_shortcut(raw[paths[0]]) if resnet.conv_shortcut is not None else raw[paths[0]]
        assert torch.allclose(found[f"{vit}res-out"], shortcut + found[f"{vit}res-increment"], atol=1e-6)
        out = found[f"{vit}vit-block{last}-out"]
        attention = block.attentions[0]
        if attention.use_linear_projection:
            projected = attention.proj_out(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            projected = attention.proj_out(out)
        assert torch.allclose(found[f"{vit}vit-out"] - raw[paths[1]], projected, atol=1e-5)


@pytest.mark.parametrize("passed", ["sd15", "sdxl"], indirect=True)
def test_a_transformer_block_written_by_hand(passed):
    backbone, _, found, sample, timestep, condition = passed
    start, path = "up-level1-repeat0-vit-block0-", "up_blocks.1.attentions.0.transformer_blocks.0"
    block = backbone.denoiser.get_submodule(path)
    text = condition["encoder_hidden_states"].expand(2, -1, -1)
    with torch.no_grad():
        raw = capture(backbone.denoiser, resolve(backbone.denoiser, [f"{path}@in"]), sample, timestep, condition)
        tokens = raw[f"{path}@in"].flatten(2).transpose(1, 2)
        normed = block.norm1(tokens)
        parts = {f"self-{letter}": getattr(block.attn1, f"to_{letter}")(normed) for letter in "qkv"}
        tokens = tokens + block.attn1(normed)
        normed = block.norm2(tokens)
        parts["cross-q"] = block.attn2.to_q(normed)
        tokens = tokens + block.attn2(normed, encoder_hidden_states=text)
        parts["ffn-inner"] = block.ff.net[0](block.norm3(tokens))
        parts["out"] = tokens + block.ff.net[2](parts["ffn-inner"])
    for part, expected in parts.items():
        value = found[f"{start}{part}"].flatten(2).transpose(1, 2)
        assert torch.allclose(value, expected, rtol=3e-6, atol=1e-6), part


@pytest.mark.parametrize("passed", ["sd15", "pixart"], indirect=True)
def test_map_times_values_is_the_attention(passed):
    backbone, ids, found, sample, timestep, condition = passed
    name = next(one for one in ids if one.endswith("self-map") and not one.startswith("down"))
    attention = ids[name].path
    names = [f"{attention}.to_v@out", f"{attention}.to_out.0@in"]
    with torch.no_grad():
        raw = capture(backbone.denoiser, resolve(backbone.denoiser, names), sample, timestep, condition)
    values = raw[names[0]].flatten(2).transpose(1, 2)
    heads = found[name].shape[1]
    values = values.unflatten(2, (heads, -1)).transpose(1, 2)
    out = (found[name] @ values).transpose(1, 2).flatten(2)
    assert torch.allclose(out, raw[names[1]].flatten(2).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("passed", ["sd3", "flux"], indirect=True)
def test_joint_maps_times_values_is_the_attention_of_the_image(passed):
    backbone, _, found, sample, timestep, condition = passed
    attention = backbone.denoiser.transformer_blocks[0].attn
    kept = {}

    def keep(name):
        return lambda module, args, output: kept.__setitem__(name, output)

    handles = [getattr(attention, name).register_forward_hook(keep(name)) for name in ("to_v", "add_v_proj")]
    handles.append(attention.to_out[0].register_forward_pre_hook(lambda module, args: kept.__setitem__("out", args[0])))
    try:
        with torch.no_grad():
            backbone.denoise(sample, timestep, condition)
    finally:
        for handle in handles:
            handle.remove()
    maps = torch.cat([found["vit-block0-cross-map"], found["vit-block0-self-map"]], dim=-1)
    values = torch.cat([kept["add_v_proj"], kept["to_v"]], dim=1).unflatten(2, (attention.heads, -1)).transpose(1, 2)
    assert torch.allclose((maps @ values).transpose(1, 2).flatten(2), kept["out"], atol=1e-5)


@pytest.mark.parametrize("passed", ["flux"], indirect=True)
def test_tokens_of_text_are_cut_off(passed):
    backbone, _, found, sample, timestep, condition = passed
    text = condition["encoder_hidden_states"].shape[1]
    kept = []
    single = backbone.denoiser.single_transformer_blocks[0].attn.to_q
    handle = single.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        backbone.denoise(sample, timestep, condition)
        handle.remove()
        both = capture(
            backbone.denoiser,
            resolve(backbone.denoiser, ["transformer_blocks.0@image", "transformer_blocks.0@text"]),
            sample,
            timestep,
            condition,
        )
    image = kept[0][:, text:]
    assert torch.equal(found["vit-block2-q"].flatten(2).transpose(1, 2), image)
    assert torch.equal(both["transformer_blocks.0@image"], found["vit-block0-out"])
    assert both["transformer_blocks.0@text"].shape[2] == text


def test_names_by_path_by_glob_and_with_the_root(tiny):
    unet = tiny("sd15").denoiser
    first, second = resolve(unet, ["unet.up_blocks.1.attentions.0", "up-level1-repeat0-vit-out"])
    assert first.path == second.path == "up_blocks.1.attentions.0"
    assert len(resolve(unet, ["up_blocks.*attn2.to_q"])) == 9
    assert {tap.name for tap in resolve(unet, ["up-level1-*-cross-q"])} == {
        f"up-level1-repeat{r}-vit-block0-cross-q" for r in range(3)
    }
    assert resolve(unet, ["unet-in", "unet-in"]) == [Tap("unet-in", "conv_in", "in")]


def test_unknown_names_name_the_nearest(tiny):
    unet = tiny("sd15").denoiser
    with pytest.raises(KeyError, match="up-level1-repeat1-vit-block0-cross-q"):
        resolve(unet, ["up-level1-repeat1-vit-block0-cros-q"])
    with pytest.raises(KeyError, match="no activation of the model matches"):
        resolve(unet, ["nothing.*.here"])
    with pytest.raises(KeyError, match="tap @middle"):
        resolve(unet, ["conv_in@middle"])
    with pytest.raises(KeyError, match="is no attention"):
        resolve(unet, ["conv_in@map"])
    with pytest.raises(ValueError, match="no activation is named"):
        resolve(unet, [])


def test_fused_projections_are_refused(tiny):
    import copy

    unet = copy.deepcopy(tiny("sd15").denoiser)
    unet.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
        resolve(unet, ["up-level1-repeat1-vit-block0-self-k"])


def test_a_module_that_is_not_executed_is_told_before_the_pass_and_in_it(tiny):
    backbone = tiny("sd15")
    taps = resolve(backbone.denoiser, ["up_blocks.1.attentions.0.transformer_blocks"])
    condition = backbone.condition(["a photo"], 64)
    sample = torch.zeros(1, 4, 8, 8)
    with pytest.raises(RuntimeError, match="never produces"):
        shapes(backbone.denoiser, taps, sample, condition)
    with pytest.raises(RuntimeError, match="never produces"):
        capture(backbone.denoiser, taps, sample, 50.0, condition)


def test_no_hook_is_left_after_an_exception(tiny):
    backbone = tiny("sd15")
    taps = list(official_ids(backbone.denoiser).values())

    def call(denoiser, *arguments):
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        capture(backbone.denoiser, taps, torch.zeros(1, 4, 8, 8), 50.0, backbone.condition(["a photo"], 64), call=call)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.denoiser.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())


def test_tokens_become_images_row_by_row():
    class Inner(torch.nn.Module):
        def forward(self, tokens):
            return tokens

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, image):
            return self.inner(image.flatten(2).transpose(1, 2))

    class Model(torch.nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.outer = Outer()

        def forward(self, image):
            return self.outer(image)

    Model.__name__ = "UNet2DModel"  # whose blocks know their own grid
    image = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    found = capture(
        Model(),
        [Tap("x", "outer.inner", "out")],
        image,
        0.0,
        {},
        call=lambda model, sample, timestep, condition: model(sample),
    )
    assert torch.equal(found["x"], image)
