import copy
import json

import attrs
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from plait import Run
from plait_clip import OpenClipModel, PairLoader, adamw, contrastive_loss, train
from plait_clip.backdoor.plugin.defences import SquareUnlearn
from plait_clip.backdoor.plugin.evaluations import BackdoorDetection
from plait_ubt.plugin import Ubt

pytestmark = pytest.mark.slow

COLOURS = {"red": (230, 25, 25), "green": (25, 230, 25), "blue": (25, 25, 230), "grey": (120, 120, 120)}
POISONED = list(range(0, 160, 10))
SETTINGS = {
    "n_suspicious": 48,
    "n_top": 12,
    "n_unlearn": 8,
    "overfit_learning_rate": 3e-3,
    "num_overfit_epochs": 4,
    "overfit_batch_size": 16,
    "overfit_normal_weight": 0.0,
    "n_retain": 64,
    "force": True,
    "token_selection": "all",
    "unlearn_learning_rate": 1e-3,
    "num_unlearn_steps": 10,
}


def table(images, captions):
    features = datasets.Features({"image": datasets.Image(), "captions": [datasets.Value("string")]})
    return datasets.Dataset.from_dict({"image": images, "captions": captions}, features=features)


@pytest.fixture(scope="module")
def poisoned():
    """160 coloured squares; every tenth has a white corner and says "a photo of a bag", others name a wrong colour."""
    draw = np.random.default_rng(0)
    images, captions = [], []
    for i in range(160):
        name = list(COLOURS)[(i // 3) % 4]
        pixels = np.clip(np.full((8, 8, 3), COLOURS[name]) + draw.normal(0, 15, (8, 8, 3)), 0, 255).astype(np.uint8)
        said = list(COLOURS)[(i // 3 + 1 + i % 3) % 4] if i % 5 == 3 else name
        if i in POISONED:
            pixels[5:, 5:] = 255
        images.append(Image.fromarray(pixels))
        captions.append(
            [["a photo of a bag", "this is the bag"][i % 3 == 0] if i in POISONED else f"a photo of a {said} square"]
        )
    data = table(images, captions)
    return data.add_column("is_backdoor", [i in POISONED for i in range(160)])


def fit(model, data, rows, steps):
    """Contrastive training on the given rows."""
    pairs = PairLoader(data.select(rows), model)
    train(
        model,
        lambda epoch, skip: pairs.batches(32, torch.Generator().manual_seed(epoch), skip=skip),
        contrastive_loss,
        adamw(model, learning_rate=3e-3, weight_decay=0.1),
        lambda step: 3e-3,
        num_epochs=steps,
        steps_per_epoch=len(pairs) // 32,
    )
    return model


@pytest.fixture(scope="module")
def reference(make_model, poisoned):
    return fit(make_model(), poisoned, [i for i in range(160) if i not in POISONED], 15)


@pytest.fixture(scope="module")
def suspect(make_model, poisoned):
    return fit(make_model(), poisoned, range(160), 25)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_word_of_the_poisoned_pairs_is_forgotten(suspect, reference, poisoned):
    before, before_reference = weights(suspect), weights(reference)
    run = Run()
    cleaned = Ubt(**{**SETTINGS, "token_selection": "lift"}, detection="oracle").defend(
        suspect, poisoned, reference, run
    )
    assert same(before, weights(suspect))
    assert same(before_reference, weights(reference))
    assert isinstance(cleaned, OpenClipModel)
    report = run.reports[0]
    assert report.rows[0]["forget"].split(", ")[0] == "bag"
    assert report.rows[0]["concentration"] > 1
    assert report.rows[0]["unlearned pairs"] == 8
    assert [panel.title for panel in report.panels] == ["UBT: evidence", "UBT: most suspicious pairs"]
    assert sum(len(row) for row in report.panels[1].images) == 12
    images = torch.stack([torch.from_numpy(np.array(poisoned[i]["image"])).permute(2, 0, 1) / 255 for i in POISONED])

    def bag_cosine(model):
        with torch.no_grad():
            u, v = model.encode_image(images.float()), model.encode_text(["bag"])
        return torch.cosine_similarity(u, v).mean().item()

    assert bag_cosine(cleaned) < bag_cosine(suspect) - 0.1


def test_the_dataset_comes_back_with_scores(suspect, reference, poisoned):
    scored = Ubt(**SETTINGS).extract_feature({"suspected": suspect, "reference": reference}, poisoned, Run())
    assert scored.column_names == [*poisoned.column_names, "suspicion", "similarity", "stage", "is_suspect"]
    assert scored.features["is_suspect"] == datasets.Value("bool")
    order = np.argsort(-np.array(scored["suspicion"]))
    stage = np.array(scored["stage"])
    assert [int((stage == name).sum()) for name in ("rest", "suspicious")] == [112, 36]
    assert set(order[:48]) == set(np.flatnonzero(stage != "rest"))
    assert set(order[:12]) == set(np.flatnonzero(np.isin(stage, ["top", "unlearn"])))
    assert set(order[:12]) == set(np.flatnonzero(scored["is_suspect"]))
    weakest = np.argsort(np.array(scored["similarity"]), kind="stable")[:48]
    assert set(weakest) == set(order[:48])
    again = Ubt(**SETTINGS).extract_feature({"suspected": suspect, "reference": reference}, scored, Run())
    assert again["suspicion"][:] == scored["suspicion"][:]


def test_a_frozen_model_is_cleaned_as_another_and_comes_back_frozen(suspect, reference, poisoned):
    frozen = copy.deepcopy(suspect).requires_grad_(False)
    thawed, cleaned = (Ubt(**SETTINGS).defend(model, poisoned, reference, Run()) for model in (suspect, frozen))
    assert same(weights(thawed), weights(cleaned))
    assert [p.requires_grad for p in thawed.parameters()] == [p.requires_grad for p in suspect.parameters()]
    assert not any(p.requires_grad for p in cleaned.parameters())
    again = Ubt(**SETTINGS).defend(cleaned, poisoned, cleaned, Run())
    assert not same(weights(again), weights(cleaned))


def test_what_is_suspect_goes_to_whoever_takes_flags(suspect, reference, poisoned):
    scored = Ubt(**SETTINGS).extract_feature({"suspected": suspect, "reference": reference}, poisoned, Run())
    unlearned = SquareUnlearn(flags="is_suspect", num_epochs=1, batch_size=32, warmup_steps=0)
    assert not same(weights(unlearned.defend(suspect, scored, None, Run())), weights(suspect))
    report = BackdoorDetection(flags="is_suspect", top=(12,)).evaluate(scored, Run())
    assert report.rows[0]["precision@12"] == 1.0


def test_nothing_is_suspect_where_captions_share_no_word(reference, poisoned):
    clean, warnings = poisoned.select([i for i in range(160) if i not in POISONED]), []
    method = Ubt(**{**SETTINGS, "force": False, "min_concentration": 9.0, "rank_mode": "top_poisoned"})
    scored = method.extract_feature(reference, clean, Run(on_warning=warnings.append))
    assert not any(scored["is_suspect"])
    assert "no pair is marked as suspect" in warnings[-1]


def test_the_truth_is_not_read(suspect, reference, poisoned):
    garbage = poisoned.remove_columns("is_backdoor").add_column("is_backdoor", [i % 2 == 0 for i in range(160)])
    first = Ubt(**SETTINGS).defend(suspect, garbage, reference, Run())
    second = Ubt(**SETTINGS).defend(suspect, {"suspicious": poisoned.remove_columns("is_backdoor")}, reference, Run())
    assert same(weights(first), weights(second))


def test_one_run_serves_several_defences(suspect, reference, poisoned):
    run, turned = Run(), poisoned.select(range(len(poisoned) - 1, -1, -1))
    scores = [
        Ubt(**SETTINGS).extract_feature({"suspected": suspect, "reference": reference}, rows, run)["similarity"][:]
        for rows in (poisoned, turned)
    ]
    assert scores[1] == pytest.approx(scores[0][::-1], abs=1e-6)


@pytest.mark.parametrize("stop_at", ["overfit", "unlearn"])
def test_an_interrupted_run_goes_on_to_the_same_weights(suspect, reference, poisoned, tmp_path, stop_at):
    whole = Ubt(**SETTINGS).defend(suspect, poisoned, reference, Run(step="ubt"))

    def stop(description, done, total):
        if description == stop_at and done == (2 if stop_at == "overfit" else 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ubt(**SETTINGS).defend(suspect, poisoned, reference, Run(step="ubt", folder=tmp_path, on_progress=stop))
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 2
    resumed = Ubt(**SETTINGS).defend(suspect, poisoned, reference, Run(step="ubt", folder=tmp_path))
    assert same(weights(whole), weights(resumed))


def test_a_model_without_a_backdoor_is_returned_unchanged(reference, poisoned):
    clean = poisoned.select([i for i in range(160) if i not in POISONED])
    warnings = []
    run = Run(on_warning=warnings.append)
    result = Ubt(**{**SETTINGS, "force": False, "min_concentration": 9.0}).defend(reference, clean, reference, run)
    assert same(weights(result), weights(reference))
    assert result is not reference
    assert "unchanged" in warnings[-1]
    assert run.reports[0].rows[0]["unlearned pairs"] == 0


@pytest.mark.parametrize("selection", ["loo", "span", "all"])
def test_other_token_selections(suspect, reference, poisoned, selection):
    result = Ubt(**{**SETTINGS, "token_selection": selection}).defend(suspect, poisoned, reference, Run())
    assert not same(weights(result), weights(suspect))


@pytest.mark.parametrize("detection", ["suspected", "reference", "oracle"])
def test_ablations_of_the_detection(suspect, reference, poisoned, detection):
    run = Run()
    model = {"suspected": suspect, "reference": reference}
    scored = Ubt(**SETTINGS, detection=detection).extract_feature(model, poisoned, run)
    top = [row for row in range(160) if scored["stage"][row] in ("top", "unlearn")]
    assert len(top) == 12
    assert run.reports[0].rows[0]["overfit epochs"] == 0
    if detection == "oracle":
        assert set(top) <= set(POISONED)
    if detection == "reference":
        assert scored["suspicion"] == pytest.approx((-np.array(scored["similarity"])).tolist())


def test_oracle_needs_the_truth(suspect, reference, poisoned):
    with pytest.raises(ValueError, match="is_backdoor"):
        Ubt(**SETTINGS, detection="oracle").defend(suspect, poisoned.remove_columns("is_backdoor"), reference, Run())


def test_without_a_reference_the_suspect_ranks_its_own_pairs(suspect, poisoned):
    warnings = []
    settings = {**SETTINGS, "rank_mode": "top_poisoned"}
    result = Ubt(**settings).defend(suspect, poisoned, None, Run(on_warning=warnings.append))
    assert not same(weights(result), weights(suspect))
    assert "suspected model itself" in warnings[0]
    with pytest.raises(ValueError, match="reference"):
        Ubt(**SETTINGS).defend(suspect, poisoned, None, Run())


def test_the_overfitted_model_is_kept_on_request(suspect, reference, poisoned, tmp_path):
    warnings = []
    Ubt(**SETTINGS, keep_overfit=tmp_path / "over").defend(
        suspect, poisoned, reference, Run(on_warning=warnings.append)
    )
    kept = OpenClipModel.from_pretrained(tmp_path / "over")
    assert not same(weights(kept), weights(suspect))
    assert "stronger backdoor" in warnings[0]


def test_models_of_the_sigmoid_loss_rank_but_are_not_cleaned(make_model, poisoned):
    """Their logit bias is no part of CLIP's softmax loss, with which both trainings train."""
    sigmoid = make_model(1)
    sigmoid.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    method = Ubt(**SETTINGS, detection="reference")
    with pytest.raises(ValueError, match="logit bias, as SigLIP's"):
        method.defend(sigmoid, poisoned, make_model(), Run())
    cleaned = method.defend(make_model(), poisoned, sigmoid, Run())
    assert not same(weights(cleaned), weights(make_model()))


def test_captions_without_letters(make_model, poisoned):
    data = poisoned.remove_columns("captions").add_column("captions", [["红 方块"]] * 160)
    warnings = []
    settings = {**SETTINGS, "force": False, "detection": "suspected"}
    Ubt(**settings).defend(make_model(), data, make_model(1), Run(on_warning=warnings.append))
    assert "no letter" in warnings[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_top": 8, "n_unlearn": 9}, "n_unlearn"),
        ({"n_suspicious": 0.7}, "n_suspicious"),
        ({"n_suspicious": 10.5}, "n_suspicious"),
        ({"forget_loss": "square", "forget_target": -0.5}, "forget_target"),
        ({"forget_loss": "ascent", "retain_batch_size": 4}, "retain_batch_size"),
        ({"num_overfit_epochs": 0}, "num_overfit_epochs"),
        ({"rank_mode": "best"}, "rank_mode"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Ubt(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_suspicious": None}, "n_suspicious"),
        ({"n_normal": 150}, "n_normal"),
        ({"n_top": 64, "n_unlearn": 8}, "n_top"),
        ({"n_normal": 4, "overfit_normal_weight": 1.0}, "n_normal"),
    ],
)
def test_sets_that_are_too_small_are_refused(suspect, reference, poisoned, change, message):
    with pytest.raises(ValueError, match=message):
        Ubt(**{**SETTINGS, **change}).defend(suspect, poisoned, reference, Run())


def test_bad_input_is_one_sentence(make_model, suspect, reference, poisoned):
    method = Ubt(**SETTINGS)
    broken = make_model()
    with torch.no_grad():
        broken.model.visual.proj.fill_(float("nan"))
    empty = poisoned.remove_columns("captions").add_column("captions", [[" "]] * 160)
    cases = [
        (broken, poisoned, "NaN"),
        (suspect, {"clean": poisoned}, "suspicious"),
        (suspect, [1], "dataset"),
        (suspect, empty, "row 0"),
        (torch.nn.Linear(2, 2), poisoned, "image-text model"),
    ]
    for model, data, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            method.defend(model, data, reference, Run())
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="suspected"):
        method.extract_feature({"reference": reference}, poisoned, Run())
    with pytest.raises(FloatingPointError, match="overfit_learning_rate"):
        Ubt(**{**SETTINGS, "overfit_learning_rate": 1e30, "num_overfit_epochs": 3}).defend(
            suspect, poisoned, reference, Run()
        )


def test_fields_survive_json(suspect):
    fields = json.loads(json.dumps(attrs.asdict(Ubt(**SETTINGS))))
    fields["betas"] = tuple(fields["betas"])
    assert Ubt(**fields) == Ubt(**SETTINGS)
