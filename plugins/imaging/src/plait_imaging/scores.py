"""``evaluate`` methods: PSNR and SSIM, perceptual and no-reference metrics, with tables and panels."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs
import torch
from datasets import Dataset
from plait import Report, Run, hookimpl
from plait.errors import MissingDependency
from plait.fields import field, in_range
from plait.report import Panel

from plait_imaging import metrics
from plait_imaging.images import FLOAT_COLUMN, check_same_scenes, names, read_batches, read_floats, sizes, to_float
from plait_imaging.pictures import comparison

INPUT = "input"


@attrs.frozen
class _Comparison:
    """What is compared: candidates, their truth and, where known, the degraded input, all of the same scenes."""

    candidates: dict[str, Dataset]
    truth: tuple[Dataset, str] | None  # dataset and column
    degraded: Dataset | None

    @property
    def first(self) -> Dataset:
        return next(iter(self.candidates.values()))

    def rows(self, rounding: bool) -> Iterator[tuple[str, dict[str, torch.Tensor], torch.Tensor | None]]:
        """Name, method → image and truth of each scene; float ``[3, H, W]`` in [0, 1]."""
        readers = {method: _images(dataset, rounding) for method, dataset in self._scored().items()}
        truth = _column(*self.truth) if self.truth else None
        for name in names(self.first):
            yield name, {method: next(reader) for method, reader in readers.items()}, next(truth) if truth else None

    def _scored(self) -> dict[str, Dataset]:
        return {INPUT: self.degraded, **self.candidates} if self.degraded is not None else self.candidates


def _images(dataset: Dataset, rounding: bool) -> Iterator[torch.Tensor]:
    if rounding:
        yield from _column(dataset, "image")
    else:
        for _, batch in read_floats(dataset, batch_size=1):
            yield from batch


def _column(dataset: Dataset, column: str) -> Iterator[torch.Tensor]:
    for _, batch in read_batches(dataset, column, batch_size=1):
        yield from map(to_float, batch)


def _compare(data: Any, reference: Any, *, needs_truth: bool) -> _Comparison:
    candidates = dict(data) if isinstance(data, Mapping) else {"result": data}
    if not candidates:
        raise ValueError("data is an empty mapping; give at least one dataset to score")
    for label, dataset in {**candidates, **({} if reference is None else {"reference": reference})}.items():
        if not isinstance(dataset, Dataset) or "image" not in dataset.column_names:
            kind = type(dataset).__name__ if not isinstance(dataset, Dataset) else "dataset without column 'image'"
            raise ValueError(f"{label} is a {kind}; expected a dataset of images (name a split as step.split)")
        if len(dataset) == 0:
            raise ValueError(f"{label} has no images, so there is nothing to score")
    check_same_scenes(candidates)
    first, base = next(iter(candidates.items()))
    truth, degraded = None, None
    if reference is not None:
        column = "target" if "target" in reference.column_names else "image"
        truth = (reference, column)
        degraded = reference if column == "target" and INPUT not in candidates else None
    elif "target" in base.column_names:
        truth = (base, "target")
    if truth is None:
        if needs_truth:
            raise ValueError(f"{first} has no column 'target' and no reference is given; give from: {{reference: …}}")
        return _Comparison(candidates, None, None)
    if names(truth[0]) != names(base):
        raise ValueError(
            f"reference and {first} do not show the same images in the same order "
            f"({len(truth[0])} and {len(base)} of them); give both the same scenes"
        )
    for name, size, target_size in zip(names(base), sizes(base), sizes(*truth), strict=True):
        if size != target_size:
            raise ValueError(
                f"image {name} is {size[0]}×{size[1]} pixels in {first} and {target_size[0]}×{target_size[1]} "
                "in its target; score images of the target's size"
            )
    # What was downsampled has another size than its target, and no score.
    if degraded is not None and list(sizes(degraded)) != list(sizes(*truth)):
        degraded = None
    return _Comparison(candidates, truth, degraded)


@attrs.frozen(kw_only=True)
class _Scoring:
    """What all metrics of images have."""

    takes = {"data": "dataset", "reference": "dataset"}
    columns_needed = {"data": ("image",), "reference": ("image",)}

    listed: int = field(50, "images in the per-image tables; averages are over all", in_range(0))
    by: str | None = field(
        None, "column of the first dataset, e.g. weather: also the mean over the images of each of its values"
    )

    def groups(self, compared: _Comparison) -> dict[str, list[str]]:
        """Value of column ``by`` → names of its images; empty without ``by``.

        Raises:
            ValueError: there is no such column.
        """
        if self.by is None:
            return {}
        dataset = compared.first
        if self.by not in dataset.column_names:
            raise ValueError(f"by is {self.by!r}; the data has {', '.join(dataset.column_names)}")
        found: dict[str, list[str]] = {}
        for name, value in zip(names(dataset), dataset.with_format(None)[self.by], strict=True):
            found.setdefault(str(value), []).append(name)
        return found


@attrs.frozen(kw_only=True)
class PSNRSSIM(_Scoring):
    """PSNR and SSIM on RGB or Y, per image and on average, with panels of images, crops and error maps."""

    channels: Literal["rgb", "y"] = field(
        "rgb", "rgb: all three together; y: BT.601 luminance, as super-resolution and deraining papers do"
    )
    crop: int = field(0, "pixels cut off each side first; super-resolution: its factor", in_range(0))
    rounding: bool = field(
        True, "true: score the 8-bit images; false: the unrounded ones, clipped to [0, 1], where keep_float kept them"
    )
    panels: int = field(2, "images shown, spread evenly over the data set", in_range(0))
    panel_crop: int = field(56, "side of the zoomed crop in the panels, in pixels", in_range(8))

    @hookimpl
    def evaluate(self, data: Any, reference: Dataset | None, run: Run) -> Report:
        """One row per candidate: mean and standard deviation over images; per-image tables in the run's report.

        ``data`` is one restored dataset, or a mapping name → dataset. The truth is column ``target`` of
        ``reference`` (whose ``image`` is then scored as the input), else its ``image``, else column ``target``
        of ``data``.
        """
        compared = _compare(data, reference, needs_truth=True)
        assert compared.truth is not None
        for name, size in zip(names(compared.first), sizes(*compared.truth), strict=True):
            if min(size) - 2 * self.crop < metrics.SSIM_WINDOW:
                raise ValueError(
                    f"image {name} is {size[0]}×{size[1]} pixels, crop {self.crop} leaves less than the "
                    f"{metrics.SSIM_WINDOW} that SSIM needs; lower crop or leave the image out"
                )
        scores = _Scores(self.by, self.groups(compared))
        panels = list(self._score(compared, scores, run))
        what = (
            f"{'RGB' if self.channels == 'rgb' else 'Y'}, border of {self.crop} px cut"
            if self.crop
            else ("RGB" if self.channels == "rgb" else "Y (BT.601)")
        )
        notes = [
            f"PSNR in dB and SSIM on {what}; mean over {len(scores.images)} images, {self._precision(compared, run)}. "
            "std is the standard deviation over images."
        ]
        for metric, digits in (("PSNR", ".2f"), ("SSIM", ".4f")):
            run.add(scores.per_image(metric, digits, self.listed))
        return Report(
            rows=scores.means(),
            better={"PSNR": "higher", "SSIM": "higher"},
            formats={"PSNR": ".2f", "PSNR std": ".2f", "SSIM": ".4f", "SSIM std": ".4f"},
            panels=panels,
            notes=notes,
        )

    def _precision(self, compared: _Comparison, run: Run) -> str:
        """Which of the scored images are unrounded, in words."""
        if self.rounding:
            return "8-bit images"
        kept = [name for name, dataset in compared.candidates.items() if FLOAT_COLUMN in dataset.column_names]
        if not kept:
            run.warn(
                f"rounding is false, but {', '.join(compared.candidates)} kept no unrounded images, so that 8-bit ones are"
                " scored; set keep_float: true where they are made"
            )
        others = "the others " if kept else ""
        unrounded = f"those of {', '.join(kept)} unrounded and clipped to [0, 1], " if kept else ""
        return f"{unrounded}{others}8 bit" if len(kept) < len(compared.candidates) else unrounded.rstrip(", ")

    def _score(self, compared: _Comparison, scores: _Scores, run: Run) -> Iterator[Panel]:
        shown = _spread(len(compared.first), self.panels)
        rows = run.track(compared.rows(self.rounding), "scoring", total=len(compared.first))
        for number, (name, images, truth) in enumerate(rows):
            assert truth is not None
            for method, image in images.items():
                scores.add(name, method, self._pair(image, truth))
            if number in shown:
                captions = {
                    method: f"{method} · {scores.get(name, method, 'PSNR'):.2f} dB · {scores.get(name, method, 'SSIM'):.3f}"
                    for method in images
                }
                yield comparison(name, images, captions, truth, self.panel_crop)

    def _pair(self, image: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
        ours, theirs = (metrics.crop_border(x.double().clamp(0, 1) * 255, self.crop) for x in (image, truth))
        if self.channels == "y":
            ours, theirs = metrics.luminance(ours), metrics.luminance(theirs)
        return {"PSNR": metrics.psnr(ours, theirs), "SSIM": metrics.ssim(ours, theirs)}


@attrs.frozen(kw_only=True)
class Perceptual(_Scoring):
    """LPIPS and other learned or no-reference metrics through pyiqa (extra ``perceptual``)."""

    metrics: tuple[str, ...] = field(
        ("lpips",), "names in pyiqa, e.g. lpips, dists, niqe, musiq; no-reference ones need no target"
    )

    def __attrs_post_init__(self) -> None:
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics is {list(self.metrics)}; name at least one, and each once")
        if importlib.util.find_spec("pyiqa") is None:
            raise MissingDependency(
                'perceptual needs pyiqa, which is not installed; pip install "plait-imaging[perceptual]"'
            )
        import pyiqa

        known = pyiqa.list_models()
        for name in self.metrics:
            if name not in known:
                raise ValueError(f"metrics names {name!r}, which pyiqa does not know; pyiqa.list_models() gives all")

    @hookimpl
    def evaluate(self, data: Any, reference: Dataset | None, run: Run) -> Report:
        """One row per candidate with the mean and the standard deviation over images of each metric."""
        import pyiqa

        try:
            models = {name: pyiqa.create_metric(name, device=run.device) for name in self.metrics}
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"the weights of {', '.join(self.metrics)} could not be loaded: {reason}") from error
        with_truth = {name for name, model in models.items() if model.metric_mode == "FR"}
        compared = _compare(data, reference, needs_truth=bool(with_truth))
        scores = _Scores(self.by, self.groups(compared))
        for name, images, truth in run.track(compared.rows(rounding=True), "scoring", total=len(compared.first)):
            for method, image in images.items():
                scores.add(name, method, {key: self._value(models[key], image, truth) for key in models})
        for metric in models:
            run.add(scores.per_image(metric, ".4f", self.listed))
        better: dict[str, Literal["higher", "lower"]] = {
            name: "lower" if model.lower_better else "higher" for name, model in models.items()
        }
        formats = {column: ".4f" for name in models for column in (name, f"{name} std")}
        return Report(
            rows=scores.means(),
            better=better,
            formats=formats,
            notes=[f"Mean over {len(scores.images)} images, computed by pyiqa {pyiqa.__version__} on 8-bit RGB."],
        )

    def _value(self, model: Any, image: torch.Tensor, truth: torch.Tensor | None) -> float:
        with torch.inference_mode():
            if model.metric_mode == "FR":
                assert truth is not None
                return float(model(image[None], truth[None]))
            return float(model(image[None]))


class _Scores:
    """The score of every image under every method."""

    def __init__(self, by: str | None, groups: Mapping[str, list[str]]) -> None:
        self.images: dict[str, dict[str, dict[str, float]]] = {}
        self.by, self.groups = by, groups

    def add(self, image: str, method: str, values: dict[str, float]) -> None:
        self.images.setdefault(image, {})[method] = values

    def get(self, image: str, method: str, metric: str) -> float:
        return self.images[image][method][metric]

    def means(self) -> list[dict[str, Any]]:
        """One row a method: metric, and its standard deviation over images in ``metric std``; then those of the groups."""
        first = next(iter(self.images.values()))
        parts = {"": list(self.images)} if self.by is None else {"all": list(self.images), **self.groups}
        return [
            {**({self.by: part} if self.by else {}), "method": method, **self._of(method, columns, members)}
            for part, members in parts.items()
            for method, columns in first.items()
        ]

    def _of(self, method: str, columns: Mapping[str, float], members: list[str]) -> dict[str, float | None]:
        row: dict[str, float | None] = {}
        for metric in columns:
            values = [self.images[name][method][metric] for name in members]
            row[metric] = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
            row[f"{metric} std"] = spread
        return row

    def per_image(self, metric: str, digits: str, listed: int) -> Report:
        """One row an image, one column a method."""
        rows: list[dict[str, Any]] = [
            {"image": image, **{method: values[metric] for method, values in by_method.items()}}
            for image, by_method in list(self.images.items())[:listed]
        ]
        methods = list(next(iter(self.images.values())))
        notes = [f"The first {listed} of {len(self.images)} images."] if listed < len(self.images) else []
        return Report(title=f"{metric} per image", rows=rows, formats=dict.fromkeys(methods, digits), notes=notes)


def _spread(length: int, count: int) -> set[int]:
    """``count`` row numbers, evenly over ``length`` rows."""
    count = min(count, length)
    return {round((number + 0.5) * length / count - 0.5) for number in range(count)}
