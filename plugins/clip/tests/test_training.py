import copy
import math
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait_clip import training
from plait_clip.model import architectures
from plait_clip.pair_batches import PairLoader
from plait_clip.plugin.models import OpenClip
from plait_clip.plugin.training import ClipContrastive


@pytest.fixture
def model(run):
    return OpenClip().load_model(data=None, run=run[0])


@pytest.fixture
def small(digits):
    return digits["train"].select(range(120))


def same(a, b, **tolerance):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def short(**fields):
    return ClipContrastive(**{"num_epochs": 2, "batch_size": 40, "learning_rate": 2e-3, "warmup_steps": 2, **fields})


def test_schedule_at_the_published_steps():
    rate = [training.warmup_cosine(step, peak=1e-5, warmup_steps=5, num_steps=40) for step in range(42)]
    for step, value in {0: 2.000e-6, 4: 1.000e-5, 6: 9.980e-6, 39: 2.013e-8, 40: 0.0, 41: 2.013e-8}.items():
        assert rate[step] == pytest.approx(value, rel=1e-3, abs=1e-12)


@given(warmup=st.integers(0, 60), total=st.integers(1, 100), step=st.integers(0, 99))
def test_the_schedule_stays_between_0_and_its_peak(warmup, total, step):
    if step < total:
        assert 0 <= training.warmup_cosine(step, peak=0.3, warmup_steps=warmup, num_steps=total) <= 0.3 + 1e-12


