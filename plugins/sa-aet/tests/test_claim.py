"""What the small bed shows: how far SA-AET carries, and that the projection hurts where texts share no direction."""

import pytest
from plait import Run
from plait_clip.plugin.training import ClipContrastive
from plait_sa_aet.plugin.attacks import Dra, PgdCos, SaAet, Sga
from plait_sa_aet.plugin.scenes import DigitScenes, SceneEncoder
from plait_sa_aet.plugin.transfer import Transfer
from plait_sa_aet.scenes import SWAPS


def trained(prefix="", **fields):
    """The scenes of seed 0, and the three encoders of transfer-attack.yaml trained on them."""
    scenes = DigitScenes().load_data(Run(seed=0, step="scenes"))
    training = ClipContrastive(num_epochs=10, batch_size=64, learning_rate=3e-3, warmup_steps=180, weight_decay=0.01)
    models = {}
    for name in ("cnn", "vit", "convnet"):
        fresh = SceneEncoder(architecture=name, **fields).load_model(Run(seed=0, step=f"fresh-{prefix}{name}"))
        models[name] = training.optimize(fresh, scenes["train"], Run(seed=0, step=f"{prefix}{name}"))
    return scenes["test"], models


def transferred(attack, data, models):
    """Mean success rate over the six pairs of a source and another target, %."""
    pairs = {name: attack.attack(model, data, Run(seed=0, step=f"attack-{name}")) for name, model in models.items()}
    report = Transfer(num_panels=0).evaluate(models, pairs, data, Run(seed=0, step="transfer"))
    return report.value("ASR", source="all", target="others (mean)", setting="transfer")


@pytest.mark.slow
def test_sa_aet_carries_further_than_sga_and_plain_sign_steps():
    data, models = trained(directions="per-encoder")
    words = {"batch_size": 25, "generator": "synonyms", "synonyms": SWAPS}
    found = transferred(SaAet(**words), data, models)
    assert found > transferred(Sga(**words), data, models)
    assert found > transferred(PgdCos(batch_size=25), data, models) + 4


@pytest.mark.slow
def test_the_projection_hurts_where_texts_share_no_direction():
    data, models = trained("flat-", cone=0.0)
    alone = {"batch_size": 25, "text": False}
    projected = SaAet(**alone, triangle="full", project_candidates=False)
    assert transferred(projected, data, models) < transferred(Dra(**alone), data, models) - 2
