import math

import datasets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_clip import digit_pairs, prompts, tiny_fusion_model, tiny_model, zero_shot
from plait_clip.plugin.evaluation import LinearProbe, Retrieval, SupervisedFineTune, ZeroShot, success_rate
from plait_clip.probe import linear_probe
from plait_clip.retrieval import evaluate_retrieval, recall, retrieval_ranks
from plait_vision.recognition import Accuracy

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_zero_shot_on_digits(trained, digits, run):
    row = ZeroShot(templates="digits").evaluate(model=trained, data=digits["test"], run=run[0]).rows[0]
    assert list(row) == ["CA@1", "CA@3", "CA@5"]  # ten classes: CA@10 would say nothing
    assert 0.75 <= row["CA@1"] <= row["CA@3"] <= row["CA@5"] <= 1
    less = ZeroShot(templates=("{}",), top=(1,)).evaluate(model=trained, data=digits["test"], run=run[0]).rows[0]
    assert list(less) == ["CA@1"]
    assert less["CA@1"] > 0.3


def test_models_and_data_sets_by_name_are_rows_of_one_table(run):
    run, data = run[0], digit_pairs(40)
    models, parts = {"a": tiny_model(), "b": tiny_model()}, {"some": data.select(range(20)), "all": data}
    for method in (ZeroShot(templates="digits"), Retrieval()):
        table = method.evaluate(model=models, data=parts, run=run).rows
        assert [(row["model"], row["data"]) for row in table] == [
            ("a", "some"), ("b", "some"), ("a", "all"), ("b", "all"),
        ]  # fmt: skip
        alone = method.evaluate(model=models["b"], data=parts["some"], run=run).rows[0]
        assert table[1] == {"model": "b", "data": "some", **alone}
        one_model = method.evaluate(model=models["a"], data=parts, run=run).rows
        assert [next(iter(row)) for row in one_model] == ["data", "data"]
    splits = {"train": data, "test": parts["some"]}
    probed = LinearProbe(num_epochs=1).evaluate(model=models, data=splits, run=run).rows
    assert [(row["model"], row["split"]) for row in probed] == [("a", "test"), ("b", "test")]
    models["b"].model.token_embedding.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model b, data all: .* are not finite"):
        ZeroShot(templates="digits").evaluate(model=models, data={"all": data}, run=run)
    with pytest.raises(ValueError, match="there is no model"):
        ZeroShot().evaluate(model={}, data=data, run=run)


def test_success_rate_counts_images_of_other_classes_and_poisoned_ones(run):
    labels, predicted = torch.tensor([7, 7, 1, 2, 3]), torch.tensor([7, 7, 7, 2, 7])
    data = datasets.Dataset.from_dict({"label": labels.tolist()})
    assert success_rate(predicted, labels, 7, data) == pytest.approx(2 / 3)
    poisoned = data.add_column("is_backdoor", [False, True, False, False, False])
    assert success_rate(predicted, labels, 7, poisoned) == pytest.approx(3 / 4)
    assert success_rate(predicted[:1], labels[:1], 7, data) is None
    row = ZeroShot(templates="digits", target="seven").evaluate(model=tiny_model(), data=digit_pairs(40), run=run[0])
    assert 0 <= row.rows[0]["ASR"] <= 1
    with pytest.raises(ValueError, match=r"target is 'eleven'.*the classes are zero, one"):
        ZeroShot(templates="digits", target="eleven").evaluate(model=tiny_model(), data=digit_pairs(40), run=run[0])


def test_the_head_is_the_mean_of_normalised_prompts(trained):
    templates = ("a photo of the number {}", "the digit {}")
    head = zero_shot.zero_shot_head(trained, NAMES, templates)
    assert head.shape == (10, 48)
    torch.testing.assert_close(head.norm(dim=1), torch.ones(10))
    for k, name in enumerate(NAMES):
        with torch.no_grad():
            features = F.normalize(trained.encode_text([prompts.fill(text, name) for text in templates]), dim=-1)
        torch.testing.assert_close(head[k], F.normalize(features.mean(dim=0), dim=0), rtol=1e-4, atol=1e-5)
    pieces = zero_shot.zero_shot_head(trained, NAMES, templates, batch_size=3, cache=False)
    torch.testing.assert_close(head, pieces, rtol=1e-4, atol=1e-5)