def test_vectors_do_not_decay(model):
    groups = training.adamw(model, learning_rate=1e-3, weight_decay=0.1).param_groups
    assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])
    assert all(parameter.ndim < 2 for parameter in groups[1]["params"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.slow
def test_training_learns_and_leaves_its_input_alone(model, digits, run):
    data = digits["train"].select(range(600))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    made, _, curves = run
    after = short(num_epochs=3).optimize(model=model, data=data, run=made)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert len(curves) == 3 * (600 // 40)
    losses = [values["loss"] for _, values in curves]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert not after.training
    assert all(parameter.requires_grad for parameter in after.parameters())
    again = short(num_epochs=3).optimize(model=model, data=data, run=Run(seed=0, step="step"))
    same(after, again)
    other = short(num_epochs=3).optimize(model=model, data=data, run=Run(seed=1, step="step"))
    assert any(not torch.equal(a, b) for a, b in zip(after.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tower", ["both", "image"])
def test_a_frozen_model_is_trained_as_another_and_comes_back_frozen(model, small, tower):
    thawed = short(train=tower).optimize(model=model, data=small, run=Run(seed=0))
    frozen = copy.deepcopy(model).requires_grad_(False)
    after = short(train=tower).optimize(model=frozen, data=small, run=Run(seed=0))
    same(thawed, after)
    assert all(parameter.requires_grad for parameter in thawed.parameters())
    assert not any(parameter.requires_grad for parameter in after.parameters())


class StoppedError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_killed_training_goes_on_to_the_same_result(model, small, stop_at, tmp_path):
    method = short(num_epochs=4, checkpoint_minutes=0.0)
    whole = method.optimize(model=model, data=small, run=Run(seed=3, folder=tmp_path / "a"))

    def stop(values, step):
        if step == stop_at:
            raise StoppedError

    with pytest.raises(StoppedError):
        method.optimize(model=model, data=small, run=Run(seed=3, folder=tmp_path / "b", on_log=stop))
    steps = []
    run = Run(seed=3, folder=tmp_path / "b", on_log=lambda values, step: steps.append(step))
    same(whole, method.optimize(model=model, data=small, run=run))
    assert 0 < steps[0] <= stop_at
    assert steps[-1] == 4 * 3 - 1


@pytest.mark.slow
def test_streamed_pairs_are_the_held_ones(model, small, run):
    held = short().optimize(model=model, data=small, run=Run(seed=0))
    streamed = short(held_gigabytes=0.0).optimize(model=model, data=small, run=Run(seed=0))
    same(held, streamed)
    in_processes = short(held_gigabytes=0.0, workers=2).optimize(model=model, data=small, run=Run(seed=0))
    same(held, in_processes)


def test_sharing_equal_captions_changes_nothing_but_rounding(model, small):
    shared, apart = PairLoader(small, model), PairLoader(small, model, share_texts=False)
    a, b = (next(pairs.batches(60, torch.Generator().manual_seed(0))) for pairs in (shared, apart))
    assert len(a.tokens) < len(b.tokens) == 60
    assert torch.equal(a.tokens[a.text_index], b.tokens)
    torch.testing.assert_close(training.contrastive_loss(model, a), training.contrastive_loss(model, b))
    gradients = []
    for batch in (a, b):
        model.zero_grad()
        training.contrastive_loss(model, batch).backward()
        gradients.append(model.model.token_embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_batch_holds_its_rows(model, digits):
    data = digits["train"].select(range(50))
    for pairs in (PairLoader(data, model), PairLoader(data, model, held_bytes=0)):
        batches = list(pairs.batches(20, torch.Generator().manual_seed(1)))
        assert [len(batch.rows) for batch in batches] == [20, 20]
        everything = list(pairs.batches(20, torch.Generator().manual_seed(1), drop_last=False))
        assert sorted(int(row) for batch in everything for row in batch.rows) == list(range(50))
        skipped = list(pairs.batches(20, torch.Generator().manual_seed(1), skip=1))
        assert torch.equal(skipped[0].rows, batches[1].rows)
        halves = [next(pairs.batches(20, torch.Generator().manual_seed(1), part=(k, 2))).rows for k in (0, 1)]
        assert torch.equal(torch.stack(halves, dim=1).flatten(), batches[0].rows)
        for i, row in enumerate(batches[0].rows.tolist()):
            pixels = torch.frombuffer(bytearray(data[row]["image"].tobytes()), dtype=torch.uint8).view(8, 8, 3)
            assert torch.equal(batches[0].images[i], pixels.permute(2, 0, 1))
            tokens = model.tokenize(data[row]["captions"])[0]
            found = batches[0].tokens[batches[0].text_index[i]]
            assert torch.equal(found, tokens[: len(found)])


def test_captions_are_drawn_anew_in_every_epoch(model):
    image = Image.new("RGB", (8, 8))
    data = datasets.Dataset.from_dict({"image": [image] * 40, "captions": [["one", "two", "three four"]] * 40})
    pairs = PairLoader(data, model)
    lengths = Counter()
    for epoch in range(30):
        batch = next(pairs.batches(40, torch.Generator().manual_seed(epoch)))
        lengths.update((batch.tokens[batch.text_index, 1]).tolist())
    assert len(lengths) == 3
    assert all(abs(count - 400) < 80 for count in lengths.values())


@pytest.mark.slow
def test_accumulation_is_the_mean_of_its_batches(model, small, run):
    pairs = PairLoader(small, model)
    batches = list(pairs.batches(40, torch.Generator().manual_seed(0)))[:2]
    for batch in batches:
        (training.contrastive_loss(model, batch) / 2).backward()
    expected = model.model.visual.proj.grad.clone()
    model.zero_grad()
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.model.visual.proj.detach().clone()
    training.train(
        model,
        lambda epoch, skip: iter(batches[skip:]),
        training.contrastive_loss,
        optimizer,
        lambda step: 1.0,
        num_epochs=1,
        steps_per_epoch=1,
        accumulation=2,
        on_step=lambda step, values: seen.append(values["loss"]),
    )
    torch.testing.assert_close(before - model.model.visual.proj.detach(), expected)
    assert len(seen) == 1
    assert len(short(accumulation=3).optimize(model=model, data=small, run=run[0]).state_dict()) > 0
    assert [step for step, _ in run[2]] == [0, 1]


def test_the_logit_scale_stays_within_its_bounds(model, small, run):
    after = short(learning_rate=1.0, warmup_steps=0, max_log_scale=2.0, on_divergence="restore").optimize(
        model=model, data=small, run=run[0]
    )
    assert 0 <= float(after.logit_scale.detach()) <= 2.0


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_can_learn_alone(model, small, tower, run):
    after = short(train=tower, weight_decay=0.5).optimize(model=model, data=small, run=run[0])
    changed = {name for name, t in after.state_dict().items() if not torch.equal(t, model.state_dict()[name])}
    assert changed
    assert "model.logit_scale" in changed
    assert all(name.startswith("model.visual.") == (tower == "image") for name in changed - {"model.logit_scale"})


@pytest.mark.slow
def test_bf16_learns_what_fp32_learns(model, small):
    curves = {}
    for precision in ("fp32", "bf16"):
        curve = curves[precision] = []
        run = Run(seed=0, on_log=lambda values, step, curve=curve: curve.append(values["loss"]))
        after = short(precision=precision).optimize(model=model, data=small, run=run)
        assert next(after.parameters()).dtype == torch.float32
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.02)


def test_divergence_restores_the_last_good_weights(model, small, run):
    pairs = PairLoader(small, model)
    good = {}

    def loss(model, batch):
        if len(good) == 5:
            return training.contrastive_loss(model, batch) * math.nan
        good[len(good)] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return training.contrastive_loss(model, batch)

    with pytest.raises(training.DivergedError) as caught:
        training.train(
            model,
            lambda epoch, skip: pairs.batches(40, torch.Generator().manual_seed(epoch), skip=skip),
            loss,
            training.adamw(model, learning_rate=1e-3, weight_decay=0.1),
            lambda step: 1e-3,
            num_epochs=4,
            steps_per_epoch=3,
        )
    assert (caught.value.step, caught.value.restored_step) == (5, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, good[3][name])


def test_diverging_runs_fail_with_one_sentence_or_give_the_last_good_weights(model, small, run):
    made, warnings, _ = run
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "num_epochs": 3}
    with pytest.raises(
        training.DivergedError, match=r"the loss is nan at step \d+; the weights of step 0 are restored"
    ):
        short(**wild).optimize(model=model, data=small, run=made)
    after = short(**wild, on_divergence="restore").optimize(model=model, data=small, run=made)
    assert all(torch.isfinite(tensor).all() for tensor in after.state_dict().values())
    assert len(warnings) == 1


def test_users_mistakes_are_one_sentence(model, digits, run):
    made, _, _ = run
    train = digits["train"]
    image = train[0]["image"]

    def data(captions, images=None):
        return datasets.Dataset.from_dict({"image": images or [image] * len(captions), "captions": captions})

    with pytest.raises(ValueError, match="30 rows, fewer than batch_size × accumulation = 128"):
        ClipContrastive().optimize(model=model, data=train.select(range(30)), run=made)
    with pytest.raises(ValueError, match="row 1: the caption is empty"):
        short(batch_size=2).optimize(model=model, data=data([["one"], [" "]]), run=made)
    with pytest.raises(ValueError, match="row 0: the caption is empty"):
        short(batch_size=2).optimize(model=model, data=data([[], ["one"]]), run=made)
    with pytest.raises(ValueError, match="row 1: the image is missing"):
        short(batch_size=2).optimize(model=model, data=data([["a"], ["b"]], [image, None]), run=made)
    with pytest.raises(ValueError, match="no column 'captions'"):
        short().optimize(model=model, data=train.remove_columns("captions"), run=made)
    with pytest.raises(ValueError, match="no column 'image'"):
        short().optimize(model=model, data=train.remove_columns("image"), run=made)
    with pytest.raises(ValueError, match="pick a split"):
        short().optimize(model=model, data=digits, run=made)
    with pytest.raises(ValueError, match="has no rows"):
        short().optimize(model=model, data=train.select([]), run=made)
    with pytest.raises(TypeError, match="image-text model"):
        short().optimize(model=torch.nn.Linear(2, 2), data=train, run=made)
    with pytest.raises(TypeError, match="logit bias"):
        short(loss="sigmoid").optimize(model=model, data=train, run=made)
    with pytest.raises(ValueError, match="cannot be shared"):
        ClipContrastive(batch_size=5, num_processes=2)
    with torch.no_grad():
        model.model.ln_final.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"ln_final.weight holds NaN"):
        short().optimize(model=model, data=train, run=made)


@pytest.mark.slow
def test_a_damaged_image_is_named_also_by_worker_processes(model, small, run):
    rows = small.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[37]["image"]["bytes"] = rows[37]["image"]["bytes"][:-40]
    data = datasets.Dataset.from_list(rows, features=small.features)
    for fields in ({}, {"held_gigabytes": 0.0}, {"held_gigabytes": 0.0, "workers": 2}):
        with pytest.raises(ValueError, match="row 37: the image cannot be decoded"):
            short(**fields).optimize(model=model, data=data, run=run[0])


def test_long_captions_are_cut_and_counted(model, run):
    data = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (8, 8))] * 4, "captions": [["one"], ["two"], ["three"], ["seven " * 10_000]]}
    )
    _, warnings, _ = run
    for fields in ({}, {"held_gigabytes": 0.0}):
        again = Run(seed=0, on_warning=warnings.append)
        short(batch_size=4, num_epochs=2, **fields).optimize(model=model, data=data, run=again)
    assert warnings == ["2 times a caption was longer than the model's 14 tokens and was cut"] * 2


