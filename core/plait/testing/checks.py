"""The checks. Each is one promise of a method, and raises :class:`ConformanceError` where it is broken."""

from __future__ import annotations

import copy
import inspect
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from plait import codecs
from plait.catalogue import offers
from plait.configuration import configure, plain_fields
from plait.context import Run
from plait.contract import declared
from plait.errors import PlaitError, sentence_of
from plait.hookspecs import HOOKS, implemented_hooks, kinds_of
from plait.methods import Method, find
from plait.optional import require
from plait.report.model import Report
from plait.surroundings import deterministic_kernels
from plait.testing.compare import differences
from plait.testing.examples import Example, built_in_example, described, given_example
from plait.testing.remedies import AFTER_RELOAD, BETWEEN_RUNS, IN_PLACE, ON_RESUME, remedy
from plait.versions import plait_modules


class ConformanceError(AssertionError):
    """A method breaks a promise; the message says which, and how."""


class NotApplicable(Exception):  # noqa: N818 - a reason, not an error
    """A check has nothing to look at in this method."""


class Killed(BaseException):
    """Ends a run from inside, as a kill would."""


class WatchedRun(Run):
    """A run that remembers what a method asked of it; on the CPU, or on the device that ``PLAIT_DEVICE`` names."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(
            requested_device=os.environ.get("PLAIT_DEVICE") or "cpu",
            on_progress=self._tick,
            on_log=self._tick,
            on_warning=lambda message: None,
            **facts,
        )
        self.device_was_read = False
        self.ticks = 0
        self.kill_after: int | None = None

    @property
    def device(self) -> Any:
        self.device_was_read = True
        return super().device

    def _tick(self, *_: Any) -> None:
        self.ticks += 1
        if self.kill_after is not None and self.ticks > self.kill_after:
            raise Killed


@attrs.define
class Call:
    """One call of a method: its run, its result, and what it did to its inputs and to what the process shares."""

    run: WatchedRun
    result: Any
    changed_inputs: list[str]
    changed_states: list[str]


@attrs.define
class Subject:
    """A method with an example of its inputs; ``built_in``: the one of its hook, which may not suit it."""

    method: Method
    example: Example
    built_in: bool = False
    _calls: list[Call] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        # As a step gets its inputs, whatever device the example was made on.
        _to_cpu(self.example.arguments)

    def instance(self, **fields: Any) -> Any:
        """The configured method."""
        return configure(self.method, {**self.example.fields, **fields})

    def call(self, run: Run, instance: Any = None, **replaced: Any) -> Any:
        """Call the hook with the example's arguments, some of them replaced."""
        function = getattr(instance or self.instance(), self.method.hook)
        wanted = [p for p in inspect.signature(function).parameters if p != "run"]
        arguments: dict[str, Any] = {name: {**self.example.arguments, **replaced}.get(name) for name in wanted}
        if "run" in inspect.signature(function).parameters:
            arguments["run"] = run
        with deterministic_kernels():
            return function(**arguments)

    def calls(self, number: int) -> list[Call]:
        """So many calls with seed 0, each in surroundings of its own; all checks look at the same ones."""
        while len(self._calls) < number:
            arguments = dict(self.example.arguments)
            inputs, states = copy.deepcopy(arguments), _shared_states()
            run = self.run()
            result = self.call(run)
            changed = [name for name, state in _shared_states().items() if not _same_state(states[name], state)]
            self._calls.append(
                Call(run, result, list(_moved(arguments)) or list(differences(inputs, arguments)), changed)
            )
        return self._calls[:number]

    def result(self) -> Any:
        """The result for seed 0."""
        return self.calls(1)[0].result

    def run(self, seed: int = 0, folder: Path | None = None) -> WatchedRun:
        """Fresh surroundings."""
        return WatchedRun(seed=seed, step="check", folder=folder or Path(tempfile.mkdtemp(prefix="plait-check-")))

    def differences(self, one: Any, other: Any) -> list[str]:
        """What differs between two results."""
        return list(differences(one, other, self.example.ignore))


