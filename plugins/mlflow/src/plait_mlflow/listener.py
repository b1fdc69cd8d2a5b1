"""A listener to run events that writes to MLflow."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from plait import PlaitError, hookimpl

MAX_PARAMETER = 500


@attrs.define(kw_only=True, eq=False)
class MLflowListener:
    """One MLflow run for every run of a pipeline.

    Attributes:
        tracking_uri: where MLflow keeps runs; default ``MLFLOW_TRACKING_URI``, and nothing is logged without it.
        experiment: default ``MLFLOW_EXPERIMENT_NAME``, else the pipeline's name.
    """

    tracking_uri: str | None = None
    experiment: str | None = None
    _client: Any = attrs.field(default=None, init=False)
    _run: str = attrs.field(default="", init=False)

    @hookimpl
    def run_started(self, run_id: str, pipeline: Mapping[str, Any]) -> None:
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            return
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or str(pipeline.get("name") or "plait")
        try:
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            self._run = client.create_run(experiment, run_name=run_id).info.run_id
        except MlflowException as error:
            raise PlaitError(
                f"MLflow at {uri} does not answer as it should: {error}; unset MLFLOW_TRACKING_URI to run without it"
            ) from error
        self._client = client

    @hookimpl
    def step_started(self, step: str, hook: str, method: str, config: Mapping[str, Any]) -> None:
        if self._client:
            self._parameter(f"{step}.{hook}", method)
            for name, value in config.items():
                self._parameter(f"{step}.{name}", value)

    @hookimpl
    def step_logged(self, step: str, values: Mapping[str, float], at: int | None) -> None:
        for name, value in values.items():
            self._metric(f"{step}/{name}", value, at or 0)

    @hookimpl
    def step_warned(self, step: str, message: str) -> None:
        if self._client:
            self._client.set_tag(self._run, allowed(f"warning.{step}"), message)

    @hookimpl
    def step_finished(self, step: str, report: Any) -> None:
        for row in report.rows if report is not None else ():
            numbers = {
                name: value
                for name, value in row.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            about = [str(value) for name, value in row.items() if name not in numbers and value is not None]
            for name, value in numbers.items():
                self._metric("/".join([step, *about, name]), value, 0)

    @hookimpl
    def run_finished(self, folder: Path, failed: list[str]) -> None:
        if self._client:
            for file in sorted(folder.iterdir()):
                self._client.log_artifact(self._run, str(file))
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
            self._client = None

    def _parameter(self, name: str, value: Any) -> None:
        self._client.log_param(self._run, allowed(name), str(value)[:MAX_PARAMETER])

    def _metric(self, name: str, value: float, at: int) -> None:
        # MLflow's stores do not take NaN and infinity alike.
        if self._client and math.isfinite(value):
            self._client.log_metric(self._run, allowed(name), float(value), step=at)


def allowed(name: str) -> str:
    """A name with only the characters that MLflow allows, at most 250 of them."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)[:250]