@pytest.mark.slow
def test_sigmoid_loss_trains_a_model_with_a_bias(small, run):
    tiny = architectures.tiny("tiny")
    model = architectures.from_config({**tiny.config, "init_logit_bias": -10.0})
    model.tokenizer = tiny.tokenizer
    with pytest.raises(ValueError, match="sigmoid"):
        short().optimize(model=model, data=small, run=run[0])
    short(loss="sigmoid", num_epochs=6).optimize(model=model, data=small, run=run[0])
    losses = [values["loss"] for _, values in run[2]]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_two_processes_do_what_one_does(model, small):
    curves = {1: [], 2: []}
    results = {}
    for processes, curve in curves.items():
        run = Run(seed=0, on_log=lambda values, step, curve=curve: curve.append(values["loss"]))
        results[processes] = short(num_processes=processes).optimize(model=model, data=small, run=run)
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    same(results[1], results[2], rtol=0, atol=2e-3)


def test_processes_are_not_started_for_too_few_rows(model, small, run):
    with pytest.raises(ValueError, match="fewer than batch_size"):
        short(num_processes=2, batch_size=400).optimize(model=model, data=small, run=run[0])


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_not_used(model, small, digits, tmp_path):
    def stop(values, step):
        if step == 4:
            raise StoppedError

    method = short(checkpoint_minutes=0.0)
    with pytest.raises(StoppedError):
        method.optimize(model=model, data=small, run=Run(folder=tmp_path, on_log=stop))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.logit_scale.add_(0.01)
    trainings = [
        (short(checkpoint_minutes=0.0, learning_rate=1e-3), model, small),
        (short(checkpoint_minutes=0.0, train="image"), model, small),
        (method, other, small),
        (method, model, digits["test"].select(range(120))),
    ]
    for trained, start, data in trainings:
        steps = []
        trained.optimize(
            model=start, data=data, run=Run(folder=tmp_path, on_log=lambda _, step, s=steps: s.append(step))
        )
        assert steps == [0, 1, 2, 3, 4, 5]
    steps = []
    method.optimize(model=model, data=small, run=Run(folder=tmp_path, on_log=lambda _, step: steps.append(step)))
    assert steps[0] > 0
