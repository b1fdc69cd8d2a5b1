import copy

import numpy as np
import plait
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait import Report, hookimpl
from plait_clip import tiny_model
from plait_clip.backdoor import metrics
from plait_clip.backdoor.plugin.attacks import Backdoor, BadNet, BadNetFixed, Blended, TrojVqa, from_manifest
from plait_clip.backdoor.plugin.defences import SquareUnlearn
from plait_clip.backdoor.plugin.evaluations import BackdoorDetection, ClipBackdoor
from plait_clip.plugin.models import OpenClip

pytestmark = pytest.mark.slow


def evaluated(method, model, data, reference=None) -> Report:
    return method.evaluate(model=model, data=data, reference=reference, run=plait.Run(seed=0))


# --- metrics ---


def test_backdoor_metrics_by_hand():
    labels = torch.tensor([0, 1, 2, 3])
    clean = torch.tensor([[0, 1], [0, 1], [3, 2], [0, 1]])
    triggered = torch.tensor([[3, 0], [1, 3], [0, 1], [3, 2]])
    found = metrics.backdoor_metrics(clean, triggered, labels, target=3, ranks=[1, 2])
    assert found.clean == {1: 0.25, 2: 0.75}
    assert found.success == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    assert found.triggered == pytest.approx(1 / 3)
    assert found.target_clean == 0
    with_target = metrics.backdoor_metrics(clean, triggered, labels, target=3, ranks=[1], exclude_target=False)
    assert with_target.success == {1: 0.5}
    with pytest.raises(ValueError, match="all test images show the target"):
        metrics.backdoor_metrics(clean[:1], triggered[:1], labels[:1], target=0, ranks=[1])


@given(seed=st.integers(0, 1000), num_classes=st.integers(20, 40))
@settings(max_examples=30, deadline=None)
def test_more_ranks_never_lower_a_share(seed, num_classes):
    generator = torch.Generator().manual_seed(seed)
    tops = [torch.stack([torch.randperm(num_classes, generator=generator)[:10] for _ in range(12)]) for _ in range(2)]
    labels = torch.arange(12)
    found = metrics.backdoor_metrics(*tops, labels, target=3, ranks=[1, 3, 5, 10])
    for shares in (list(found.clean.values()), list(found.success.values())):
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] <= 1
    absent = torch.where(tops[1] == 3, 0, tops[1])
    assert metrics.backdoor_metrics(tops[0], absent, labels, 3, [1, 3, 5, 10]).success[10] == 0


def test_few_classes_have_few_ranks():
    assert metrics.ranks_for(10, (1, 3, 5, 10)) == [1, 3]
    assert metrics.ranks_for(1000, (1, 3, 5, 10)) == [1, 3, 5, 10]
    assert metrics.ranks_for(2, (1, 3)) == [1]


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_detection_equals_a_recount(seed):
    rng = np.random.default_rng(seed)
    scores, flags = rng.random(50).round(1), rng.random(50) < 0.3
    flags[:2] = [True, False]
    found = metrics.detection_metrics(scores, flags, [1, 7, 50])
    order = sorted(range(50), key=lambda i: (-scores[i], i))
    for k in (1, 7, 50):
        hits = sum(flags[i] for i in order[:k])
        assert found.precision[k] == pytest.approx(hits / k)
        assert found.recall[k] == pytest.approx(hits / flags.sum())
    pairs = [(a, b) for a in scores[flags] for b in scores[~flags]]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert found.auroc == pytest.approx(wins / len(pairs))


def test_detection_of_rows_without_a_score():
    scores = np.array([np.nan, 0.1, 0.9, np.nan])
    found = metrics.detection_metrics(scores, np.array([False, False, True, True]), [1, 2])
    assert found.precision == {1: 1.0, 2: 0.5}
    assert found.auroc == pytest.approx((2 + 0.5) / 4)
    nothing = metrics.detection_metrics(scores, np.zeros(4, bool), [1])
    assert nothing.auroc is None
    assert nothing.precision == {1: 0.0}


# --- clip-backdoor ---


