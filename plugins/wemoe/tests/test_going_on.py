"""Models that can go on: what is merged or trained is trained, attacked, stored and merged again, whatever was frozen."""

import copy

import plait
import pytest
import torch
from plait import codecs
from plait_wemoe import plugin
from plait_wemoe.images import ImageColumn
from plait_wemoe.supervised import labelled_tasks, train_tasks
from torch.nn import functional as F

TASKS = ("digits", "textures")
STATIC = {
    "simple-average": plugin.SimpleAverage(),
    "task-arithmetic": plugin.TaskArithmetic(),
    "ties": plugin.Ties(),
    "dare": plugin.Dare(),
    "fisher": plugin.Fisher(num_examples=4),
    "regmean": plugin.RegMean(num_examples=4),
    "adamerging": plugin.AdaMerging(num_steps=1),
    "concrete": plugin.Concrete(num_steps=1),
}
MIXTURES = {
    "wemoe": plugin.WEMoE(num_steps=1, batch_size=4),
    "e-wemoe": plugin.EWEMoE(num_steps=1, batch_size=4),
    "e-wemoe, fixed": plugin.EWEMoE(num_steps=1, batch_size=4, eval_routing="fixed"),
}
METHODS = {"individual": plugin.Individual(), **STATIC, **MIXTURES}
TRAINING = plugin.MultiTaskTraining(num_steps=2, batch_size=4)


def merged(method, base, experts, data):
    return method.merge(base=base, experts=experts, data=data, run=plait.Run())


def trained(model, data, method=TRAINING):
    return method.optimize(model=model, data=data, run=plait.Run())


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def toy():
    data = {
        task: plugin.FourTasks(task=task).load_data(run=plait.Run())["test"].shuffle(seed=0).select(range(12))
        for task in TASKS
    }
    base = plugin.MultiTaskViT(embed_dim=8, depth=1, num_heads=2).load_model(data=data, run=plait.Run())
    experts = {task: trained(base, {task: part}) for task, part in data.items()}
    return base, experts, data


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_frozen_models_are_merged_as_thawed_ones_and_do_not_come_back_frozen(toy, method):
    base, experts, data = toy
    frozen = [copy.deepcopy(model).requires_grad_(False) for model in (base, *experts.values())]
    one = merged(method, base, experts, data)
    two = merged(method, frozen[0], dict(zip(TASKS, frozen[1:], strict=True)), data)
    assert same(one, two)
    assert all(parameter.requires_grad for model in (one, two) for parameter in model.parameters())
    assert not any(parameter.requires_grad for model in frozen for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_merged_model_is_trained_stored_and_merged_again(toy, method, tmp_path):
    base, experts, data = toy
    model = merged(method, base, experts, data)
    thawed = {task: trained(model, {task: part}) for task, part in data.items()}
    frozen = trained(copy.deepcopy(model).requires_grad_(False), {"digits": data["digits"]})
    assert same(frozen, thawed["digits"])
    assert not same(thawed["digits"], model)
    assert all(parameter.requires_grad for parameter in (*frozen.parameters(), *thawed["textures"].parameters()))

    codecs.save(thawed["digits"], tmp_path)
    loaded = codecs.load(tmp_path)
    assert same(loaded, thawed["digits"])
    assert all(parameter.requires_grad for parameter in loaded.parameters())

    again = {"digits": loaded, "textures": thawed["textures"]}
    origin = base if isinstance(method, plugin.Individual) else model
    both = merged(plugin.TaskArithmetic(scaling=1.0), origin, again, None)
    first = next(iter(dict(both.encoder.named_parameters())))
    parts = {task: expert.encoder(task) if origin is base else expert.encoder for task, expert in again.items()}
    start = origin.encoder.get_parameter(first)
    expected = start + sum(part.get_parameter(first) - start for part in parts.values())
    assert torch.allclose(both.encoder.get_parameter(first), expected, atol=1e-6)
    images = ImageColumn(data["digits"]).read(range(3))
    with torch.no_grad():
        assert torch.isfinite(both.logits(images, "digits")).all()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_weight_of_a_merged_model_and_its_input_have_a_gradient(toy, method):
    """What a defence, which trains a copy, and an attack, which follows the input's gradient, need."""
    base, experts, data = toy
    model = merged(method, base, experts, data)
    images = ImageColumn(data["digits"]).read(range(4)).requires_grad_(True)
    sum(F.cross_entropy(model.logits(images, task), torch.zeros(4, dtype=torch.long)) for task in TASKS).backward()
    assert images.grad.abs().sum() > 0
    # With fixed coefficients no router is asked.
    silent = {"encoder.routers"} if isinstance(method, plugin.EWEMoE) and method.eval_routing == "fixed" else set()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(any(name.startswith(place) for place in silent) for name in without)


@pytest.mark.parametrize("compute", ["merge", "activation", "group", "reference"])
@pytest.mark.parametrize("pruned", [None, 0.9])
def test_pre_trained_weights_of_routed_layers_have_the_gradient_that_differences_have(toy, compute, pruned):
    base, experts, data = toy
    method = plugin.WEMoE(num_steps=0, compute=compute, prune_ratio=pruned, merge_dtype="float64", router_init_std=0.5)
    model = merged(method, base, experts, data).double()
    images = ImageColumn(data["digits"]).read(range(3)).double()
    for name, parameter in model.encoder.named_parameters():
        if ".mlp." not in name:
            continue
        model.zero_grad()
        model.features(images).square().sum().backward()
        direction, losses = torch.randn_like(parameter), []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter.add_(step * direction)
                losses.append(model.features(images).square().sum().item())
            parameter.add_(1e-5 * direction)
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-3, abs=1e-4)


