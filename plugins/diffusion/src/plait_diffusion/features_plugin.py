"""Evaluations of feature sets, whoever made them, and the layout of SPair-71k."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
import numpy as np
import torch
from plait import Report, Run, hookimpl
from plait.fields import field, in_range
from plait.report import Curve, Image, Panel, png
from plait_vision import write_rows
from torch import Tensor

from plait_diffusion import correspondence, probe, segmentation, spair
from plait_diffusion.feature_sets import FeatureSet, mask_tensors

_WHOLE = 256  # rows read at a time


@attrs.frozen(kw_only=True)
class SPair:
    """SPair-71k, or data laid out like it: images, and for each split pairs with marked points (Min et al., 2019).

    Splits: ``images`` (image, name, category), to extract features of, and ``trn``, ``val``, ``test`` as asked for.
    """

    folder: Path = field(attrs.NOTHING, "the unpacked SPair-71k, with JPEGImages, PairAnnotation and Layout")
    parts: tuple[Literal["trn", "val", "test"], ...] = field(("test",), "splits to read pairs of")
    layout: Literal["large", "small"] = field("large", "which list of pairs")
    pairs_per_category: int | None = field(None, "pairs of each category and split, drawn at random; all", in_range(1))

    gives = "dataset"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("images", *self.parts)

    @hookimpl
    def load_data(self, run: Run) -> dict[str, datasets.Dataset]:
        if not self.parts:
            raise ValueError("parts is empty; name trn, val or test")
        found: dict[str, list[dict[str, Any]]] = {}
        for part in run.track(self.parts, "pairs"):
            found[part] = spair.read_pairs(
                Path(self.folder),
                part,
                self.layout,
                pairs_per_category=self.pairs_per_category,
                generator=run.numpy_generator(part),
            )
        names = sorted({row[side] for rows in found.values() for row in rows for side in ("source", "target")})
        features = datasets.Features(
            {"image": datasets.Image(), "name": datasets.Value("string"), "category": datasets.Value("string")}
        )
        rows = run.track(spair.read_images(Path(self.folder), names), "images", len(names))
        images = write_rows(run.folder, rows, features)
        pairs = {part: datasets.Dataset.from_list(rows, features=spair.PAIR_FEATURES) for part, rows in found.items()}
        return {"images": images, **pairs}


@attrs.frozen(kw_only=True)
class FeatureProbe:
    """Accuracy of logistic regression on pooled features, from few labels.

    Of every set, features are averaged over positions and standardised; every set sees the same rows.
    """

    takes = {"data": "feature-set", "reference": "feature-set"}

    num_labels: int | None = field(200, "labelled rows that are drawn for every repeat; null: all", in_range(2))
    repeats: int = field(5, "draws", in_range(1))
    label_column: str = field("label", "column with the classes")
    inverse_strength: float = field(1.0, "scikit-learn's C", in_range(0, low_open=True))
    each_activation: bool = field(False, "a row for every activation alone too")
    baseline: str | dict[str, str] | None = field(
        None,
        "set that all are compared with, or set: the one that it is compared with; adds gains, and how often there is one",
    )

    @hookimpl
    def evaluate(self, data: Any, reference: Any | None, run: Run) -> Report:
        """
        Args:
            data: a feature set, or several by name; the test rows.
            reference: the training rows, under the same names; without it, rows of ``data`` that are not drawn are the test.
        """
        sets, training = _sets_and_training(data, reference)
        compared = {} if self.baseline is None else self.baseline
        if isinstance(compared, str):
            compared = dict.fromkeys(sets, compared)
        if unknown := [name for pair in compared.items() for name in pair if name not in sets]:
            raise ValueError(f"baseline names {unknown[0]!r}; the sets are {', '.join(sets)}")
        first = next(iter(sets))
        test_labels = _labels(sets[first], self.label_column)
        train_labels = _labels(training[first], self.label_column) if training else test_labels
        chosen = probe.draws(
            len(train_labels),
            len(test_labels) if training else None,
            self.num_labels,
            self.repeats,
            run.numpy_generator("labels"),
        )
        candidates = list(self._candidates(sets, training))
        scores: dict[tuple[str, str], list[float]] = {}
        for key, test, train in run.track(candidates, "probes", len(candidates)):
            test_rows = _pooled(test)
            train_rows = _pooled(train) if train is not None else test_rows
            scores[key] = [
                probe.probe(train_rows[a], train_labels[a], test_rows[b], test_labels[b], self.inverse_strength)
                for a, b in chosen
            ]
        rows = [self._row(key, scores, sets[key[0]], compared.get(key[0])) for key in scores]
        return Report(
            rows=rows,
            better={"accuracy, %": "higher", "gain, points": "higher"},
            formats={"accuracy, %": ".1f", "± over draws": ".1f", "gain, points": "+.1f", "gains, % of draws": ".0f"},
            curves=list(_over_timesteps(sets, {name: scores[name, ""] for name in sets})),
            notes=[
                f"{len(chosen[0][0])} labelled rows, drawn {len(chosen)} times; {len(chosen[0][1])} test rows;"
                f" {len(np.unique(train_labels))} classes"
            ],
        )

    def _candidates(
        self, sets: Mapping[str, FeatureSet], training: Mapping[str, FeatureSet]
    ) -> Iterator[tuple[tuple[str, str], FeatureSet, FeatureSet | None]]:
        for name, features in sets.items():
            train = training.get(name)
            yield (name, ""), features, train
            for activation in features.names if self.each_activation else ():
                yield (name, activation), features.only(activation), train.only(activation) if train else None

    def _row(
        self,
        key: tuple[str, str],
        scores: Mapping[tuple[str, str], Sequence[float]],
        features: FeatureSet,
        baseline: str | None,
    ) -> dict[str, Any]:
        name, activation = key
        values = scores[key]
        row: dict[str, Any] = {"features": name}
        if self.each_activation:
            row["activation"] = activation or "all"
        channels = sum(a.channels for a in features.activations if activation in ("", a.name))
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row |= {"channels": channels, "accuracy, %": 100 * statistics.fmean(values), "± over draws": 100 * spread}
        if baseline is not None:
            other = scores[baseline, ""]
            row["compared with"] = baseline
            row["gain, points"] = 100 * (statistics.fmean(values) - statistics.fmean(other))
            row["gains, % of draws"] = 100 * probe.wins(values, other) / len(values)
        return row


@attrs.frozen(kw_only=True)
class FeatureSegmentation:
    """What pixels are, from the features of few labelled images: ensemble of pixel MLPs, or dense ridge (ICLR 2022).

    Baranchuk et al., Label-Efficient Semantic Segmentation with Diffusion Models. The rows have a column with masks: images
    whose levels are class numbers, 255 where there is none. Scores are over all pixels of the test images.
    """

    takes = {"data": "feature-set", "reference": "feature-set"}

    classifier: Literal["mlp", "ridge"] = field("mlp", "ensemble of MLPs as published, or ridge regression")
    mask_column: str = field("mask", "column with the classes of pixels")
    num_train: int = field(30, "labelled images, drawn for every repeat from the training rows", in_range(1))
    repeats: int = field(5, "draws", in_range(1))
    side: int = field(256, "of the grid of pixels that is trained and scored on", in_range(2))
    num_classes: int | None = field(None, "default: the highest class number + 1", in_range(2))
    num_models: int = field(10, "networks of the ensemble", in_range(1))
    learning_rate: float = field(1e-3, "of Adam", in_range(0, low_open=True))
    batch_size: int = field(64, "pixels a step", in_range(2))
    num_epochs: int = field(100, "most passes over the labelled pixels", in_range(1))
    patience: int = field(50, "steps without a new lowest loss, from epoch 4 on, that end training", in_range(1))
    min_pixels: int = field(20, "of a class in a mask; fewer are ignored in training", in_range(0))
    ridge_strength: float = field(1e-2, "penalty a pixel, of standardised channels", in_range(0, low_open=True))
    num_panels: int = field(4, "test images in the report", in_range(0))

    @hookimpl
    def evaluate(self, data: Any, reference: Any | None, run: Run) -> Report:
        """
        Args:
            data: a feature set, or several by name; the test rows.
            reference: the training rows; without it, images of ``data`` that are not drawn are the test.
        """
        sets, training = _sets_and_training(data, reference)
        for name, features in sets.items():
            if flat := [a.name for a in features.activations if not a.height]:
                raise ValueError(f"activation {flat[0]!r} of {name!r} is pooled; segmentation needs maps")
        first = next(iter(sets))
        masks = mask_tensors(sets[first].rows, self.mask_column, self.side)
        train_masks = mask_tensors(training[first].rows, self.mask_column, self.side) if training else masks
        num_classes = self._classes(masks, train_masks)
        chosen = probe.draws(
            len(train_masks),
            len(masks) if training else None,
            self.num_train,
            self.repeats,
            run.numpy_generator("images"),
        )
        rows: list[dict[str, str | float]] = []
        panels: list[tuple[str, int, Tensor]] = []
        for name, features in sets.items():
            train = training.get(name, features)
            scores = []
            for number, (a, b) in enumerate(chosen):
                predict = self._fit(train.select(a.tolist()), train_masks[a], num_classes, run, f"{name} {number}")
                confusion = segmentation.Confusion.of(num_classes)
                for row in run.track(b.tolist(), f"{name}, draw {number + 1}: test images"):
                    predicted = self._predict(predict, features.select([row]), run.device)
                    confusion.add(masks[row], predicted)
                    if number == 0 and len(panels) < self.num_panels * len(sets) and row in b[: self.num_panels]:
                        panels.append((name, row, predicted))
                scores.append(confusion.scores())
            found = segmentation.mean_and_spread(scores)
            rows.append(
                {
                    "features": name,
                    "channels": sum(activation.channels for activation in features.activations),
                    **{f"{score}, %": 100 * mean for score, (mean, _) in found.items()},
                    "mIoU ± over draws": 100 * found["mIoU"][1],
                }
            )
        columns = [column for column in rows[0] if column.endswith("%")]
        return Report(
            rows=rows,
            better=dict.fromkeys(columns, "higher"),
            formats=dict.fromkeys([*columns, "mIoU ± over draws"], ".1f"),
            panels=[_mask_panel(sets[first].rows, masks, panels, num_classes)] if panels else [],
            notes=[
                f"{self.classifier}; {len(chosen[0][0])} labelled images, drawn {len(chosen)} times, {len(chosen[0][1])} test"
                f" images; {self.side}×{self.side} pixels an image, intersections and unions over all of them"
            ],
        )

    def _classes(self, *masks: Tensor) -> int:
        known = [mask[mask != segmentation.IGNORED] for mask in masks]
        highest = max((int(one.max()) for one in known if one.numel()), default=-1)
        if highest < 1:
            raise ValueError(f"column {self.mask_column!r} has {highest + 1} classes; masks of at least two are needed")
        if self.num_classes is not None and highest >= self.num_classes:
            raise ValueError(
                f"class {highest} occurs in column {self.mask_column!r}; num_classes is {self.num_classes}"
            )
        return self.num_classes or highest + 1

    def _fit(
        self, features: FeatureSet, masks: Tensor, num_classes: int, run: Run, name: str
    ) -> Callable[[Tensor], Tensor]:
        pixels = self._pixels(features, run.device)
        if self.classifier == "ridge":
            ridge = segmentation.Ridge(pixels.channels, num_classes, run.device)
            labels = masks.flatten().to(run.device)
            for start, rows in zip(range(0, len(pixels), 4096), pixels.batches(4096), strict=True):
                ridge.add(rows, labels[start : start + len(rows)])
            return ridge.solve(self.ridge_strength)
        settings = segmentation.Settings(
            num_models=self.num_models,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            num_epochs=self.num_epochs,
            patience=self.patience,
            min_pixels=self.min_pixels,
        )
        with run.loop(self, f"{name}: networks", inputs=(features, masks)) as loop:
            models = segmentation.train_pixel_classifiers(
                pixels,
                masks,
                num_classes,
                settings,
                lambda what: run.generator(f"{name} {what}"),
                device=run.device,
                checkpoint=loop,
                track=loop.track,
            )
        return functools.partial(segmentation.vote, models)

    def _pixels(self, features: FeatureSet, device: torch.device) -> segmentation.PixelRows:
        values = features.read()
        return segmentation.PixelRows([values[name].to(device) for name in features.names], self.side)

    def _predict(self, predict: Callable[[Tensor], Tensor], image: FeatureSet, device: torch.device) -> Tensor:
        pixels = self._pixels(image, device)
        return torch.cat([predict(rows) for rows in pixels.batches(16384)]).view(self.side, self.side)


@attrs.frozen(kw_only=True)
class FeatureCorrespondence:
    """PCK of matching by features, by image and by box (SPair-71k): nearest neighbour, or a trained 3×3 convolution."""

    takes = {"data": "feature-set", "reference": "dataset"}

    aggregation: Literal["nearest", "trained"] = field(
        "nearest", "match the features, or a trained 3×3 convolution of them"
    )
    alpha: float = field(0.1, "share of the larger side within which a point is right", in_range(0, low_open=True))
    grid: int = field(128, "side that every activation is brought to", in_range(1))
    match_side: int = field(512, "side of the grid of possible matches, upsampled from the first", in_range(1))
    out_channels: int | None = field(None, "of the convolution; as many as go in", in_range(1))
    learning_rate: float = field(5e-4, "of AdamW", in_range(0, low_open=True))
    weight_decay: float = field(0.01, "of AdamW", in_range(0))
    num_epochs: int = field(2, "draws of training pairs", in_range(1))
    pairs_per_epoch: int = field(5000, "pairs a draw, one a step", in_range(1))
    temperature: float = field(0.07, "of the softmax over cosines", in_range(0, low_open=True))
    num_panels: int = field(4, "pairs in the report", in_range(0))

    @hookimpl
    def evaluate(self, data: Any, reference: Any, run: Run) -> Report:
        """
        Args:
            data: a feature set of the images, or several by name; column ``name`` says which image a row is.
            reference: pairs, as ``load-data: spair`` has them; with ``trained`` a mapping with ``train`` and ``test``.
        """
        sets, _ = _sets_and_training(data, None)
        test, train = self._pairs(reference)
        rows, pictures = [], []
        for name, features in sets.items():
            images = _ImageFeatures(features.at(self.grid).concat(), [*test, *train], run.device)
            model = self._train(images, train, run, name) if train else None
            counts = torch.zeros(3)
            by_category: dict[str, list[int]] = {}
            found = correspondence.score(images.read, test, self.match_side, self.alpha, model)
            for number, (pair, predicted, by_image, by_box) in enumerate(run.track(found, f"{name}: pairs", len(test))):
                counts += torch.tensor([len(by_image), int(by_image.sum()), int(by_box.sum())])
                tally = by_category.setdefault(pair.category, [0, 0])
                tally[0] += len(by_box)
                tally[1] += int(by_box.sum())
                if number < self.num_panels:
                    pictures.append(
                        [Image(caption=f"{name}: {pair.category}", data=_draw(images, pair, predicted, by_image))]
                    )
            total, by_image_count, by_box_count = counts.tolist()
            rows.append(
                {
                    "features": name,
                    "matching": "nearest neighbour" if model is None else "trained 3×3 convolution",
                    "channels": images.channels,
                    "PCK img, %": 100 * by_image_count / total,
                    "PCK bbox, %": 100 * by_box_count / total,
                    "PCK bbox, mean of categories, %": 100
                    * statistics.fmean(right / points for points, right in by_category.values()),
                }
            )
        columns = [column for column in rows[0] if column.startswith("PCK")]
        return Report(
            rows=rows,
            better=dict.fromkeys(columns, "higher"),
            formats=dict.fromkeys(columns, ".2f"),
            panels=[Panel(title="matches (green: right by the image)", images=pictures)] if pictures else [],
            notes=[
                f"PCK@{self.alpha:g} over {sum(len(pair.source_points) for pair in test)} points of {len(test)} pairs;"
                f" features at {self.grid}×{self.grid}, matches on {self.match_side}×{self.match_side}"
            ],
        )

    def _pairs(self, reference: Any) -> tuple[list[correspondence.Pair], list[correspondence.Pair]]:
        parts = reference if isinstance(reference, Mapping) else {"test": reference}
        needed = {"test", "train"} if self.aggregation == "trained" else {"test"}
        if not needed <= set(parts) or not set(parts) <= {"test", "train"}:
            raise ValueError(
                f"reference has {', '.join(map(str, parts))}; matching by {self.aggregation} needs pairs as {', '.join(sorted(needed))}"
            )
        test = spair.to_pairs(parts["test"], "reference")
        return test, spair.to_pairs(parts["train"], "reference.train") if self.aggregation == "trained" else []

    def _train(self, images: _ImageFeatures, pairs: list[correspondence.Pair], run: Run, name: str) -> torch.nn.Module:
        with run.loop(self, f"{name}: training", inputs=images.features) as loop:
            return correspondence.train_aggregation(
                images.read,
                pairs,
                images.channels,
                run.generator(f"aggregation {name}"),
                out_channels=self.out_channels,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                num_epochs=self.num_epochs,
                pairs_per_epoch=self.pairs_per_epoch,
                temperature=self.temperature,
                device=run.device,
                checkpoint=loop,
                track=loop.track,
                log=loop.log,
            )


class _ImageFeatures:
    """Features of images by name, the last few kept."""

    def __init__(self, features: FeatureSet, pairs: Sequence[correspondence.Pair], device: torch.device) -> None:
        if "name" not in features.rows.column_names:
            raise ValueError("the feature set has no column 'name', by which pairs name their images")
        self._places = {name: row for row, name in enumerate(features.rows["name"])}
        for pair in pairs:
            for name in (pair.source, pair.target):
                if name not in self._places:
                    raise ValueError(
                        f"image {name!r}, which a pair names, has no features; extract them from spair's images"
                    )
        self.features, self._device = features, device
        self.channels = features.activations[0].channels
        self.read = functools.lru_cache(maxsize=4)(self._read)

    def _read(self, name: str) -> Tensor:
        values = self.features.read(rows=[self._places[name]])
        return values[self.features.names[0]][0].float().to(self._device)

    def picture(self, name: str) -> Any | None:
        rows = self.features.rows
        return rows[self._places[name]]["image"] if "image" in rows.column_names else None


def _sets_and_training(data: Any, reference: Any) -> tuple[dict[str, FeatureSet], dict[str, FeatureSet]]:
    """The sets by name, and those to train on under the same names (none without a reference)."""
    sets = _named(data, "data")
    training = _named(reference, "reference") if reference is not None else {}
    if training and set(training) != set(sets):
        raise ValueError(f"data has {', '.join(sets)} and reference {', '.join(training)}; give the same names in both")
    for what, several in (("data", sets), ("reference", training)):
        lengths = {name: len(features) for name, features in several.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"the sets of {what} have different numbers of rows ({lengths}); extract them from one dataset"
            )
    for name, train in training.items():
        if difference := sets[name].difference(train, seeds=False):
            raise ValueError(
                f"features {name!r} of data and of reference were extracted in different ways: {difference}"
            )
    return sets, training


def _named(data: Any, what: str) -> dict[str, FeatureSet]:
    sets = dict(data) if isinstance(data, Mapping) else {"features": data}
    for name, features in sets.items():
        if not isinstance(features, FeatureSet):
            raise ValueError(
                f"{what if features is data else f'{what}.{name}'} is a {type(features).__name__}; give a feature set, or several by"
                " name, from a step extract-feature"
            )
        if not len(features):
            raise ValueError(f"{what} has no rows")
    if not sets:
        raise ValueError(f"{what} has no feature sets")
    return sets


def _labels(features: FeatureSet, column: str) -> np.ndarray:
    if column not in features.rows.column_names:
        raise ValueError(f"the features' rows have no column {column!r} but {', '.join(features.rows.column_names)}")
    return np.asarray(features.rows.with_format(None)[column])


def _pooled(features: FeatureSet) -> np.ndarray:
    one = features.pooled().concat()
    return torch.cat([batch["concat"] for batch in one.batches(_WHOLE)]).numpy()


def _over_timesteps(sets: Mapping[str, FeatureSet], scores: Mapping[str, Sequence[float]]) -> Iterator[Curve]:
    """A curve for sets that are named alike up to their timestep: ``plain-50``, ``plain-200``."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, features in sets.items():
        timestep = features.origins[0].timestep
        if timestep is not None:
            kind = name.removesuffix(f"{timestep:g}").rstrip("-") or "features"
            groups.setdefault(kind, []).append((timestep, 100 * statistics.fmean(scores[name])))
    for kind, points in groups.items():
        if len({timestep for timestep, _ in points}) > 1:
            x, y = zip(*sorted(points), strict=True)
            yield Curve(name=kind, x=x, y=y, x_label="timestep", y_label="accuracy, %")


