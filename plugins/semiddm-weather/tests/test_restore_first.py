"""A model that restores first: the composition, its gradients, saving, and the score of a model's scorer."""

import pytest
import torch
from plait import Run, load
from plait_clip import ImageTextModel, digit_pairs, tiny_fusion_model, tiny_model
from plait_semiddm_weather import examples
from plait_semiddm_weather.model import WeatherRestorer, derived_seed
from plait_semiddm_weather.plugin.purifying import RestoreFirst
from plait_semiddm_weather.plugin.scoring import LearnedQuality
from plait_semiddm_weather.purified import RestoringModel
from plait_semiddm_weather.settings import Architecture


@pytest.fixture(scope="module")
def parts():
    restorer = WeatherRestorer(Architecture(**examples.TINY), seed=1).eval()
    with torch.no_grad():
        for parameter in restorer.teacher.parameters():
            parameter.add_(0.02)  # away from the identity
    return tiny_model(), restorer


def test_the_embedding_is_that_of_the_restored_image(parts):
    model, restorer = parts
    images = torch.rand(3, 3, model.image_size, model.image_size)
    defended = RestoreFirst(num_samples=2, first_seed=5).defend(model, restorer, Run())
    expected = []
    for number in (5, 6):
        random = [torch.Generator().manual_seed(derived_seed(number)) for _ in range(3)]
        expected.append(model.eval().encode_image(restorer.sample(images, random)))
    found = defended.encode_image(images)
    assert torch.allclose(found, torch.stack(expected).mean(dim=0), atol=1e-5)
    assert torch.allclose(defended.encode_image(images[1:2]), found[1:2], atol=1e-5)
    assert torch.equal(defended.encode_text(["a seven"]), model.encode_text(["a seven"]))


def test_gradients_reach_the_pixels_through_the_restorer(parts):
    model, restorer = parts
    images = torch.rand(1, 3, model.image_size, model.image_size, requires_grad=True)
    RestoreFirst().defend(model, restorer, Run()).encode_image(images).sum().backward()
    through = images.grad.clone()
    images.grad = None
    model.encode_image(images).sum().backward()
    assert through.abs().sum() > 0
    assert not torch.allclose(through, images.grad)


def test_saved_and_loaded(parts, tmp_path):
    defended = RestoreFirst(num_samples=2).defend(*parts, Run())
    defended.save_pretrained(tmp_path / "a")
    again = RestoringModel.from_pretrained(tmp_path / "a")
    images = torch.rand(2, 3, defended.image_size, defended.image_size)
    assert isinstance(again, ImageTextModel)
    assert torch.equal(again.eval().encode_image(images), defended.encode_image(images))
    with pytest.raises(ValueError, match=r"holds no restore_first\.json"):
        RestoringModel.from_pretrained(tmp_path)


def test_what_is_no_restorer_or_has_more_than_towers(parts):
    with pytest.raises(ValueError, match="reference is a Linear"):
        RestoreFirst().defend(parts[0], torch.nn.Linear(1, 1), Run())
    with pytest.raises(ValueError, match="takes contrastive ones"):
        RestoreFirst().defend(tiny_fusion_model(), parts[1], Run())


def test_an_attack_can_know_of_the_restorer(parts):
    data = digit_pairs(2)
    defended = RestoreFirst(num_samples=2).defend(*parts, Run())
    attack = load("pgd", num_steps=2)
    adaptive = attack.attack(model=defended, data=data, run=Run())
    plain = attack.attack(model=parts[0], data=data, run=Run())
    assert adaptive[0]["image"].tobytes() != plain[0]["image"].tobytes()


def test_scores_of_the_input_the_results_and_the_truth(parts):
    example = examples.training()
    model = example.arguments["data"]["labelled"]
    with pytest.raises(ValueError, match="model has no scorer"):
        LearnedQuality().evaluate(parts[1], model, None, Run())
    from plait_semiddm_weather.scorers import Ranker

    restorer = WeatherRestorer(Architecture(**examples.TINY))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        restorer.scorer = Ranker().eval()
    report = LearnedQuality().evaluate(restorer, {"same": model}, model, Run())
    rows = {row["method"]: row for row in report.rows}
    assert list(rows) == ["input", "same", "target"]
    assert rows["same"]["score"] == rows["input"]["score"]
    assert rows["same"]["above input"] == 0
