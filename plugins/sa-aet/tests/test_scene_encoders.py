"""The three encoders of the scenes: their cone, their words, and that they come back as they were."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plait import Run
from plait_clip import ImageTextModel, captions_of, retrieval_ranks, text_features
from plait_clip.plugin.training import ClipContrastive
from plait_sa_aet import scenes
from plait_sa_aet.plugin.scenes import DigitScenes, SceneEncoder
from plait_sa_aet.sa_aet import semantic_projection
from plait_sa_aet.scene_encoders import ARCHITECTURES, Cone

KINDS = list(ARCHITECTURES)


@pytest.fixture(scope="module")
def bed():
    return DigitScenes(num_train=256, num_test=40).load_data(Run(seed=0))


@pytest.fixture
def images():
    return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def fresh(kind, seed=0, **fields):
    return SceneEncoder(architecture=kind, **fields).load_model(Run(seed=seed))


TEXTS = ["a red seven to the left of a blue two", "a [UNK] seven to the left of a blue two", "[UNK]", "two"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_towers_end_on_the_unit_sphere(kind, images):
    model = fresh(kind)
    assert not model.training
    assert model.image_size == 24
    assert model.logit_scale.item() == pytest.approx(2.5 + 1.609438, abs=1e-6)
    images.requires_grad_(True)
    seen, read = model.encode_image(images), model.encode_text(TEXTS)
    assert seen.shape == (5, 64)
    assert read.shape == (4, 64)
    torch.testing.assert_close(torch.cat([seen, read]).norm(dim=1), torch.ones(9))
    (gradient,) = torch.autograd.grad(seen[:, 3].sum(), images)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_the_cone_by_hand():
    cone = Cone(2.0)
    with torch.no_grad():
        cone.direction.copy_(F.one_hot(torch.tensor(0), 64))
    # (0, 5, 0, …) becomes (2, 1, 0, …) / √5; the direction itself stays
    features = torch.zeros(2, 64)
    features[0, 1], features[1, 0] = 5, 0.1
    found = cone(features)
    assert found[0, :2].tolist() == pytest.approx([2 / 5**0.5, 1 / 5**0.5])
    assert found[1, 0] == pytest.approx(1)
    assert torch.equal(Cone(0.0)(features), F.normalize(features, dim=1))
    assert not list(cone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_drawn_anew_for_each_tower_and_seed(kind):
    one, same, other = fresh(kind), fresh(kind), fresh(kind, seed=1)
    directions = [m.module.image_cone.direction for m in (one, other)] + [one.module.text_cone.direction]
    torch.testing.assert_close(torch.stack(directions).norm(dim=1), torch.ones(3))
    assert max(float(directions[i] @ directions[j]) for i, j in ((0, 1), (0, 2), (1, 2))) < 0.6
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_one_direction_for_both_towers(kind):
    apart, together = fresh(kind).module, fresh(kind, directions="per-encoder").module
    assert torch.equal(together.image_cone.direction, together.text_cone.direction)
    assert together.image_cone.direction.data_ptr() != together.text_cone.direction.data_ptr()
    assert torch.equal(together.image_cone.direction, apart.image_cone.direction)
    assert fresh(kind, cone=0.0).logit_scale.item() == pytest.approx(2.5)


def test_drawing_weights_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    fresh("vit")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cone", [2.0, 0.0])
def test_a_saved_encoder_is_the_same_one(kind, cone, images, bed, tmp_path):
    model = ClipContrastive(num_epochs=1, batch_size=64).optimize(fresh(kind, cone=cone), bed["train"], Run())
    model.save_pretrained(tmp_path / "model")
    loaded = ImageTextModel.from_pretrained(tmp_path / "model").eval()
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(TEXTS), model.encode_text(TEXTS))
    assert loaded.context_length == model.context_length


def test_all_words_are_known_and_fit(bed):
    model = fresh("cnn")
    words = {word for texts in bed["train"]["captions"] for text in texts for word in text.split()}
    words |= {word for key, others in scenes.SWAPS.items() for word in (key, *others)}
    tokens = model.tokenize(sorted(words))
    assert (tokens > 0).sum(dim=1).tolist() == [3] * len(words)  # start, the word, end
    assert len(tokens.unique(dim=0)) == len(words)
    longest = max((text for texts in bed["train"]["captions"] for text in texts), key=lambda text: len(text.split()))
    assert not any(model.truncated([longest, longest + " unk"]))
    # A masked word keeps its place, another string is left out.
    plain, masked, strange = model.tokenize(["a red two", "a [UNK] two", "a zebra two"])
    assert (plain != masked).nonzero().flatten().tolist() == [2]
    assert (strange > 0).sum() == (plain > 0).sum() - 1


@pytest.mark.slow
def test_training_on_scenes_and_the_common_direction_of_texts():
    bed = DigitScenes(num_train=960, num_test=40).load_data(Run(seed=0))
    texts, owner = captions_of(bed["test"])
    energies = {}
    for cone in (2.0, 0.0):
        model = fresh("cnn", cone=cone)
        before = copy.deepcopy(model.state_dict())
        method = ClipContrastive(num_epochs=11, batch_size=64, learning_rate=3e-3, warmup_steps=30)
        trained = method.optimize(model, bed["train"], Run(seed=0))
        assert torch.equal(trained.module.text_cone.direction, before["module.text_cone.direction"])
        features = text_features(trained, texts)
        energies[cone] = float(semantic_projection(features, "none").rho_1)
        with torch.no_grad():
            seen = trained.encode_image(torch.stack([_pixels(image) for image in bed["test"]["image"]]))
        ranks = retrieval_ranks(seen, features, owner)[1]
        assert float(ranks.float().mean()) < 10  # by chance: 19.5
    assert energies[2.0] > 0.7
    assert energies[0.0] < energies[2.0] - 0.15


def _pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_fields_are_checked():
    with pytest.raises(ValueError, match="architecture"):
        SceneEncoder(architecture="resnet")
    with pytest.raises(ValueError, match="cone"):
        SceneEncoder(cone=-1.0)
