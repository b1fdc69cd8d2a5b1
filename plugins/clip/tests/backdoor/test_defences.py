import copy

import numpy as np
import plait
import pytest
import torch
from plait_clip import tiny_model
from plait_clip.backdoor import baselines
from plait_clip.backdoor.clean_clip import FineTuning
from plait_clip.backdoor.losses import one_way_loss
from plait_clip.backdoor.plugin.defences import Abl, CleanClip, DropTop, FineTune, NoDefence, Par, SquareUnlearn
from plait_clip.backdoor.plugin.evaluations import ClipBackdoor
from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import PairLoader
from plait_clip.plugin.training import ClipContrastive

pytestmark = pytest.mark.slow

TOY = {"learning_rate": 1e-3, "warmup_steps": 0.1}
QUICK = {"num_epochs": 1, "batch_size": 64, **TOY}
ALL = [
    FineTune(**QUICK),
    CleanClip(**QUICK, synonyms="toy-data"),
    Abl(**QUICK),
    DropTop(**QUICK, removal_epochs=(1,)),
    Par(**QUICK),
    NoDefence(),
]


def name(method):
    return type(method).__name__


def defended(method, model, data, seed=0, reference=None):
    return method.defend(model=model, data=data, reference=reference, run=plait.Run(seed=seed))


def measured(model, digits, trigger):
    report = ClipBackdoor(templates="digits", trigger=trigger).evaluate(
        model=model, data=digits["test"], reference=None, run=plait.Run()
    )
    return report.rows[0]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def parts(small, dirty):
    return {"clean": small, "suspicious": dirty.select(range(200))}


@pytest.mark.parametrize("method", ALL, ids=name)
def test_no_defence_reads_the_truth(method, victim, parts):
    dirty = parts["suspicious"]
    garbage = np.random.default_rng(0).integers(0, 2, len(dirty)).astype(bool)
    scrambled = dirty.remove_columns("is_backdoor").add_column("is_backdoor", garbage)
    scrambled.info.description = ""
    with_truth = defended(method, victim, parts)
    assert equal(with_truth, defended(method, victim, {**parts, "suspicious": scrambled}))
    without = dirty.remove_columns(["is_backdoor", "source_row"])
    assert equal(with_truth, defended(method, victim, {**parts, "suspicious": without}))


@pytest.mark.parametrize("method", [*ALL[:-1], SquareUnlearn(**QUICK)], ids=name)
def test_a_defence_changes_a_copy_and_depends_on_the_seed(method, victim, parts):
    before = copy.deepcopy(victim)
    after = defended(method, victim, parts)
    assert isinstance(after, ImageTextModel)
    assert equal(before, victim)
    assert not equal(before, after)
    assert equal(after, defended(method, victim, parts))
    assert not equal(after, defended(method, victim, parts, seed=1))


