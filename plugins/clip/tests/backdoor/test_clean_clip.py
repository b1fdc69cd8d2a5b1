import copy
import random

import datasets
import numpy as np
import plait
import pytest
import torch
from PIL import Image
from plait import PlaitError
from plait_clip import toy_data
from plait_clip.backdoor.clean_clip import (
    FineTuning,
    clean_clip,
    clean_clip_loss,
    encode_views,
    fine_tune,
    optimizer,
    released_groups,
    released_optimizer_state,
    view_batches,
)
from plait_clip.backdoor.plugin.defences import CleanClip
from plait_clip.backdoor.synonyms import mapped_synonyms
from plait_clip.losses import clip_loss
from plait_clip.model import ImageTextModel, OpenClipModel, WordTokenizer
from plait_clip.model.open_clip_model import build, image_input
from plait_clip.plugin.models import OpenClip
from plait_clip.training import MAX_LOG_SCALE, DivergedError
from torch import nn

SYNONYMS = mapped_synonyms(toy_data.SYNONYMS)


@pytest.fixture
def model() -> ImageTextModel:
    return OpenClip().load_model(data=None, run=plait.Run(seed=0))


def epoch_of(pairs, model, **more):
    settings = {"batch_size": 64, "seed": 0, "epoch": 0, "augment_images": True, "synonyms": SYNONYMS}
    return list(view_batches(pairs, model, **{**settings, **more}))


def same(a, b):
    return (
        torch.equal(a.rows, b.rows)
        and torch.equal(a.images, b.images)
        and torch.equal(a.augmented_images, b.augmented_images)
        and a.captions == b.captions
        and a.augmented_captions == b.augmented_captions
    )


# --- views ---


def test_an_epoch_has_every_row_at_most_once_in_another_order(small, model):
    first, second = epoch_of(small, model), epoch_of(small, model, epoch=1)
    assert [len(batch.rows) for batch in first] == [64, 64, 64]
    rows = torch.cat([batch.rows for batch in first]).tolist()
    assert len(set(rows)) == 192
    assert rows != torch.cat([batch.rows for batch in second]).tolist()
    for batch in first:
        for row, image, caption in zip(batch.rows.tolist(), batch.images, batch.captions, strict=True):
            assert caption in small[row]["captions"]
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(small[row]["image"].convert("RGB")))


def test_views_depend_on_seed_epoch_and_row_alone(small, model):
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    first = epoch_of(small, model)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert random.getstate() == python_state
    torch.manual_seed(99)
    assert all(map(same, first, epoch_of(small, model)))
    assert all(map(same, first, epoch_of(small, model, num_workers=2)))
    assert all(map(same, first[1:], epoch_of(small, model, skip=1)))
    assert not same(first[0], epoch_of(small, model, seed=1)[0])


def test_augmented_captions_are_drawn_once_or_every_epoch(small, model):
    def captions(epoch, **more):
        return {
            (row, caption): augmented
            for batch in epoch_of(small, model, batch_size=200, epoch=epoch, **more)
            for row, caption, augmented in zip(
                batch.rows.tolist(), batch.captions, batch.augmented_captions, strict=True
            )
        }

    assert captions(0) == captions(1)
    assert captions(0, resample_captions=True) != captions(1, resample_captions=True)


def test_images_are_augmented_anew_in_every_epoch(small, model):
    def images(epoch):
        (batch,) = epoch_of(small, model, batch_size=200, epoch=epoch)
        return batch.augmented_images[batch.rows.argsort()]

    assert not torch.equal(images(0), images(1))


def test_palette_and_cmyk_images_are_augmented(model):
    images = [Image.new(mode, (12, 9)) for mode in ("P", "CMYK", "L")] + [Image.new("RGBA", (12, 9), (9, 9, 9, 255))]
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    pairs = datasets.Dataset.from_dict({"image": images, "captions": [["a photo", "a picture"]] * 4}, features=features)
    (batch,) = epoch_of(pairs, model, batch_size=4)
    assert batch.augmented_images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_named_in_one_sentence(num_workers, small, model):
    rows = small.select(range(64)).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[37]["image"]["bytes"] = rows[37]["image"]["bytes"][:-40]
    data = datasets.Dataset.from_list(rows, features=small.features)
    with pytest.raises(ValueError, match=r"^row 37: the image cannot be decoded .*\Z") as error:
        epoch_of(data, model, num_workers=num_workers)
    assert "\n" not in str(error.value)


def test_fewer_pairs_than_a_batch(small, model):
    with pytest.raises(ValueError, match="200 pairs, fewer than one batch of 256"):
        epoch_of(small, model, batch_size=256)


# --- loss ---


def test_views_are_encoded_in_one_pass_of_each_tower(small, model):
    (batch,) = epoch_of(small, model, batch_size=200)
    calls = []
    model.model.visual.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    e = encode_views(model, batch, ["the number one", "the digit two"])
    assert calls == [400]
    assert e.extra_texts.shape[0] == 2
    for part in (e.images, e.augmented_images, e.texts, e.augmented_texts, e.extra_texts):
        assert torch.allclose(part.norm(dim=1), torch.ones(len(part)), atol=1e-5)
    expected = nn.functional.normalize(model.encode_text(batch.augmented_captions), dim=-1)
    assert torch.allclose(e.augmented_texts, expected, atol=1e-5)
    assert e.scale.item() == pytest.approx(model.logit_scale.exp().item())