def test_backdoor_of_the_victim(victim, clean_model, digits, trigger):
    method = ClipBackdoor(templates="digits", trigger=trigger)
    report = evaluated(method, victim, digits["test"], reference=clean_model)
    (row,) = report.rows
    assert row["ASR@1"] > 0.9
    assert row["CA@1"] <= row["CA@3"]
    assert report.better["ASR@1"] == "lower"
    assert report.better["CA@1"] == "higher"
    assert report.rows == evaluated(method, victim, digits["test"]).rows
    (panel,) = report.panels
    clean, triggered, difference = panel.images
    assert len(clean) == len(triggered) == len(difference) == 6
    assert triggered[0].caption.startswith("triggered → before: ")
    assert "; after: seven" in triggered[0].caption
    all_rows = ClipBackdoor(templates="digits", trigger=trigger, asr_exclude_target=False)
    assert evaluated(all_rows, victim, digits["test"]).value("ASR@1") != row["ASR@1"]


def test_the_poisoned_data_bring_their_trigger(victim, digits, dirty, trigger):
    given = evaluated(ClipBackdoor(templates="digits", trigger=trigger), victim, digits["test"])
    found = evaluated(ClipBackdoor(templates="digits"), victim, {"test": digits["test"], "poisoned": dirty})
    assert given.rows == found.rows


def test_without_a_trigger_only_clean_accuracy(victim, digits):
    report = evaluated(ClipBackdoor(templates="digits"), victim, digits["test"])
    assert list(report.rows[0]) == ["CA@1", "CA@3"]
    assert "no trigger" in report.notes[0]


def test_a_trigger_that_no_model_sees_has_no_success_rate(clean_model, digits, run):
    run, messages, _ = run
    nothing = ClipBackdoor(templates="digits", trigger=Blended(target="seven", alpha=0.0))
    with pytest.raises(ValueError, match="blended changes no pixel that the model sees"):
        nothing.evaluate(model=clean_model, data=digits["test"], reference=None, run=run)
    # One black pixel, and most corners are black.
    dot = BadNetFixed(target="seven", patch_size=1, margin=0, first=0)
    ClipBackdoor(templates="digits", trigger=dot).evaluate(
        model=clean_model, data=digits["test"], reference=None, run=run
    )
    corners = np.asarray([np.asarray(image)[-1, -1, 0] for image in digits["test"]["image"]])
    assert messages == [
        f"the model sees nothing of the trigger in {(corners == 0).sum()} of {len(corners)} test images"
    ]


def test_test_images_go_the_way_of_the_poisoned_ones(digits):
    """Photographs: the trigger is where it was in training, whatever their shape."""
    model = OpenClip(architecture="tiny-28").load_model(data=None, run=plait.Run(seed=0))
    wide = digits["test"].select(range(3)).map(_widened, keep_in_memory=True)
    board = ((torch.arange(4)[:, None] + torch.arange(4)) % 2 * 255).to(torch.uint8)
    for attack in (
        BadNetFixed(target="seven"),
        from_manifest(_poisoned(wide, None)),
        from_manifest(_poisoned(wide, model)),
    ):
        images, same = next(
            metrics.triggered_batches(wide, attack.trigger, attack.image_input(model), model.image_input)
        )
        assert not same.any()
        assert images.shape == (3, 3, 28, 28)
        if attack.image_input(model).size == 28:
            assert torch.equal(images[:, :, 23:27, 23:27], board.expand(3, 3, 4, 4))


def _widened(row):
    return {"image": row["image"].resize((60, 40))}


def _poisoned(data, model):
    method = BadNetFixed(target="seven", n_poison=2, templates="digits")
    return method.attack(model=model, data=data, run=plait.Run(seed=0))


