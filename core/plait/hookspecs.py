"""What every hook takes and returns: the one page to read before writing a method.

A method is an attrs class whose fields are its hyperparameters and which implements one or more
of the hooks below, each marked with ``@plait.hookimpl``. A hook method names the arguments that it
wants, in any order and without defaults:

* an argument that it names is required in the pipeline's ``from``;
* annotated ``... | None`` it may be left out there, and in Python, and is then ``None``;
* an argument that it does not name cannot be given.

``run`` (:class:`plait.Run`: seed, device, progress, curves, scratch folder) is always available.

Kinds of argument, written as annotations below: ``Data`` is a Hugging Face ``Dataset``, a mapping split or
name → ``Dataset``, a PyG ``Data`` or whatever the kit of the domain documents; ``Model`` is a
``torch.nn.Module`` (one that saves itself with ``save_pretrained``, or whose builder :func:`plait.build_module` noted);
``Models`` and ``DataSets`` are several of them, by name or in order. Where a pipeline gives a list or a mapping of
steps, the method receives a list or a dict. Inputs are never modified; a hook returns a new object.

Images are ``image`` columns (8-bit RGB); methods work on float tensors ``[N, 3, H, W]`` in [0, 1].

A method may also say what it takes and gives; a pipeline in which two steps do not fit is then refused before anything
runs, and ``plait show`` tells it. Each is a class attribute, or a property where fields decide; what is not said is not
checked (:mod:`plait.contract`).

* ``takes``: argument → a kind or several, ``{"model": "image-text-model"}``. Kinds are words that packages agree on. Models:
  ``classifier`` (images → logits), ``image-text-model``, ``multi-task-model``, ``graph-network``, ``diffusion-model``, ``restorer``.
  Data: ``dataset`` (one, or split → one), ``clients`` (the data sets of several), ``graph``, ``graph-tasks``, ``feature-set``;
* ``gives``: the kind of the result. The name of an argument says that the result is like it: of its kind, with its columns and
  splits. That is so without a word for the ``model`` of defend and optimize, and the ``data`` of attack and restore;
* ``columns_needed``: the columns of ``data`` that it reads, or argument → columns;
* ``columns_made``: the columns that the result has besides those of the argument that it is like (of a source: all);
  ``columns_kept``: those of the argument that stay, where not all do;
* ``splits``: the names of the parts of its result.

What concerns the result may be a mapping hook → value, where a class has several hooks.

A method may also have

* ``input_files()``: files beyond those that its fields name, such as the images of a list, so that the step
  runs again when one of them changes;
* ``renamed_fields``: old name → new name of a field, so that a pipeline with the old one is told the new one;
* ``example()``, a static function that returns a :class:`plait.testing.Example`, what ``plait check`` tries it on;
* ``depends_on_libraries``: names of distributions (``("torch",)``) whose version is part of what makes its
  result. For all others the version is recorded, and ``plait plan`` tells where it differs.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import attrs
import pluggy

if TYPE_CHECKING:
    from plait.context import Run


F = TypeVar("F", bound=Callable[..., Any])


@attrs.frozen
class Kind:
    """What an argument or a result of a hook is: of one kind (``any``: a model or data), one or several of it."""

    name: Literal["model", "data", "report", "any"]
    several: bool = False


Model = Annotated[Any, Kind("model")]
Models = Annotated[Any, Kind("model", several=True)]
Data = Annotated[Any, Kind("data")]
DataSets = Annotated[Any, Kind("data", several=True)]
ModelOrData = Annotated[Any, Kind("any")]
ModelOrDataSets = Annotated[Any, Kind("any", several=True)]
Metrics = Annotated[Any, Kind("report")]

hookspec = pluggy.HookspecMarker("plait")
_mark = pluggy.HookimplMarker("plait")


@typing.overload
def hookimpl(function: F) -> F: ...
@typing.overload
def hookimpl(*, wrapper: bool = False, tryfirst: bool = False, trylast: bool = False) -> Callable[[F], F]: ...
def hookimpl(function: Any = None, **options: Any) -> Any:
    """Mark a hook of a method; called from plain Python, it may go without the arguments annotated ``| None``."""
    if function is None:
        return functools.partial(hookimpl, **options)
    return _mark(_optional_arguments(function), **options)


def _optional_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    # pluggy passes nothing to an argument with a default, so hooks have none.
    parameters = inspect.signature(function).parameters
    optional = [name for name, parameter in parameters.items() if "None" in str(parameter.annotation)]
    if not optional:
        return function
    names = list(parameters)

    @functools.wraps(function)
    def hook(*given: Any, **named: Any) -> Any:
        there = {*names[: len(given)], *named}
        return function(*given, **named, **{name: None for name in optional if name not in there})

    return hook


class MethodHooks:
    """Hooks that a pipeline step calls; exactly one method answers, chosen by its name."""

    @hookspec(firstresult=True)
    def load_data(self, run: Run) -> Data:
        """A source: a dataset, or a mapping split → dataset."""

    @hookspec(firstresult=True)
    def transform(self, data: Data, run: Run) -> Data:
        """Derive data from data: degrade, partition, subsample, caption."""

    @hookspec(firstresult=True)
    def load_model(self, data: Data, run: Run) -> Model:
        """Build a model, or load one from a local folder or a hub; ``data`` may set its size."""

    @hookspec(firstresult=True)
    def attack(self, model: Model, data: Data, run: Run) -> Data:
        """An adversarial (test-time) or poisoned (training-time) copy of the data.

        Budgets are stated in [0, 1] units and hold after rounding to 8 bits.
        """

    @hookspec(firstresult=True)
    def defend(self, model: Model, data: Data, reference: Model, run: Run) -> Model:
        """A cleaned or hardened copy of the model, as trainable as it came; ``reference`` is trusted to be clean."""

    @hookspec(firstresult=True)
    def ensemble(self, candidates: DataSets, reference: ModelOrDataSets, run: Run) -> Data:
        """Fuse several outputs for the same inputs into one dataset.

        ``candidates`` maps a name to a dataset; ``reference`` has the same names plus ``target``, or is what was
        learned from such.
        """

    @hookspec(firstresult=True)
    def merge(self, base: Model, experts: Models, data: DataSets, run: Run) -> Model:
        """Fuse several models into one; ``experts`` and ``data`` map task → model / unlabelled data."""

    @hookspec(firstresult=True)
    def optimize(self, model: Model, data: Data, run: Run) -> Model:
        """Train: a trained copy of the model; one that is frozen is thawed (:func:`plait.freezing.thawed`)."""

    @hookspec(firstresult=True)
    def extract_feature(self, model: Model, data: Data, run: Run) -> Data:
        """Dense or pooled representations: a dataset, or a dict of tensors."""

    @hookspec(firstresult=True)
    def aggregate(self, model: Model, clients: DataSets, run: Run) -> Model:
        """Federated or decentralised training: one model from many clients' data."""

    @hookspec(firstresult=True)
    def restore(self, model: Model, data: Data, run: Run) -> Data:
        """Image → better image: the dataset with its ``image`` column restored."""

    @hookspec(firstresult=True)
    def evaluate(self, model: Model, data: Data, reference: ModelOrData, run: Run) -> Metrics:
        """Metrics, tables, curves and panels as a :class:`plait.Report`."""


