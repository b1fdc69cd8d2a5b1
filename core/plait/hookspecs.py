"""What every hook takes and returns: the one page to read before writing a method.

A method is an attrs class whose fields are its hyperparameters and which implements one or more
of the hooks below, each marked with ``@plait.hookimpl``. A hook method names the arguments that it
wants, in any order and without defaults:

* an argument that it names is required in the pipeline's ``from``;
* annotated ``... | None`` it may be left out there, and is then ``None``;
* an argument that it does not name cannot be given.

``run`` (:class:`plait.Run`: seed, device, progress, curves, scratch folder) is always available.

Kinds of argument: *data* is a Hugging Face ``Dataset``, a mapping split or name → ``Dataset``, a
PyG ``Data`` or whatever the kit of the domain documents; *model* is a ``torch.nn.Module`` (or an
object that saves itself with ``save_pretrained``). Where a pipeline gives a list or a mapping of
steps, the method receives a list or a dict. Inputs are never modified; a hook returns a new object.

Images are ``image`` columns (8-bit RGB); methods work on float tensors ``[N, 3, H, W]`` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from plait.context import Run
    from plait.report import Report

hookspec = pluggy.HookspecMarker("plait")
hookimpl = pluggy.HookimplMarker("plait")


class MethodHooks:
    """Hooks that a pipeline step calls; exactly one method answers, chosen by its name."""

    @hookspec(firstresult=True)
    def load_data(self, run: Run) -> Any:
        """A source: a dataset, or a mapping split → dataset."""

    @hookspec(firstresult=True)
    def transform(self, data: Any, run: Run) -> Any:
        """Derive data from data: degrade, partition, subsample, caption."""

    @hookspec(firstresult=True)
    def load_model(self, data: Any, run: Run) -> Any:
        """Build a model, or load one from a local folder or a hub; ``data`` may set its size."""

    @hookspec(firstresult=True)
    def attack(self, model: Any, data: Any, run: Run) -> Any:
        """An adversarial (test-time) or poisoned (training-time) copy of the data.

        Budgets are stated in [0, 1] units and hold after rounding to 8 bits.
        """

    @hookspec(firstresult=True)
    def defend(self, model: Any, data: Any, reference: Any, run: Run) -> Any:
        """A cleaned or hardened copy of the model; ``reference`` is a model trusted to be clean."""

    @hookspec(firstresult=True)
    def ensemble(self, candidates: Mapping[str, Any], reference: Mapping[str, Any], run: Run) -> Any:
        """Fuse several outputs for the same inputs into one dataset.

        ``candidates`` maps a name to a dataset; ``reference`` has the same names plus ``target``.
        """

    @hookspec(firstresult=True)
    def merge(self, base: Any, experts: Mapping[str, Any], data: Mapping[str, Any], run: Run) -> Any:
        """Fuse several models into one; ``experts`` and ``data`` map task → model / unlabelled data."""

    @hookspec(firstresult=True)
    def optimize(self, model: Any, data: Any, run: Run) -> Any:
        """Train: a trained copy of the model."""

    @hookspec(firstresult=True)
    def extract_feature(self, model: Any, data: Any, run: Run) -> Any:
        """Dense or pooled representations: a dataset, or a dict of tensors."""

    @hookspec(firstresult=True)
    def aggregate(self, model: Any, clients: Any, run: Run) -> Any:
        """Federated or decentralised training: one model from many clients' data."""

    @hookspec(firstresult=True)
    def restore(self, model: Any, data: Any, run: Run) -> Any:
        """Image → better image: the dataset with its ``image`` column restored."""

    @hookspec(firstresult=True)
    def evaluate(self, model: Any, data: Any, reference: Any, run: Run) -> Report:  # type: ignore[empty-body]
        """Metrics, tables, curves and panels as a :class:`plait.Report`."""


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