def learning(model):
    return [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("method", [*ALL, SquareUnlearn(**QUICK)], ids=name)
def test_frozen_models_are_defended_as_others_and_come_back_frozen(method, parts, tmp_path):
    few = {part: rows.select(range(80)) for part, rows in parts.items()}
    thawed, frozen = (defended(method, tiny_model().requires_grad_(learns), few) for learns in (True, False))
    assert equal(thawed, frozen)
    assert all(learning(thawed))
    assert not any(learning(frozen))
    # What comes back goes on: it is stored, trained and defended again.
    frozen.save_pretrained(tmp_path / "stored")
    stored = ImageTextModel.from_pretrained(tmp_path / "stored").requires_grad_(False)
    trained = ClipContrastive(num_epochs=1, batch_size=32).optimize(model=stored, data=few["clean"], run=plait.Run())
    assert not equal(trained, stored)
    assert equal(defended(method, trained, few), trained) == isinstance(method, NoDefence)


def test_what_is_frozen_beside_others_stays_as_it_is(small):
    model = tiny_model()
    model.model.visual.requires_grad_(False)
    after = defended(FineTune(**QUICK), model, small)
    assert equal(after.model.visual, model.model.visual)
    assert not equal(after, model)
    assert learning(after) == learning(model)


def test_no_defence_gives_the_same_model(victim):
    assert equal(victim, defended(NoDefence(), victim, None))


def test_one_run_object_may_serve_several_calls(victim, parts):
    run = plait.Run(seed=0)
    first = FineTune(**QUICK).defend(model=victim, data=parts, reference=None, run=run)
    other = FineTune(**{**QUICK, "learning_rate": 1e-4}).defend(model=victim, data=parts, reference=None, run=run)
    assert not equal(first, other)


# --- what they achieve on the digits ---


def test_the_toy_data_have_a_backdoor(victim, digits, trigger, clean_model):
    found, clean = measured(victim, digits, trigger), measured(clean_model, digits, trigger)
    assert found["CA@1"] > 0.85
    assert found["ASR@1"] > 0.9
    assert found["TA"] < 0.1
    assert clean["ASR@1"] < 0.2


def test_defences_on_the_digits(victim, digits, dirty, trigger):
    data = {"clean": digits["train"], "suspicious": dirty}
    methods = {
        "fine-tune": FineTune(num_epochs=3, **TOY),
        "clean-clip": CleanClip(num_epochs=3, **TOY, synonyms="toy-data"),
        "par": Par(num_epochs=3, batch_size=64, **TOY),
        "square-unlearn": SquareUnlearn(num_epochs=3, **TOY),
    }
    found = {key: measured(defended(method, victim, data), digits, trigger) for key, method in methods.items()}
    assert all(row["CA@1"] > 0.8 for row in found.values()), found
    # Plain fine-tuning hardly helps, PAR does, and the oracle removes the backdoor.
    assert found["par"]["ASR@1"] < found["fine-tune"]["ASR@1"] - 0.3, found
    assert found["clean-clip"]["ASR@1"] < found["fine-tune"]["ASR@1"] + 0.05, found
    assert found["square-unlearn"]["ASR@1"] < 0.15, found
    assert found["square-unlearn"]["TA"] > 0.3, found


# --- the algorithms ---


def test_similarities_and_top_share(victim, small):
    pairs = PairLoader(small, victim)
    similarities = baselines.pair_similarities(victim, pairs, batch_size=64)
    with torch.no_grad():
        images = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in small["image"]])
        u = torch.nn.functional.normalize(victim.encode_image(images.permute(0, 3, 1, 2) / 255), dim=-1)
        v = torch.nn.functional.normalize(victim.encode_text([texts[0] for texts in small["captions"]]), dim=-1)
    assert similarities == pytest.approx((u * v).sum(dim=1).numpy(), abs=1e-5)
    assert np.abs(similarities).max() <= 1 + 1e-6
    assert baselines.top_share(np.array([0.1, 0.9, 0.9, 0.5]), 0.25).tolist() == [1]
    assert baselines.top_share(np.array([0.1, 0.9, 0.9, 0.5]), 0.75).tolist() == [1, 2, 3]


def test_abl_unlearns_the_isolated_pairs_and_keeps_the_others(victim, small):
    pairs = PairLoader(small, victim)
    isolated = np.arange(0, 200, 20)
    before = baselines.pair_similarities(victim, pairs)
    options = FineTuning(num_epochs=2, batch_size=32, learning_rate=3e-4, warmup_steps=0)
    baselines.anti_backdoor_learning(victim, pairs, isolated, 4, options)
    change = baselines.pair_similarities(victim, pairs) - before
    rest = np.setdiff1d(np.arange(200), isolated)
    assert change[isolated].mean() < change[rest].mean() - 0.1


def test_abl_has_a_gradient_although_isolated_captions_are_equal(victim, dirty):
    isolated = np.flatnonzero(dirty["is_backdoor"])
    texts = dirty.select(isolated)
    same = [["the number seven"]] * len(texts)
    column = texts.remove_columns("captions").add_column("captions", same)
    whole = PairLoader(dirty, victim)
    batch = PairLoader(column, victim).read(range(8), [0.0] * 8)
    images, embedded = baselines.embed(victim, batch)
    # Among themselves equal captions give the images nothing to ascend: ln B whatever they are ...
    (gradient,) = torch.autograd.grad(one_way_loss(images, embedded.detach(), 10.0), images)
    assert gradient.abs().max() < 1e-5
    # ... mixed with others they are unlearned.
    scores = baselines.pair_similarities(victim, whole)[isolated].mean()
    baselines.anti_backdoor_learning(
        victim, whole, isolated, 8, FineTuning(num_epochs=1, learning_rate=3e-4, warmup_steps=0)
    )
    assert baselines.pair_similarities(victim, whole)[isolated].mean() < scores - 0.1


