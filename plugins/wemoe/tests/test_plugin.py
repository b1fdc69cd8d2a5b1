"""The hooks: from datasets and models with heads to one model, saved, evaluated; what users may get wrong."""

import copy

import datasets
import numpy as np
import plait
import pytest
import torch
from PIL import Image
from plait_wemoe import plugin
from plait_wemoe.four_tasks import TASKS, four_tasks
from plait_wemoe.heads import CosineHead, head_places, split_head
from plait_wemoe.images import ImageColumn, ShuffledBatches
from plait_wemoe.supervised import labelled_tasks
from plait_wemoe.tasks import IndividualModels
from plait_wemoe.wemoe import e_wemoe
from timm.models.vision_transformer import VisionTransformer

METHODS = {
    "individual": plugin.Individual(),
    "simple-average": plugin.SimpleAverage(),
    "task-arithmetic": plugin.TaskArithmetic(),
    "ties": plugin.Ties(),
    "dare": plugin.Dare(),
    "dare-ties": plugin.Dare(then="ties"),
    "fisher": plugin.Fisher(num_examples=40),
    "regmean": plugin.RegMean(num_examples=40),
    "adamerging-layer": plugin.AdaMerging(num_steps=2),
    "adamerging-task": plugin.AdaMerging(num_steps=2, level="task"),
    "concrete": plugin.Concrete(num_steps=2),
    "concrete-adamerging": plugin.Concrete(num_steps=2, then="adamerging"),
    "wemoe": plugin.WEMoE(num_steps=2),
    "wemoe-icml": plugin.WEMoEIcml(num_steps=2),
    "e-wemoe": plugin.EWEMoE(num_steps=2),
    "e-wemoe-fixed": plugin.EWEMoE(num_steps=2, eval_routing="fixed", gate_prune_ratio=0.2),
    "e-wemoe-fast": plugin.EWEMoEFast(num_steps=2),
    "e-wemoe-published": plugin.EWEMoEPublished(num_steps=2),
}


@pytest.fixture(scope="module")
def toy():
    """Two tasks, a base and an expert each, trained for a few steps."""
    run = plait.Run(seed=0)
    tasks = {name: plugin.FourTasks(task=name).load_data(run=run) for name in ("digits", "textures")}
    train = {name: parts["train"].select(range(0, 1100, 5)) for name, parts in tasks.items()}
    test = {name: parts["test"].shuffle(seed=0).select(range(60)) for name, parts in tasks.items()}
    fresh = plugin.MultiTaskViT(embed_dim=16, depth=2, num_heads=2).load_model(data=train, run=run)
    base = plugin.MultiTaskTraining(num_steps=20, batch_size=32, train_heads=True).optimize(
        model=fresh, data=train, run=run
    )
    expert = plugin.MultiTaskTraining(num_steps=40, batch_size=32, learning_rate=3e-3, trainable=r"\.(mlp|norm2)\.")
    experts = {name: expert.optimize(model=base, data={name: train[name]}, run=run) for name in tasks}
    return base, experts, train, test


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def score(model, test):
    report = plugin.MultiTaskAccuracy(pictures=False).evaluate(model=model, data=test, run=plait.Run())
    return {task: report.rows[0][task] for task in test}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_merges_saves_and_leaves_the_callers_models_alone(toy, method, tmp_path):
    base, experts, _, test = toy
    before = {name: state(m) for name, m in {"": base, **experts}.items()}
    flags = [p.requires_grad for m in experts.values() for p in m.parameters()]
    merged = method.merge(base=base, experts=experts, data=test, run=plait.Run(seed=1))
    assert all(same(before[name], m.state_dict()) for name, m in {"": base, **experts}.items())
    assert [p.requires_grad for m in experts.values() for p in m.parameters()] == flags
    assert all(p.grad is None for m in experts.values() for p in m.parameters())
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    images = ImageColumn(test["digits"]).read(range(9))
    with torch.no_grad():
        for task in test:
            assert torch.equal(loaded.logits(images, task), merged.logits(images, task))
    again = method.merge(base=base, experts=experts, data=test, run=plait.Run(seed=1))
    assert same(again.state_dict(), merged.state_dict())


