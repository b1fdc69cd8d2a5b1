"""The attacks of torchattacks by name: what they take, what they promise, and how they run. Nothing here knows plait."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import random
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
import torchattacks
from torch import Tensor, nn

# Those that are given other attacks, or data to train on.
_WRAPPERS = ("LGV", "MultiAttack")
NAMES = tuple(name for name in torchattacks.__all__ if name not in _WRAPPERS)
# Those that look at nothing but answers.
WITHOUT_GRADIENT = ("GN", "OnePixel", "Pixle", "Square", "VANILA")
_IN_L2 = ("PGDL2", "PGDRSL2")
_FAILURES = (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def check_name(name: str) -> None:
    """Raise ValueError where torchattacks has no such attack."""
    if name in _WRAPPERS:
        raise ValueError(f"name is {name!r}, which is made of other attacks; name one attack, and take a step for each")
    if name not in NAMES:
        raise ValueError(f"name is {name!r}{_nearest(name, NAMES)}; torchattacks has {', '.join(NAMES)}")


def checked_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an attack's class, with fractions such as ``"8/255"`` as numbers.

    Raises:
        ValueError: the class has no such argument, or another kind of value for it.
    """
    known = parameters(name)
    found = {}
    for key, value in arguments.items():
        if key not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"arguments has {key!r}{_nearest(key, tuple(known))}; {name} takes {takes}")
        if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*/\s*[1-9]\d*\s*", value):
            value = float(Fraction(value.replace(" ", "")))
        default = known[key]
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if number and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{key} of {name} is {value!r}; a number is needed, such as {default}")
        if isinstance(default, (bool, str)) and type(value) is not type(default):
            raise ValueError(f"{key} of {name} is {value!r}; a value such as {default!r} is needed")
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def parameters(name: str) -> dict[str, Any]:
    """Argument → default, of an attack's class, without the model."""
    signature = inspect.signature(getattr(torchattacks, name).__init__)
    return {key: one.default for key, one in signature.parameters.items() if key not in ("self", "model")}


def budget(name: str, arguments: Mapping[str, Any]) -> tuple[float | None, Literal["linf", "l2"]]:
    """The largest change in [0, 1] units and its norm; ``None`` for attacks without a budget.

    Raises:
        ValueError: a norm other than Linf and L2.
    """
    full = {**parameters(name), **arguments}
    norm = full.get("norm", "L2" if name in _IN_L2 else "Linf")
    if norm not in ("Linf", "L2"):
        raise ValueError(f"norm of {name} is {norm!r}; budgets in 8 bits are of Linf and L2")
    return full.get("eps"), "linf" if norm == "Linf" else "l2"


def classes_needed(name: str, arguments: Mapping[str, Any]) -> int:
    """How many classes a model must tell apart: the difference of logits ratio looks at the third or fourth best."""
    full = {**parameters(name), **arguments}
    if name == "APGDT" or (name == "AutoAttack" and full["version"] != "rand"):
        return 4
    return 3 if name == "AutoAttack" or full.get("loss") == "dlr" else 2


def make(name: str, classifier: nn.Module, arguments: Mapping[str, Any], *, num_classes: int, seed: int) -> Any:
    """The attack; the number of classes and the seed of its own are given where the class has such arguments.

    Raises:
        ValueError: the class refuses its arguments, or the model has no parameters.
    """
    if next(classifier.parameters(), None) is None:
        raise ValueError("the model has no parameters, by which torchattacks finds its device")
    own = {"n_classes": num_classes, "seed": seed % 2**31}
    filled = {key: value for key, value in own.items() if key in parameters(name) and key not in arguments}
    try:
        return getattr(torchattacks, name)(classifier, **{**arguments, **filled})
    except _FAILURES as error:
        raise ValueError(f"{name} of torchattacks refuses its arguments: {_reason(error)}") from error


def lead_to(attack: Any, target: int, name: str) -> None:
    """Make an attack a targeted one.

    Raises:
        ValueError: it has no such mode.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its mode
            attack.set_mode_targeted_by_function(lambda images, labels: torch.full_like(labels, target))
    except ValueError as error:
        raise ValueError(f"{name} of torchattacks has no targeted mode; leave target out") from error


def attacked(attack: Any, name: str, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Images ``[N, 3, H, W]`` in [0, 1] → the changed ones, not rounded; global random states stay as they are.

    Raises:
        ValueError: the library fails, or gives images that are not finite.
    """
    try:
        with drawing(seed, images.device):
            changed: Tensor = attack(images, labels).detach()
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise ValueError(
            f"{name} of torchattacks fails on images of shape {tuple(images.shape)}: {_reason(error)}"
        ) from error
    if changed.shape != images.shape or not bool(torch.isfinite(changed).all()):
        raise ValueError(f"{name} of torchattacks gives images that are not finite, or of another shape")
    return changed.clamp(0, 1)


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's, NumPy's and Python's own random numbers from a seed; their states are as before afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _nearest(name: str, names: tuple[str, ...]) -> str:
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
