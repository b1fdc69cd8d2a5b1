"""The small check on photographs: what every run of it has shown, and nothing about who wins."""

import pytest
import torch
from plait import Run
from plait_imaging.sources import Photos
from plait_imaging.transforms import RandomCrops, Weathers
from plait_semiddm_weather.plugin.images import Images
from plait_semiddm_weather.semiddm_weather import semiddm_weather
from plait_semiddm_weather.settings import preset

pytestmark = pytest.mark.slow

LIGHT = {"severity": (0.4, 0.8), "air_light": (0.85, 0.95), "angle": (0, 0.35)}
HEAVY = {"severity": (0.9, 1.5), "air_light": (0.75, 0.85), "angle": (0.35, 0.7)}


def crops(photographs, count, weather, step):
    whole = Photos(splits={"data": photographs}, layout="whole").load_data(Run())["data"]
    data = RandomCrops(crops_per_image=count).transform(whole, Run(step=f"crops {step}"))
    return Weathers(**weather).transform(data, Run(step=f"weather {step}"))


class Held(Images):
    """Images that are decoded once."""

    def __init__(self, dataset, paired):
        super().__init__(dataset, paired)
        self.rows = [super(Held, self).__getitem__(row) for row in range(len(dataset))]

    def __getitem__(self, row):
        return self.rows[row]


def stacked(images):
    degraded, clean = zip(*[images[row] for row in range(len(images))], strict=True)
    return torch.stack(degraded), torch.stack(clean)


def psnr(images, clean):
    return -10 * (images - clean).square().flatten(1).mean(dim=1).clamp_min(1e-9).log10()


@pytest.fixture(scope="module")
def checked():
    labelled = Held(crops(("china", "coffee"), 24, LIGHT, "labelled"), paired=True)
    unlabelled = Held(crops(("astronaut", "flower"), 8, HEAVY, "unlabelled"), paired=False)
    test = Held(crops(("chelsea", "rocket", "motorcycle"), 8, LIGHT, "test"), paired=True)
    networks, training = preset("small", rule="supervised", batch_size=4, num_steps_stage1=80, ranker_steps=100)
    start = semiddm_weather(labelled, None, networks, training, seed=0).model
    networks, training = preset("small", batch_size=4, num_steps_stage2=6)
    semi = semiddm_weather(labelled, unlabelled, networks, training, model=start, seed=0)
    return start, semi, test


def test_rain_snow_and_haze_gain_a_decibel_in_both_stages(checked):
    start, semi, test = checked
    degraded, clean = stacked(test)
    before = psnr(degraded, clean)
    for model, weights in ((start, "student"), (semi.model, "teacher")):
        gain = psnr(model.restore(degraded, range(len(test)), weights=weights)[0], clean) - before
        for weather in ("rain", "snow", "haze"):
            assert gain[[name == weather for name in test.domains]].mean() >= 1, weather


def test_the_scorer_prefers_clean_images(checked):
    start, _, test = checked
    degraded, clean = stacked(test)
    assert (start.score(clean) > start.score(degraded)).float().mean() >= 0.9


def test_the_mean_of_eight_samples_is_at_least_as_similar_as_one(checked):
    from skimage.metrics import structural_similarity

    start, _, test = checked
    degraded, clean = stacked(test)
    samples = start.restore(degraded[:12], range(12), num_samples=8)

    def similarity(images):
        pairs = zip(images.numpy(), clean[:12].numpy(), strict=True)
        return sum(structural_similarity(one, other, data_range=1, channel_axis=0) for one, other in pairs)

    assert similarity(samples.mean(dim=0)) >= similarity(samples[0])


def test_the_bank_does_not_get_worse_by_its_own_measure(checked):
    _, semi, _ = checked
    assert semi.bank.scorer.startswith("ranker ")
    scores = semi.model.score(semi.bank.get(torch.arange(len(semi.bank)))).double()
    assert torch.allclose(scores, semi.bank.best_score, atol=1e-3)
