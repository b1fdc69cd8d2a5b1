"""Pipeline file → a checked :class:`Pipeline`; every problem at once, each with line and column."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from plait.configuration import configure
from plait.contract import misfits
from plait.document import MERGE, TEXT, Document, KeyPath, merged_in_place, parse, read
from plait.each import KEY as EACH
from plait.each import EachError, Family, expanded, member_of
from plait.errors import ConfigurationError, PipelineError, PlaitError, nearest
from plait.hookspecs import HOOKS, hook_arguments
from plait.methods import Method, find
from plait.resources import Resources, parse_resources

FORMAT = 1
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
TOP_KEYS = ("plait", "name", "description", "seed", "matrix", "steps")
STEP_KEYS = ("each", "from", "with", "seed", "resources", "keep")
OF_AN_AXIS = re.compile(r"\$\{matrix\.([A-Za-z_][A-Za-z0-9_-]*)\}")
MAX_CELLS = 10_000
MAPPING = "<mapping>"


@attrs.frozen
class Reference:
    """The result of another step, or a part of it (``step.split``)."""

    step: str
    part: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.step, *self.part))


@attrs.frozen
class Step:
    """One checked step of one matrix cell; ``instance`` is its method, made from the fields ``config``.

    A member of a step with ``each`` is named ``NAME.LABEL``, its ``family`` is NAME, and ``each`` holds the labels.
    Of a source with a ``limit`` only the first rows are kept.
    """

    name: str
    family: str
    each: Mapping[str, str]
    hook: str
    method: Method
    instance: Any
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    seed: int
    resources: Resources
    keep: bool
    limit: int | None = None

    def references(self) -> Iterator[Reference]:
        """All steps that this one takes something from."""
        for value in self.inputs.values():
            yield from self.references_in(value)

    @classmethod
    def references_in(cls, value: Any) -> Iterator[Reference]:
        """All references in what an argument is given: one, a list or a mapping."""
        if isinstance(value, Reference):
            yield value
        elif isinstance(value, (Mapping, list)):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from cls.references_in(item)


@attrs.frozen
class Cell:
    """One combination of matrix values, and its steps in an order in which they can run."""

    values: Mapping[str, Any]
    steps: Mapping[str, Step]


@attrs.frozen
class Pipeline:
    """A checked pipeline: every step of every cell has its method, fields and inputs.

    Attributes:
        axes: step → the axes of the matrix that its own text depends on.
    """

    name: str
    cells: Sequence[Cell]
    axes: Mapping[str, frozenset[str]]
    data: Mapping[str, Any]
    folder: Path
    source: str


def load_pipeline(path: Path | str, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file.

    Args:
        path: the YAML file.
        overrides: ``a.b=value`` each, as OmegaConf reads them: ``steps.dirty.with.rate=0.1``, ``matrix.seed=[0]``.

    Raises:
        PipelineError: everything that is wrong with it; nothing has been run.
    """
    return check(read(Path(path)), overrides, Path(path).resolve().parent)


