"""``evaluate: learned-quality``: what the scorer of a model says about images, without their truth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import attrs
from datasets import Dataset
from plait import Report, Run, hookimpl
from plait.fields import field, in_range
from plait_imaging import check_same_scenes, read_batches, to_float

from plait_semiddm_weather.model import WeatherRestorer


@attrs.frozen(kw_only=True)
class LearnedQuality:
    """Scores by the scorer that a model was trained with; higher is better, only between versions of the same images."""

    takes = {"model": "restorer", "data": "dataset", "reference": "dataset"}
    columns_needed = {"data": ("image",), "reference": ("image",)}

    batch_size: int = field(16, "images read at a time", in_range(1))

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any | None, run: Run) -> Report:
        """One row a dataset of ``data``, and ``input`` and ``target`` of ``reference``; better: share above the input."""
        if not isinstance(model, WeatherRestorer) or model.scorer is None:
            raise ValueError("model has no scorer; give a model of semiddm-weather trained with scorer ranker or nss")
        datasets = dict(data) if isinstance(data, Mapping) else {"result": data}
        for name, dataset in {**datasets, **({} if reference is None else {"reference": reference})}.items():
            if not isinstance(dataset, Dataset) or "image" not in dataset.column_names or not len(dataset):
                raise ValueError(f"{name} holds no images; give a dataset with a column image")
        columns = {name: (dataset, "image") for name, dataset in datasets.items()}
        if reference is not None:
            check_same_scenes({"reference": reference, **datasets})
            columns = {"input": (reference, "image"), **columns}
            if "target" in reference.column_names:
                columns["target"] = (reference, "target")
        before = model.device
        network = model.to(run.device)
        try:
            scores = {
                name: self._scores(network, *column)
                for name, column in run.track(columns.items(), "scoring", total=len(columns))
            }
        finally:
            model.to(before)
        rows: list[dict[str, Any]] = []
        for name, values in scores.items():
            row: dict[str, Any] = {"method": name, "score": statistics.fmean(values)}
            row["score std"] = statistics.stdev(values) if len(values) > 1 else None
            if reference is not None:
                wins = [own > first for own, first in zip(values, scores["input"], strict=True)]
                row["above input"] = statistics.fmean(wins)
            rows.append(row)
        formats = {"score": ".3f", "score std": ".3f", "above input": ".2f"}
        note = f"Scorer: {model.scorer.kind}, fitted on the labelled images of the model. Selection by a score raises the score."
        return Report(rows=rows, better={"score": "higher", "above input": "higher"}, formats=formats, notes=[note])

    def _scores(self, model: WeatherRestorer, dataset: Dataset, column: str) -> list[float]:
        found: list[float] = []
        for _, images in read_batches(dataset, column, self.batch_size):
            for image in images:  # sizes may differ
                found += model.score(to_float(image)[None].to(model.device)).tolist()
        return found