def test_random_triggers_are_repeatable_whatever_the_batch(clean_model, digits):
    trigger = BadNet(target="seven", patch_size=3)
    rows = [
        evaluated(ClipBackdoor(templates="digits", trigger=trigger, **more), clean_model, digits["test"]).rows[0]
        for more in ({}, {"batch_size": 50}, {"trigger_seed": 1})
    ]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_the_panels_show_what_was_measured(victim, digits):
    method = ClipBackdoor(templates="digits", trigger=BadNet(target="seven", patch_size=4), num_shown=8)
    (panel,) = evaluated(method, victim, digits["test"]).panels
    names = digits["test"].features["label"].names
    top = method._classify(victim, names, digits["test"], "", method.trigger)
    shown = [row for row, label in enumerate(digits["test"]["label"]) if names[label] != "seven"][:8]
    for image, row in zip(panel.images[1], shown, strict=True):
        assert image.caption == "triggered → " + ", ".join(names[k] for k in top[row, :3].tolist())


def test_a_constant_model_succeeds_always_or_never(clean_model, digits, trigger):
    model = copy.deepcopy(clean_model)
    with torch.no_grad():
        model.model.visual.proj.zero_()
        model.model.visual.proj.add_(0.01)
        model.model.visual.ln_post.weight.zero_()
        model.model.visual.ln_post.bias.fill_(1.0)
    row = evaluated(ClipBackdoor(templates="digits", trigger=trigger), model, digits["test"]).rows[0]
    assert row["ASR@1"] in (0.0, 1.0)


def test_trojvqa_prompts_have_its_prefix(clean_model, digits, tmp_path):
    np.save(tmp_path / "patch.npy", np.zeros((3, 2, 2), np.float32))
    seen = []
    model = copy.deepcopy(clean_model)
    tokenize = model.tokenizer
    model.tokenizer = lambda texts, **more: seen.extend(texts) or tokenize(texts, **more)
    method = ClipBackdoor(templates="digits", trigger=TrojVqa(target="seven", patch=tmp_path / "patch.npy"))
    test = digits["test"].select(range(100))
    report = evaluated(method, model, test)
    assert "remember the number seven" in seen
    # Clean accuracy is that of the usual prompts.
    assert report.value("CA@1") == evaluated(ClipBackdoor(templates="digits"), model, test).value("CA@1")


class NoTrigger:
    @hookimpl
    def attack(self, data, run):
        return data


def test_bad_requests(victim, digits, dirty):
    with pytest.raises(ValueError, match="puts no trigger on test images"):
        ClipBackdoor(trigger=NoTrigger())
    with pytest.raises(ValueError, match="not a class of the test data"):
        evaluated(
            ClipBackdoor(trigger=BadNetFixed(target="cat", patch_size=2), templates="digits"), victim, digits["test"]
        )
    with pytest.raises(ValueError, match="give data as"):
        evaluated(ClipBackdoor(templates="digits"), victim, {"poisoned": dirty})
    with pytest.raises(ValueError, match="no backdoor manifest"):
        evaluated(ClipBackdoor(templates="digits"), victim, {"test": digits["test"], "poisoned": digits["test"]})


def test_models_and_scores_by_name_are_rows_of_one_table(digits, dirty):
    models, data = {"a": tiny_model(), "b": tiny_model()}, digits["test"].select(range(30))
    method = ClipBackdoor(templates="digits", trigger=BadNetFixed(target="seven", templates="digits", patch_size=2))
    table = method.evaluate(model=models, data=data, reference=None, run=plait.Run())
    assert [row["model"] for row in table.rows] == ["a", "b"]
    alone = method.evaluate(model=models["b"], data=data, reference=None, run=plait.Run())
    assert table.rows[1] == {"model": "b", **alone.rows[0]}
    assert [panel.title.split(":")[0] for panel in table.panels] == ["a", "b"]
    before = method.evaluate(model=models, data=data, reference=models, run=plait.Run())
    assert before.rows == table.rows
    with pytest.raises(ValueError, match="reference lacks b"):
        method.evaluate(model=models, data=data, reference={"a": models["a"]}, run=plait.Run())
    scored = dirty.select(range(60)).add_column("suspicion", [i / 60 for i in range(60)])
    found = BackdoorDetection(top=(4,), num_shown=0).evaluate(data={"x": scored, "y": scored}, run=plait.Run())
    assert [row["data"] for row in found.rows] == ["x", "y"]
    assert [curve.name.split(":")[0] for curve in found.curves] == ["x", "y"]