def test_a_cached_head_follows_the_text_tower(trained, monkeypatch):
    head = zero_shot.zero_shot_head(trained, NAMES, prompts.DIGITS)
    calls = []
    encode = type(trained).encode_tokens
    monkeypatch.setattr(type(trained), "encode_tokens", lambda self, tokens: calls.append(1) or encode(self, tokens))
    with torch.no_grad():
        trained.model.visual.proj.mul_(2)
        trained.logit_scale.add_(1)
    assert torch.equal(zero_shot.zero_shot_head(trained, NAMES, prompts.DIGITS), head)
    assert not calls
    assert not torch.equal(zero_shot.zero_shot_head(trained, NAMES[::-1], prompts.DIGITS), head)
    with torch.no_grad():
        trained.model.ln_final.weight[0].mul_(3)
    changed = zero_shot.zero_shot_head(trained, NAMES, prompts.DIGITS)
    assert len(calls) == 2
    assert not torch.equal(changed, head)


def test_evaluation_keeps_the_model_and_its_mode(trained, digits, run):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    trained.train()
    ZeroShot(templates="digits").evaluate(model=trained, data=digits["test"].select(range(20)), run=run[0])
    assert trained.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_bf16_evaluation_is_close(trained, digits, run):
    rows = [
        ZeroShot(templates="digits", precision=p).evaluate(model=trained, data=digits["test"], run=run[0]).rows[0]
        for p in ("fp32", "bf16")
    ]
    assert rows[1]["CA@1"] == pytest.approx(rows[0]["CA@1"], abs=0.03)


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 10**6), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_ranks_are_those_of_the_whole_sorted_matrix(num_images, num_captions, seed, block):
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, num_captions + 1, (num_images,), generator=draw)
    owner = torch.repeat_interleave(torch.arange(num_images), counts)
    # Few distinct values, so that there are ties.
    images = F.normalize(torch.randint(1, 3, (num_images, 3), generator=draw).float(), dim=1)
    texts = F.normalize(torch.randint(1, 3, (len(owner), 3), generator=draw).float(), dim=1)
    text_ranks, image_ranks = retrieval_ranks(images, texts, owner, block=block)
    similarities = images @ texts.T
    # Blocks may round differently; exact ties are compared where they are exact.
    for i in range(num_images):
        order = similarities[i].sort(descending=True, stable=True).indices
        first = next(place for place, text in enumerate(order.tolist()) if owner[text] == i)
        assert abs(int(text_ranks[i]) - first) <= _near_ties(similarities[i])
    for j in range(len(owner)):
        order = similarities[:, j].sort(descending=True, stable=True).indices
        place = order.tolist().index(int(owner[j]))
        assert abs(int(image_ranks[j]) - place) <= _near_ties(similarities[:, j])


def _near_ties(values):
    gaps = values.sort().values.diff()
    return 0 if bool(((gaps == 0) | (gaps > 1e-6)).all()) and bool((gaps > 1e-6).all()) else len(values)


def test_recall_by_hand():
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0, 0.1, 1], [0, 1, 0.2]]), dim=1)
    owner = torch.tensor([0, 1, 1, 2])
    text_ranks, image_ranks = retrieval_ranks(images, texts, owner)
    # image 1 is nearest to text 3, then to its own text 1; image 2 to text 2, then to its own text 3
    assert text_ranks.tolist() == [0, 1, 1]
    # text 2 is nearest to image 2, then to its own image 1; text 3 to image 1, then to its own image 2
    assert image_ranks.tolist() == [0, 0, 1, 1]
    assert recall(text_ranks, 1) == pytest.approx(1 / 3)
    assert recall(image_ranks, 1) == 0.5
    assert recall(image_ranks, 2) == 1.0