def check_configuration(subject: Subject) -> None:
    """The configuration comes back equal from YAML, and unknown fields are refused."""
    import yaml

    instance = subject.instance()
    text = yaml.safe_dump(_writable(instance))
    again = configure(subject.method, {**(yaml.safe_load(text) or {}), **_nested(instance)})
    if plain_fields(again) != plain_fields(instance):
        raise ConformanceError(
            f"the configuration changes on its way through YAML: {plain_fields(instance)} → {plain_fields(again)}"
        )
    try:
        configure(subject.method, {**subject.example.fields, "no_such_field": 1})
    except PlaitError:
        return
    raise ConformanceError("an unknown field is not refused")


def _nested(instance: Any) -> dict[str, Any]:
    from plait.configuration import fields_of
    from plait.fields import HOOK

    return {name: getattr(instance, f.name) for name, f in fields_of(type(instance)).items() if HOOK in f.metadata}


def _writable(instance: Any) -> dict[str, Any]:
    from plait.configuration import fields_of, plain
    from plait.fields import HOOK

    # A field that is a method is written by name, and keeps its own check.
    return {
        name: plain(getattr(instance, f.name))
        for name, f in fields_of(type(instance)).items()
        if HOOK not in f.metadata
    }


def check_documented(subject: Subject) -> None:
    """The class has a docstring, and every field says what it means."""
    from plait.configuration import fields_of
    from plait.fields import DOC

    if not inspect.getdoc(subject.method.cls):
        raise ConformanceError(
            f"class {subject.method.cls.__name__} has no docstring; its first line is what plait list shows"
        )
    silent = [name for name, field in fields_of(subject.method.cls).items() if not field.metadata.get(DOC)]
    if silent:
        raise ConformanceError(
            f"fields without a meaning: {', '.join(silent)}; declare them with plait.fields.field(default, 'meaning')"
        )


def check_repeatable(subject: Subject) -> None:
    """The same seed gives the same result, bit for bit; another seed another one where the method is random."""
    first, second = subject.calls(2)
    if different := subject.differences(first.result, second.result):
        raise ConformanceError(f"two runs with one seed differ: {different[0]}{remedy(different[0], BETWEEN_RUNS)}")
    if subject.example.random and not subject.differences(first.result, subject.call(subject.run(seed=1))):
        raise ConformanceError(
            "another seed gives the same result, though the example says that the method is random: draw from run.generator(),"
            " or say random=False in the example"
        )


def check_inputs_untouched(subject: Subject) -> None:
    """Inputs, train/eval modes, ``requires_grad`` flags, global random states and the default dtype stay as they were."""
    first, second = subject.calls(2)
    # Not of the first call, which imports: some libraries draw random numbers while they are imported.
    for name in second.changed_states:
        raise ConformanceError(f"{name} is changed; use run.generator() and give settings back")
    for different in first.changed_inputs + second.changed_inputs:
        raise ConformanceError(f"an input is modified in place: {different}{remedy(different, IN_PLACE)}")


def _shared_states() -> dict[str, Any]:
    torch, numpy = require("torch"), require("numpy")
    return {
        "torch's global random state": torch.get_rng_state(),
        "NumPy's global random state": numpy.random.get_state()[1].copy(),
        "Python's global random state": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
    }


def _same_state(old: Any, new: Any) -> bool:
    same = old == new
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def check_result(subject: Subject) -> None:
    """The result is of the hook's kind; rows keep their number and order; pixels stay 8-bit images."""
    result, hook = subject.result(), subject.method.hook
    if hook == "evaluate" and not isinstance(result, Report):
        raise ConformanceError(f"evaluate returns a {type(result).__name__}; it has to return a plait.Report")
    is_model = kinds_of(hook)["return"].name == "model" and not isinstance(result, Mapping)
    if is_model and not (hasattr(result, "save_pretrained") or hasattr(result, "named_modules")):
        raise ConformanceError(
            f"{hook} returns a {type(result).__name__}; it has to return a torch.nn.Module, or a model with save_pretrained"
        )
    if result is None:
        raise ConformanceError("the hook returns nothing: return its result")
    if subject.example.keeps_rows:
        data = subject.example.arguments["data"]
        if len(result) != len(data):
            raise ConformanceError(
                f"the result has {len(result)} rows, the data {len(data)}: return one row for each, in their order"
            )
        names = [name for name in ("name", "label", "id") if name in data.column_names]
        for name in names:
            if name not in result.column_names or list(result[name]) != list(data[name]):
                raise ConformanceError(
                    f"column {name!r} is lost or in another order: derive the result from data, e.g. with data.map"
                )