def test_drop_top_removes_the_most_similar_pairs(victim, small):
    pairs = PairLoader(small, victim)
    first = baselines.top_share(baselines.pair_similarities(victim, pairs), 0.1)
    options = FineTuning(num_epochs=3, batch_size=32, learning_rate=1e-3, warmup_steps=0)
    seen = []
    original = pairs.read

    def read(rows, picks):
        seen.append(list(rows))
        return original(rows, picks)

    pairs.read = read
    removed = baselines.drop_top(victim, pairs, [0, 2], 0.1, options)
    assert removed[:20].tolist() == first.tolist()
    assert len(removed) == 20 + 18
    assert len(set(removed.tolist())) == 38
    trained = [set(rows) for rows in seen if len(rows) == 32]
    assert len(trained) == 3 * (162 // 32)
    assert not set.union(*trained) & set(first.tolist())
    assert not set.union(*trained[-5:]) & set(removed.tolist())


def test_drop_top_goes_on_after_an_interruption(victim, small, checkpoint):
    options = FineTuning(num_epochs=3, batch_size=32, learning_rate=1e-3, warmup_steps=0)
    whole = copy.deepcopy(victim)
    expected = baselines.drop_top(whole, PairLoader(small, whole), [1, 2], 0.1, options)

    class StopError(Exception):
        pass

    def stop(step, values):
        if step == 7:
            raise StopError

    broken = copy.deepcopy(victim)
    with pytest.raises(StopError):
        baselines.drop_top(broken, PairLoader(small, broken), [1, 2], 0.1, options, checkpoint=checkpoint, on_step=stop)
    removed = baselines.drop_top(victim, PairLoader(small, victim), [1, 2], 0.1, options, checkpoint=checkpoint)
    assert removed.tolist() == expected.tolist()
    assert equal(whole, victim)


def test_square_unlearning_drives_flagged_pairs_to_minus_the_target(victim, small):
    pairs = PairLoader(small, victim)
    flags = np.zeros(200, bool)
    flags[::10] = True
    options = FineTuning(num_epochs=6, batch_size=64, learning_rate=1e-3, warmup_steps=0)
    reached = {}
    for target in (-1.0, 0.0, 1.0):
        model = copy.deepcopy(victim)
        baselines.square_unlearning(model, pairs, flags, 4.0, target, options)
        reached[target] = baselines.pair_similarities(model, pairs)[flags].mean()
    assert reached[1.0] < reached[0.0] < reached[-1.0]
    assert abs(reached[0.0]) < 0.4


def test_square_unlearning_of_nothing_and_of_everything(victim, small):
    options = FineTuning(num_epochs=1, batch_size=64, learning_rate=1e-3, warmup_steps=0)
    pairs, losses = PairLoader(small, victim), {}

    def first_loss(name):
        return lambda step, values: losses.setdefault(name, values["loss"])

    nothing, everything = np.zeros(200, bool), np.ones(200, bool)
    baselines.plain_fine_tuning(copy.deepcopy(victim), pairs, options, on_step=first_loss("plain"))
    model = copy.deepcopy(victim)
    baselines.square_unlearning(model, pairs, nothing, 1.0, 0.0, options, on_step=first_loss("nothing"))
    baselines.square_unlearning(victim, pairs, everything, 1.0, 0.0, options, on_step=first_loss("everything"))
    assert losses["nothing"] == pytest.approx(losses["plain"], rel=1e-4)
    assert 0 < losses["everything"] <= 1
    assert all(torch.isfinite(parameter).all() for parameter in victim.parameters())


def test_par_is_fine_tuning_once_the_limit_is_passed(victim, small):
    options = FineTuning(num_epochs=2, batch_size=64, learning_rate=1e-3, warmup_steps=0)
    seen = []
    baselines.perturb_and_recover(victim, small, 0.001, options, on_step=lambda step, values: seen.append(values))
    assert seen[0]["image shift"] <= 0.001
    for values in seen[3:]:
        assert values["image shift"] == values["text shift"] == 0
        assert values["loss"] == pytest.approx(values["clip"])


def test_par_moves_away_up_to_the_limit_and_keeps_the_scale(victim, small):
    options = FineTuning(num_epochs=3, batch_size=64, learning_rate=1e-3, weight_decay=0.0, warmup_steps=0)
    scale, seen = victim.logit_scale.item(), []
    baselines.perturb_and_recover(victim, small, 2.15, options, on_step=lambda step, values: seen.append(values))
    assert seen[0]["image shift"] == pytest.approx(0, abs=1e-5)
    assert max(values["image shift"] for values in seen) > 0.2
    assert all(0 <= values[f"{part} shift"] <= 2.15 for values in seen for part in ("image", "text"))
    # The loss has no gradient for the scale.
    assert victim.logit_scale.item() == pytest.approx(scale)


# --- bad input ---


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (FineTune(**QUICK), {"suspicious": None}, "fine-tune needs the clean pairs"),
        (Abl(**QUICK), {"clean": None}, "abl needs the suspicious pairs"),
        (FineTune(**QUICK), [1, 2], "are a list"),
    ],
    ids=["no clean", "no suspicious", "no data"],
)
def test_missing_parts(method, data, message, victim):
    with pytest.raises(ValueError, match=message):
        defended(method, victim, data)