def test_retrieval_of_a_trained_model(trained, digits, run):
    # One image of every class: each has one right caption.
    labels = digits["test"]["label"][:]
    rows = [labels.index(k) for k in range(10)]
    data = digits["test"].select(rows)
    data = data.remove_columns("captions").add_column(
        "captions", [[f"the number {n}", f"the digit {n}"] for n in NAMES]
    )
    row = Retrieval(top=(1, 5), block=3).evaluate(model=trained, data=data, run=run[0]).rows[0]
    assert list(row) == ["TR R@1", "TR R@5", "IR R@1", "IR R@5"]
    assert 0.6 <= row["TR R@1"] <= row["TR R@5"] <= 1
    assert 0.6 <= row["IR R@1"] <= row["IR R@5"] <= 1
    whole = Retrieval(top=(1, 5), block=1000).evaluate(model=trained, data=data, run=run[0]).rows[0]
    assert row == whole


def test_fusion_models_order_their_candidates_by_match(digits, tmp_path):
    model = tiny_fusion_model()
    data = digits["test"].select(range(6)).remove_columns("captions")
    data = data.add_column("captions", [["one two"], ["three"], ["four", "five"], ["six"], ["seven one"], ["nine"]])
    texts = ["one two", "three", "four", "five", "six", "seven one", "nine"]
    owner = [0, 1, 2, 2, 3, 4, 5]
    pixels = torch.stack([torch.tensor(list(image.tobytes())).view(8, 8, 3) for image in data["image"]])
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        scores = torch.stack([model.match(pixels[i : i + 1].expand(7, -1, -1, -1), texts) for i in range(6)])
    assert scores.std(dim=0).min() > 0.01
    text_ranks, image_ranks = evaluate_retrieval(model, data, tmp_path, candidates=7)
    for i in range(6):
        order = scores[i].argsort(descending=True).tolist()
        assert text_ranks[i] == next(place for place, text in enumerate(order) if owner[text] == i)
    for j in range(7):
        assert image_ranks[j] == scores[:, j].argsort(descending=True).tolist().index(owner[j])
    assert not list(tmp_path.iterdir())  # the states of the images are gone
    few, _ = evaluate_retrieval(model, data, tmp_path, candidates=1)
    assert set(few.tolist()) <= {0, 7}  # found at once, or not among the candidates


def test_a_probe_that_runs_away_is_not_reported():
    features, labels = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step \d+; lower learning_rate"):
        linear_probe(features, labels, 2, torch.Generator().manual_seed(0), num_epochs=4, learning_rate=1e38)


@pytest.mark.slow
def test_linear_probe_and_fine_tuning(trained, digits, run):
    data = {"train": digits["train"], "test": digits["test"], "copy": digits["test"]}
    report = LinearProbe(target="seven", learning_rate=0.05).evaluate(model=trained, data=data, run=run[0])
    assert report.value("accuracy", split="test") > 0.85
    assert report.rows[0]["accuracy"] == report.rows[1]["accuracy"]
    assert report.value("ASR", split="test") < 0.05
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    method = SupervisedFineTune(num_epochs=4, learning_rate=1e-3, warmup_steps=5)
    report = method.evaluate(model=trained, data=data, run=run[0])
    assert report.value("accuracy", split="test") > 0.7
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


class TwoTasks(torch.nn.Module):
    """A body and a linear head for each of two tasks."""

    tasks = ("a", "b")

    def __init__(self, body, head):
        super().__init__()
        self.body = body
        self.heads = torch.nn.ModuleList([head, torch.nn.Linear(head.in_features, head.out_features)])

    def features(self, images):
        return self.body(images)

    def logits(self, images, task):
        return self.heads[self.tasks.index(task)](self.features(images))