def check_contract(subject: Subject) -> None:
    """The columns and splits that the method says it makes are there, and it refuses data without one that it needs."""
    says = declared(subject.instance(), subject.method.hook)
    result, arguments = subject.result(), subject.example.arguments
    if says.splits is not None and isinstance(result, Mapping) and set(result) != set(says.splits):
        raise ConformanceError(
            f"splits says {', '.join(says.splits)}, and the result has {', '.join(result)}: let splits name these"
        )
    for part in _tables(result):
        for column in says.columns_made or ():
            if column not in part.column_names:
                raise ConformanceError(
                    f"columns_made says {column!r}, and the result lacks it; it has {', '.join(part.column_names)}: make it, or take it out of columns_made"
                )
    for argument, columns in says.columns_needed.items():
        for column in columns:
            if argument in arguments:
                _check_needed(subject, argument, column)


def _check_needed(subject: Subject, argument: str, column: str) -> None:
    given = subject.example.arguments[argument]
    tables = _tables(given)
    if not all(column in table.column_names for table in tables):
        raise ConformanceError(
            f"columns_needed says {column!r}, which the example's {argument!r} lacks: say what the method reads"
        )
    if not tables:
        return
    without = (
        {name: part.remove_columns(column) for name, part in given.items()}
        if isinstance(given, Mapping)
        else [part.remove_columns(column) for part in given]
        if isinstance(given, list)
        else given.remove_columns(column)
    )
    try:
        subject.call(subject.run(), **{argument: without})
    except Exception as error:
        _check_sentence(subject, error, f"{argument!r} without its column {column!r}")
    else:
        raise ConformanceError(
            f"columns_needed says {column!r}, and without it the method runs: leave it out of columns_needed, or refuse the data"
        )


def _tables(value: Any) -> list[Any]:
    """The datasets in what an argument or a result is: one, or several of them."""
    several = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return [one for one in several if hasattr(one, "column_names") and hasattr(one, "remove_columns")]


def check_budget(subject: Subject) -> None:
    """After rounding to 8 bits, no pixel has moved further than the budget."""
    budget = subject.example.budget
    if budget is None:
        raise NotApplicable("the example states no budget")
    numpy = require("numpy")
    data = subject.example.arguments["data"]
    for row, (clean, changed) in enumerate(zip(data["image"], subject.result()["image"], strict=True)):
        moved = (
            numpy.abs(
                numpy.asarray(clean.convert("RGB"), dtype=int) - numpy.asarray(changed.convert("RGB"), dtype=int)
            ).max()
            / 255
        )
        if moved > budget + 1e-9:
            raise ConformanceError(
                f"row {row} moves by {moved:.5f}; the budget is {budget:.5f}: project after rounding to 8 bits"
            )


def check_batch_sizes(subject: Subject) -> None:
    """Batches of one, and a last batch that is shorter, work."""
    from plait.configuration import fields_of

    if "batch_size" not in fields_of(subject.method.cls):
        raise NotApplicable("no field batch_size")
    expected = _length(subject.result())
    for size in (1, 2, 3):
        try:
            instance = subject.instance(batch_size=size)
        except PlaitError:
            continue  # methods with contrastive losses refuse batches of one, before they start
        result = subject.call(subject.run(), instance)
        if _length(result) != expected:
            raise ConformanceError(
                f"batch_size {size} gives {_length(result)} rows; another gives {expected}: keep the last batch, however short"
            )


def _length(result: Any) -> int | None:
    return len(result) if hasattr(result, "__len__") else None


def check_device(subject: Subject) -> None:
    """The device is taken from ``run``."""
    if not subject.example.device:
        raise NotApplicable("the example says that it computes on the CPU")
    if not subject.calls(1)[0].run.device_was_read:
        raise ConformanceError("run.device is never read; compute on it")