def test_parts_that_the_models_keep_fixed_stay_so(toy):
    base, experts, data = (copy.deepcopy(part) if index < 2 else part for index, part in enumerate(toy))
    name = "encoder.vit.blocks.0.mlp.fc1.weight"
    for model in (base, *experts.values()):
        model.get_parameter(name).requires_grad_(False)
    for method in (plugin.SimpleAverage(), plugin.WEMoE(num_steps=0), plugin.Individual()):
        fixed = [found for found, p in merged(method, base, experts, data).named_parameters() if not p.requires_grad]
        assert len(fixed) == (2 if isinstance(method, plugin.Individual) else 1)
        assert all(found.endswith("vit.blocks.0.mlp.fc1.weight") for found in fixed)


def test_a_model_trained_after_a_merge_is_an_expert_beside_others(toy):
    """Individual models give the one of the task that they are named for."""
    base, experts, data = toy
    individual = merged(plugin.Individual(), base, experts, data)
    one = merged(plugin.SimpleAverage(), base, {"digits": individual, "textures": experts["textures"]}, None)
    assert same(one, merged(plugin.SimpleAverage(), base, experts, None))
    with pytest.raises(TypeError, match="the base is several models"):
        merged(plugin.SimpleAverage(), individual, experts, None)
    mixture = merged(plugin.WEMoE(num_steps=0), base, experts, data)
    with pytest.raises(ValueError, match="the base is a mixture of experts already"):
        merged(plugin.WEMoE(num_steps=0), mixture, {"digits": mixture}, {"digits": data["digits"]})


def test_labels_that_a_head_has_no_class_for_are_refused(toy):
    base, _, data = toy
    wrong = {"textures": data["digits"]}
    with pytest.raises(ValueError, match="the data of task 'textures' has labels up to 9, and its head answers for"):
        trained(base, wrong)
    with pytest.raises(ValueError, match="the data of task 'textures' has labels up to 9"):
        plugin.MultiTaskAccuracy().evaluate(model=base, data=wrong, run=plait.Run())
    for label in (None, -1, "one"):
        part = data["digits"].remove_columns("label").add_column("label", [label] * 12)
        with pytest.raises(ValueError, match=r"row 0 of the data of task 'digits' has label"):
            trained(base, {"digits": part})


def test_a_stopped_training_goes_on_to_the_same_bits(toy, tmp_path):
    base, _, data = toy
    dropping = copy.deepcopy(base)
    dropping.encoder.vit.norm_pre = torch.nn.Dropout(0.5)
    tasks = labelled_tasks(data, dropping)

    def train(log=lambda **values: None, checkpoint=None):
        return train_tasks(
            dropping, tasks, num_steps=6, batch_size=4, learning_rate=1e-2, weight_decay=0.01, seed=3,
            checkpoint=checkpoint, log=log, seconds_between_saves=0,
        )  # fmt: skip

    def stop(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    steps = []
    with pytest.raises(KeyboardInterrupt):
        train(stop, plait.Run(folder=tmp_path).loop("test", "train"))
    resumed = train(lambda step, loss: steps.append(step), plait.Run(folder=tmp_path).loop("test", "train"))
    assert steps == [4, 5, 6]
    assert same(resumed, train())
    assert not same(resumed, dropping)
