"""The whole training on toys: rules, resuming, options, and what the model does afterwards."""

import copy
import math

import pytest
import torch
from plait_semiddm_weather.model import WeatherRestorer, pad_to_multiple
from plait_semiddm_weather.semiddm_weather import semiddm_weather
from plait_semiddm_weather.settings import AS_RELEASED, Architecture, Training, preset

SMALL = Architecture(
    base_channels=4, channel_mult=(1,), latent_dim=4, latent_embed_dim=8, mapping_layers=1, disc_base_channels=4,
    disc_num_layers=3, time_embed_dim=8, num_train_timesteps=2,
)  # fmt: skip
QUICK = {
    "crop_size": 16, "batch_size": 4, "num_steps_stage1": 4, "num_steps_stage2": 3, "ranker_steps": 3,
    "checkpoint_every": 1, "r1_interval": 2,
}  # fmt: skip


class Images:
    """Textures under a veil; ``pairs`` with the truth, otherwise alone."""

    def __init__(self, count, pairs, seed=0, side=16, known=True):
        draw = torch.Generator().manual_seed(seed)
        rough = torch.rand(count, 3, side // 4, side // 4, generator=draw)
        self.clean = torch.nn.functional.interpolate(rough, size=side, mode="bicubic").clamp(0, 1)
        self.pairs, self.known = pairs, known
        self.domains = ["rain" if row % 2 else "snow" for row in range(count)]

    def __len__(self):
        return len(self.clean)

    def __getitem__(self, row):
        veiled = self.clean[row] * 0.6 + 0.35
        return (veiled, self.clean[row]) if self.pairs else veiled

    def truth(self, row):
        return self.clean[row] if self.known else None


class Memory:
    """A checkpoint that survives in memory, and can kill the training when it has been saved so many times."""

    def __init__(self):
        self.state, self.saves, self.kill_at = None, 0, None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)
        self.saves += 1
        if self.saves == self.kill_at:
            raise KeyboardInterrupt


LABELLED, UNLABELLED = Images(6, True), Images(8, False, seed=1)


def train(rule="semiddm", model=None, checkpoint=None, log=None, unlabelled=UNLABELLED, architecture=SMALL, **given):
    training = Training(rule=rule, **{**QUICK, **given})
    return semiddm_weather(
        LABELLED,
        unlabelled if rule != "supervised" else None,
        architecture,
        training,
        model=model,
        checkpoint=checkpoint,
        log=log or (lambda **values: None),
        warn=lambda sentence: None,
    )


def same(one, other):
    here, there = one.state_dict(), other.state_dict()
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


@pytest.fixture(scope="module")
def started():
    return train("supervised").model


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    ["semiddm", "supervised", "mean-teacher", "static-pseudo", "bank-no-content", "bank-score-only", "bank-confidence", "oracle-screen"],
)  # fmt: skip
def test_every_rule_trains(started, rule):
    result = train(rule, started, num_steps_stage1=2, num_steps_stage2=2)
    assert not same(result.model.student, started.student)
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())
    assert not result.model.training
    if rule != "supervised":
        assert all(map(math.isfinite, result.bank_psnr))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["regression", "patch-ddim"])
def test_baselines_with_other_networks(architecture):
    from dataclasses import replace

    networks = replace(SMALL, kind=architecture, base_channels=8, patch_size=8)
    model = train("supervised", architecture=networks).model
    assert model.discriminator is None
    found = model.restore(torch.rand(2, 3, 10, 13), [0, 1], num_samples=2)
    assert found.shape == (2, 2, 3, 10, 13)
    with pytest.raises(ValueError, match="is trained by supervised alone"):
        train("semiddm", architecture=networks)


@pytest.fixture(scope="module")
def whole():
    return train(checkpoint=Memory())


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 5, 7])  # in stage 1, at its end, in stage 2
def test_killed_and_resumed_it_gives_the_same_bits(whole, kill_at):
    memory, expected = Memory(), whole
    memory.kill_at = kill_at
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=memory)
    found = train(checkpoint=memory)
    assert same(found.model, expected.model)
    assert torch.equal(found.bank.images, expected.bank.images)
    assert torch.equal(found.bank.best_score, expected.bank.best_score)
    assert found.funnel == expected.funnel
    assert found.bank_psnr == expected.bank_psnr


def test_without_weight_stage_2_is_supervised_training_bit_for_bit(started):
    semi = train("semiddm", started, unsup_weight=0.0, num_steps_stage2=3)
    plain = train("supervised", started, num_steps_stage1=3)
    assert same(semi.model.student, plain.model.student)
    assert same(semi.model.teacher, plain.model.teacher)
    assert same(semi.model.discriminator, plain.model.discriminator)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"content_threshold": 0.0}, {"scorer": "constant"}])