def check_saves(subject: Subject) -> None:
    """The result is saved and comes back equal; a model gives equal outputs on data."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            codecs.save(subject.result(), Path(folder) / "a")
        except PlaitError as error:
            raise ConformanceError(str(error)) from error
        again = codecs.load(Path(folder) / "a")
        if different := subject.differences(subject.result(), again):
            raise ConformanceError(
                f"the result changes when it is saved and loaded: {different[0]}{remedy(different[0], AFTER_RELOAD)}"
            )
        outputs = subject.example.outputs
        _to_cpu(subject.result())  # as it is loaded
        if outputs is not None and (different := subject.differences(outputs(subject.result()), outputs(again))):
            raise ConformanceError(
                f"the model computes something else when it is saved and loaded: {different[0]}: let its configuration say all"
                " that its outputs depend on"
            )


def check_goes_on(subject: Subject) -> None:
    """What defends, trains, merges or aggregates returns can be trained on, and takes frozen models as it takes others."""
    if subject.method.hook not in ("defend", "optimize", "merge", "aggregate"):
        raise NotApplicable("it returns no model that was made from others")
    results, given = _modules(subject.result()), _modules(dict(subject.example.arguments))
    if not results:
        raise NotApplicable("it returns no torch.nn.Module")
    trainable = {name for model in given for name, weight in model.named_parameters() if weight.requires_grad}
    for model in results:
        weights = dict(model.named_parameters())
        if trainable and weights and not any(weight.requires_grad for weight in weights.values()):
            raise ConformanceError("the model comes back frozen: give back requires_grad as it came in")
        for name, weight in weights.items():
            if name in trainable and not weight.requires_grad:
                raise ConformanceError(
                    f"{name} comes back frozen, and it was not: give back requires_grad as it came in"
                )
    if given:
        _check_frozen_inputs(subject, results)


def _check_frozen_inputs(subject: Subject, results: list[Any]) -> None:
    arguments = copy.deepcopy(dict(subject.example.arguments))
    for model in _modules(arguments):
        model.requires_grad_(False)
    try:
        again = _modules(subject.call(subject.run(), **arguments))
    except Exception as error:
        raise ConformanceError(
            f"a model whose weights are frozen ends in {type(error).__name__}: {error}; set requires_grad of what is trained"
        ) from error
    for one, other in zip(results, again, strict=True):
        if different := subject.differences(one.state_dict(), other.state_dict()):
            raise ConformanceError(
                f"a model whose weights are frozen gives another result: {different[0]}: set requires_grad of what is trained"
            )


def _to_cpu(value: Any) -> None:
    for module in _modules(value):
        module.to("cpu")


def _moved(inputs: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every input that is no longer on the CPU."""
    for name, value in inputs.items():
        for module in _modules(value):
            devices = {str(weight.device) for weight in module.state_dict().values() if hasattr(weight, "device")}
            if devices - {"cpu"}:
                yield f"{name} is moved to {', '.join(sorted(devices))}"


def _modules(value: Any) -> list[Any]:
    """The ``torch.nn.Module``s in what an argument or a result is, at any depth of mappings, lists and attrs objects."""
    if hasattr(value, "named_parameters"):
        return [value]
    several = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if attrs.has(type(value)):
        several = [getattr(value, field.name) for field in attrs.fields(type(value))]
    return [module for one in several for module in _modules(one)]


def check_progress(subject: Subject) -> None:
    """Progress is reported with ``run.track`` or ``run.log``."""
    if not subject.example.progress:
        raise NotApplicable("the example says that it is done at once")
    if not subject.calls(1)[0].run.ticks:
        raise ConformanceError("no progress is reported; loop over run.track(…)")