_COLOURS = np.random.default_rng(7).integers(40, 256, (256, 3), dtype=np.uint8)
_COLOURS[0], _COLOURS[segmentation.IGNORED] = 0, 128


def _mask_panel(
    rows: datasets.Dataset, masks: Tensor, found: Sequence[tuple[str, int, Tensor]], num_classes: int
) -> Panel:
    lines: dict[int, list[Image]] = {}
    for name, row, predicted in found:
        line = lines.setdefault(row, [Image(caption=f"truth, row {row}", data=png(_COLOURS[masks[row].numpy()]))])
        line.append(Image(caption=name, data=png(_COLOURS[predicted.numpy()])))
    return Panel(title=f"classes of pixels ({num_classes}; grey: none)", images=list(lines.values()))


def _draw(images: _ImageFeatures, pair: correspondence.Pair, predicted: Tensor, right: Tensor) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    figure = Figure(figsize=(6, 3))
    axes = figure.subplots(1, 2)
    for axis, name, size in zip(axes, (pair.source, pair.target), (pair.source_size, pair.target_size), strict=True):
        picture = images.picture(name)
        axis.imshow(np.full((*size, 3), 200, np.uint8) if picture is None else np.asarray(picture.convert("RGB")))
        axis.axis("off")
    for here, there, is_right in zip(pair.source_points.tolist(), predicted.tolist(), right.tolist(), strict=True):
        colour = "tab:green" if is_right else "tab:red"
        figure.add_artist(
            ConnectionPatch(here, there, "data", "data", axesA=axes[0], axesB=axes[1], color=colour, linewidth=0.8)
        )
    return png(figure)
