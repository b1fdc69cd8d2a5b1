"""The claim on the small bed: SA-AET carries further than SGA and DRA, and the projection is why."""

import pytest
from plait import Run
from plait_clip.plugin.training import ClipContrastive
from plait_sa_aet.plugin.attacks import Dra, SaAet, Sga
from plait_sa_aet.plugin.scenes import DigitScenes, SceneEncoder
from plait_sa_aet.plugin.transfer import Transfer
from plait_sa_aet.scenes import SWAPS


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sa_aet_carries_further_than_sga_and_dra(seed):
    scenes = DigitScenes().load_data(Run(seed=seed, step="scenes"))
    training = ClipContrastive(num_epochs=10, batch_size=64, learning_rate=3e-3, warmup_steps=180, weight_decay=0.01)
    models = {}
    for name in ("cnn", "vit", "convnet"):
        fresh = SceneEncoder(architecture=name).load_model(Run(seed=seed, step=f"fresh-{name}"))
        models[name] = training.optimize(fresh, scenes["train"], Run(seed=seed, step=name))

    def transferred(attack, label):
        pairs = {
            name: attack.attack(model, scenes["test"], Run(seed=seed, step=f"{label}-{name}"))
            for name, model in models.items()
        }
        report = Transfer(num_panels=0).evaluate(models, pairs, scenes["test"], Run(seed=seed, step="transfer"))
        return report.value("ASR", source="all", target="others (mean)", setting="transfer")

    words = {"generator": "synonyms", "synonyms": SWAPS, "batch_size": 25}
    found = {
        label: transferred(attack, label)
        for label, attack in {"sga": Sga(**words), "dra": Dra(**words), "sa-aet": SaAet(**words)}.items()
    }
    assert found["sa-aet"] > found["dra"]
    assert found["sa-aet"] > found["sga"]