def test_a_bank_that_takes_nothing_is_self_training(started, given):
    static = train("static-pseudo", started, num_steps_stage2=2)
    if "scorer" in given:
        training = Training(rule="semiddm", **{**QUICK, "num_steps_stage2": 2})
        semi = semiddm_weather(
            LABELLED, UNLABELLED, SMALL, training, model=started, scorer=lambda images: images.new_zeros(len(images))
        )
    else:
        semi = train("semiddm", started, num_steps_stage2=2, **given)
    assert torch.equal(semi.bank.images, static.bank.images)
    # The draws of teacher and student have moved the random stream on, so the weights need not be equal.
    assert semi.funnel.get("accepted", 0) == 0


def test_gradients_of_the_unsupervised_losses_reach_the_generator_only_through_x0(started):
    found = {}
    for grad in ("x0", "none"):
        model = train("static-pseudo", started, unsup_grad=grad, adversarial_weight=0.0, recon_weight=0.0,
                      num_steps_stage2=1, unsup_rampup=0, r1_interval=0).model  # fmt: skip
        found[grad] = not same(model.student, started.student)
    assert found == {"x0": True, "none": False}


@pytest.mark.slow
def test_what_the_released_code_does_can_be_chosen(started):
    released = train("semiddm", started, **AS_RELEASED)
    assert not same(released.model, train("semiddm", started).model)


@pytest.mark.parametrize(
    "given",
    [
        {"contrast_weight": 1.0},
        {"strong_aug": "official"},
        {"student_gate_view": "weak"},
        {"bank_crops": 2},
        {"content_gate": "low-band"},
        {"content_gate": "ssim"},
        {"scorer": "nss"},
        {"ranker_pairs": "restorations", "refit_scorer": True},
        {"precision": "bf16"},
        {"num_epochs_stage2": 1, "unsup_rampup": 2, "curriculum": {"snow": 0, "rain": 1}},
    ],
    ids=str,
)
def test_options(started, given):
    result = train("semiddm", started, **{"num_steps_stage2": 1, **given})
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())
    assert len(result.bank) == len(UNLABELLED) * given.get("bank_crops", 1)


def test_a_discriminator_that_sees_the_degraded_image():
    from dataclasses import replace

    result = train(architecture=replace(SMALL, conditional_discriminator=True))
    assert result.model.architecture.conditional_discriminator


def test_curves_hold_the_losses_and_how_well_the_discriminator_does():
    curves = []
    train(log=lambda **values: curves.append(values))
    assert {"stage 1: L_D", "stage 1: accuracy of D", "stage 1: adversarial", "stage 1: reconstruction"} < set(
        curves[0]
    )
    assert {"stage 2: weight of the unsupervised part", "stage 2: accepted"} < set(curves[-1])
    assert all(0 <= one["stage 1: accuracy of D"] <= 1 for one in curves[:4])


@pytest.mark.slow
def test_the_factor_two_of_the_sub_bands_matters():
    """The released losses compare images of half the scale: the optimum is twice too bright."""
    images = Images(6, True)
    found = {}
    for half in (False, True):
        training = Training(rule="supervised", half_scale=half, **{**QUICK, "num_steps_stage1": 25, "r1_interval": 0})
        model = semiddm_weather(images, None, SMALL, training, seed=0).model
        degraded, clean = (torch.stack(part) for part in zip(*[images[row] for row in range(6)], strict=True))
        with torch.no_grad():
            error = (model.sample(degraded, torch.Generator().manual_seed(0), "student") - clean).square().mean()
        found[half] = -10 * math.log10(error)
    assert found[False] > found[True] + 5


# What cannot be trained


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batch_size": 6}, "batch_size is 6"),
        ({"crop_size": 18}, "crop_size is 18; it has to be a multiple of 4"),
        ({"crop_size": 4}, "crop_size is 4, which leaves the discriminator nothing"),
        ({"crop_size": 32}, "16×16 pixels and crop_size 32"),
        ({"perceptual_weight": 1.0}, "perceptual_weight is 1.0 and vgg16 is not given"),
        ({"contrast_weight": 1.0, "contrast": "vgg19"}, "vgg19 is not given"),
        ({"scorer": "mine"}, "scorer is 'mine'"),
        ({"curriculum": {"hail": 0}}, "names 'hail'"),
        (
            {"learning_rate_g": 1e30, "num_steps_stage1": 20},
            "is nan; lower learning_rate_g|is inf; lower learning_rate_g",
        ),
    ],
)
def test_bad_values_end_in_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(**given)