HOOKS: tuple[str, ...] = tuple(name for name in vars(MethodHooks) if not name.startswith("_"))


@functools.cache
def kinds_of(hook: str) -> Mapping[str, Kind]:
    """Argument of a hook (without ``run``) → its kind, and ``return`` → that of its result."""
    hints = typing.get_type_hints(getattr(MethodHooks, hook), localns={"Run": Any}, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if name != "run"}


def hook_arguments(hook: str) -> tuple[str, ...]:
    """The arguments of a hook besides ``run``, in the order of its specification."""
    return tuple(name for name in kinds_of(hook) if name != "return")


def implemented_hooks(cls: type[Any]) -> list[str]:
    """The hooks that a class implements; a field may have the name of a hook without being one."""
    return [hook for hook in HOOKS if hasattr(getattr(cls, hook, None), "plait_impl")]


class RunEvents:
    """Told to every listener, in this order; the display, the log and trackers are listeners.

    ``run_id`` names the run folder, ``step`` the step (``name`` or ``name[axis=value,...]``).
    """

    @hookspec
    def run_started(self, run_id: str, folder: Any, pipeline: Mapping[str, Any], steps: list[str]) -> None:
        """A run begins; ``pipeline`` is the resolved pipeline, ``steps`` all steps of its plan."""

    @hookspec
    def step_started(self, run_id: str, step: str, hook: str, method: str, config: Mapping[str, Any]) -> None:
        """A step begins; ``config`` holds its method's resolved fields."""

    @hookspec
    def step_progress(self, run_id: str, step: str, description: str, done: int, total: int | None) -> None:
        """A tracked loop of a step went on."""

    @hookspec
    def step_logged(self, run_id: str, step: str, values: Mapping[str, float], at: int | None) -> None:
        """``run.log`` was called in a step."""

    @hookspec
    def step_warned(self, run_id: str, step: str, message: str) -> None:
        """``run.warn`` was called in a step."""

    @hookspec
    def step_said(self, run_id: str, step: str, text: str) -> None:
        """What libraries wrote to the standard error while a step ran: their own bars and warnings."""

    @hookspec
    def step_cached(self, run_id: str, step: str, key: str) -> None:
        """The step's result was in the store already."""

    @hookspec
    def step_finished(self, run_id: str, step: str, key: str, seconds: float, report: Any) -> None:
        """A step's result is in the store; ``report`` is its :class:`plait.Report` or ``None``."""

    @hookspec
    def step_failed(self, run_id: str, step: str, message: str) -> None:
        """A step failed with ``message``, or was skipped because a step before it did."""

    @hookspec
    def run_finished(self, run_id: str, folder: Any, failed: list[str], seconds: float) -> None:
        """All that could run has run; ``folder`` holds the report."""
