"""The methods on real datasets: fields, resuming, samples for ensembles, files, bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from plait import Run, load
from plait.errors import PlaitError
from plait_imaging import Scenes
from plait_imaging.ensembles import Average, LeastSquares
from plait_imaging.restorers import Median
from plait_semiddm_weather import examples
from plait_semiddm_weather.model import WeatherRestorer
from plait_semiddm_weather.networks import Generator
from plait_semiddm_weather.plugin import LoadWeatherRestorer, RestoreWeather, TrainWeatherRestorer
from plait_semiddm_weather.plugin.images import images_of
from plait_semiddm_weather.released import load_released, released_names, released_state
from plait_semiddm_weather.settings import PRESETS, Architecture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    return examples.training()


@pytest.fixture(scope="module")
def trained(example):
    return TrainWeatherRestorer(**example.fields).optimize(None, example.arguments["data"], Run())


def images(dataset, column="image"):
    return [np.array(picture) for picture in dataset[column][:]]


def test_planning_needs_no_diffusers():
    program = (
        "import sys, plait_semiddm_weather.plugin\nprint({'diffusers', 'transformers'} & set(sys.modules) or 'none')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "none"


def test_fields_of_the_preset_and_ones_own():
    networks, training = TrainWeatherRestorer(learning_rate_d=1e-3, base_channels=8).settings()
    assert (networks.base_channels, networks.channel_mult) == (8, (1, 2))
    assert (training.learning_rate_d, training.learning_rate_g) == (1e-3, 1e-3)
    networks, training = TrainWeatherRestorer(training="wavelet-regression").settings()
    assert (networks.kind, training.rule) == ("regression", "supervised")
    _, training = TrainWeatherRestorer(as_released=True, unsup_grad="x0").settings()
    assert (training.half_scale, training.unsup_grad, training.teacher_start) == (True, "x0", "random")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batch_size": 6}, "batch_size is 6"),
        ({"crop_size": 20}, "crop_size is 20"),
        ({"preset": "paper"}, "vgg16 is not given"),
        ({"scorer": "musiq"}, "scorer is 'musiq'"),
    ],
)
def test_values_that_do_not_go_together(fields, sentence):
    with pytest.raises((PlaitError, ValueError), match=sentence):
        TrainWeatherRestorer(**fields)


def test_training_says_what_came_of_it(example):
    run = Run()
    TrainWeatherRestorer(**example.fields).optimize(None, example.arguments["data"], run)
    (report,) = run.reports
    assert "PSNR of the bank" in " ".join(report.notes)
    captions = [[image.caption for image in line] for line in report.panels[1].images]
    assert captions[0] == ["input", "bank", "student", "teacher", "target"]


def test_a_scorer_of_ones_own(example, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def light(images):\n    return images.mean(dim=(1, 2, 3))\n")
    method = TrainWeatherRestorer(**example.fields, scorer=f"{file}:light")
    model = method.optimize(None, example.arguments["data"], Run())
    assert isinstance(model, WeatherRestorer)


def test_going_on_from_a_model(example, trained):
    fields = {**example.fields, "training": "supervised", "num_steps_stage1": 1}
    further = TrainWeatherRestorer(**fields).optimize(trained, example.arguments["data"], Run())
    assert not torch.equal(next(further.student.parameters()), next(trained.student.parameters()))
    assert further.scorer is not None


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda data: {"labelled": data["labelled"]}, "data has no unlabelled images"),
        (lambda data: {"unlabelled": data["labelled"]}, "data has no labelled images"),
        (lambda data: {**data, "test": data["labelled"]}, "data names 'test'"),
        (lambda data: {**data, "labelled": 3}, "labelled is a int"),
        (lambda data: {**data, "unlabelled": data["labelled"].select([])}, "unlabelled has no images"),
        (
            lambda data: {**data, "labelled": data["labelled"].remove_columns("target")},
            "labelled has no column 'target'",
        ),
    ],
)
def test_data_that_cannot_be_trained_on(example, data, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainWeatherRestorer(**example.fields).optimize(None, data(example.arguments["data"]), Run())


def test_an_image_that_cannot_be_read_is_named_by_its_row():
    pictures = [PILImage.new("RGB", (16, 16), "red"), PILImage.new("RGBA", (16, 16))]
    features = Features({"image": Image(), "target": Image()})
    labelled, _ = images_of(Dataset.from_dict({"image": pictures, "target": pictures}, features=features), 8, False)
    assert torch.equal(*labelled[0])
    with pytest.raises(ValueError, match="column 'image', row 1 is partly transparent"):
        labelled[1]


def test_images_smaller_than_a_crop(example):
    fields = {**example.fields, "crop_size": 32}
    with pytest.raises(ValueError, match=r"image chelsea_0 of labelled is 16×16 pixels and crop_size 32"):
        TrainWeatherRestorer(**fields).optimize(None, example.arguments["data"], Run())


def test_every_ensemble_takes_the_samples(example, trained):
    data = example.arguments["data"]["labelled"]
    sampled = RestoreWeather(num_samples=3).restore(trained, data, Run())
    median = Median().restore(data, Run())
    assert Scenes.of_candidates(sampled).models == ("sample_0", "sample_1", "sample_2")
    mixed = {"median": median, "semiddm": sampled}
    assert len(Scenes.of_candidates(mixed).models) == 4
    for method in (Average(), LeastSquares(), load("ensir", min_samples=2)):
        fused = method.ensemble(candidates=mixed, reference={**mixed, "target": data}, run=Run())
        assert fused["name"][:] == data["name"][:]
    alone = Average().ensemble(candidates=sampled, reference=None, run=Run())
    mean = RestoreWeather(num_samples=3, reduce="mean").restore(trained, data, Run())
    for one, other in zip(images(alone), images(mean), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    one = RestoreWeather().restore(trained, sampled, Run())
    assert not [name for name in one.column_names if name.startswith("image_sample")]


def test_restorations_depend_on_names_and_not_on_places(example, trained):
    data = example.arguments["data"]["labelled"]
    whole = images(RestoreWeather().restore(trained, data, Run()))
    part = images(RestoreWeather().restore(trained, data.select([2]), Run()))
    assert np.array_equal(part[0], whole[2])
    student = images(RestoreWeather(weights="student").restore(trained, data, Run()))
    assert not np.array_equal(student[2], whole[2])
    tiled = images(RestoreWeather(tile=8, stride=4).restore(trained, data, Run()))
    assert tiled[0].shape == whole[0].shape
    with pytest.raises(ValueError, match="a stride above the tile"):
        RestoreWeather(tile=8)
    seeded = [images(RestoreWeather(first_seed=0).restore(trained, data, Run(seed=seed))) for seed in (0, 1)]
    assert np.array_equal(seeded[0][1], seeded[1][1])
    splits = RestoreWeather().restore(trained, {"a": data, "b": data}, Run())
    assert set(splits) == {"a", "b"}


def test_saved_folders(trained, tmp_path):
    trained.save_pretrained(tmp_path / "model")
    again = LoadWeatherRestorer(path=tmp_path / "model").load_model(Run())
    assert torch.equal(again.restore(torch.ones(1, 3, 8, 8), [0]), trained.restore(torch.ones(1, 3, 8, 8), [0]))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        LoadWeatherRestorer(path=tmp_path).load_model(Run())


def test_names_of_the_released_checkpoint():
    with torch.device("meta"):
        network = Generator(**{k: v for k, v in PRESETS["paper"][0].items() if not k.startswith(("disc", "time"))})
    names = released_names(network)
    assert names.keys() == network.state_dict().keys()
    assert len(set(names.values())) == len(names)
    assert names["time_in.weight"] == "all_modules.0.weight"
    assert names["first.weight"] == "all_modules.2.weight"
    assert names["mapping.layers.4.bias"] == "z_transform.9.bias"
    assert names["down.0.conv_0.weight"] == "all_modules.5.Conv_0.weight"
    assert names["pyramid.0.conv.weight"] == "all_modules.6.conv.weight"
    assert names["encoder_attention.1.0.query.weight"] == "all_modules.8.NIN_0.W"


def test_a_released_checkpoint_comes_back(tmp_path, monkeypatch):
    networks = {**examples.TINY, "channel_mult": (1, 2), "attention_levels": (1,)}
    monkeypatch.setitem(PRESETS, "paper", (networks, {}))
    model = WeatherRestorer(Architecture(**networks), seed=3)
    state = {f"module.{name}": value for name, value in released_state(model.student).items()}
    torch.save({"netG_dict": state, "epoch": 3}, tmp_path / "content.pth")
    again = load_released(tmp_path / "content.pth")
    for name, value in model.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name
    del state["module.all_modules.2.weight"]
    torch.save({"netG_dict": state}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"has no all_modules\.2\.weight"):
        load_released(tmp_path / "less.pth")
    torch.save({"other": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="netG_dict"):
        load_released(tmp_path / "other.pth")