def test_rules_need_their_images(started):
    with pytest.raises(ValueError, match="rule 'semiddm' needs unlabelled images"):
        semiddm_weather(LABELLED, None, SMALL, Training(**QUICK))
    with pytest.raises(ValueError, match="oracle-screen needs the clean versions"):
        train("oracle-screen", started, unlabelled=Images(4, False, known=False))


# The model


def test_saved_and_loaded_it_restores_to_the_same_bits(started, tmp_path):
    started.save_pretrained(tmp_path)
    again = WeatherRestorer.from_pretrained(tmp_path)
    assert same(again, started)
    image = torch.rand(1, 3, 9, 14)
    for weights in ("student", "teacher"):
        assert torch.equal(again.restore(image, [3], weights=weights), started.restore(image, [3], weights=weights))
    assert torch.equal(again.score(image), started.score(image))
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_folders_without_a_model_are_refused(tmp_path, started):
    with pytest.raises(ValueError, match="holds no saved model"):
        WeatherRestorer.from_pretrained(tmp_path)
    started.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": {"base_channels": 8, "depth": 3}}')
    with pytest.raises(ValueError, match=r"config\.json has 'depth'"):
        WeatherRestorer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": {"base_channels": 8}}')
    with pytest.raises(ValueError, match=r"does not fit config\.json"):
        WeatherRestorer.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (16, 16), (5, 64)])
def test_any_size_comes_back(started, shape):
    assert started.restore(torch.rand(1, 3, *shape), [0]).shape == (1, 1, 3, *shape)
    assert all(side % 8 == 0 for side in pad_to_multiple(torch.rand(1, 3, *shape), 8).shape[-2:])
    with pytest.raises(ValueError, match="1×4 pixels; 2×2 is the least"):
        started.restore(torch.rand(1, 3, 1, 4), [0])


def test_a_new_network_with_a_residual_head_gives_the_image_back():
    image = torch.rand(1, 3, 12, 20)
    assert torch.allclose(WeatherRestorer(SMALL).restore(image, [0])[0], image, atol=1e-4)


def test_samples_differ_and_their_mean_is_better_than_they_are(started):
    degraded, clean = (torch.stack([LABELLED[row][place] for row in (0, 1)]) for place in (0, 1))
    samples = started.restore(degraded, [4, 5], num_samples=5, batch_size=3)
    assert samples.shape == (5, 2, 3, 16, 16)
    assert len({tuple(sample.flatten().tolist()) for sample in samples[:, 0]}) == 5
    assert torch.allclose(samples, started.restore(degraded, [4, 5], num_samples=5), atol=1e-5)
    assert torch.allclose(samples[:2, :1], started.restore(degraded[:1], [4], num_samples=2), atol=1e-5)
    assert not torch.equal(samples[:1, :1], started.restore(degraded[:1], [5]))
    errors = (samples - clean).square().mean(dim=(2, 3, 4))
    assert ((samples.mean(dim=0) - clean).square().mean(dim=(1, 2, 3)) <= errors.mean(dim=0) + 1e-9).all()
    with pytest.raises(ValueError, match="1 seeds for 2 images"):
        started.restore(degraded, [1])


def test_tiles_cover_the_image_and_each_has_noise_of_its_own(started):
    image = torch.rand(1, 3, 20, 26)
    options = {"tile": 16, "stride": 5, "num_samples": 2}
    tiled = started.restore(image, [1], **options)
    assert tiled.shape == (2, 1, 3, 20, 26)
    assert torch.allclose(tiled, started.restore(image, [1], **options, batch_size=3), atol=1e-5)
    averaged = started.restore(image, [1], tile=16, stride=5, average=True)
    assert averaged.shape == (1, 1, 3, 20, 26)
    identity = WeatherRestorer(SMALL).restore(image, [1], tile=16, stride=5)
    assert torch.allclose(identity[0], image, atol=1e-4)


def test_gradients_pass_through_a_restoration(started):
    image = torch.rand(2, 3, 8, 8, requires_grad=True)
    started(image).sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_global_random_state_stays(started):
    before = torch.get_rng_state()
    train()
    WeatherRestorer(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_trainings_are_equal(whole):
    assert same(train().model, whole.model)


def test_lengths_in_steps_replace_those_of_a_preset_in_epochs():
    _, training = preset("paper", num_steps_stage1=7, vgg16="x", vgg19="y")
    assert training.num_epochs_stage1 is None
    assert training.num_epochs_stage2 == 650
    with pytest.raises(ValueError, match="there is no setting 'speed'"):
        preset("small", speed=2)