def test_classifiers_and_models_of_several_tasks_are_measured_beside_image_text_models(run):
    run, data = run[0], digit_pairs(60)
    torch.manual_seed(0)
    body, head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16)), torch.nn.Linear(16, 10)
    plain, tasks = torch.nn.Sequential(body, torch.nn.ReLU(), head), TwoTasks(body, head)
    models = {"CLIP": tiny_model(), "plain": plain, "tasks": tasks}
    method = LinearProbe(num_epochs=20, batch_size=20, learning_rate=0.05)
    probed = method.evaluate(model=models, data={"train": data, "test": data}, run=run)
    assert probed.value("accuracy", model="plain") > 0.6
    assert probed.value("accuracy", model="tasks") > 0.6
    table = ZeroShot(templates="digits", task="a").evaluate(model={"tasks": tasks}, data=data, run=run)
    same = Accuracy(top=(1, 3), task="a").evaluate(model=tasks, data=data, run=run)
    assert table.value("CA@3", model="tasks") == pytest.approx(same.value("top-3"))
    with pytest.raises(ValueError, match="name one of them by task"):
        ZeroShot().evaluate(model=tasks, data=data, run=run)
    with pytest.raises(ValueError, match="label 9 occurs, and the model tells 3 classes apart"):
        ZeroShot().evaluate(model=torch.nn.Sequential(body, torch.nn.Linear(16, 3)), data=data, run=run)


def test_splits_of_a_probe_go_together_by_name(run):
    data = digit_pairs(40)
    names = list(reversed(data.features["label"].names))
    turned = data.remove_columns("label").add_column(
        "label", [9 - label for label in data["label"]], feature=datasets.ClassLabel(names=names)
    )
    for other in (turned, with_texts(data)):
        splits = {"train": data, "same": data, "turned": other}
        rows = LinearProbe(num_epochs=5, learning_rate=0.05).evaluate(model=tiny_model(), data=splits, run=run[0]).rows
        assert rows[0]["accuracy"] == rows[1]["accuracy"]
    by_text = ZeroShot(class_names=tuple(names)).evaluate(model=tiny_model(), data=with_texts(data), run=run[0])
    assert by_text.rows == ZeroShot().evaluate(model=tiny_model(), data=turned, run=run[0]).rows


def with_texts(data):
    names = data.features["label"].names
    return data.remove_columns("label").add_column("label", [names[label] for label in data["label"]])


def test_users_mistakes_are_one_sentence(trained, digits, run):
    run = run[0]
    test = digits["test"]
    one_class = test.select(range(3)).cast_column("label", datasets.Value("int64")).map(lambda row: {"label": 0})
    one_class = one_class.cast_column("label", datasets.ClassLabel(names=["zero"]))
    with pytest.raises(ValueError, match="there is 1 class"):
        ZeroShot().evaluate(model=trained, data=one_class, run=run)
    with pytest.raises(ValueError, match="no column 'label'"):
        ZeroShot().evaluate(model=trained, data=test.remove_columns("label"), run=run)
    with pytest.raises(ValueError, match="but there are 2 class names"):
        ZeroShot(class_names=("a", "b")).evaluate(model=trained, data=test, run=run)
    with pytest.raises(ValueError, match="duplicate class name 'a'"):
        ZeroShot(class_names=("a",) * 10).evaluate(model=trained, data=test, run=run)
    with pytest.raises(ValueError, match="unknown; known are"):
        ZeroShot(templates="unknown").evaluate(model=trained, data=test, run=run)
    with pytest.raises(ValueError, match="give train and at least one more"):
        LinearProbe().evaluate(model=trained, data=test, run=run)
    with pytest.raises(ValueError, match="target is 'ten'"):
        LinearProbe(target="ten").evaluate(model=trained, data=digits, run=run)
    with pytest.raises(ValueError, match="one class only"):
        LinearProbe().evaluate(model=trained, data={"train": one_class, "test": test}, run=run)
    few = {"train": test.select(range(20)), "test": test}
    with pytest.raises(ValueError, match="fewer than batch_size"):
        SupervisedFineTune().evaluate(model=trained, data=few, run=run)
    with pytest.raises(ValueError, match="less than the rank"):
        Retrieval(candidates=3)
    with torch.no_grad():
        trained.model.ln_final.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        ZeroShot().evaluate(model=trained, data=test, run=run)
    with pytest.raises(ValueError, match="text embeddings are not finite"):
        Retrieval().evaluate(model=trained, data=test, run=run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_part_has_its_own_mode_again(precision):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).train()
    model[1].eval()  # normalisation that somebody froze
    with zero_shot.evaluating(model, precision):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, False]
