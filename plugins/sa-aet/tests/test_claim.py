"""What the small bed shows: how far SA-AET carries; and that the projection hurts where texts share no direction."""

import pytest
import torch
from plait import Run
from plait_clip.plugin.training import ClipContrastive
from plait_sa_aet.plugin.attacks import PgdCos, SaAet, Sga
from plait_sa_aet.plugin.scenes import DigitScenes, SceneEncoder
from plait_sa_aet.plugin.transfer import Transfer
from plait_sa_aet.randomness import PerImage
from plait_sa_aet.sa_aet import caption_targets, evolve_images, semantic_projection
from plait_sa_aet.scenes import SWAPS
from plait_sa_aet.source import Source


def trained(**fields):
    """Sixty scenes of seed 0, and the three encoders of transfer-attack.yaml, trained on them for half as long."""
    scenes = DigitScenes().load_data(Run(seed=0, step="scenes"))
    training = ClipContrastive(num_epochs=5, batch_size=64, learning_rate=3e-3, warmup_steps=90, weight_decay=0.01)
    models = {}
    for name in ("cnn", "vit", "convnet"):
        fresh = SceneEncoder(architecture=name, **fields).load_model(Run(seed=0, step=f"fresh-{name}"))
        models[name] = training.optimize(fresh, scenes["train"], Run(seed=0, step=name))
    return scenes["test"].select(range(60)), models


def transferred(attack, data, models):
    """Mean success rate over the six pairs of a source and another target, %."""
    pairs = {name: attack.attack(model, data, Run(seed=0, step=f"attack-{name}")) for name, model in models.items()}
    report = Transfer(num_panels=0).evaluate(models, pairs, data, Run(seed=0, step="transfer"))
    return report.value("ASR", source="all", target="others (mean)", setting="transfer")


@pytest.mark.slow
def test_sa_aet_carries_as_far_as_sga_and_further_than_plain_sign_steps():
    """Its lead over SGA was 1.0 to 3.3 points in eight seeds of the pipeline; one seed, on any processor, shows that it is not behind."""
    data, models = trained(directions="per-encoder")
    words = {"batch_size": 25, "generator": "synonyms", "synonyms": SWAPS}
    found = transferred(SaAet(**words), data, models)
    assert found > transferred(Sga(**words), data, models) - 1
    assert found > transferred(PgdCos(batch_size=25), data, models) + 4


class Blocks(torch.nn.Module):
    """One feature for each of eight blocks of 24 pixels: their mean, from −0.5 to 0.5."""

    image_size = 8

    def encode_image(self, images):
        return images.flatten(1).unflatten(1, (8, 24)).mean(2) - 0.5


def test_the_projection_hurts_where_texts_share_no_direction():
    """Each direction tells two captions apart; the attack cannot tell them apart by the one that is projected away."""
    texts = torch.cat([torch.eye(8), -torch.eye(8)])
    images = (0.5 + 0.02 * texts)[:, :, None].expand(16, 8, 24).reshape(16, 3, 8, 8)
    with pytest.warns(UserWarning, match="share no direction"):
        projection = semantic_projection(torch.cat([texts, texts, texts[[0, 8]]]))
    assert projection.rho_1 == pytest.approx(3 / 17)
    source, owners = Source(Blocks()), torch.arange(16)

    def fooled(projection):
        targets = caption_targets(texts, owners, 16, projection)
        noise = PerImage(0, range(16))
        found = evolve_images(source, images, targets, noise, triangle="full", views=lambda x, rng: [x]).images
        return (Blocks().encode_image(found) @ texts.T).argmax(1) != owners

    assert fooled(None).all()
    assert (fooled(projection) == torch.tensor([False, *[True] * 7] * 2)).all()
