"""Training of the small model and of a ControlNet on it."""

import copy

import diffusers
import pytest
import torch
from plait import Run
from plait.demo.pictures import digits
from plait_diffusion import gradient_magnitude, small_backbone, small_controlnet, warped_digits
from plait_diffusion.plugin import LoadDiffusion, TrainDiffusion

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def backbone():
    return small_backbone(NAMES, 0)


def test_the_small_model_is_the_one_of_the_paper_page(backbone):
    parameters = sum(parameter.numel() for parameter in backbone.denoiser.parameters())
    assert parameters == pytest.approx(0.87e6, rel=0.01)
    assert backbone.class_names == tuple(NAMES)


@pytest.mark.slow
def test_it_learns_and_its_input_stays_as_it_was(backbone):
    before, losses = backbone.fingerprint(), []
    run = Run(on_log=lambda values, step: losses.append(values["loss"]))
    trained = TrainDiffusion(num_steps=25, batch_size=8).optimize(backbone, digits(8), run)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert backbone.fingerprint() == before != trained.fingerprint()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.slow
def test_averaged_weights_differ_from_the_last_ones(backbone):
    one, other = (
        TrainDiffusion(num_steps=3, batch_size=2, ema_decay=decay).optimize(backbone, digits(4), Run())
        for decay in (0.9, 0)
    )
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(backbone, tmp_path):
    class Stop(BaseException):
        pass

    method = TrainDiffusion(num_steps=4, batch_size=2, checkpoint_every=2)
    expected = method.optimize(backbone, digits(4), Run(folder=tmp_path / "a"))

    def stop(values, step):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        method.optimize(backbone, digits(4), Run(folder=tmp_path / "b", on_log=stop))
    steps = []
    again = method.optimize(
        backbone, digits(4), Run(folder=tmp_path / "b", on_log=lambda values, step: steps.append(step))
    )
    assert steps == [2, 3]
    assert again.fingerprint() == expected.fingerprint()


@pytest.mark.slow
def test_a_controlnet_learns_and_the_denoiser_does_not(backbone):
    # The last layers of a fresh U-Net start at values that are not zero, so gradients reach the new parts.
    trained = TrainDiffusion(part="control", num_steps=3, batch_size=2).optimize(backbone, digits(4), Run())
    for name, value in backbone.denoiser.state_dict().items():
        assert torch.equal(value, trained.denoiser.state_dict()[name])
    assert isinstance(trained.components["controlnet"], diffusers.ControlNetModel)
    assert float(trained.components["controlnet"].controlnet_mid_block.weight.abs().max()) > 0


def test_a_fresh_controlnet_changes_no_bit(backbone):
    controlnet = small_controlnet(backbone.denoiser, 0).eval()
    sample, condition = torch.randn(2, 1, 16, 16), backbone.condition(["3", ""], 16)
    with torch.no_grad():
        plain = backbone.denoise(sample, 50.0, condition)
        down, mid = controlnet(sample, 50, controlnet_cond=torch.rand(2, 1, 16, 16), return_dict=False, **condition)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        assert torch.equal(backbone.denoise(sample, 50.0, condition | residuals), plain)


def test_outlines():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 3, 4, 4) / 4
    edges = gradient_magnitude(ramp)
    assert edges.shape == (1, 1, 4, 4)
    assert torch.allclose(edges[..., 1:3], torch.full((1, 1, 4, 2), 0.25 * 2**0.5))
    assert torch.equal(gradient_magnitude(torch.full((1, 3, 4, 4), 0.3)), torch.zeros(1, 1, 4, 4))


def test_the_digits():
    data = warped_digits()
    assert {name: len(part) for name, part in data.items()} == {"train": 1200, "test": 597}
    assert data["train"][0]["image"].size == (16, 16)
    assert data["train"].features["label"].names == NAMES
    assert len(set(data["test"]["label"])) == 10


@pytest.mark.slow
def test_what_cannot_be_trained_on(backbone, tiny):
    method = TrainDiffusion(num_steps=1)
    with pytest.raises(ValueError, match="column 'image'"):
        method.optimize(backbone, digits(3).remove_columns("image"), Run())
    with pytest.raises(ValueError, match="no rows"):
        method.optimize(backbone, digits(3).select([]), Run())
    with pytest.raises(ValueError, match="made for cat"):
        method.optimize(small_backbone(["cat"], 0), digits(3), Run())
    with pytest.raises(ValueError, match="a diffusion backbone is needed"):
        method.optimize(object(), digits(3), Run())
    with pytest.raises(ValueError, match="multiples of 4"):
        TrainDiffusion(num_steps=1, image_size=10).optimize(backbone, digits(3), Run())
    with pytest.raises(ValueError, match="not a FlowMatchEulerDiscreteScheduler"):
        method.optimize(tiny("sd3"), digits(3), Run())
    with pytest.raises(FloatingPointError, match=r"the loss is .* lower learning_rate"):
        TrainDiffusion(num_steps=20, batch_size=2, learning_rate=1e30).optimize(backbone, digits(3), Run())


def test_a_latent_model_is_trained_too(tiny):
    trained = TrainDiffusion(num_steps=1, batch_size=2).optimize(tiny("sd15"), digits(3), Run())
    assert trained.fingerprint() != tiny("sd15").fingerprint()


def test_fresh_models_by_seed_and_dtype():
    one, same, other = (LoadDiffusion().load_model(None, Run(seed=seed)) for seed in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert LoadDiffusion(dtype="bfloat16").load_model(digits(3), Run()).dtype == torch.bfloat16
    assert copy.deepcopy(one).fingerprint() == one.fingerprint()
