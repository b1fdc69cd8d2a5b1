"""Each method puts the tested parts together in the order of the paper: compared with that order written out here."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from plait import Run
from plait_clip import digit_pairs, tiny_fusion_model, tiny_model, toy_data
from plait_sa_aet.baselines import co_attack_images, dra
from plait_sa_aet.captions import clean_caption
from plait_sa_aet.plugin.attacks import CoAttack, Dra, PgdCos, SaAet, Sga
from plait_sa_aet.randomness import PerImage
from plait_sa_aet.sa_aet import Batch, Words, evolve_images, sa_aet, semantic_projection
from plait_sa_aet.source import Source
from plait_sa_aet.text_attack import bert_words, word_attack
from plait_sa_aet.word_candidates import Synonyms

TABLE = {word: tuple(others) for word, others in toy_data.SYNONYMS.items()}
WORDS = {"generator": "synonyms", "synonyms": TABLE}
ROWS, BATCH, STEPS = 11, 4, 4


def levels(data):
    return np.stack([np.asarray(image) for image in data["image"]]).astype(int)


@pytest.fixture(scope="module")
def data():
    """Pairs with one, two or three captions that want cleaning."""
    plain = digit_pairs(ROWS)
    texts = plain["captions"]
    several = [
        [f"{texts[(3 * i + j) % ROWS][0].title()}, {toy_data.DIGIT_NAMES[i % 10]}!" for j in range(1 + i % 3)]
        for i in range(ROWS)
    ]
    return plain.remove_columns("captions").add_column("captions", several)


class Batches:
    """The batches of the pairs, with what every method needs of them."""

    def __init__(self, model, data, run):
        self.source, self.data, self.run = Source(model), data, run
        self.max_length = 30 if model.kind == "fusion" else 77

    def __iter__(self):
        for start in range(0, ROWS, BATCH):
            self.rows = list(range(start, min(start + BATCH, ROWS)))
            self.captions = [clean_caption(text) for row in self.rows for text in self.data["captions"][row]]
            self.owner = torch.tensor([k for k, row in enumerate(self.rows) for _ in self.data["captions"][row]])
            images = torch.from_numpy(levels(self.data)[self.rows]).permute(0, 3, 1, 2).float() / 255
            yield images, PerImage(self.run.derived_seed("noise"), self.rows)

    def swapped(self, references, weights):
        owned = [reference[self.owner] for reference in references]
        return word_attack(
            self.source, self.captions, Synonyms(TABLE), owned, weights, max_length=self.max_length
        ).captions

    def summed(self, features):
        return torch.zeros(len(self.rows), features.shape[1]).index_add_(0, self.owner, features)

    def seen(self, images):
        with torch.no_grad():
            return self.source.image_features(images)


def rounded(images, clean):
    found, clean = (images * 255).round(), (clean * 255).round()
    return found.clamp(clean - 8, clean + 8).clamp(0, 255).permute(0, 2, 3, 1).int().numpy()


def without_first_direction(batches, data):
    """P from two fifths of all captions (Eq. 16)."""
    texts = [clean_caption(text) for captions in data["captions"] for text in captions]
    chosen = torch.randperm(len(texts), generator=batches.run.generator("corpus"))[: int(0.4 * len(texts))]
    corpus = batches.source.text_features([texts[i] for i in chosen]).double()
    basis = torch.linalg.svd(corpus.T, full_matrices=False)[0][:, 1:]
    return (basis @ basis.T).float()


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_model, tiny_fusion_model])
@pytest.mark.parametrize("name", ["sa-aet", "dra", "sga"])
def test_words_images_words(name, make, data):
    model, run = make(), Run(seed=5, step="x")
    method, triangle, weights = {
        "sa-aet": (SaAet, {"triangle": "sub"}, [0.6, 0.2, 0.2]),
        "dra": (Dra, {"triangle": "full", "project_candidates": False}, [0.6, 0.2, 0.2]),
        "sga": (Sga, {"triangle": "none"}, [0.0, 1.0, 0.0]),
    }[name]
    batches = Batches(model, data, run)
    projection = without_first_direction(batches, data) if name == "sa-aet" else None
    pictures, captions = [], []
    for images, rng in batches:
        clean = batches.seen(images)
        away = batches.source.text_features(batches.swapped([clean], [1.0]))
        targets = batches.summed(away if projection is None else away @ projection)
        found = evolve_images(batches.source, images, targets, rng, num_steps=STEPS, **triangle)
        pictures.append(rounded(found.images, images))
        captions += batches.swapped([clean, batches.seen(found.images), batches.seen(found.previous_images)], weights)
    attacked = method(num_steps=STEPS, batch_size=BATCH, **WORDS).attack(model, data, run)
    # Where a gradient is nearly zero, another order of sums may flip its sign.
    assert (levels(attacked) == np.concatenate(pictures)).mean() >= 0.98
    assert [text for texts in attacked["captions"] for text in texts] == captions
    assert captions != [clean_caption(text) for texts in data["captions"] for text in texts]


def test_pgd_cos_leaves_the_clean_captions_by_one_view(data):
    model, run = tiny_model(), Run(seed=5, step="x")
    batches, pictures = Batches(model, data, run), []
    for images, rng in batches:
        targets = batches.summed(batches.source.text_features(batches.captions))
        found = evolve_images(
            batches.source, images, targets, rng, num_steps=STEPS, triangle="none", views=lambda x, rng: [x]
        )
        pictures.append(rounded(found.images, images))
    attacked = PgdCos(num_steps=STEPS, batch_size=BATCH).attack(model, data, run)
    assert (levels(attacked) == np.concatenate(pictures)).mean() >= 0.98


def test_co_attack_leaves_the_swapped_captions(data):
    model, run = tiny_model(), Run(seed=5, step="x")
    batches, pictures, captions = Batches(model, data, run), [], []
    for images, rng in batches:
        away = bert_words(batches.source, batches.captions, Synonyms(TABLE), max_length=77).captions
        found = co_attack_images(batches.source, images, away, batches.owner, rng, num_steps=STEPS)
        pictures.append(rounded(found, images))
        captions += away
    attacked = CoAttack(num_steps=STEPS, batch_size=BATCH, **WORDS).attack(model, data, run)
    # The divergence from an image's own clean embedding starts near its minimum, where signs flip more easily.
    assert (levels(attacked) == np.concatenate(pictures)).mean() >= 0.98
    assert [text for texts in attacked["captions"] for text in texts] == captions


def test_the_whole_of_sa_aet_is_one_call(data):
    """A corpus of texts, or the projection that was made of them once; DRA is the whole triangle without either."""
    source = Source(tiny_model())
    texts = [text for captions in data["captions"] for text in captions]
    batch = Batch(torch.from_numpy(levels(data)[:3]).permute(0, 3, 1, 2).float() / 255, texts[:3], torch.arange(3))
    words = Words(Synonyms(TABLE))

    def attacked(attack, **options):
        return attack(source, batch, PerImage(0, range(3)), words=words, num_steps=2, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer texts than dimensions
        once = attacked(sa_aet, corpus=texts)
        again = attacked(sa_aet, corpus=semantic_projection(source.text_features(texts)))
    assert torch.equal(once.images, again.images)
    assert once.captions == again.captions != list(batch.captions)
    plain = attacked(dra)
    assert not torch.equal(plain.images, once.images)
    assert torch.equal(plain.images, attacked(sa_aet, corpus=None, triangle="full", project_candidates=False).images)


def test_the_fields_of_methods_are_read_without_what_computes():
    """So that a run of hundreds of steps begins at once."""
    modules = ("plait_sa_aet.plugin.attacks", "plait_sa_aet.plugin.scenes", "plait_sa_aet.plugin.transfer")
    heavy = {"torch", "open_clip", "datasets", "matplotlib", "transformers"}
    program = (
        f"import sys, plait_clip.plugin.training, {', '.join(modules)}\nprint({heavy!r} & set(sys.modules) or 'none')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "none"
