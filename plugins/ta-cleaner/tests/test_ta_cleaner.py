import copy
import math

import pytest
import torch
import torch.nn.functional as F
from plait_clip import clip_loss
from plait_clip.backdoor import FineTuning, clean_clip, encode_views, view_batches
from plait_ta_cleaner import baselines
from plait_ta_cleaner import ta_cleaner as ta
from plait_ta_cleaner.subcaptions import SubcaptionSource, WordPool, pool_words
from plait_ta_cleaner.tagging import LexiconTagger, open_words

E1, E2 = torch.eye(2)
TRAINING = FineTuning(num_epochs=2, batch_size=16, learning_rate=1e-3, warmup_steps=2)
NO_NEGATIVES = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module")
def source(pairs):
    made = SubcaptionSource(LexiconTagger(open_words(None)), WordPool({}))
    made.pool = WordPool(pool_words([made.tag(captions[0]) for captions in pairs["captions"]], 1))
    return made


@pytest.fixture(scope="module")
def train(make_model, pairs, source, toy_synonyms):
    def run(n_subtext=16, ta_weight=1.0, **settings):
        model = make_model()
        ta.ta_cleaner(
            model,
            pairs,
            source.draw,
            TRAINING,
            ta.Alignment(n_subtext=n_subtext, ta_weight=ta_weight),
            ta.Augmentation(synonyms=toy_synonyms),
            seed=7,
            **settings,
        )
        return model

    return run


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def random_unit(rows, seed=0):
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- The loss


def test_the_hand_example_in_both_scopes():
    u = torch.stack([E1, E2])
    args = (u, u, torch.stack([E2, E1]), torch.tensor([0, 1]), 1.0)
    assert ta.image_to_text_loss(*args, "batch").item() == pytest.approx(math.log(2 + 2 / math.e), abs=1e-6)
    assert ta.image_to_text_loss(*args, "own").item() == pytest.approx(0.551445, abs=1e-6)
    assert ta.text_to_image_loss(u, u, 1.0).item() == pytest.approx(0.313262, abs=1e-6)
    terms = ta.alignment_losses(*args, ta.Alignment())
    assert ((terms["i2t"] + terms["t2i"]) / 2).item() == pytest.approx(0.659835, abs=1e-6)


def test_without_negatives_it_is_the_contrastive_loss():
    u, p = random_unit(5), random_unit(5, 1)
    terms = ta.alignment_losses(u, p, u[:0], torch.zeros(0, dtype=torch.long), 7.0, ta.Alignment())
    torch.testing.assert_close((terms["i2t"] + terms["t2i"]) / 2, clip_loss(u, p, 7.0))


@pytest.mark.parametrize("scope", ["batch", "own"])
def test_every_negative_raises_the_image_to_text_loss(scope):
    u, p, n = random_unit(4), random_unit(4, 1), random_unit(8, 2)
    owners = torch.arange(8) % 4
    losses = [ta.image_to_text_loss(u, p, n[:k], owners[:k], 3.0, scope).item() for k in range(9)]
    assert losses == sorted(losses)
    assert losses[0] >= 0