def parse_pipeline(text: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Pipeline:
    """As :func:`load_pipeline`, for text that is at hand."""
    return check(parse(text), overrides, folder or Path.cwd())


def pipeline_of(data: Mapping[str, Any], overrides: Sequence[str] = (), folder: Path | None = None) -> Pipeline:
    """As :func:`load_pipeline`, for what a file would say as a mapping."""
    try:
        # As from a file: lists are lists, keys are texts, and there is nothing but plain values.
        plain = json.loads(json.dumps(data, default=_path_text))
    except (TypeError, ValueError) as error:
        raise PipelineError([f"the pipeline holds what a file could not say: {error}; write plain values"]) from error
    return check(Document(plain, {}, MAPPING), overrides, folder or Path.cwd())


def _path_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def check(document: Document, overrides: Sequence[str], folder: Path) -> Pipeline:
    """Check a document; see :func:`load_pipeline`."""
    problems = _Problems(document)
    if document.data is None:
        raise PipelineError([f"{document.name}: it is empty; a pipeline has the keys plait, name and steps"])
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        raise PipelineError(
            [f"{document.name}:1:1: it is {kind}; a pipeline is a mapping with the keys plait, name and steps"]
        )
    data = _override(document.data, overrides)
    _check_top(data, problems)
    matrix = data.get("matrix") or {}
    if problems.found:
        raise PipelineError(problems.found)
    cells = []
    known: dict[str, Step | None] = {}
    texts: list[tuple[Mapping[str, Any], Mapping[str, str]]] = []
    resolver = _Resolver(data)
    for values in _combinations(matrix):
        resolved = resolver.cell(values, problems)
        if resolved is not None:
            cells.append(_check_cell(resolved, values, folder, known, problems))
            texts.append((values, _texts(resolved, values)))
    axes = _axes_of_steps(data, texts, resolver)
    if not problems.found:
        _check_axes_used(matrix, axes, problems)
    if problems.found:
        raise PipelineError(problems.found)
    source = "" if document.name in (TEXT, MAPPING) else document.name
    return Pipeline(str(data.get("name") or Path(source).stem or "pipeline"), cells, axes, data, folder, source)


@attrs.frozen
class _Resolved:
    """A cell without interpolations, with the members of steps with ``each`` in their places."""

    seed: Any
    steps: Mapping[str, Any]
    families: Mapping[str, Family]
    family_of: Mapping[str, str]

    def origin(self, name: str) -> str:
        """The step of the file that a step was made from."""
        return self.family_of.get(name, name)


def _texts(resolved: _Resolved, values: Mapping[str, Any]) -> dict[str, str]:
    """What every step of a cell resolves to, as text: equal for equal steps."""
    seed = values.get("seed", resolved.seed)
    families = {name: list(family.members) for name, family in resolved.families.items()}
    return {
        name: json.dumps([body, None if isinstance(body, dict) and "seed" in body else seed, families], default=str)
        for name, body in resolved.steps.items()
    }


def _axes_of_steps(
    data: Mapping[str, Any], texts: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]], resolver: _Resolver
) -> dict[str, frozenset[str]]:
    """Step → the axes whose value changes what it resolves to, however an interpolation reaches them."""
    found: dict[str, set[str]] = {name: set() for _, cell in texts for name in cell}
    for axis, axis_values in (data.get("matrix") or {}).items():
        if len(axis_values) == 1:
            texts_here = [*texts[:1], *_probe(data, axis, texts[:1], resolver)]
        else:
            texts_here = list(texts)
        for name in found:
            by_others: dict[str, str] = {}
            for values, cell in texts_here:
                others = json.dumps({other: value for other, value in values.items() if other != axis}, default=str)
                if name in cell and by_others.setdefault(others, cell[name]) != cell[name]:
                    found[name].add(axis)
                    break
    return {name: frozenset(axes) for name, axes in found.items()}


def _probe(
    data: Mapping[str, Any],
    axis: str,
    first: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
    resolver: _Resolver,
) -> list[tuple[Mapping[str, Any], Mapping[str, str]]]:
    """The first cell with another value of an axis that has only one; empty where it cannot be resolved."""
    if not first:
        return []
    values = dict(first[0][0])
    value = values[axis]
    values[axis] = (
        value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else f"{value} (another)"
    )
    resolved = resolver.cell(values, None)
    if resolved is not None:
        return [(values, _texts(resolved, values))]
    mentioning = {name for name, body in data["steps"].items() if f"matrix.{axis}" in str(body)}
    mentioned = {
        name: f"{text} (another)"
        for name, text in first[0][1].items()
        if name in mentioning or name.partition(".")[0] in mentioning
    }
    return [(values, {**first[0][1], **mentioned})]


def _check_axes_used(matrix: Mapping[str, Any], axes: Mapping[str, frozenset[str]], problems: _Problems) -> None:
    for axis in matrix:
        if not any(axis in used for used in axes.values()):
            problems.add(
                ("matrix", axis),
                f"no step uses matrix axis {axis}; write ${{matrix.{axis}}} where it belongs, or leave it out",
            )


