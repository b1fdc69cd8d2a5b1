"""Small real inputs to try a method on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from plait.catalogue import entry_points, load_entry_point
from plait.demo.pictures import digits, with_images
from plait.errors import PlaitError, located
from plait.importing import named_object
from plait.methods import Method
from plait.optional import require

GROUP = "plait.examples"


@attrs.frozen(kw_only=True)
class Example:
    """What to try a method on.

    Attributes:
        arguments: the hook's arguments (without ``run``), as small as makes sense.
        fields: hyperparameters for a quick trial.
        random: whether another seed has to give another result.
        keeps_rows: the result has as many rows as ``data``, in its order (attack at test time, restore).
        progress: whether a run reports progress or logs; ``False`` for methods that are done at once.
        device: whether the method computes on ``run.device``.
        budget: largest allowed change of an image in [0, 1] units (L∞), where the method promises one.
        empty: argument → the same kind of input without a single row; it has to be refused.
        wrong: argument → an input of a wrong kind or shape; it has to be refused.
        ignore: columns of a report that may differ between equal runs (times).
        outputs: where the result is a model, a function from it to what it computes on some data.
    """

    arguments: Mapping[str, Any]
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    random: bool = False
    keeps_rows: bool = False
    progress: bool = True
    device: bool = True
    budget: float | None = None
    empty: Mapping[str, Any] = attrs.field(factory=dict)
    wrong: Mapping[str, Any] = attrs.field(factory=dict)
    ignore: tuple[str, ...] = ()
    outputs: Callable[[Any], Any] | None = None


def example_for(method: Method) -> Example:
    """The example that the method or its package gives, else the built-in one of its hook.

    Raises:
        PlaitError: there is neither.
    """
    return given_example(method) or built_in_example(method)


def given_example(method: Method) -> Example | None:
    """The example of the entry-point group ``plait.examples``, else the one of the class (a static function ``example``).

    Raises:
        PlaitError: it fails, or is no :class:`Example`.
    """
    given = {ep.name: ep for ep in entry_points(GROUP)}
    for name in (f"{method.hook}.{method.name}", method.name):
        if name in given:
            return _made(load_entry_point(given[name].value, f"example {name!r}"), f"example {name!r}")
    # A field may be called example too; it is no function.
    own = inspect.getattr_static(method.cls, "example", None)
    return _made(method.cls.example, f"example of {method.name!r}") if isinstance(own, staticmethod) else None


def named_example(path: str) -> Example:
    """What the user's function ``file.py:function`` or ``package.module:function`` returns.

    Raises:
        PlaitError: there is no such function, it fails, or it returns something else.
    """
    try:
        function = named_object(path, inspect.isfunction, "a function that returns a plait.testing.Example")
    except ValueError as error:
        raise PlaitError(f"example {error}") from error
    return _made(function, f"example {path!r}")


def _made(function: Callable[[], Any], what: str) -> Example:
    try:
        example = function()
    except Exception as error:  # whatever the user's function raises
        raise PlaitError(f"{what} fails: {located(error)}") from error
    if not isinstance(example, Example):
        raise PlaitError(f"{what} returns a {type(example).__name__}; it has to return a plait.testing.Example")
    return example


def built_in_example(method: Method) -> Example:
    """The example of the method's hook: digits, and small classifiers of them.

    Raises:
        PlaitError: the hook has none.
    """
    if method.hook not in BUILT_IN:
        raise PlaitError(
            f"hook {method.hook} has no built-in example; give {method.name!r} one in the entry-point group {GROUP}"
        )
    return BUILT_IN[method.hook](method)


def described(example: Example) -> str:
    """What is in an example, in a few words."""
    return ", ".join(f"{name}: {_in_words(value)}" for name, value in example.arguments.items()) or "no arguments"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{', '.join(map(str, value))}, each {_in_words(next(iter(value.values())))}"
    if isinstance(value, list):
        return f"{len(value)} times {_in_words(value[0])}"
    if hasattr(value, "column_names"):
        return f"{len(value)} rows of {', '.join(value.column_names)}"
    return f"a {type(value).__name__}"


def classifier(seed: int = 0) -> Any:
    """A small seeded image classifier ``[N, 3, 8, 8] → [N, 10]`` that saves itself."""
    from plait.demo.models import make_classifier

    return make_classifier(seed)


def _of_data(method: Method, **more: Any) -> Example:
    from plait.demo.models import images_of

    data = digits()
    if method.hook == "evaluate":
        data = with_images(data, images_of(data), keep_as="target")
    arguments = {name: value for name, value in {"data": data, **more}.items() if name in method.arguments}
    empty = {"data": data.select([])} if "data" in arguments else {}
    wrong = {"data": data.remove_columns("image")} if "data" in arguments else {}
    return Example(
        arguments=arguments, empty=empty, wrong=wrong, progress=method.hook not in ("transform", "evaluate", "load_model"),
        device="model" in arguments and method.hook != "evaluate", keeps_rows=method.hook == "restore" or (method.hook == "attack" and "model" in arguments),
    )  # fmt: skip


def _of_candidates(method: Method) -> Example:
    data = digits()
    pictures = [picture.point(lambda value: 255 - value) for picture in data["image"]]
    negative = require("datasets").Dataset.from_dict({**data.to_dict(), "image": pictures}, features=data.features)
    candidates = {"one": data, "two": negative}
    arguments: dict[str, Any] = {"candidates": candidates, "reference": {**candidates, "target": data}}
    arguments = {name: value for name, value in arguments.items() if name in method.arguments}
    empty = {"candidates": {name: value.select([]) for name, value in candidates.items()}}
    wrong = {"candidates": {"one": data, "two": negative.select(range(3))}}
    return Example(arguments=arguments, empty=empty, wrong=wrong, device=False)


def _of_models(method: Method) -> Example:
    arguments: dict[str, Any] = {
        "base": classifier(0), "experts": {"a": classifier(1), "b": classifier(2)}, "data": {"a": digits(), "b": digits()},
    }  # fmt: skip
    arguments = {name: value for name, value in arguments.items() if name in method.arguments}
    return Example(arguments=arguments, empty={"experts": {}}, wrong={"experts": {"a": object()}}, device=False)


def _of_clients(method: Method) -> Example:
    data = digits(12)
    clients = [data.select(range(i, 12, 3)) for i in range(3)]
    arguments: dict[str, Any] = {"model": classifier(), "clients": clients}
    return Example(
        arguments={n: v for n, v in arguments.items() if n in method.arguments},
        empty={"clients": []},
        wrong={"clients": [data.remove_columns("image")]},
    )


BUILT_IN: dict[str, Callable[[Method], Example]] = {
    "load_data": lambda method: Example(arguments={}, progress=False, device=False),
    "transform": _of_data,
    "load_model": lambda method: attrs.evolve(_of_data(method), empty={}, wrong={}, device=False),
    "attack": lambda method: _of_data(method, model=classifier()),
    "defend": lambda method: _of_data(method, model=classifier(), reference=classifier(1)),
    "ensemble": _of_candidates,
    "merge": _of_models,
    "optimize": lambda method: _of_data(method, model=classifier()),
    "extract_feature": lambda method: _of_data(method, model=classifier()),
    "aggregate": _of_clients,
    "restore": lambda method: _of_data(method),
    "evaluate": lambda method: _of_data(method, model=classifier()),
}