def test_views_have_to_be_there(small, model):
    (batch,) = epoch_of(small, model, batch_size=200, synonyms=None)
    with pytest.raises(ValueError, match="no augmented views"):
        encode_views(model, batch)


# --- optimiser ---


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
        self.bn1 = nn.BatchNorm2d(1)
        self.positional_embedding = nn.Parameter(torch.zeros(3, 3))
        self.logit_scale = nn.Parameter(torch.zeros(()))


def test_the_authors_weight_decay_goes_by_names():
    toy = Toy()
    names = {parameter: name for name, parameter in toy.named_parameters()}
    spared, decayed = ({names[p] for p in group["params"]} for group in released_groups(toy, 0.1))
    assert spared == {"bn1.weight", "bn1.bias", "logit_scale", "downsample.1.bias"}
    # A BatchNorm that does not say so in its name decays.
    assert decayed == {"downsample.0.weight", "downsample.1.weight", "positional_embedding"}


def rates(model, pairs, **more):
    seen = []
    options = FineTuning(num_epochs=4, batch_size=20, learning_rate=1e-5, warmup_steps=5, **more)
    clean_clip(model, pairs, SYNONYMS, options, on_step=lambda step, values: seen.append(values["learning_rate"]))
    return seen


@pytest.mark.slow
def test_schedule(small, model):
    seen = rates(model, small)
    assert len(seen) == 40
    check = {0: 2.000e-6, 4: 1.000e-5, 6: 9.980e-6, 39: 2.013e-8}
    assert {step: seen[step] for step in check} == pytest.approx(check, rel=1e-3)
    assert 0 <= model.logit_scale.item() <= MAX_LOG_SCALE


@pytest.mark.slow
def test_the_authors_schedule_starts_late_and_rises_at_the_end(small, model):
    seen, usual = rates(copy.deepcopy(model), small, as_released=True), rates(model, small)
    assert len(seen) == 40
    assert seen[:30] == pytest.approx(usual[10:])
    assert seen[30] == 0
    assert seen[31] == pytest.approx(2.013e-8, rel=1e-3)
    assert all(np.diff(seen[30:]) > 0)


def test_logit_scale_is_kept_in_range(small, model):
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    clean_clip(model, small, SYNONYMS, FineTuning(num_epochs=1, learning_rate=1e-6))
    assert model.logit_scale.item() <= MAX_LOG_SCALE


VIT = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 16}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "image_size": 32}


def clip_with(vision):
    text = {"context_length": 14, "vocab_size": beds_tokenizer().vocab_size, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = build(config)
    return OpenClipModel(inner, config, beds_tokenizer(), image_input({}, inner)).eval()


def beds_tokenizer():
    return WordTokenizer(toy_data.vocabulary(), 14)


def authors_checkpoint(model, **more):
    """As another implementation of the same model leaves it: parameters in its own order, after one step.

    The moments of a parameter are told by its name.
    """
    state = model.model.state_dict()
    order = sorted(state, key=lambda name: name[::-1])
    own = dict(model.model.named_parameters())
    parameters = {f"module.{name}": nn.Parameter(own[name].detach().clone()) for name in order if name in own}
    rule = ("bn", "ln", "bias", "logit_scale")
    spared = [p for name, p in parameters.items() if any(part in name for part in rule)]
    decayed = [p for name, p in parameters.items() if not any(part in name for part in rule)]
    adamw = torch.optim.AdamW(
        [{"params": spared, "weight_decay": 0}, {"params": decayed, "weight_decay": 0.3}], lr=1e-3
    )
    for name, parameter in parameters.items():
        parameter.grad = torch.full_like(parameter, len(name))
    adamw.step()
    weights = {f"module.{name}": state[name] for name in order}
    return {"epoch": 1, "name": "x", "state_dict": weights, "optimizer": adamw.state_dict(), **more}


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_authors_optimizer_state_belongs_to_parameters_by_name(vision):
    model = clip_with(vision)
    state = released_optimizer_state(authors_checkpoint(model), model)
    adamw = optimizer(model, FineTuning(as_released=True, optimizer_state=state))
    for name, parameter in model.model.named_parameters():
        moments = adamw.state[parameter]
        gradient = torch.full_like(parameter, len(f"module.{name}"))
        torch.testing.assert_close(moments["exp_avg"], gradient * 0.1)
        torch.testing.assert_close(moments["exp_avg_sq"], gradient.square() * 0.001)
        assert float(moments["step"]) == 1
    assert [group["weight_decay"] for group in adamw.param_groups] == [0, 0.3]


def test_an_optimizer_state_of_old_torch_versions(small):
    """Steps were plain numbers then, and groups had fewer options."""
    model = clip_with(VIT)
    checkpoint = authors_checkpoint(model)
    for moments in checkpoint["optimizer"]["state"].values():
        moments["step"] = int(moments["step"])
    for group in checkpoint["optimizer"]["param_groups"]:
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}:
            del group[key]
    state = released_optimizer_state(checkpoint, model)
    options = FineTuning(num_epochs=1, batch_size=50, as_released=True, optimizer_state=state)
    clean_clip(model, small, SYNONYMS, options)