class _Problems:
    """Sentences by their places in the file."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.origins: dict[str, str] = {}
        self._sentences: dict[str, tuple[int, int]] = {}

    def add(self, path: KeyPath, sentence: str) -> None:
        if len(path) > 1 and path[0] == "steps":
            path = ("steps", self.origins.get(str(path[1]), path[1]), *path[2:])
        # Cells of a matrix share most of their text: the same sentence stands once.
        self._sentences.setdefault(f"{self.document.where(path)}: {sentence}", self.document.place(path))

    @property
    def found(self) -> list[str]:
        """All sentences in the order of the file."""
        return sorted(self._sentences, key=lambda sentence: self._sentences[sentence])


def _override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    if not overrides:
        return data
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config: Any = OmegaConf.create(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        adds = key.startswith("+")
        key = key.removeprefix("+")
        if not equals or not key or not all(key.split(".")):
            raise PipelineError([f"override {override!r} is not of the form path.to.field=value"])
        parts = key.split(".")
        _check_override(override, parts, data, adds)
        try:
            value = parse(text).data
        except PipelineError as error:
            raise PipelineError(
                [f"override {override!r} cannot be read: {error.problems[0].removeprefix('<text>:')}"]
            ) from error
        try:
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, AttributeError, IndexError) as error:
            raise PipelineError([f"override {override!r} does not fit: {_first_line(error)}"]) from error
    result: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return result


def _check_override(override: str, parts: Sequence[str], data: Mapping[str, Any], adds: bool) -> None:
    if parts[0] not in TOP_KEYS:
        raise PipelineError([f"override {override!r}: there is no key {parts[0]!r}{nearest(parts[0], TOP_KEYS)}"])
    known = data.get(parts[0])
    if len(parts) == 1 or parts[0] not in ("steps", "matrix"):
        return
    name = parts[1].partition("[")[0]
    if parts[0] == "steps" and isinstance(known, dict) and name not in known:
        raise PipelineError([f"override {override!r}: there is no step {name!r}{nearest(name, known)}"])
    if parts[0] == "matrix" and not adds and name not in (known or {}):
        raise PipelineError(
            [
                f"override {override!r}: the matrix has no axis {name!r}{nearest(name, known or {})}; +matrix.{name}=… adds one"
            ]
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_top(data: Mapping[str, Any], problems: _Problems) -> None:
    for key in data:
        if key not in TOP_KEYS:
            problems.add(
                (key,), f"there is no key {key!r}{nearest(key, TOP_KEYS) or '; the keys are ' + ', '.join(TOP_KEYS)}"
            )
    if "plait" not in data:
        problems.add((), f"the first line has to be 'plait: {FORMAT}', the format of the file")
    elif data["plait"] != FORMAT or isinstance(data["plait"], bool):
        problems.add(("plait",), f"format {data['plait']!r} is unknown; this plait reads format {FORMAT}")
    if "name" in data and (not isinstance(data["name"], str) or not NAME.fullmatch(data["name"])):
        problems.add(("name",), f"name is {data['name']!r}; allowed are letters, digits, - and _, a letter first")
    if "description" in data and not isinstance(data["description"], str):
        problems.add(("description",), "description has to be a text")
    seed = data.get("seed", 0)
    if not (_is_seed(seed) or _is_interpolation(seed)):
        problems.add(("seed",), f"seed is {seed!r}; allowed is a whole number from 0 to 2**63 - 1")
    _check_matrix(data.get("matrix"), problems)
    steps = data.get("steps")
    if not isinstance(steps, dict) or not steps:
        problems.add(("steps",), "steps has to be a mapping with at least one step: name: {hook: method}")
        return
    for name, step in steps.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problems.add(
                ("steps", name), f"step name {name!r} is not allowed; use letters, digits, - and _, a letter first"
            )
        if not isinstance(step, dict):
            problems.add(
                ("steps", name), f"step {name}: it is {step!r}; a step is a mapping {{hook: method, from: …, with: …}}"
            )


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _check_matrix(matrix: Any, problems: _Problems) -> None:
    if matrix is None:
        return
    if not isinstance(matrix, dict):
        problems.add(("matrix",), "matrix has to be a mapping axis → list of values")
        return
    for axis, values in matrix.items():
        path = ("matrix", axis)
        if not NAME.fullmatch(str(axis)):
            problems.add(path, f"axis name {axis!r} is not allowed; use letters, digits, - and _, a letter first")
        if not isinstance(values, list) or not values:
            problems.add(path, f"matrix axis {axis} is {values!r}; it has to be a list of at least one value")
        elif axis == "seed" and not all(map(_is_seed, values)):
            problems.add(path, f"matrix axis seed is {values!r}; its values are whole numbers from 0 to 2**63 - 1")
        elif len({repr(value) for value in values}) < len(values):
            problems.add(path, f"matrix axis {axis} has a duplicate value; keep one")
    if not problems.found and math.prod(len(values) for values in matrix.values()) > MAX_CELLS:
        problems.add(("matrix",), f"the matrix has more than {MAX_CELLS} cells; run it in parts, e.g. matrix.seed=[0]")


def _combinations(matrix: Mapping[str, list[Any]]) -> Iterator[Mapping[str, Any]]:
    for values in itertools.product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))


class _Resolver:
    """Resolves the cells of a matrix one after the other; what no interpolation reaches is resolved once."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._configs: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._bodies: dict[tuple[str, str, str], Any] = {}

    def cell(self, values: Mapping[str, Any], problems: _Problems | None) -> _Resolved | None:
        """One cell without interpolations; ``None`` where it has problems."""
        from omegaconf.errors import OmegaConfBaseException

        try:
            return self._cell(values, problems)
        except EachError as error:
            path: KeyPath = ("steps", *error.path)
            sentence = f"step {error.path[0]}: {error}"
        except OmegaConfBaseException as error:
            path = tuple(part for part in re.split(r"[.\[\]]+", str(getattr(error, "full_key", None) or "")) if part)
            sentence = f"{'.'.join(map(str, path)) or 'the file'}: {_first_line(error)}"
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            path, sentence = (), f"an interpolation cannot be resolved: {_first_line(error)}"
        if problems is not None:
            problems.add(path, sentence)
        return None

    def _cell(self, values: Mapping[str, Any], problems: _Problems | None) -> _Resolved:
        families, steps = _expand(self._data["steps"], self._config({}, values)[0])
        whole, fixed = self._config(steps if families else {}, values)
        family_of = {f"{name}.{label}": name for name, family in families.items() for label in family.members}
        if problems is not None:
            problems.origins.update(family_of)
        seed = _plain(whole, "seed") if "seed" in whole else 0
        bodies = {
            name: fixed[name] if name in fixed else self._resolved(name, body, whole, values)
            for name, body in steps.items()
            if name not in families
        }
        return _Resolved(seed, bodies, families, family_of)

    def _resolved(self, name: str, body: Any, whole: Any, values: Mapping[str, Any]) -> Any:
        """A step's body; those that depend on nothing but a few axes are the same in all cells with the same values of them."""
        text = json.dumps(body, default=str)
        axes = OF_AN_AXIS.findall(text)
        if len(axes) < text.count("${") or "\\" in text:
            return _plain(whole.steps, name)
        place = (name, text, json.dumps([values.get(axis) for axis in axes], default=str))
        if place not in self._bodies:
            self._bodies[place] = _plain(whole.steps, name)
        return self._bodies[place]

    def _config(self, steps: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """OmegaConf's view of the file with these values of the matrix, and the steps that hold no interpolation."""
        from omegaconf import OmegaConf

        text = json.dumps(steps, default=str)
        if text not in self._configs:
            data = {**self._data, "matrix": dict(values), **({"steps": dict(steps)} if steps else {})}
            fixed = {name: body for name, body in data["steps"].items() if "${" not in json.dumps(body, default=str)}
            self._configs[text] = (OmegaConf.create(data), fixed)
        whole, fixed = self._configs[text]
        OmegaConf.update(whole, "matrix", dict(values), merge=False, force_add=True)
        return whole, fixed


def _plain(config: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    node = config._get_node(key)
    if OmegaConf.is_config(node) and not node._is_interpolation():
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    value = config[key]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


def _expand(written: Mapping[str, Any], whole: Any) -> tuple[dict[str, Family], dict[str, Any]]:
    """Steps with ``each`` replaced by their members; what ``${steps.NAME.…}`` finds is the first of them."""
    from omegaconf import OmegaConf

    families: dict[str, Family] = {}
    steps: dict[str, Any] = {}
    for name, body in written.items():
        if not isinstance(body, dict) or EACH not in body:
            steps[name] = body
            continue
        node = whole.steps[name][EACH]
        each = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        try:
            family, bodies = expanded(name, body, each)
        except EachError as error:
            raise EachError((name, *error.path), str(error)) from error
        families[name] = family
        steps |= {f"{name}.{label}": member for label, member in bodies.items()}
        steps[name] = next(iter(bodies.values()))
    return families, steps


def _check_cell(
    cell: _Resolved, values: Mapping[str, Any], folder: Path, known: dict[str, Step | None], problems: _Problems
) -> Cell:
    """Check one cell; ``known`` holds the steps of the cells before it, by their resolved text."""
    default_seed = values.get("seed", cell.seed)
    if not _is_seed(default_seed):
        problems.add(("seed",), f"seed is {default_seed!r}; allowed is a whole number from 0 to 2**63 - 1")
    steps: dict[str, Step] = {}
    families = {name: list(family.members) for name, family in cell.families.items()}
    for name, body in cell.steps.items():
        if not isinstance(body, dict):
            problems.add(
                ("steps", cell.origin(name)),
                f"step {name}: it is {body!r}; a step is a mapping {{hook: method, from: …, with: …}}",
            )
            continue
        text = json.dumps([name, body, default_seed, families], default=str)
        if text not in known:
            known[text] = _check_step(name, body, cell, default_seed, folder, problems)
        if (step := known[text]) is not None:
            steps[name] = step
    for step, argument, sentence in misfits(steps):
        problems.add(("steps", step.name, "from", argument), f"step {step.name}: {sentence}")
    order = _order(steps, problems)
    return Cell(values, {name: steps[name] for name in order})


def _check_step(
    name: str, body: Mapping[str, Any], cell: _Resolved, default_seed: int, folder: Path, problems: _Problems,
) -> Step | None:  # fmt: skip
    path: KeyPath = ("steps", name)
    hooks = [key for key in body if str(key).replace("-", "_") in HOOKS]
    shown = [hook.replace("_", "-") for hook in HOOKS]
    for key in body:
        if key not in hooks and key not in STEP_KEYS:
            guess = nearest(key, [*shown, *STEP_KEYS])
            problems.add(
                (*path, key),
                f"step {name}: {key!r} is neither a hook nor a key of a step{guess or '; the hooks are ' + ', '.join(shown)}",
            )
    if len(hooks) != 1:
        if hooks or not [key for key in body if key not in STEP_KEYS]:
            found = (
                f"two hooks: {', '.join(hooks)}; make two steps of it"
                if hooks
                else "no hook; write hook: method, the hooks are " + ", ".join(shown)
            )
            problems.add(path, f"step {name} has {found}")
        return None
    hook = hooks[0].replace("-", "_")
    seed = body.get("seed", default_seed)
    if not _is_seed(seed):
        problems.add((*path, "seed"), f"step {name}: seed is {seed!r}; allowed is a whole number from 0 to 2**63 - 1")
        return None
    inputs = _check_inputs(name, hook, body.get("from"), cell, problems)
    try:
        resources = parse_resources(body.get("resources"))
    except ValueError as error:
        problems.add((*path, "resources"), f"step {name}: {error}")
        return None
    keep = body.get("keep", True)
    if not isinstance(keep, bool):
        problems.add((*path, "keep"), f"step {name}: keep is {keep!r}; allowed is true or false")
        return None
    method, instance = _check_method(name, hooks[0], hook, body, folder, problems)
    if method is None or inputs is None:
        return None
    _check_arguments(name, method, inputs, problems)
    if instance is None:
        return None
    family = cell.families.get(cell.origin(name))
    labels = family.members[name.removeprefix(f"{family.name}.")] if family else {}
    config = body.get("with") or {}
    return Step(name, cell.origin(name), labels, hook, method, instance, config, inputs, seed, resources, keep)


def _check_method(
    name: str, key: str, hook: str, body: Mapping[str, Any], folder: Path, problems: _Problems
) -> tuple[Method | None, Any]:
    path: KeyPath = ("steps", name)
    method_name, fields = body[key], body.get("with")
    fields = {} if fields is None else fields
    if not isinstance(method_name, str):
        problems.add(
            (*path, key),
            f"step {name}: the method is {method_name!r}; it has to be a name, its fields stand under with",
        )
        return None, None
    if not isinstance(fields, dict):
        problems.add((*path, "with"), f"step {name}: with is {fields!r}; it has to be a mapping field → value")
        return None, None
    try:
        method = find(hook, method_name, folder)
    except PlaitError as error:
        problems.add((*path, key), f"step {name}: {error}")
        return None, None
    try:
        return method, configure(method, fields, folder)
    except ConfigurationError as error:
        for where, sentence in error.problems:
            problems.add((*path, "with", *where), f"step {name}: {sentence}")
        return method, None


def _check_inputs(name: str, hook: str, given: Any, cell: _Resolved, problems: _Problems) -> dict[str, Any] | None:
    path: KeyPath = ("steps", name, "from")
    if given is None:
        return {}
    if not isinstance(given, dict):
        arguments = ", ".join(hook_arguments(hook))
        problems.add(
            path,
            f"step {name}: from is {given!r}; it has to be a mapping argument → step (arguments: {arguments or 'none'})",
        )
        return None
    return {
        argument: _parse_reference(name, value, cell, (*path, argument), problems) for argument, value in given.items()
    }


def _parse_reference(name: str, value: Any, cell: _Resolved, path: KeyPath, problems: _Problems) -> Any:
    if isinstance(value, list) and value:
        return [_parse_reference(name, item, cell, (*path, i), problems) for i, item in enumerate(value)]
    if isinstance(value, dict) and value:
        named = {
            str(key): None if key == MERGE else _parse_reference(name, item, cell, (*path, key), problems)
            for key, item in value.items()
        }
        if MERGE not in value:
            return named
        return merged_in_place(named, _parse_merged(name, value[MERGE], cell, (*path, MERGE), problems))
    if not isinstance(value, str) or not all(value.split(".")):
        problems.add(path, f"step {name}: {value!r} names no step; write step or step.split")
        return Reference("")
    step, *part = value.split(".")
    if step in cell.families:
        return _parse_member(name, cell.families[step], part, path, problems)
    if step not in cell.steps:
        known = [*(n for n in cell.steps if n not in cell.family_of), *cell.families]
        problems.add(path, f"step {name}: there is no step {step!r}{nearest(step, known)}")
    return Reference(step, tuple(part))


def _parse_merged(name: str, value: Any, cell: _Resolved, path: KeyPath, problems: _Problems) -> dict[str, Any]:
    """``<<: noisy`` or ``<<: [noisy, digits]`` in a mapping: the members of steps with ``each``, the parts of others.

    Parts are known when the result is there; their references stay under ``<<``.
    """
    found: dict[str, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        members = _parse_reference(name, item, cell, path, problems)
        if isinstance(members, dict):
            found |= members
        else:
            found.setdefault(MERGE, []).append(members)
    return found


def _parse_member(name: str, family: Family, part: Sequence[str], path: KeyPath, problems: _Problems) -> Any:
    """``expert``: all members by label; ``expert.digits`` one of them; ``expert.*.test`` a part of each."""
    if not part or part[0] == "*":
        return {label: Reference(f"{family.name}.{label}", tuple(part[1:])) for label in family.members}
    found = member_of(family, part)
    if found is None:
        has = ", ".join(family.members)
        guess = nearest(".".join(part), family.members)
        problems.add(path, f"step {name}: {family.name} has no {'.'.join(part)!r}{guess}; it has {has}")
        return Reference("")
    label, rest = found
    return Reference(f"{family.name}.{label}", rest)


def _check_arguments(name: str, method: Method, inputs: Mapping[str, Any], problems: _Problems) -> None:
    arguments = method.arguments
    for argument in inputs:
        if argument not in arguments:
            valid = ", ".join(arguments) or "none"
            problems.add(
                ("steps", name, "from", argument),
                f"step {name}: {method.name} takes no {argument!r}{nearest(argument, arguments)}; it takes {valid}",
            )
    for argument, required in arguments.items():
        if required and argument not in inputs:
            problems.add(
                ("steps", name), f"step {name}: {method.name} needs {argument!r}; add it to from: {{{argument}: step}}"
            )


def _order(steps: Mapping[str, Step], problems: _Problems) -> list[str]:
    from graphlib import CycleError, TopologicalSorter

    graph = {name: [r.step for r in step.references() if r.step in steps] for name, step in steps.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
        problems.add(
            ("steps", cycle[0]),
            f"steps form a cycle: {' → '.join(reversed(cycle))}; take one of these from another step",
        )
        return []
    order: dict[str, None] = {}
    todo = list(reversed(graph))
    # As in the file, but for steps that need a later one.
    while todo:
        name = todo[-1]
        missing = [needed for needed in graph[name] if needed not in order]
        if missing:
            todo += reversed(missing)
        else:
            todo.pop()
            order[name] = None
    return list(order)