def test_labels_never_reach_the_merge(toy):
    base, experts, _, test = toy
    method = plugin.EWEMoE(num_steps=3)
    blind = {task: part.remove_columns("label").add_column("label", [0] * len(part)) for task, part in test.items()}
    one = method.merge(base=base, experts=experts, data=test, run=plait.Run())
    two = method.merge(base=base, experts=experts, data=blind, run=plait.Run())
    assert same(one.state_dict(), two.state_dict())


def test_experts_are_better_than_the_base_and_kept_as_they_are(toy):
    base, experts, _, test = toy
    individual = METHODS["individual"].merge(base=base, experts=experts, data=None, run=plait.Run())
    found = score(individual, test)
    assert found == {task: score(experts[task], {task: test[task]})[task] for task in test}
    assert sum(found.values()) > sum(score(base, test).values())


def test_training_needs_no_more_than_its_checkpoint_to_go_on(toy, tmp_path):
    base, experts, _, test = toy
    method, seen = plugin.EWEMoE(num_steps=4, checkpoint_every=2), []
    whole = method.merge(base=base, experts=experts, data=test, run=plait.Run())

    def stop(values, step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.merge(base=base, experts=experts, data=test, run=plait.Run(folder=tmp_path, on_log=stop))
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 1
    run = plait.Run(folder=tmp_path, on_log=lambda values, step: seen.append(step))
    rest = method.merge(base=base, experts=experts, data=test, run=run)
    assert same(rest.state_dict(), whole.state_dict())
    assert seen[0] == 2


@pytest.mark.parametrize("method", [plugin.AdaMerging, plugin.WEMoE, plugin.EWEMoE])
def test_one_run_serves_several_trainings(method, toy):
    base, experts, _, test = toy
    run = plait.Run()
    options = {"num_steps": 2, "checkpoint_every": 1}
    slow, fast = (method(learning_rate=rate, **options) for rate in (1e-4, 1e-1))
    first = slow.merge(base=base, experts=experts, data=test, run=run)
    second = fast.merge(base=base, experts=experts, data=test, run=run)
    assert not same(first.state_dict(), second.state_dict())
    alone = fast.merge(base=base, experts=experts, data=test, run=plait.Run())
    assert same(second.state_dict(), alone.state_dict())


@pytest.mark.slow
def test_evaluation_reports_tasks_mean_routing_sizes_and_pictures(toy):
    base, experts, _, test = toy
    run = plait.Run()
    models = {
        "average": METHODS["simple-average"].merge(base=base, experts=experts, data=None, run=run),
        "e-wemoe": METHODS["e-wemoe"].merge(base=base, experts=experts, data=test, run=run),
        "individual": METHODS["individual"].merge(base=base, experts=experts, data=None, run=run),
    }
    method = plugin.MultiTaskAccuracy(batches=("one-task", "mixed"), routing=("sample", "batch"), batch_size=30)
    report = method.evaluate(model=models, data=test, run=run)
    assert [(row["method"], row["routing"], row["batches"]) for row in report.rows] == [
        ("average", "–", "any"),
        *(("e-wemoe", routing, batches) for routing in ("sample", "batch") for batches in ("one-task", "mixed")),
        ("individual", "–", "any"),
    ]
    for row in report.rows:
        assert row["mean"] == pytest.approx((row["digits"] + row["textures"]) / 2)
    sample = [row for row in report.rows if row["routing"] == "sample"]
    assert sample[0]["digits"] == sample[1]["digits"]
    assert len(report.panels) == 2
    assert models["e-wemoe"].mixture.gates[0].routing == "sample"
    average, individual = report.rows[0], report.rows[-1]
    assert individual["parameters"] == 2 * average["parameters"]
    assert individual["bytes on disk"] > 1.8 * average["bytes on disk"]


def test_mixed_batches_score_every_image_with_its_own_head(toy):
    base, _, _, test = toy
    from plait_wemoe.evaluation import mixed_accuracy, one_task_accuracy

    tasks = labelled_tasks(test, base)
    generator = torch.Generator().manual_seed(0)
    assert mixed_accuracy(base, tasks, 17, generator) == pytest.approx(one_task_accuracy(base, tasks, 64))


def test_models_with_a_linear_head():
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    base = VisionTransformer(num_classes=0, **sizes)
    experts = {"a": VisionTransformer(num_classes=3, **sizes), "b": VisionTransformer(num_classes=5, **sizes)}
    data = {name: pictures(6, 8) for name in experts}
    merged = plugin.TaskArithmetic().merge(base=base, experts=experts, data=None, run=plait.Run())
    images = torch.rand(2, 3, 8, 8)
    assert merged.logits(images, "a").shape == (2, 3)
    assert merged.logits(images, "b").shape == (2, 5)
    routed = plugin.WEMoE(num_steps=1, init_lambda=1.0, router_init_std=0.0).merge(
        base=base, experts={"a": experts["a"]}, data={"a": data["a"]}, run=plait.Run()
    )
    assert routed.logits(images, "a").shape == (2, 3)
    encoder, head = split_head(experts["a"], head_places(experts["a"]))
    assert torch.equal(head.around(encoder, images), experts["a"](images))
    assert not torch.equal(encoder(images), experts["a"](images))
    assert isinstance(experts["a"].head, torch.nn.Linear)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)
        )

    def forward(self, x):
        return self.layers(x)


