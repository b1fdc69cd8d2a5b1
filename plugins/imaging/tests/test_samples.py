"""Several samples of one image: written together, read as models by every ensemble, gone after the next restorer."""

import pytest
import torch
from plait import Run
from plait_imaging import Scenes, write_images
from plait_imaging.ensembles import Average, BestSingle
from plait_imaging.restorers import Median
from plait_imaging.sources import Photos
from plait_imaging.transforms import GaussianNoise


@pytest.fixture(scope="module")
def noisy():
    data = Photos(splits={"test": ("chelsea",)}, tile_size=24).load_data(Run())["test"]
    return GaussianNoise().transform(data, Run())


@pytest.fixture(scope="module")
def sampled(noisy):
    images = (torch.full((4, 3, 24, 24), 40 * (row + 1), dtype=torch.uint8) for row in range(2))
    levels = torch.tensor([0, 0, 10, 20], dtype=torch.uint8).view(4, 1, 1, 1)
    return write_images(Run(), noisy, (image + levels for image in images), num_samples=3)


def level(dataset, row=0):
    return dataset[row]["image"].getpixel((0, 0))[0]


def test_samples_are_models_alone(sampled):
    assert [name for name in sampled.column_names if name.startswith("image")] == [
        "image", "image_sample_0", "image_sample_1", "image_sample_2",
    ]  # fmt: skip
    assert Scenes.of_candidates(sampled).models == ("sample_0", "sample_1", "sample_2")
    fused = Average().ensemble(sampled, None, Run())
    assert level(fused) == 50
    assert not [name for name in fused.column_names if name.startswith("image_sample")]


def test_samples_are_models_beside_others(sampled, noisy):
    median = Median().restore(noisy, Run())
    candidates = {"median": median, "weather": sampled}
    assert Scenes.of_candidates(candidates).models == ("median", "weather 0", "weather 1", "weather 2")
    best = BestSingle().ensemble(candidates, {**candidates, "target": noisy}, Run())
    assert len(best) == 2


def test_a_later_restorer_leaves_no_old_samples(sampled):
    again = Median().restore(sampled, Run())
    assert [name for name in again.column_names if name.startswith("image")] == ["image"]
    with pytest.raises(ValueError, match="an ensemble needs at least 2"):
        Scenes.of_candidates({"median": again})


def test_other_numbers_of_samples_are_refused(noisy):
    with pytest.raises(ValueError, match=r"row 0 is of shape \(2, 3, 24, 24\); expected \[3, 3, H, W\]"):
        write_images(Run(), noisy, iter([torch.zeros(2, 3, 24, 24)]), num_samples=2)