def with_captions(data, captions):
    return data.remove_columns("captions").add_column("captions", [captions] * len(data))


@pytest.mark.parametrize("method", ALL[:-1], ids=name)
@pytest.mark.parametrize("captions", [[], [None], ["a seven", "  "], [""]], ids=["none", "null", "blank", "empty"])
def test_captions_that_are_none_are_named(method, captions, victim, parts):
    bad = {part: with_captions(data, captions) for part, data in parts.items()}
    with pytest.raises(ValueError, match="row 0: the caption is empty"):
        defended(method, victim, bad)


@pytest.mark.parametrize("method", [FineTune(**QUICK), Abl(**QUICK)], ids=name)
def test_captions_that_are_cut_or_of_another_alphabet_are_told(method, victim, parts):
    messages = []
    run = plait.Run(seed=0, on_warning=messages.append)
    data = {part: with_captions(data, ["seven " * 13, "семь"]) for part, data in parts.items()}
    method.defend(model=victim, data=data, reference=None, run=run)
    assert messages[0] == "200 of 400 captions are longer than the model's 14 tokens and are cut"
    assert messages[1].startswith("200 of 400 captions hold no letter from a to z")


@pytest.mark.parametrize("method", ALL[:-1], ids=name)
def test_models_of_the_sigmoid_loss_are_refused(method, victim, parts):
    victim.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    with pytest.raises(ValueError, match="logit bias, as SigLIP's"):
        defended(method, victim, parts)


def test_bad_models(victim, small):
    with pytest.raises(TypeError, match="model is a Linear"):
        defended(FineTune(**QUICK), torch.nn.Linear(2, 2), small)
    with torch.no_grad():
        victim.model.text_projection[0, 0] = torch.nan
    with pytest.raises(ValueError, match="text_projection holds NaN"):
        defended(FineTune(**QUICK), victim, small)


def test_bad_sizes_and_columns(victim, small, tmp_path):
    with pytest.raises(ValueError, match="fewer than one batch of 256"):
        defended(Par(), victim, small)
    with pytest.raises(ValueError, match="column 'is_backdoor' is missing"):
        defended(SquareUnlearn(**QUICK), victim, small)
    with pytest.raises(ValueError, match="num_isolated is 63"):
        Abl(num_isolated=63)
    with pytest.raises(FileNotFoundError, match="neither a JSON file nor a folder"):
        defended(CleanClip(**QUICK, synonyms=str(tmp_path / "none.json")), victim, small)


def test_pulling_flagged_pairs_together_is_warned_about(victim, parts):
    messages = []
    run = plait.Run(seed=0, on_warning=messages.append)
    SquareUnlearn(**QUICK, unlearn_target=-1.0).defend(model=victim, data=parts, reference=None, run=run)
    assert "pulled together" in messages[0]


def test_a_lone_dataset_is_the_part_that_is_used(victim, parts):
    assert equal(defended(FineTune(**QUICK), victim, parts), defended(FineTune(**QUICK), victim, parts["clean"]))
    assert equal(defended(Abl(**QUICK), victim, parts), defended(Abl(**QUICK), victim, parts["suspicious"]))
