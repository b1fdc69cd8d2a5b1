"""Training, accuracy and attacks on small real data."""

import copy

import datasets
import numpy as np
import plait
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import codecs
from plait.demo.pictures import digits
from plait.testing.examples import classifier as toy
from plait_vision.adversarial import fgsm, pgd, to_eight_bits
from plait_vision.recognition import Accuracy, ClassifierTraining, Fgsm, PgdLogits, Timm, Torchvision
from plait_vision.supervised import Settings, train_classifier
from torch import nn


def levels_of(data):
    return np.stack([np.asarray(image, dtype=int) for image in data["image"]])


@pytest.fixture(scope="module")
def data():
    return digits(200)


@pytest.fixture(scope="module")
def trained(data):
    method = ClassifierTraining(num_epochs=30, batch_size=50, learning_rate=0.02)
    return method.optimize(model=toy(), data=data, run=plait.Run())


def accuracy(model, data, **fields):
    return Accuracy(**fields).evaluate(model=model, data=data, run=plait.Run())


def pictures(*colours, side=8):
    return [Image.new("RGB", (side, side), colour) for colour in colours]


def labelled(images, labels, names):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


class Brightness(nn.Module):
    """Class 1 where an image is brighter than 0.5."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, images):
        score = self.weight * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


# ---------------------------------------------------------------------------------------------- accuracy


def test_accuracy_by_hand():
    data = labelled(pictures("white", "black", "white", "black"), [1, 0, 0, 1], ["dark", "light"])
    run = plait.Run()
    report = Accuracy(top=(1, 2, 5), target="light", per_class=True, batch_size=3).evaluate(
        model=Brightness(), data=data, run=run
    )
    (row,) = report.rows
    assert row["accuracy"] == 0.5
    assert row["top-2"] == 1.0
    assert "top-5" not in row
    assert row["ASR"] == 0.5  # of the two dark ones, one is called light
    (table,) = run.reports
    assert [(line["class"], line["images"], line["accuracy"]) for line in table.rows] == [
        ("dark", 2, 0.5),
        ("light", 2, 0.5),
    ]


def test_several_models_on_several_data_sets_have_a_row_each(data, trained):
    report = accuracy({"fresh": toy(), "trained": trained}, {"a": data, "b": data.select(range(5))})
    assert len(report.rows) == 4
    assert report.value("accuracy", model="trained", data="a") > report.value("accuracy", model="fresh", data="a")


def test_classes_go_together_by_name():
    names = ["light", "dark"]
    data = labelled(pictures("white", "black"), [0, 1], names)
    model = plait_classifier(["dark", "light"])
    assert accuracy(model, data).value("accuracy") == 1.0
    with pytest.raises(ValueError, match="class 'grey' of the data is none of the model's"):
        accuracy(model, labelled(pictures("white"), [0], ["grey", "dark"]))
    assert accuracy(model, data, class_names=("light", "dark")).value("accuracy") == 0.0  # by number


def test_texts_have_the_numbers_of_the_models_classes_and_no_others():
    data = datasets.Dataset.from_dict({"image": pictures("white"), "label": ["light"]})  # alone, light would be class 0
    data = data.cast_column("image", datasets.Image())
    assert accuracy(plait_classifier(["dark", "light"]), data).value("accuracy") == 1.0
    assert accuracy(Brightness(), data, class_names=("dark", "light")).value("accuracy") == 1.0
    for method in (Accuracy().evaluate, ClassifierTraining().optimize, Fgsm().attack):
        with pytest.raises(ValueError, match="the labels are texts, and the model has no names for its classes"):
            method(model=Brightness(), data=data, run=plait.Run())


def test_data_that_lacks_classes_of_a_model_without_names_is_told():
    model, warnings = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), []
    run = plait.Run(on_warning=warnings.append)
    for names in (["dark", "grey", "light"], ["dark", "light"]):
        Accuracy().evaluate(model=model, data=labelled(pictures("white"), [1], names), run=run)
    (warning,) = warnings
    assert warning.startswith("the model: 3 classes without names, and the data has 2 with names")


def plait_classifier(names):
    from plait_vision import Classifier

    return Classifier(Brightness(), class_names=names)


def test_images_of_several_sizes_are_measured(trained):
    images = [*pictures("white"), Image.new("RGB", (4, 6), "black"), *pictures("black")]
    assert accuracy(Brightness(), labelled(images, [1, 0, 0], ["dark", "light"])).value("accuracy") == 1.0


@pytest.mark.parametrize(
    ("fields", "message"), [({"target": "zebra"}, "target is 'zebra'"), ({"target": 10}, "target is 10")]
)
def test_an_unknown_target_is_refused(data, fields, message):
    with pytest.raises(ValueError, match=message):
        accuracy(toy(), data, **fields)


def test_labels_that_the_model_does_not_know_are_refused(data):
    with pytest.raises(ValueError, match="the model tells 2 classes apart"):
        accuracy(Brightness(), data)


def test_a_model_that_is_not_sound_gets_no_accuracy(data):
    model = toy()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        accuracy(model, data)


# ---------------------------------------------------------------------------------------------- training


def test_training_learns_thaws_and_leaves_its_input(data, trained):
    assert accuracy(trained, data).value("accuracy") > 0.85
    frozen = toy().requires_grad_(False)
    again = ClassifierTraining(num_epochs=1).optimize(model=frozen, data={"train": data}, run=plait.Run())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not torch.equal(next(again.parameters()), next(frozen.parameters()))


def test_a_batch_norm_is_trained_though_one_image_is_left_over(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10))
    fields = {"num_epochs": 1, "batch_size": 4, "flip": True, "crop_padding": 2, "optimizer": "sgd"}
    result = ClassifierTraining(**fields).optimize(model=model, data=data.select(range(9)), run=plait.Run())
    assert result[2].num_batches_tracked == 2


@pytest.mark.slow
def test_an_image_text_model_is_trained_and_attacked_as_a_classifier():
    clip = pytest.importorskip("plait_clip")
    pairs = clip.digit_pairs(40)
    model = clip.tiny_model()
    before = accuracy(model, pairs).value("accuracy")
    method = ClassifierTraining(num_epochs=15, batch_size=20, learning_rate=0.01)
    result = method.optimize(model=model, data=pairs, run=plait.Run())
    assert isinstance(result, clip.ImageTextModel)
    after = accuracy(result, pairs).value("accuracy")
    assert after > before
    moved = PgdLogits(epsilon=64 / 255).attack(model=result, data=pairs, run=plait.Run())
    assert accuracy(result, moved).value("accuracy") < after
    assert moved.column_names == pairs.column_names


def test_training_refuses_images_of_several_sizes(data):
    images = [*pictures("white"), Image.new("RGB", (4, 6), "black")]
    mixed = labelled(images, [1, 0], ["dark", "light"])
    with pytest.raises(ValueError, match="differ in size"):
        ClassifierTraining().optimize(model=Brightness(), data=mixed, run=plait.Run())


class Killed(BaseException):
    pass


class Checkpoint:
    state = None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)


def test_a_training_that_was_killed_ends_in_the_same_bits():
    settings = Settings(
        num_epochs=3, batch_size=4, learning_rate=0.1, optimizer="adamw", momentum=0.9, weight_decay=0.0, schedule="cosine",
        label_smoothing=0.1, flip=True, crop_padding=1, precision="fp32",
    )  # fmt: skip
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 3

    def train(checkpoint, steps=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))

        def track(iterable):
            for done, item in enumerate(iterable):
                if done == steps:
                    raise Killed
                yield item

        train_classifier(
            model, lambda rows: images[rows], labels, settings, seed=3, device=torch.device("cpu"),
            checkpoint=checkpoint, track=track, seconds_between_saves=0,
        )  # fmt: skip
        return model

    checkpoint = Checkpoint()
    with pytest.raises(Killed):
        train(checkpoint, steps=5)
    assert checkpoint.state["step"] == 5
    resumed, whole = train(checkpoint), train(None)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_training_tells_that_it_diverges(data):
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        ClassifierTraining(learning_rate=1e30, optimizer="sgd").optimize(model=toy(), data=data, run=plait.Run())


# ---------------------------------------------------------------------------------------------- attacks


def test_pgd_is_stronger_than_fgsm_and_fgsm_than_nothing(data, trained):
    clean = accuracy(trained, data).value("accuracy")
    run = plait.Run()
    by_fgsm = accuracy(trained, Fgsm(epsilon=24 / 255).attack(model=trained, data=data, run=run)).value("accuracy")
    moved = PgdLogits(epsilon=24 / 255).attack(model=trained, data=data, run=run)
    by_pgd = accuracy(trained, moved).value("accuracy")
    assert by_pgd <= by_fgsm < clean
    assert np.abs(levels_of(moved) - levels_of(data)).max() <= 24
    assert moved["label"] == data["label"]
    assert moved["name"] == data["name"]


def test_pgd_holds_its_budget_in_l2_in_8_bits(data, trained):
    moved = PgdLogits(norm="l2", epsilon=0.5, random_start=False).attack(model=trained, data=data, run=plait.Run())
    change = (levels_of(moved) - levels_of(data)).reshape(len(data), -1)
    lengths = np.sqrt((change**2).sum(1)) / 255
    assert lengths.max() <= 0.5
    assert np.median(lengths) > 0.45


def test_an_attack_leads_to_a_target(data, trained):
    moved = PgdLogits(epsilon=64 / 255, target="3", loss="margin").attack(model=trained, data=data, run=plait.Run())
    assert accuracy(trained, data, target="3").value("ASR") < 0.1
    assert accuracy(trained, moved, target="3").value("ASR") > 0.5


def test_an_attack_does_not_depend_on_the_batch_and_takes_any_sizes():
    images = [*pictures((100, 90, 80)), Image.new("RGB", (4, 6), (99, 99, 99)), *pictures((120, 140, 130))]
    data = labelled(images, [0, 0, 1], ["dark", "light"])
    one, three = (PgdLogits(batch_size=size).attack(model=Brightness(), data=data, run=plait.Run()) for size in (1, 3))
    assert [image.size for image in one["image"]] == [(8, 8), (4, 6), (8, 8)]
    for a, b in zip(one["image"], three["image"], strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


def test_every_split_is_attacked_and_named(data, trained):
    parts = {"train": data.select(range(4)), "test": data.select(range(4, 9))}
    moved = Fgsm().attack(model=trained, data=parts, run=plait.Run())
    assert [len(moved["train"]), len(moved["test"])] == [4, 5]


def test_fgsm_moves_every_pixel_by_epsilon_towards_the_loss():
    images = torch.full((1, 3, 2, 2), 0.4)
    assert torch.equal(fgsm(Brightness(), images, torch.tensor([0]), 0.1), images + 0.1)
    assert torch.equal(fgsm(Brightness(), images, torch.tensor([0]), 0.1, targeted=True), images - 0.1)


def test_pgd_stays_in_the_ball_and_in_the_cube():
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for norm in ("linf", "l2"):
        moved = pgd(Brightness(), images, torch.tensor([0, 1, 0, 1]), 0.2, norm=norm, step_size=0.1, num_steps=5)
        change = (moved - images).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        assert size.max() <= 0.2 + 1e-6
        assert size.min() > 0.05
        assert 0 <= moved.min() <= moved.max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["linf", "l2"]), st.floats(1.2 / 255, 0.6))
def test_a_budget_holds_after_rounding(seed, norm, epsilon):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, (2, 3, 6, 5), generator=generator, dtype=torch.uint8)
    noise = torch.randn(2, 3, 6, 5, generator=generator)
    size = noise.abs().amax((1, 2, 3)) if norm == "linf" else noise.flatten(1).norm(dim=1)
    changed = (levels.float() / 255 + epsilon * noise / size[:, None, None, None]).clamp(0, 1)
    change = (to_eight_bits(changed, levels, epsilon, norm).double() - levels.double()).flatten(1) / 255
    moved = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert moved.max() <= epsilon + 1e-9
    # and it is the nearest that can be had: without a budget, nothing but the rounding differs
    free = to_eight_bits(changed, levels, None)
    assert (free.double() / 255 - changed.double()).abs().max() <= 0.5 / 255 + 1e-6


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Brightness()

    def forward(self, images):
        with torch.no_grad():
            return self.inner(images)


def test_what_has_no_gradient_is_not_left_unattacked():
    data = labelled(pictures("white"), [1], ["dark", "light"])
    with pytest.raises(ValueError, match="no gradient"):
        PgdLogits().attack(model=Rounded(), data=data, run=plait.Run())
    warnings = []
    run = plait.Run(on_warning=warnings.append)
    black = labelled(pictures("black"), [0], ["dark", "light"])
    Fgsm(target="dark").attack(model=Brightness(), data=black, run=run)
    assert "1 of 1 images are as they were" in warnings[0]


def test_a_budget_below_one_level_is_refused():
    with pytest.raises(ValueError, match="below one 8-bit level"):
        Fgsm(epsilon=0.5 / 255)


# ---------------------------------------------------------------------------------------------- networks


def test_torchvision_takes_its_classes_from_the_data_and_weights_from_a_file(tmp_path):
    pytest.importorskip("torchvision")
    data = labelled(pictures("white", "black"), [1, 0], ["dark", "light"])
    fields = {"architecture": "shufflenet_v2_x0_5"}
    warnings = []
    run = plait.Run(on_warning=warnings.append)
    big = Torchvision(**fields, num_classes=7).load_model(data=None, run=run)
    torch.save({"state_dict": big.network.state_dict()}, tmp_path / "weights.pth")
    loaded = Torchvision(**fields, weights=tmp_path / "weights.pth").load_model(data=data, run=run)
    assert loaded.class_names == ("dark", "light")
    assert loaded.preparation.size == (224, 224)
    assert torch.equal(loaded.network.conv1[0].weight, big.network.conv1[0].weight)
    assert loaded.network.fc.out_features == 2
    assert "fc.weight, fc.bias are fresh" in warnings[0]
    whole = Torchvision(**fields, weights=tmp_path / "weights.pth", size=32).load_model(data=None, run=run)
    assert whole.network.fc.out_features == 7
    assert whole.preparation.size == (32, 32)
    codecs.save(whole, tmp_path / "stored")
    again = codecs.load(tmp_path / "stored")
    given = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again(given), whole(given))
    with pytest.raises(ValueError, match="are not of this network"):
        Torchvision(architecture="squeezenet1_1", weights=tmp_path / "weights.pth").load_model(data=data, run=run)


def test_networks_are_checked_by_name():
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        Torchvision(architecture="resnet81", num_classes=2).load_model(data=None, run=plait.Run())
    with pytest.raises(ValueError, match="did you mean 'test_resnet'"):
        Timm(architecture="test_resnett", num_classes=2).load_model(data=None, run=plait.Run())
    with pytest.raises(ValueError, match="number of classes is not known"):
        Timm(architecture="test_resnet").load_model(data=None, run=plait.Run())


def test_a_small_stem_keeps_small_images():
    network = Torchvision(architecture="resnet18", num_classes=2, stem="small").load_model(data=None, run=plait.Run())
    assert network.network.conv1.stride == (1, 1)
    with pytest.raises(ValueError, match="stem small is of ResNets"):
        Torchvision(architecture="alexnet", num_classes=2, stem="small").load_model(data=None, run=plait.Run())


def test_timm_prepares_as_it_says_and_survives_storage(tmp_path):
    fresh = Timm(architecture="test_resnet", num_classes=2).load_model(data=None, run=plait.Run())
    assert fresh.preparation.size is None
    fixed = Timm(architecture="test_vit", num_classes=2, arguments={"img_size": 32}).load_model(
        data=None, run=plait.Run()
    )
    assert fixed.preparation.size == (32, 32)
    codecs.save(fixed, tmp_path / "stored")
    given = torch.rand(1, 3, 50, 40)
    with torch.no_grad():
        assert torch.equal(codecs.load(tmp_path / "stored")(given), fixed(given))