def check_resume(subject: Subject) -> None:
    """Killed at any moment and run again in the same folder, the result is the same."""
    first = subject.calls(1)[0]
    expected, ticks = first.result, first.run.ticks
    if ticks < 2:
        raise NotApplicable("it reports too little progress to be killed in between")
    for kill_after in sorted({1, ticks // 2, ticks - 1}):
        folder = Path(tempfile.mkdtemp(prefix="plait-check-"))
        killed = subject.run(folder=folder)
        killed.kill_after = kill_after
        try:
            subject.call(killed)
        except Killed:
            pass
        else:
            raise ConformanceError("a kill is swallowed: do not catch BaseException without raising it again")
        if different := subject.differences(expected, subject.call(subject.run(folder=folder))):
            raise ConformanceError(
                f"killed after {kill_after} of {ticks} reports and run again, the result differs:"
                f" {different[0]}{remedy(different[0], ON_RESUME)}"
            )


def check_empty(subject: Subject) -> None:
    """Inputs without a row are refused in one sentence."""
    _check_refused(subject, subject.example.empty, "empty")


def check_wrong_inputs(subject: Subject) -> None:
    """Inputs of a wrong kind or shape are refused in one sentence."""
    _check_refused(subject, subject.example.wrong, "wrong")


def _check_refused(subject: Subject, inputs: Mapping[str, Any], kind: str) -> None:
    if not inputs:
        raise NotApplicable(f"the example has no {kind} inputs")
    for name, value in inputs.items():
        if name not in subject.example.arguments:
            continue
        try:
            subject.call(subject.run(), **{name: value})
        except Exception as error:
            _check_sentence(subject, error, f"{kind} {name!r}")
        else:
            raise ConformanceError(f"{kind} {name!r} is not refused; raise a ValueError that says what is wrong")


def _check_sentence(subject: Subject, error: Exception, refused: str) -> None:
    """Raise ConformanceError unless what a method raises is a sentence for its user."""
    if isinstance(error, PlaitError):
        if "\n" in str(error).strip():
            raise ConformanceError(f"the message for {refused} is more than one line: {error}") from error
    elif sentence_of(error, _own_modules(subject)) is None:
        raise ConformanceError(
            f"{refused} ends in {type(error).__name__}: {error}; raise a ValueError that says what is wrong"
        ) from error


def _own_modules(subject: Subject) -> set[str]:
    return {*plait_modules(), subject.method.cls.__module__.partition(".")[0]}


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_configuration, check_documented, check_result, check_contract, check_repeatable, check_inputs_untouched, check_budget, check_batch_sizes,
    check_device, check_saves, check_goes_on, check_progress, check_resume, check_empty, check_wrong_inputs,
)  # fmt: skip


def subjects(name: str, hook: str | None = None, example: Callable[[], Example] | None = None) -> Iterator[Subject]:
    """The method under every hook that offers it (or one), each with its example."""
    if hook is not None:
        hooks = [hook.replace("-", "_")]
    elif ":" in name:
        hooks = implemented_hooks(_class_at(name))
    else:
        hooks = [h for h in HOOKS if any(o.name == name.rpartition("/")[2] for o in offers(h))]
    if not hooks:
        find(HOOKS[0], name)  # tells what is wrong with the name
    for one in hooks:
        method = find(one, name)
        given = example() if example else given_example(method)
        yield Subject(method, given or built_in_example(method), built_in=given is None)


def _class_at(name: str) -> type[Any]:
    for hook in HOOKS:
        try:
            return find(hook, name).cls
        except PlaitError as error:
            if "has no hook" not in str(error):
                raise
    raise PlaitError(f"method {name!r} implements none of the hooks {', '.join(HOOKS)}")


def misfit(subject: Subject) -> str | None:
    """Why the built-in example is no input of the method, found by calling it once; ``None``: it is, or another is given."""
    if not subject.built_in:
        return None
    about = f"the built-in example ({described(subject.example)})"
    remedy = "with --example file.py:function, or a static function example() of the class, that returns a plait.testing.Example"
    try:
        subject.result()
    except Exception as error:  # whatever the method raises
        if sentence := sentence_of(error, _own_modules(subject)):
            return f"{about} does not suit this method: {sentence}; give one {remedy}"
        return f"the first call ends in {type(error).__name__}: {error}; if {about} does not suit this method, give one {remedy}"
    return None


def run_checks(subject: Subject) -> Iterator[tuple[str, str | None, bool]]:
    """Run all checks: name, what is wrong (or why it does not apply), and whether it passed."""
    if sentence := misfit(subject):
        yield "example", sentence, False
        return
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            check(subject)
        except NotApplicable as reason:
            yield name, f"does not apply: {reason}", True
        except ConformanceError as error:
            yield name, str(error), False
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}", False
        else:
            yield name, None, True


def conformance(name: str, *, hook: str | None = None, example: Callable[[], Example] | None = None) -> Any:
    """A parametrised pytest test that runs every check on a method::

    test_conformance = conformance("ensir")
    """
    import pytest

    found: list[Subject] = []
    told: list[str] = []

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
    def test(check: Callable[[Subject], None]) -> None:
        if not found:
            found.extend(subjects(name, hook, example))
            told.extend(sentence for subject in found if (sentence := misfit(subject)))
            if told:
                raise ConformanceError("; ".join(told))
        if told:
            pytest.skip("the built-in example does not suit the method")
        for subject in found:
            try:
                check(subject)
            except NotApplicable:
                continue

    return test
