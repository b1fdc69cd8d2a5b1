"""Any module can be a result: what built it is noted, its weights are stored, and what comes back is compared."""

import copy
import json
from pathlib import Path

import plait
import pytest
import torch
from plait import StoreError, build_module, codecs
from plait.building import Recipe, recipe_of
from plait.freezing import thawed


class Sees(torch.nn.Module):
    """Its arguments are its attributes, or have defaults."""

    def __init__(self, width, bias=True):
        super().__init__()
        self.width = width
        self.layer = torch.nn.Linear(width, 2, bias=bias)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.layer(x)


class Hides(torch.nn.Module):
    """Nothing tells its argument."""

    def __init__(self, wide):
        super().__init__()
        self.layer = torch.nn.Linear(wide, 2)


def sequential(width: int, names: list) -> torch.nn.Sequential:
    """A function of one's own around what takes no plain arguments."""
    return torch.nn.Sequential(torch.nn.Linear(width, 3), *(getattr(torch.nn, name)() for name in names))


def unannotated(width):
    return torch.nn.Linear(width, 1)


def stored(model, folder):
    codecs.save(model, folder)
    assert json.loads((folder / "codec.json").read_text())["codec"] == "built-module"
    assert (folder / "content" / "model.safetensors").is_file()
    before = torch.get_rng_state()
    again = codecs.load(folder)
    assert torch.equal(before, torch.get_rng_state())
    return again


def equal(one, other):
    assert type(one) is type(other)
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_network_of_torchvision_goes_through_the_store(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    net = build_module(torchvision.models.resnet18, num_classes=3).train()
    net(torch.rand(4, 3, 32, 32))  # statistics of its batches
    net.layer1.requires_grad_(False)
    net.eval()
    images = torch.rand(2, 3, 32, 32)
    again = stored(net, tmp_path / "a")
    assert equal(net, again)
    assert torch.equal(net(images), again(images))
    assert not again.training
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in again.parameters()]
    assert equal(net, stored(copy.deepcopy(again).half().train(), tmp_path / "b").float()) is False
    assert next(stored(copy.deepcopy(again).half(), tmp_path / "c").parameters()).dtype == torch.float16


def test_what_a_class_shows_of_itself_is_enough(tmp_path):
    net = Sees(4)
    net.seen += 7
    assert recipe_of(net).arguments == {"width": 4}
    again = stored(net, tmp_path / "a")
    assert equal(net, again)
    assert recipe_of(Hides(3)) is None
    with pytest.raises(StoreError, match=r"not known how it is built; build it with plait.build_module\(builder"):
        codecs.save(Hides(3), tmp_path / "b")
    noted = build_module(Hides, wide=3)
    assert equal(noted, stored(noted, tmp_path / "c"))


def test_a_builder_that_makes_another_model_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"built again by .*Sees: .*layer.bias"):
        codecs.save(Sees(4, bias=False), tmp_path / "a")
    changed = build_module(sequential, width=2, names=["ReLU"])
    changed.append(torch.nn.Linear(3, 1))
    with pytest.raises(StoreError, match="sequential"):
        codecs.save(changed, tmp_path / "b")
    kept = build_module(sequential, width=2, names=["ReLU", "Tanh"])
    assert equal(kept, stored(kept, tmp_path / "c"))


def test_tied_weights_stay_tied(tmp_path):
    again = stored(build_module(tied), tmp_path / "a")
    assert again[0].weight is again[1].weight


def tied() -> torch.nn.Sequential:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    return net


def test_what_cannot_build_is_refused_before_it_builds():
    def inner() -> torch.nn.Module:
        raise AssertionError("not called")

    with pytest.raises(ValueError, match="there is no"):
        build_module(inner)
    with pytest.raises(ValueError, match="is not a class of modules, or a function that says it returns one"):
        build_module(unannotated, width=2)
    with pytest.raises(ValueError, match="argument 'width' is a Tensor; only plain values can be stored"):
        build_module(Sees, width=torch.ones(1))
    with pytest.raises(ValueError, match="Python's own library"):
        build_module(print, x=1)


METHODS = '''
import attrs, torch
from plait import build_module, hookimpl

def net(width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(width, 2))

@attrs.frozen(kw_only=True)
class Net:
    """A net."""
    @hookimpl
    def load_model(self, run): return build_module(net, width=3)

@attrs.frozen(kw_only=True)
class Twice:
    """Doubles every weight."""
    @hookimpl
    def optimize(self, model, run):
        import copy
        model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters(): parameter *= 2
        return model
'''


def test_in_a_pipeline_from_a_file_of_the_user(workplace):
    Path("net.py").write_text(METHODS)
    text = (
        'plait: 1\nsteps: {net: {load-model: "./net.py:Net"}, twice: {optimize: "./net.py:Twice", from: {model: net}}}'
    )
    result = plait.run(text)
    one, two = result.output("net"), result.output("twice")
    assert torch.equal(2 * one[0].weight, two[0].weight)
    # What a folder from elsewhere names is not run.
    folder = next(Path("store").rglob("module.json"))
    recipe = Recipe(**json.loads(folder.read_text())["recipe"])
    with pytest.raises(ValueError, match="names and the pipeline does not"):
        recipe.build()


def test_a_frozen_model_is_thawed_and_one_that_is_frozen_in_part_is_not():
    net = tied().append(torch.nn.Linear(2, 1))
    net[2].requires_grad_(False)
    assert thawed(net) is net
    net.requires_grad_(False)
    again = thawed(net)
    assert again is not net
    assert again[0].weight is again[1].weight
    assert [p.requires_grad for p in again.parameters()] == [True] * 3
    assert [p.requires_grad for p in net.parameters()] == [False] * 3
    numbers = torch.nn.Module()
    numbers.register_parameter("n", torch.nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))
    with pytest.raises(ValueError, match=r"\(a Module\) has no weights that could be trained"):
        thawed(numbers)