def test_models_without_a_head_are_merged_whole(tmp_path):
    base, experts = Net(), {"a": Net(), "b": Net()}
    merged = plugin.SimpleAverage().merge(base=base, experts=experts, data=None, run=plait.Run())
    mean = (experts["a"].layers[3].bias + experts["b"].layers[3].bias) / 2
    assert torch.allclose(merged.model.layers[3].bias, mean)
    merged.save_pretrained(tmp_path)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(type(merged).from_pretrained(tmp_path)(x), merged(x))
    data = dict.fromkeys(experts, pictures(6, 8))
    for method in (
        plugin.AdaMerging(num_steps=1),
        plugin.Fisher(),
        plugin.RegMean(),
        plugin.EWEMoE(num_steps=1, pattern=r"(?P<block>layers)\.\d", eval_routing="fixed"),
    ):
        merged = method.merge(base=base, experts=experts, data=data, run=plait.Run())
        assert merged(torch.rand(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.slow
def test_image_text_models_keep_being_image_text_models(tmp_path):
    pytest.importorskip("plait_clip")
    from plait_clip import architectures, zero_shot_head

    torch.manual_seed(0)
    base = architectures.tiny("tiny", ["one", "two", "three", "a", "photo", "of"]).eval()
    experts = {name: copy.deepcopy(base) for name in ("a", "b")}
    with torch.no_grad():
        for expert in experts.values():
            for name, p in expert.named_parameters():
                if "visual" in name:
                    p.add_(0.05 * torch.randn_like(p))
    names = datasets.ClassLabel(names=["one", "two", "three"])
    data = {task: pictures(10, 8).add_column("label", [0] * 10).cast_column("label", names) for task in experts}
    run = plait.Run()
    for method in (plugin.SimpleAverage(), plugin.EWEMoE(num_steps=2)):
        merged = method.merge(base=base, experts=experts, data=data, run=run)
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path).eval()
        images = torch.rand(3, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(loaded.encode_image(images), merged.encode_image(images))
            assert torch.equal(loaded.encode_text(["a photo of one"]), base.encode_text(["a photo of one"]))
            assert not torch.allclose(merged.encode_image(images), base.encode_image(images))
        head = zero_shot_head(merged, ["one", "two", "three"], ["a photo of a {}."])
        assert torch.allclose(merged.heads["a"].weight, head, atol=1e-5)
        report = plugin.MultiTaskAccuracy().evaluate(model=merged, data=data, run=run)
        assert set(data) <= report.rows[0].keys()
        # On it goes: trained on labels, and merged again with the heads that it has.
        frozen = copy.deepcopy(merged).requires_grad_(False)
        training = plugin.MultiTaskTraining(num_steps=1, batch_size=4)
        trained = {t: training.optimize(model=frozen, data={t: data[t]}, run=run) for t in data}
        again = plugin.SimpleAverage().merge(base=merged, experts=trained, data=None, run=run)
        assert all(p.requires_grad for p in (*trained["a"].parameters(), *again.parameters()))
        assert again.state_dict().keys() == merged.state_dict().keys()
        before = merged.encode_image(images)
        assert not torch.allclose(trained["a"].encode_image(images), before)
        assert not torch.allclose(again.encode_image(images), before)
        if merged.mixture is None:
            assert set(plugin.Ties().merge(base=base, experts=trained, data=None, run=run).tasks) == set(data)
    mixture_blocks = {name for block in merged.mixture.blocks for name in block.modules}
    assert all("visual" in name for name in mixture_blocks)
    with pytest.raises(KeyError, match="has no class names"):
        plugin.SimpleAverage().merge(base=base, experts=experts, data=None, run=run)


def pictures(number, size):
    draw = np.random.default_rng(0)
    cells = [Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(number)]
    return datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))