@pytest.mark.slow
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_every_defence_with_the_field_takes_the_authors_checkpoints(vision, small, tmp_path):
    model = clip_with(vision)
    torch.save(authors_checkpoint(model), tmp_path / "victim.pt")
    training = {"num_epochs": 1, "synonyms": "toy-data", "as_released": True, "learning_rate": 1e-4}
    arguments = {"model": model, "data": small.select(range(64)), "reference": None}
    with_state, without = (
        CleanClip(**training, **more).defend(**arguments, run=plait.Run(seed=0))
        for more in ({"optimizer_checkpoint": tmp_path / "victim.pt"}, {})
    )
    assert not torch.equal(with_state.model.token_embedding.weight, without.model.token_embedding.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"state_dict": c["state_dict"]}, "no entry 'optimizer'"),
        (lambda c: {"optimizer": c["optimizer"]}, "no entry 'state_dict'"),
        (lambda c: c | {"state_dict": dict(list(c["state_dict"].items())[1:])}, "lacks the weights"),
        (lambda c: c | {"optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict()}, "groups of 2"),
        (lambda c: c | {"optimizer": {**c["optimizer"], "state": {}}}, "has not made a step yet"),
    ],
    ids=["no optimizer", "no weights", "other weights", "other groups", "no steps"],
)
def test_optimizer_states_of_something_else_are_refused(change, message, small, tmp_path):
    model = clip_with(VIT)
    path = tmp_path / "victim.pt"
    torch.save(change(authors_checkpoint(model)), path)
    method = CleanClip(synonyms="toy-data", as_released=True, optimizer_checkpoint=path)
    with pytest.raises(ValueError, match=rf"optimizer_checkpoint .*victim\.pt cannot be used: .*{message}"):
        method.defend(model=model, data=small, reference=None, run=plait.Run(seed=0))


def test_an_optimizer_state_of_other_shapes_is_refused():
    model, wider = clip_with(VIT), clip_with({**VIT, "patch_size": 4})
    checkpoint = authors_checkpoint(wider)
    with pytest.raises(ValueError, match=r"of visual\.\w+.* is not of the model's shape"):
        released_optimizer_state(checkpoint, model)


def test_the_former_name_of_as_released_is_answered():
    with pytest.raises(PlaitError, match=r"no field 'compat' any more \(did you mean 'as_released'\?\)"):
        plait.load("clean-clip", compat="cleanclip")


def test_an_optimizer_checkpoint_needs_the_authors_schedule(tmp_path):
    with pytest.raises(ValueError, match="only used with as_released: true"):
        CleanClip(optimizer_checkpoint=tmp_path / "victim.pt")


# --- training ---


@pytest.mark.slow
def test_an_interrupted_training_ends_as_an_uninterrupted_one(small, model, checkpoint):
    options = FineTuning(num_epochs=3, batch_size=64, learning_rate=1e-3, warmup_steps=0.1)
    whole = copy.deepcopy(model)
    clean_clip(whole, small, SYNONYMS, options, seed=3)

    class StopError(Exception):
        pass

    def stop(step, values):
        if step == 4:
            raise StopError

    broken = copy.deepcopy(model)
    with pytest.raises(StopError):
        clean_clip(broken, small, SYNONYMS, options, seed=3, checkpoint=checkpoint, on_step=stop)
    resumed, steps = copy.deepcopy(model), []
    clean_clip(
        resumed,
        small,
        SYNONYMS,
        options,
        seed=3,
        checkpoint=checkpoint,
        on_step=lambda s, v: steps.append(s),
    )
    assert steps == [3, 4, 5, 6, 7, 8]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_without_the_in_modal_term_the_gradient_is_that_of_fine_tuning(small, model):
    (batch,) = epoch_of(small, model, batch_size=200)
    images, texts = model.encode_image(batch.images.float() / 255), model.encode_text(batch.captions)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(clip_loss(images, texts, model.logit_scale.exp()), parameters)
    loss = clean_clip_loss(encode_views(model, batch), self_supervised_weight=0.0)
    for a, b in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_divergence_restores_the_last_good_weights(small, model):
    options = FineTuning(num_epochs=2, batch_size=64, warmup_steps=0)
    before = copy.deepcopy(model.state_dict())

    def loss_fn(model, batch):
        return clip_loss(model.encode_image(batch.images.float() / 255), model.encode_text(batch.captions), torch.inf)

    with pytest.raises(DivergedError):
        fine_tune(model, lambda e, s: view_batches(small, model, batch_size=64, seed=0, epoch=e), loss_fn, 3, options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
