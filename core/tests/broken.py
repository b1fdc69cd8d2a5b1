"""One method that keeps every promise, and for every check one that breaks just it."""

import copy
import random

import attrs
import torch
from plait import PlaitError, hookimpl
from plait.demo.models import images_of, make_classifier
from plait.demo.pictures import with_images
from plait.fields import doc, field, in_range


def noisy(data, run, generator=None, device=True):
    images = images_of(data)
    if device:
        images = images.to(run.device)
    for _ in run.track(range(4), "working"):
        pass
    noise = torch.randn(images.shape, generator=generator or run.generator()).to(images.device)
    return with_images(data, images + 0.01 * noise)


@attrs.frozen(kw_only=True)
class Good:
    """Adds a little noise."""

    batch_size: int = field(4, "images at a time", in_range(1))
    takes = {"data": "dataset"}
    columns_needed = ("image",)

    @hookimpl
    def restore(self, data, run):
        return noisy(data, run)


@attrs.frozen(kw_only=True)
class Configuration(Good):
    """Changes its configuration every time it is made."""

    drawn: float = attrs.field(factory=random.random, converter=lambda value: value + 1, metadata=doc("a number"))


@attrs.frozen(kw_only=True)
class Documented(Good):
    """Has a silent field."""

    silent: int = 3


@attrs.frozen(kw_only=True)
class Result(Good):
    """Loses a row."""

    @hookimpl
    def restore(self, data, run):
        return noisy(data, run).select(range(len(data) - 1))


@attrs.frozen(kw_only=True)
class Contract(Good):
    """Makes no such column."""

    columns_made = ("captions",)


@attrs.frozen(kw_only=True)
class Repeatable(Good):
    """Draws from a fresh seed every time."""

    @hookimpl
    def restore(self, data, run):
        return noisy(data, run, torch.Generator().manual_seed(random.SystemRandom().randrange(2**31)))


@attrs.frozen(kw_only=True)
class InputsUntouched(Good):
    """Moves the global random state."""

    @hookimpl
    def restore(self, data, run):
        torch.rand(1)
        return noisy(data, run)


@attrs.frozen(kw_only=True)
class Budget(Good):
    """Leaves its budget."""

    @hookimpl
    def restore(self, data, run):
        return with_images(noisy(data, run), 1 - images_of(data))


@attrs.frozen(kw_only=True)
class BatchSizes(Good):
    """Drops the last batch where it is shorter."""

    batch_size: int = field(7, "images at a time", in_range(1))

    @hookimpl
    def restore(self, data, run):
        return noisy(data, run).select(range(len(data) - len(data) % self.batch_size))


@attrs.frozen(kw_only=True)
class Device(Good):
    """Never looks at the device."""

    @hookimpl
    def restore(self, data, run):
        return noisy(data, run, device=False)


@attrs.frozen(kw_only=True)
class Saves(Good):
    """Returns what no codec knows."""

    @hookimpl
    def restore(self, data, run):
        noisy(data, run)
        return Rows(data)


class Rows:
    def __init__(self, data):
        self.data = data
        self.column_names = data.column_names

    def __len__(self):
        return len(self.data)

    def __getitem__(self, name):
        return self.data[name]

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


@attrs.frozen(kw_only=True)
class Progress(Good):
    """Works in silence."""

    @hookimpl
    def restore(self, data, run):
        return with_images(data, images_of(data).to(run.device))


@attrs.frozen(kw_only=True)
class Resume(Good):
    """Goes on from a checkpoint with other numbers."""

    @hookimpl
    def restore(self, data, run):
        resumed = (run.folder / "begun").exists()
        (run.folder / "begun").touch()
        result = noisy(data, run)
        (run.folder / "begun").unlink()
        return with_images(result, 1 - images_of(data)) if resumed else result


@attrs.frozen(kw_only=True)
class Empty(Good):
    """Lets empty data through."""

    @hookimpl
    def restore(self, data, run):
        return noisy(data, run) if len(data) else data


@attrs.frozen(kw_only=True)
class WrongInputs(Good):
    """Dies of wrong data."""

    @hookimpl
    def restore(self, data, run):
        if not len(data):
            raise PlaitError("the data has no rows; give at least one")
        data["image"]
        return noisy(data, run)


def trained(model, data, run):
    model = copy.deepcopy(model).to(run.device)
    for _ in run.track(range(2), "training"):
        loss = model(images_of(data).to(run.device)).square().mean()
        loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0 if parameter.grad is None else parameter.grad
            parameter.grad = None
    return model


@attrs.frozen(kw_only=True)
class GivesFrozen:
    """Trains, and freezes."""

    @hookimpl
    def optimize(self, model, data, run):
        return trained(model, data, run).requires_grad_(False)


@attrs.frozen(kw_only=True)
class FreezesSome:
    """Trains, and freezes a part."""

    @hookimpl
    def optimize(self, model, data, run):
        model = trained(model, data, run)
        model.layers[1].bias.requires_grad_(False)
        return model


@attrs.frozen(kw_only=True)
class NeedsThawed:
    """Trains what it is given as it is."""

    @hookimpl
    def optimize(self, model, data, run):
        return trained(model, data, run)


@attrs.frozen(kw_only=True)
class SkipsFrozen:
    """Trains what is not frozen."""

    @hookimpl
    def optimize(self, model, data, run):
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        return trained(model, data, run)


@attrs.frozen(kw_only=True)
class MovesItsModel:
    """Takes the caller's model to another device, to one that every machine has."""

    @hookimpl
    def optimize(self, model, data, run):
        model.to("meta")
        return trained(make_classifier(0), data, run)