def test_perfect_rows_have_no_loss():
    u = torch.eye(6)[:3]
    terms = ta.alignment_losses(u, u, torch.eye(6)[3:], torch.arange(3), 1e3, ta.Alignment())
    assert terms["i2t"].item() == pytest.approx(0, abs=1e-6)
    assert terms["t2i"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scope", ["batch", "own"])
@pytest.mark.parametrize("negative_loss", ["softmax", "margin"])
def test_the_order_of_the_rows_does_not_matter(scope, negative_loss):
    options = ta.Alignment(negative_scope=scope, negative_loss=negative_loss)
    u, p, n, owners = random_unit(4), random_unit(4, 1), random_unit(6, 2), torch.tensor([0, 1, 1, 2, 3, 3])
    order = torch.tensor([2, 0, 3, 1])
    place = order.argsort()
    expected = ta.alignment_losses(u, p, n, owners, 5.0, options)
    found = ta.alignment_losses(u[order], p[order], n, place[owners], 5.0, options)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_margin_by_hand():
    u = p = torch.stack([E1, E2])
    n = torch.stack([E1, E1])
    # excess of row, negative: 0.1 0.1 / 0 0; each row's own: 0.1, 0.
    assert ta.margin_loss(u, p, n, torch.tensor([0, 1]), "batch").item() == pytest.approx(0.05)
    assert ta.margin_loss(u, p, n, torch.tensor([0, 1]), "own").item() == pytest.approx(0.05)
    assert ta.margin_loss(u, p, n, torch.tensor([0, 0]), "own").item() == pytest.approx(0.1)
    assert ta.margin_loss(u, p, *NO_NEGATIVES).item() == 0
    terms = ta.alignment_losses(u, p, n, torch.tensor([0, 1]), 1.0, ta.Alignment(negative_loss="margin"))
    assert terms["i2t"].item() == pytest.approx(0.313262, abs=1e-6)


# --- The rows of an epoch


def test_a_subset_of_the_asked_size_is_drawn_anew_every_epoch():
    drawn = torch.stack([ta.subtext_rows(40, 10, seed=1, epoch=epoch) for epoch in range(600)])
    assert (drawn.sum(1) == 10).all()
    assert len(drawn.unique(dim=0)) == 600
    expected = 150.0
    chi_square = ((drawn.sum(0) - expected) ** 2 / expected).sum().item()
    assert chi_square < 70  # 39 degrees of freedom, p about 0.002 (draws without replacement vary less)
    assert torch.equal(ta.subtext_rows(40, 10, 1, 3), drawn[3])
    assert not torch.equal(ta.subtext_rows(40, 10, 2, 3), drawn[3])


# --- The step


@pytest.fixture(scope="module")
def batch(make_model, pairs, toy_synonyms):
    views = view_batches(
        pairs, make_model(), batch_size=16, seed=0, epoch=0, augment_images=True, synonyms=toy_synonyms
    )
    return next(iter(views))


def test_texts_of_a_step_belong_to_the_chosen_rows(batch, source):
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[batch.rows[[2, 5, 9]]] = True
    texts = ta.texts_of_step(batch, chosen, source.draw, True)
    assert texts.rows == [2, 5, 9]
    assert texts.owners == [0, 1, 2]
    for place, positive in zip(texts.rows, texts.positives, strict=True):
        assert positive == "a photo of a " + batch.captions[place].split()[-1]


def test_only_the_chosen_rows_get_a_gradient_from_the_alignment(make_model, batch, source):
    model = make_model()
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[batch.rows[:4]] = True
    texts = ta.texts_of_step(batch, chosen, source.draw, True)
    options = ta.Alignment(clip_weight=0.0, ss_weight=0.0)
    pixels = (batch.images.float() / 255).requires_grad_()

    class Spy(type(model)):
        def encode_image(self, images):
            return super().encode_image(torch.cat([pixels, images[16:]]))

    model.__class__ = Spy
    ta.ta_cleaner_losses(model, batch, texts, options)["loss"].backward()
    per_row = pixels.grad.abs().flatten(1).sum(1)
    assert (per_row[:4] > 0).all()
    assert (per_row[4:] == 0).all()
    assert model.model.visual.proj.grad.abs().sum() > 0


def test_one_row_is_not_enough_for_an_alignment(make_model, batch, source):
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[batch.rows[0]] = True
    texts = ta.texts_of_step(batch, chosen, source.draw, True)
    losses = ta.ta_cleaner_losses(make_model(), batch, texts, ta.Alignment())
    assert "i2t" not in losses
    torch.testing.assert_close(losses["loss"], losses["clip"] + losses["self_supervised"])


def test_the_loss_is_the_weighted_sum_of_its_terms(make_model, batch, source):
    texts = ta.texts_of_step(batch, torch.ones(64, dtype=torch.bool), source.draw, True)
    options = ta.Alignment(ta_weight=0.5, clip_weight=2.0, ss_weight=3.0)
    losses = ta.ta_cleaner_losses(make_model(), batch, texts, options)
    expected = 2 * losses["clip"] + 3 * losses["self_supervised"] + 0.25 * (losses["i2t"] + losses["t2i"])
    torch.testing.assert_close(losses["loss"], expected)
    e = encode_views(make_model(), batch, texts.positives)
    assert losses["positive_cosine"].item() == pytest.approx((e.images * e.extra_texts).sum(-1).mean().item(), abs=1e-5)


# --- The training


@pytest.mark.parametrize("settings", [{"ta_weight": 0.0}, {"n_subtext": 0}])
def test_without_alignment_it_is_clean_clip_bit_for_bit(make_model, pairs, toy_synonyms, train, settings):
    plain = make_model()
    clean_clip(plain, pairs, toy_synonyms, TRAINING, seed=7)
    assert equal_weights(train(**settings), plain)


@pytest.mark.slow
def test_alignment_changes_the_result_and_is_reproducible(train, make_model):
    first, second = train(), train()
    assert equal_weights(first, second)
    assert not equal_weights(first, train(ta_weight=0.0))
    assert first.logit_scale.item() <= 4.6052 + 1e-6
    assert not equal_weights(first, make_model())


def test_the_number_of_rows_with_sub_captions():
    assert [ta.num_subtext_rows(asked, 40) for asked in (0, 0.25, 1, 1.0, 16)] == [0, 10, 40, 40, 16]
    with pytest.raises(ValueError, match="up to the 40"):
        ta.num_subtext_rows(41, 40)
    with pytest.raises(ValueError, match="whole number"):
        ta.num_subtext_rows(3.5, 40)


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(train):
    assert equal_weights(train(), train(num_workers=2))


class Memory:
    """A checkpoint in memory."""

    state = None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)


def test_it_resumes_to_the_same_weights(train):
    whole = train()

    def stop(step, values):
        if step >= 5:
            raise KeyboardInterrupt

    checkpoint = Memory()
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=checkpoint, on_step=stop)
    assert checkpoint.state is not None
    assert equal_weights(train(checkpoint=checkpoint), whole)


def test_every_step_logs_finite_terms(train):
    seen = []
    train(n_subtext=64, on_step=lambda step, values: seen.append(values))
    assert len(seen) == 8
    for values in seen:
        assert {"loss", "clip", "self_supervised", "i2t", "t2i", "positive_cosine", "negative_cosine"} <= set(values)
        assert all(math.isfinite(value) for value in values.values())


def test_hard_negatives_without_any_are_the_contrastive_loss(make_model, batch):
    model = make_model()
    u = model.encode_image(batch.images.float() / 255)
    v = model.encode_text(batch.captions)
    torch.testing.assert_close(baselines.hard_negative_loss(model, batch, []), clip_loss(u, v, model.logit_scale.exp()))
    assert baselines.hard_negative_loss(model, batch, ["a photo of a dress"]) > baselines.hard_negative_loss(
        model, batch, []
    )


def test_fine_tuning_with_hard_negatives_learns(make_model, pairs, source):
    model, losses = make_model(), []
    before = copy.deepcopy(model)
    baselines.fine_tune_with_hard_negatives(
        model, pairs, source.draw, 64, FineTuning(num_epochs=6, batch_size=16, learning_rate=3e-3, warmup_steps=1),
        on_step=lambda step, values: losses.append(values["loss"]),
    )  # fmt: skip
    assert not equal_weights(model, before)
    assert losses[-1] < losses[0] - 0.3
