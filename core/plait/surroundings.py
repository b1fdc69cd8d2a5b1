"""The global state of Python and of the libraries: the same at the start of every step, and given back after it.

Whatever ran before a step in its process, and however it ran (fresh, resumed, in one process or in several), what it
finds is the same; and code that draws from the global generators draws the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import locale
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

RECURSION_LIMIT = 1000


@contextlib.contextmanager
def same_surroundings(seed: int, deterministic: bool = False) -> Iterator[None]:
    """Set all global state to what a fresh process has, the global generators to ``seed``; restore it at the end.

    ``deterministic``: with :func:`deterministic_kernels`.

    That is: working directory (kept), environment variables (kept, changes undone), recursion limit, warnings filters,
    locale; the generators of ``random``, NumPy and torch; torch's default dtype, grad mode, deterministic and
    benchmark flags and matmul precision; its number of threads (kept); caches of Hugging Face's ``datasets`` (none).
    Libraries that are imported only in the step are set when they are.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_python(seed))
        for name, surroundings in (
            ("numpy", _numpy),
            ("torch", functools.partial(_torch, deterministic=deterministic)),
            ("datasets", _datasets),
        ):
            if name in sys.modules:
                stack.enter_context(surroundings(sys.modules[name], seed))
            else:
                finder = _OnImport(name, functools.partial(_enter, stack, surroundings, seed))
                sys.meta_path.insert(0, finder)
                stack.callback(_forget, finder)
        yield


def _enter(stack: contextlib.ExitStack, surroundings: Callable[..., Any], seed: int, module: ModuleType) -> None:
    stack.enter_context(surroundings(module, seed))


@contextlib.contextmanager
def _python(seed: int) -> Iterator[None]:
    folder, environment, limit = os.getcwd(), dict(os.environ), sys.getrecursionlimit()
    state, place = random.getstate(), locale.setlocale(locale.LC_ALL)
    random.seed(seed)
    sys.setrecursionlimit(max(RECURSION_LIMIT, limit))
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(folder)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.setrecursionlimit(limit)
        random.setstate(state)
        locale.setlocale(locale.LC_ALL, place)


@contextlib.contextmanager
def _numpy(numpy: Any, seed: int) -> Iterator[None]:
    state, errors, shown = numpy.random.get_state(), numpy.geterr(), numpy.get_printoptions()
    numpy.random.seed(seed % 2**32)
    numpy.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    try:
        yield
    finally:
        numpy.random.set_state(state)
        numpy.seterr(**errors)
        numpy.set_printoptions(**shown)


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """With a CUDA device, the same sums come out of the same numbers, to the last bit, and more slowly.

    The fastest CUDA kernels of some operations (attention, backward passes of indexing, scattering and resizing) add in
    whatever order their threads finish. Of an operation that has no other kernel torch warns. On the CPU nothing changes:
    its kernels are deterministic.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield
        return
    before = _torch_state(torch)
    with _workspace_of_cublas():
        _set_torch(torch, {**before, **DETERMINISTIC})
        try:
            yield
        finally:
            _set_torch(torch, before)


@contextlib.contextmanager
def _workspace_of_cublas() -> Iterator[None]:
    """What torch asks for before it calls matrix products deterministic, unless the user has set it."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    if name in os.environ:
        yield
        return
    os.environ[name] = ":4096:8"
    try:
        yield
    finally:
        os.environ.pop(name, None)


# Only a warning where there is no deterministic kernel; and memory that is not yet written needs no filling for equal sums.
DETERMINISTIC = {"deterministic": True, "warn_only": True, "fill": False}


@contextlib.contextmanager
def _torch(torch: Any, seed: int, deterministic: bool) -> Iterator[None]:
    before = _torch_state(torch)
    devices = [torch.cuda.get_rng_state_all()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    generator = torch.get_rng_state()
    _set_torch(
        torch,
        {
            "dtype": torch.float32, "grad": True, "deterministic": False, "warn_only": False, "benchmark": False,
            "cudnn": False, "matmul": "highest", "threads": before["threads"], "detect": False, "fill": before["fill"],
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    try:
        with deterministic_kernels() if deterministic else contextlib.nullcontext():
            yield
    finally:
        _set_torch(torch, before)
        torch.set_rng_state(generator)
        for states in devices:
            torch.cuda.set_rng_state_all(states)


@contextlib.contextmanager
def _datasets(datasets: Any, seed: int) -> Iterator[None]:
    """What it derives it keeps beside what that was derived from: in the store, or in a folder of the user's."""
    if not datasets.is_caching_enabled():
        yield
        return
    datasets.disable_caching()
    try:
        yield
    finally:
        datasets.enable_caching()


def _torch_state(torch: Any) -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark, "cudnn": torch.backends.cudnn.deterministic,
        "matmul": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads(),
        "detect": torch.is_anomaly_enabled(), "fill": torch.utils.deterministic.fill_uninitialized_memory,
    }  # fmt: skip


def _set_torch(torch: Any, state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["dtype"])
    torch.set_grad_enabled(state["grad"])
    now = _torch_state(torch)
    if (state["deterministic"], state["warn_only"]) != (now["deterministic"], now["warn_only"]):
        # Imports torch's compiler, which takes long and adds filters of warnings to those of the step.
        torch.use_deterministic_algorithms(state["deterministic"], warn_only=state["warn_only"])
    torch.utils.deterministic.fill_uninitialized_memory = state["fill"]
    torch.backends.cudnn.benchmark = state["benchmark"]
    torch.backends.cudnn.deterministic = state["cudnn"]
    torch.set_float32_matmul_precision(state["matmul"])
    torch.autograd.set_detect_anomaly(state["detect"])
    if state["threads"] != now["threads"]:
        torch.set_num_threads(state["threads"])


class _OnImport(importlib.abc.MetaPathFinder):
    """Calls a function with a library when it has been imported, however often it was only looked for before."""

    def __init__(self, name: str, function: Callable[[ModuleType], Any]) -> None:
        self._name, self._function = name, function

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        load: Any = spec.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            _forget(self)
            self._function(module)

        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec


def _forget(finder: Any) -> None:
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