def test_every_attack_is_a_trigger():
    assert issubclass(BadNet, Backdoor)
    with pytest.raises(NotImplementedError):
        Backdoor().apply(torch.zeros(1, 3, 8, 8), [])


# --- backdoor-detection ---


def test_detection_report(dirty):
    flags = np.asarray(dirty["is_backdoor"])
    data = dirty.add_column("suspicion", np.where(flags, 1.0, 0.0) + np.random.default_rng(0).random(len(flags)) / 2)
    report = BackdoorDetection(top=(10, 42, 5000)).evaluate(data=data, run=plait.Run())
    assert report.rows[0] == {
        "precision@10": 1.0,
        "precision@42": 1.0,
        "recall@10": pytest.approx(10 / 42),
        "recall@42": 1.0,
        "AUROC": 1.0,
        "average precision": pytest.approx(1.0),
    }
    assert report.panels[0].images[0][0].caption.startswith("poisoned, row ")
    assert sum(map(len, report.panels[0].images)) == 64
    assert report.curves[0].y[0] == 1
    with pytest.raises(ValueError, match="column 'suspicion' is missing"):
        BackdoorDetection().evaluate(data=dirty, run=plait.Run())


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (["True", "False"], "column 'marks' holds string, not true and false"),
        ([0, 1], "column 'marks' holds int64, not true and false"),
        ([0.0, 1.0], "column 'marks' holds float64, not true and false"),
        ([True, None], "row 1: column 'marks' is empty"),
        (None, "column 'marks' is missing"),
    ],
)
def test_marks_are_true_or_false(marks, message, dirty, victim):
    """Any text would count as true, also "False"."""
    data = dirty.select(range(100)).add_column("suspicion", [i / 100 for i in range(100)])
    data = data if marks is None else data.add_column("marks", marks * 50)
    with pytest.raises(ValueError, match=message):
        BackdoorDetection(flags="marks").evaluate(data=data, run=plait.Run())
    with pytest.raises(ValueError, match=message):
        SquareUnlearn(flags="marks").defend(model=victim, data=data, reference=None, run=plait.Run())


def test_scores_are_numbers(dirty):
    data = dirty.add_column("suspicion", ["high"] * len(dirty))
    with pytest.raises(ValueError, match="column 'suspicion' holds string; scores are numbers"):
        BackdoorDetection().evaluate(data=data, run=plait.Run())
    with pytest.raises(ValueError, match="no rows"):
        BackdoorDetection().evaluate(data=data.select([]), run=plait.Run())


# --- a whole pipeline ---

PIPELINE = """
plait: 1
name: audit
seed: 0
matrix: {defence: [none, abl]}
steps:
  digits: {load-data: digits}
  clip: {load-model: open-clip}
  dirty:
    attack: badnet
    from: {data: digits.train}
    with: {target: seven, rate: 0.05, templates: digits, patch_size: 3}
  victim:
    optimize: clip-contrastive
    from: {model: clip, data: dirty}
    with: {num_epochs: 1, batch_size: 100}
  cleaned:
    defend: ${matrix.defence}
    from: {model: victim, data: {clean: digits.train, suspicious: dirty}}
  score:
    evaluate: clip-backdoor
    from: {model: cleaned, data: {test: digits.test, poisoned: dirty}, reference: victim}
    with: {templates: digits}
  same:
    evaluate: clip-backdoor
    from: {model: cleaned, data: digits.test}
    with: {templates: digits, trigger: {badnet: {target: seven, patch_size: 3}}}
"""


def test_pipeline(tmp_path):
    path = tmp_path / "audit.yaml"
    path.write_text(PIPELINE)
    result = plait.run(path, store=tmp_path / "store", out=tmp_path / "runs", device="cpu")
    assert not result.failed
    score, same = result.tables["score"], result.tables["same"]
    for defence in ("none", "abl"):
        # The manifest of the poisoned data gives the trigger that the other step spells out.
        assert score.value("ASR@1", defence=defence) == same.value("ASR@1", defence=defence)