# --------------------------------------------------------------------------------------------- the toy tasks


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_toy_sizes_and_reproducibility(task):
    one, two, other = four_tasks(task, 0), four_tasks(task, 0), four_tasks(task, 1)
    for split, number in (
        {"train": 1500, "test": 600}.items() if task == "textures" else {"train": 1100, "test": 697}.items()
    ):
        images, labels = one[split]
        assert images.shape == (number, 16, 16)
        assert images.dtype == np.uint8
        assert len(labels) == number
        assert np.array_equal(images, two[split][0])
        assert not np.array_equal(images, other[split][0])


def test_no_test_digit_is_seen_in_training_of_another_task():
    digits, rotated = four_tasks("digits", 0), four_tasks("rotated", 0)
    for split in ("train", "test"):
        assert np.array_equal(np.rot90(digits[split][0], axes=(1, 2)), rotated[split][0])


def test_batches_cover_each_epoch_once_and_depend_on_the_step_alone():
    stream = ShuffledBatches(ImageColumn(pictures(10, 4)), 4, seed=1)
    epochs = [[row for step in range(3 * e, 3 * e + 3) for row in stream.rows(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert len(stream.rows(2)) == 2
    assert torch.equal(stream[4], ShuffledBatches(ImageColumn(pictures(10, 4)), 4, seed=1)[4])
    assert 0 <= stream[0].min() <= stream[0].max() <= 1


def test_images_are_the_same_whether_held_or_decoded_again(monkeypatch):
    held = ImageColumn(pictures(5, 4))
    monkeypatch.setattr("plait_wemoe.images.HELD_BYTES", 2 * 4 * 4 * 3)  # room for two
    tight = ImageColumn(pictures(5, 4))
    for rows in ([0, 1, 2], [2, 0, 4, 4], [3]):
        assert torch.equal(held.read(rows), tight.read(rows))
    assert (len(held._held), len(tight._held)) == (5, 2)


def test_images_of_other_sizes_are_resized_where_the_model_says_so():
    column = ImageColumn(pictures(3, 20), size=8)
    assert column.read([0, 1]).shape == (2, 3, 8, 8)


# -------------------------------------------------------------------------------------- users' mistakes


def merge_wrong(toy, match, *, method=None, **changes):
    base, experts, _, test = toy
    arguments = {"base": base, "experts": experts, "data": test, **changes}
    with pytest.raises((ValueError, KeyError, TypeError), match=match):
        (method or plugin.EWEMoE(num_steps=1)).merge(**arguments, run=plait.Run())


def test_refusals(toy):
    base, experts, _, test = toy
    run = plait.Run()
    merge_wrong(toy, "no unlabelled data for task 'textures'", data={"digits": test["digits"]})
    merge_wrong(toy, "no unlabelled data for task 'digits'", data=None)
    merge_wrong(toy, "'more' belongs to no expert", data={**test, "more": test["digits"]})
    merge_wrong(toy, "task 'digits': the data has no sample", data={**test, "digits": test["digits"].select([])})
    merge_wrong(toy, "no column 'image'", data={**test, "digits": test["digits"].remove_columns("image")})
    merge_wrong(toy, "no expert", experts={}, data={})
    merge_wrong(toy, "give a mapping from task", experts=experts["digits"])
    merge_wrong(toy, "matches nothing|no module on the way", method=plugin.EWEMoE(pattern="nothing"))
    merge_wrong(
        toy, "has no head for its task", experts={"elsewhere": experts["digits"]}, data={"elsewhere": test["digits"]}
    )
    other = plugin.MultiTaskViT(embed_dim=24, depth=2, num_heads=2).load_model(data=test, run=run)
    merge_wrong(toy, r"vit.* is \(.*\) in expert 'digits'", experts={**experts, "digits": other})
    deeper = plugin.MultiTaskViT(embed_dim=16, depth=3, num_heads=2).load_model(data=test, run=run)
    merge_wrong(toy, "another architecture", experts={**experts, "digits": deeper})
    infinite = copy.deepcopy(experts["digits"])
    with torch.no_grad():
        infinite.encoder.vit.norm.weight.fill_(float("inf"))
    merge_wrong(toy, "not finite", experts={**experts, "digits": infinite})
    merge_wrong(toy, "equals the base", experts={**experts, "digits": base}, method=plugin.SimpleAverage(strict=True))
    merge_wrong(
        toy,
        "expert 'digits', a Linear, has no classification head",
        experts={**experts, "digits": torch.nn.Linear(1, 1)},
    )
    merge_wrong(toy, "the base is a int; give a torch module", base=3, experts={"digits": torch.nn.ReLU()})


def test_warnings(toy):
    base, experts, _, test = toy
    said = []
    run = plait.Run(on_warning=said.append)
    method = plugin.EWEMoEPublished(num_steps=0, init_lambda=1.5)
    method.merge(base=base, experts={**experts, "digits": base}, data=test, run=run)
    assert any("'digits' equals the base" in sentence for sentence in said)
    assert any("outside the usual" in sentence for sentence in said)
    assert any("eval_routing is batch" in sentence for sentence in said)


def test_no_steps_leave_the_routers_at_their_first_values(toy):
    base, experts, _, test = toy
    merged = plugin.WEMoE(num_steps=0, router_init_std=0.0).merge(
        base=base, experts=experts, data=test, run=plait.Run()
    )
    weights = merged.mixture.routing_weights(torch.rand(2, 3, 16, 16))
    assert torch.allclose(weights, torch.tensor(0.3))


@pytest.mark.parametrize(
    ("cls", "fields", "match"),
    [
        (plugin.WEMoE, {"prune_ratio": 1.2}, "prune_ratio"),
        (plugin.WEMoE, {"router_depth": 3}, "router_depth"),
        (plugin.WEMoE, {"position_encoding": True, "position_encoding_dim": 3}, "even"),
        (plugin.WEMoE, {"delta_storage": "lowrank"}, "delta_rank"),
        (plugin.WEMoE, {"eval_routing": "token"}, "eval_routing"),
        (plugin.Dare, {"drop_rate": 1.0}, "drop_rate"),
        (plugin.Ties, {"keep": 0.0}, "keep"),
        (plugin.FourTasks, {"task": "letters"}, "task"),
    ],
)
def test_wrong_fields(cls, fields, match):
    with pytest.raises(ValueError, match=match):
        cls(**fields)


def test_wrong_training_and_evaluation(toy):
    base, _, train, test = toy
    run = plait.Run()
    with pytest.raises(ValueError, match="matches no parameter"):
        plugin.MultiTaskTraining(trainable="nothing").optimize(model=base, data=train, run=run)
    with pytest.raises(ValueError, match="a Linear has no classification head"):
        plugin.MultiTaskTraining().optimize(model=torch.nn.Linear(1, 1), data=train, run=run)
    with pytest.raises(ValueError, match="not a dataset with a column 'label'"):
        plugin.MultiTaskAccuracy().evaluate(model=base, data={"digits": pictures(2, 16)}, run=run)
    with pytest.raises(KeyError, match="no head for task 'x'"):
        plugin.MultiTaskAccuracy().evaluate(model=base, data={"x": test["digits"]}, run=run)
    with pytest.raises(ValueError, match="give a mapping"):
        plugin.MultiTaskAccuracy().evaluate(model=base, data=test["digits"], run=run)
    with pytest.raises(ValueError, match="give a model with heads"):
        plugin.MultiTaskAccuracy().evaluate(model=torch.nn.Linear(1, 1), data=test, run=run)


def test_heads_survive_their_files(tmp_path):
    heads = {
        "cosine": CosineHead(torch.randn(3, 4), 20.0),
        "linear": torch.nn.Linear(4, 2),
        "plain": torch.nn.Linear(4, 2, bias=False),
    }
    from plait_wemoe.tasks import read_heads, write_heads

    write_heads(heads, tmp_path, {})
    _, again = read_heads(tmp_path)
    x = torch.randn(5, 4)
    for task, head in heads.items():
        assert torch.equal(again[task](x), head(x))


def test_individual_models_have_no_answer_for_other_tasks(toy):
    base, experts, _, test = toy
    individual = METHODS["individual"].merge(
        base=base, experts={"digits": experts["digits"]}, data=None, run=plait.Run()
    )
    assert isinstance(individual, IndividualModels)
    with pytest.raises(KeyError, match="no expert for task 'textures'"):
        individual.logits(ImageColumn(test["digits"]).read([0]), "textures")


def test_a_base_that_cannot_be_stored_is_refused_before_the_work(toy):
    class Local(Net):
        pass

    merge_wrong(toy, "Local cannot be stored", base=Local(), experts={"a": Local(), "b": Local()}, data=None)


def test_the_method_in_plain_python_is_what_the_plugin_makes(toy):
    base, experts, _, test = toy
    run = plait.Run(seed=1)
    merged = plugin.EWEMoE(num_steps=2, learning_rate=1e-2).merge(base=base, experts=experts, data=test, run=run)
    streams = {
        task: ShuffledBatches(ImageColumn(part, 16), 16, run.derived_seed(f"batches/{task}"))
        for task, part in test.items()
    }
    mixture, history = e_wemoe(
        base.encoder,
        {task: expert.encoder for task, expert in experts.items()},
        {task: experts[task].heads[task] for task in experts},
        streams,
        seed=run.derived_seed("routers"),
        num_steps=2,
        learning_rate=1e-2,
    )
    assert same(mixture.state_dict(), merged.mixture.state_dict())
    assert [len(entropies) for entropies in history.entropies.values()] == [2, 2]


def test_concrete_adamerging_resumes_in_its_second_training_to_the_same_bits(toy, tmp_path):
    """The mask's last checkpoint lies before its end: what it became since must not be taken for it."""
    base, experts, _, test = toy
    method = plugin.Concrete(then="adamerging", num_steps=3, checkpoint_every=2, learning_rate=0.1)
    arguments = {"base": base, "experts": experts, "data": test}
    whole = method.merge(**arguments, run=plait.Run())
    steps = []

    def stop(values, step):
        steps.append(step)
        if steps == [0, 1, 2, 0, 1, 2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.merge(**arguments, run=plait.Run(folder=tmp_path, on_log=stop))
    assert same(method.merge(**arguments, run=plait.Run(folder=tmp_path)).state_dict(), whole.state_dict())


def test_an_image_whose_transparency_would_be_dropped_is_refused():
    cell = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    data = datasets.Dataset.from_dict({"image": [cell]}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="the image in row 0 is partly transparent"):
        ImageColumn(data).read([0])
