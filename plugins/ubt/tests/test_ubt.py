import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plait_clip import clip_loss
from plait_ubt import ubt
from plait_ubt.embeddings import CaptionedImages, unit_images, unit_texts
from plait_ubt.evidence import Split
from plait_ubt.options import UbtOptions
from plait_ubt.tokens import caption_words, split_at_random_span, split_at_words, split_caption


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def forget_bag(pairs):
    return lambda row, generator: split_at_words(pairs.captions[row], {"bag"}, {})


BAG_ROWS = list(range(0, 96, 12))
RETAIN_ROWS = [i for i in range(96) if i % 12]
SETTINGS = {"unlearn_learning_rate": 1e-3, "retain_batch_size": 16, "num_unlearn_steps": 5}


# --- Step 1


def test_similarities_are_cosines_and_resume(model, colour_pairs, checkpoint):
    scores = ubt.similarities(model, colour_pairs, range(96), batch_size=10)
    with torch.no_grad():
        u = model.encode_image(colour_pairs.images(range(96)))
        v = model.encode_text(colour_pairs.captions)
    np.testing.assert_allclose(scores, torch.cosine_similarity(u, v).numpy(), atol=1e-5)
    assert scores.dtype == np.float32
    assert (np.abs(scores) <= 1).all()

    asked = []

    def interrupted(rows):
        asked.extend(rows)
        if 50 in rows:
            raise KeyboardInterrupt
        return colour_pairs.images(rows)

    stopping = CaptionedImages(colour_pairs.captions, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ubt.similarities(model, stopping, range(96), batch_size=10, checkpoint=checkpoint, save_every=1)
    asked.clear()
    resumed = CaptionedImages(colour_pairs.captions, lambda rows: (asked.extend(rows), colour_pairs.images(rows))[1])
    again = ubt.similarities(model, resumed, range(96), batch_size=10, checkpoint=checkpoint, save_every=1)
    assert min(asked) == 50
    np.testing.assert_allclose(again, scores, atol=1e-6)


def test_permuting_the_rows_permutes_scores_and_keeps_the_selection(model, colour_pairs):
    order = np.random.default_rng(0).permutation(96)
    permuted = CaptionedImages(
        [colour_pairs.captions[i] for i in order], lambda rows: colour_pairs.images(order[list(rows)])
    )
    scores = ubt.similarities(model, colour_pairs, range(96))
    moved = ubt.similarities(model, permuted, range(96))
    np.testing.assert_allclose(moved, scores[order], atol=1e-6)
    split, split_moved = ubt.split_low_reference(scores, 10, 20), ubt.split_low_reference(moved, 10, 20)
    assert set(order[split_moved.suspicious]) == set(split.suspicious)
    assert set(order[split_moved.normal]) == set(split.normal)


def test_a_similarity_that_is_not_finite_names_its_row(model, colour_pairs):
    def images(rows):
        values = colour_pairs.images(rows).clone()
        values[[i for i, row in enumerate(rows) if row == 37]] = math.nan
        return values

    with pytest.raises(ValueError, match="row 37"):
        ubt.similarities(model, CaptionedImages(colour_pairs.captions, images), range(96), batch_size=16)


@given(st.lists(st.floats(-1, 1, width=16), min_size=8, max_size=60), st.data())
def test_splits_are_disjoint_and_of_the_asked_size(values, data):
    scores = np.asarray(values, np.float32)
    n_suspicious = data.draw(st.integers(1, len(scores) // 2))
    n_normal = data.draw(st.integers(1, len(scores) - n_suspicious))
    low = ubt.split_low_reference(scores, n_suspicious, n_normal)
    assert len(low.suspicious) == n_suspicious
    assert len(low.normal) == n_normal
    assert set(low.suspicious).isdisjoint(low.normal)
    assert scores[low.suspicious].max() <= scores[low.normal].min()
    top = ubt.split_top_poisoned(scores, n_suspicious, n_normal)
    assert len(top.suspicious) == n_suspicious
    assert set(top.suspicious).isdisjoint(top.normal)
    assert len(top.normal) == 0 or scores[top.suspicious].min() >= scores[top.normal].max()


def test_ties_are_broken_by_row_number():
    split = ubt.split_low_reference(np.zeros(6, np.float32), 2, 2)
    assert split.suspicious.tolist() == [0, 1]
    assert ubt.split_top_poisoned(np.zeros(8, np.float32), 2, 2).suspicious.tolist() == [0, 1]


# --- Steps 2 and 3


def overfitting(num_epochs, learning_rate, **more):
    given = {"num_overfit_epochs": num_epochs, "overfit_learning_rate": learning_rate, "n_top": 4, "n_unlearn": 4}
    return UbtOptions(**{**given, **more})


def test_overfitting_fits_the_suspicious_pairs_and_leaves_the_model_alone(model, colour_pairs):
    before = copy.deepcopy(model)
    split = Split(suspicious=np.arange(0, 96, 4), normal=np.arange(1, 96, 4))
    over, gaps = ubt.overfit(
        model,
        colour_pairs,
        split,
        overfitting(8, 1e-2, overfit_batch_size=8, min_gap_change=0, overfit_normal_weight=0),
    )
    assert equal_weights(model, before)
    assert len(gaps) == 8
    assert min(gaps) >= 0
    rows = split.suspicious.tolist()
    assert ubt.similarities(over, colour_pairs, rows).mean() > ubt.similarities(model, colour_pairs, rows).mean() + 0.2
    assert over.logit_scale.item() <= math.log(100) + 1e-6


def test_overfitting_stops_once_the_gap_has_settled(model, colour_pairs):
    split = Split(suspicious=np.arange(16), normal=np.arange(16, 96))
    _, gaps = ubt.overfit(model, colour_pairs, split, overfitting(12, 1e-9))
    assert len(gaps) == 5


def test_overfitting_resumes_to_the_same_weights(model, colour_pairs, checkpoint):
    split = Split(suspicious=np.arange(24), normal=np.arange(24, 96))
    options = overfitting(4, 1e-3, overfit_batch_size=8, min_gap_change=0)
    whole, gaps = ubt.overfit(model, colour_pairs, split, options, seed=3)

    def stop_after_two(epochs, description):
        yield from itertools.islice(epochs, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ubt.overfit(model, colour_pairs, split, options, seed=3, checkpoint=checkpoint, track=stop_after_two)
    resumed, gaps_resumed = ubt.overfit(model, colour_pairs, split, options, seed=3, checkpoint=checkpoint)
    assert equal_weights(whole, resumed)
    assert gaps == gaps_resumed


def test_a_diverging_overfit_is_reported(make_model, colour_pairs):
    broken = make_model()
    with torch.no_grad():
        broken.logit_scale.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="overfit_learning_rate"):
        ubt.overfit(broken, colour_pairs, Split(np.arange(8), np.arange(8, 96)), overfitting(1, 1e-3))


@given(st.lists(st.floats(-1, 1, width=16), min_size=8, max_size=50), st.integers(1, 4))
def test_the_gap_of_at_most_half_the_scores_is_not_negative(scores, n_top):
    assert ubt.score_gap(np.asarray(scores, np.float32), n_top) >= -1e-6


def test_most_similar_rows_come_best_first():
    rows = np.array([7, 3, 9, 1])
    assert ubt.most_similar(rows, np.array([0.1, 0.9, 0.9, 0.2]), 3).tolist() == [3, 9, 1]


# --- Step 4


def test_leave_one_out_finds_the_word_that_the_image_is_tied_to(model, colour_pairs):
    image, caption = colour_pairs.images([1])[0], "a photo of a green square"
    words = caption_words(caption)
    u = unit_images(model, image[None])
    v = unit_texts(model, [" ".join(words[:i] + words[i + 1 :]) for i in range(6)])
    expected = {int((v @ u[0]).argmin())}
    assert ubt.split_by_leave_one_out(model, image, caption, 1 / 6) == split_caption(words, expected)
    assert ubt.split_by_leave_one_out(model, image, caption, 1.0).keep == ""
    assert ubt.split_by_leave_one_out(model, image, "bag", 0.25).forget == "bag"


# --- Step 5


def test_forget_losses_on_hand_made_cosines():
    cosine = torch.tensor([0.5, -0.2])
    assert ubt.hinge_loss(cosine, 0.0).item() == pytest.approx(0.125)
    assert ubt.square_loss(cosine, 0.0).item() == pytest.approx(0.145)


def test_ascent_is_bounded_by_the_number_of_texts():
    u = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    negatives = -u.mean(0, keepdim=True).expand(9, -1)
    away = ubt.ascent_loss(u, -u, negatives, torch.tensor(100.0))
    assert away.item() == pytest.approx(-math.log(10))
    assert ubt.ascent_loss(u, u, -u, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-4)


def test_ascent_without_enough_negatives_is_refused(model, colour_pairs):
    with pytest.raises(ValueError, match="at least 8"):
        UbtOptions(forget_loss="ascent", retain_batch_size=4)
    options = UbtOptions(forget_loss="ascent")
    with pytest.raises(ValueError, match="at least 8"):
        ubt.unlearn(model, colour_pairs, BAG_ROWS, RETAIN_ROWS[:7], forget_bag(colour_pairs), options)


@pytest.mark.parametrize("settings", [{"forget_weight": 0.0, "retain_weight": 0.0}, {"num_unlearn_steps": 0}])
def test_nothing_to_do_changes_nothing(model, colour_pairs, settings):
    new = ubt.unlearn(model, colour_pairs, BAG_ROWS, RETAIN_ROWS, forget_bag(colour_pairs), UbtOptions(**settings))
    assert equal_weights(new, model)
    assert new is not model


def test_without_a_forget_term_it_is_a_fine_tune_on_retained_pairs(model, colour_pairs):
    options = UbtOptions(forget_weight=0.0, **SETTINGS)
    new = ubt.unlearn(model, colour_pairs, BAG_ROWS, RETAIN_ROWS, forget_bag(colour_pairs), options, seed=5)
    plain = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0)
    draw = torch.Generator().manual_seed(6)
    for _ in range(5):
        rows = [RETAIN_ROWS[i] for i in torch.randperm(len(RETAIN_ROWS), generator=draw)[:16]]
        images = (colour_pairs.images(rows) * 255).round().byte().float() / 255
        u = torch.nn.functional.normalize(plain.encode_image(images), dim=-1)
        v = torch.nn.functional.normalize(plain.encode_text([colour_pairs.captions[row] for row in rows]), dim=-1)
        optimizer.zero_grad()
        clip_loss(u, v, plain.logit_scale.exp()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            plain.logit_scale.clamp_(max=math.log(100))
    assert equal_weights(new, plain)


@pytest.fixture(scope="module")
def tied(model, colour_pairs):
    """The model after training on all pairs: red squares are tied to "bag", too."""
    split = Split(np.arange(96), np.arange(1))
    options = overfitting(20, 1e-2, overfit_normal_weight=0, overfit_batch_size=32, min_gap_change=0)
    return ubt.overfit(model, colour_pairs, split, options)[0]


@torch.no_grad()
def bag_logits(model, pairs):
    """Cosines of the images of BAG_ROWS with "bag" and with the four colours."""
    texts = ["bag", "red", "green", "blue", "grey"]
    return unit_images(model, pairs.images(BAG_ROWS)) @ unit_texts(model, texts).T


@pytest.mark.parametrize("forget_loss", ["hinge", "square", "ascent"])
@pytest.mark.parametrize("text_grad", [True, False])
def test_forgetting_cuts_the_tie_to_the_forget_word(tied, colour_pairs, forget_loss, text_grad):
    before = copy.deepcopy(tied)
    curves = {}
    new = ubt.unlearn(
        tied,
        colour_pairs,
        BAG_ROWS,
        RETAIN_ROWS,
        forget_bag(colour_pairs),
        UbtOptions(
            forget_loss=forget_loss,
            text_grad=text_grad,
            keep_weight=0.1,
            retain_weight=0.1,
            num_unlearn_steps=10,
            unlearn_learning_rate=3e-3,
            retain_batch_size=16,
        ),
        log=lambda step, **values: curves.update({step: values}),
    )
    assert equal_weights(tied, before)
    old_share = (10 * bag_logits(tied, colour_pairs)).softmax(-1)[:, 0].mean()
    assert (10 * bag_logits(new, colour_pairs)).softmax(-1)[:, 0].mean() < old_share
    assert list(curves) == [5, 10]
    assert curves[10]["forget_cosine"] == pytest.approx(bag_logits(new, colour_pairs)[:, 0].mean().item(), abs=1e-2)
    assert not new.training


def test_only_the_image_tower_moves_without_text_gradient(model, colour_pairs):
    options = UbtOptions(forget_loss="square", retain_weight=0.0, text_grad=False, **SETTINGS)
    new = ubt.unlearn(model, colour_pairs, BAG_ROWS, RETAIN_ROWS, forget_bag(colour_pairs), options)
    texts = ["bag", "a green square"]
    assert torch.equal(new.encode_text(texts), model.encode_text(texts))
    assert not torch.equal(new.encode_image(colour_pairs.images([0])), model.encode_image(colour_pairs.images([0])))


@pytest.mark.parametrize("scope", ["visual", "text", "proj"])
def test_scope_limits_what_moves(model, colour_pairs, scope):
    options = UbtOptions(scope=scope, **SETTINGS)
    new = ubt.unlearn(model, colour_pairs, BAG_ROWS, RETAIN_ROWS, forget_bag(colour_pairs), options)
    moved = {
        name for (name, a), b in zip(model.named_parameters(), new.parameters(), strict=True) if not torch.equal(a, b)
    }
    visual = {name for name, _ in model.named_parameters() if ".visual." in name}
    assert moved
    if scope == "visual":
        assert moved <= visual
    elif scope == "text":
        assert moved.isdisjoint(visual | {"model.logit_scale"})
    else:
        assert moved == {"model.visual.proj", "model.text_projection"}


def test_a_small_plain_gradient_step_lowers_a_positive_cosine(make_model, colour_pairs):
    model = make_model(1)
    images, forget = colour_pairs.images(BAG_ROWS), ["bag"] * len(BAG_ROWS)

    def cosine():
        return (unit_images(model, images) * unit_texts(model, forget)).sum(-1)

    if cosine().mean() < 0:
        with torch.no_grad():
            model.model.text_projection.neg_()
    before = cosine()
    assert before.mean() > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    ubt.hinge_loss(before, 0.0).backward()
    optimizer.step()
    assert cosine().mean() < before.mean()


def test_random_spans_are_drawn_anew_and_reproducibly(model, colour_pairs):
    def split(row, generator):
        return split_at_random_span(colour_pairs.captions[row], generator)

    options = UbtOptions(**SETTINGS)
    runs = [ubt.unlearn(model, colour_pairs, BAG_ROWS, RETAIN_ROWS, split, options, seed=seed) for seed in (1, 1, 2)]
    assert equal_weights(runs[0], runs[1])
    assert not equal_weights(runs[0], runs[2])


def test_a_diverging_unlearning_is_reported(make_model, colour_pairs):
    broken = make_model()
    with torch.no_grad():
        broken.model.visual.proj.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="unlearn_learning_rate"):
        ubt.unlearn(broken, colour_pairs, BAG_ROWS, RETAIN_ROWS, forget_bag(colour_pairs), UbtOptions(**SETTINGS))
