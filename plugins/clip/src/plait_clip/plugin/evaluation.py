"""``evaluate``: zero-shot, retrieval, linear-probe and supervised-fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import torch
from plait import Report, hookimpl
from plait.fields import field, in_range
from plait_vision import (
    CLASSIFIERS,
    DATA,
    AnyClassifier,
    ClassifierFields,
    as_classifier,
    as_features,
    check_labels,
    class_names_of,
    class_number,
    has_texts,
    in_order_of,
    is_image_text_model,
    labels_of,
    success_rate,
)
from plait_vision import on_device as anywhere_on_device

from plait_clip import probe, prompts
from plait_clip import retrieval as rt
from plait_clip import zero_shot as zs
from plait_clip.model import on_device
from plait_clip.pair_batches import PairLoader, image_batches, undecoded


def of_each(model: Any, data: Any, measure: Callable[[Any, Any], Report]) -> Report:
    """What ``measure(model, data)`` finds for a model or each of a mapping, on a data set or each of a mapping, as one report.

    Its rows say in the columns ``model`` and ``data`` which they are of, where there is a mapping.

    Raises:
        ValueError: a mapping is empty; what ``measure`` raises, with the names that it is about.
    """
    models = model if isinstance(model, Mapping) else {"": model}
    parts = data if isinstance(data, Mapping) else {"": data}
    if not models or not parts:
        raise ValueError(f"there is no {'data set' if models else 'model'} to measure; give at least one")
    found: list[tuple[dict[str, str], Report]] = []
    for part_name, part in parts.items():
        for model_name, one in models.items():
            named = {"model": str(model_name), "data": str(part_name)}
            which = {kind: name for kind, name in named.items() if name}
            try:
                found.append((which, measure(one, part)))
            except (ValueError, TypeError) as error:
                if not which:
                    raise
                about = ", ".join(f"{kind} {name}" for kind, name in which.items())
                raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{about}: {error}") from error
    return Report(
        rows=[{**which, **row} for which, report in found for row in report.rows],
        better={column: way for _, report in found for column, way in report.better.items()},
        formats={column: form for _, report in found for column, form in report.formats.items()},
        notes=list(dict.fromkeys(_about(which, note) for which, report in found for note in report.notes)),
        curves=[attrs.evolve(one, name=_about(which, one.name)) for which, report in found for one in report.curves],
        panels=[attrs.evolve(one, title=_about(which, one.title)) for which, report in found for one in report.panels],
    )


def _about(which: Mapping[str, str], text: str) -> str:
    return ": ".join([", ".join(which.values()), text] if which else [text])


def _rows(data: Any) -> Any:
    """The data; raises ValueError where they are no dataset with images."""
    undecoded(data)
    return data


TARGET = "class name or number; adds ASR: share of the images of other classes called this"


@attrs.frozen(kw_only=True)
class ZeroShotFields:
    """How images are classified by the texts of their classes."""

    templates: tuple[str, ...] | str = field(
        "photo",
        "prompts with {} for the class: openai-imagenet, openai-simple, photo, digits, fashion-mnist, or a list",
    )
    class_names: tuple[str, ...] | str | None = field(
        None, "names in the order of the labels: imagenet, or a list; default: the data's own"
    )
    top: tuple[int, ...] = field((1, 3, 5, 10), "ranks m of CA@m; those of m ≥ classes are left out", in_range(1))
    batch_size: int = field(256, "images at a time", in_range(1))
    precision: Literal["fp32", "bf16"] = field("fp32", "arithmetic of the towers")

    def labels_and_names(self, data: Any) -> tuple[torch.Tensor, list[str]]:
        """The labels of the data and the names of their classes.

        Raises:
            ValueError: there are fewer names than classes.
        """
        labels, own = labels_of(_rows(data))
        names = list(prompts.class_names(self.class_names if self.class_names is not None else own or ()))
        if self.class_names is not None and has_texts(data):
            labels = in_order_of(labels, own, names)
        if int(labels.max()) >= len(names):
            raise ValueError(
                f"label {int(labels.max())} occurs, but there are {len(names)} class names; give class_names"
            )
        return labels, names


@attrs.frozen(kw_only=True)
class ZeroShot(ZeroShotFields):
    """Zero-shot classification accuracy: CA@1, 3, 5 and 10 (Radford et al., ICML 2021).

    Beside image-text models it takes what they were made into: of a classifier, or a model of several tasks, its own logits count.
    """

    takes = {"model": CLASSIFIERS, "data": DATA}
    columns_needed = ("image", "label")

    target: str | int | None = field(None, TARGET)
    task: str | None = field(None, "which task of a model of several; '*' takes the mean of their logits")

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        """Of a model or of several by name, on a data set or on several."""
        return of_each(model, data, lambda one, part: self._measured(one, part, run))

    def _measured(self, model: Any, data: Any, run: Any) -> Report:
        classifier, labels, names = self._classifier(model, _rows(data), run.device)
        logits = zs.outputs(
            classifier, zs.image_tensors(model, data, batch_size=self.batch_size), run.device, self.precision
        )
        check_labels(labels, logits.shape[1])
        count = logits.shape[1]
        top = logits.topk(min(max(self.top), count), dim=1).indices.cpu()
        ranks = [m for m in self.top if m < count] or [1]
        row: dict[str, float | None] = {f"CA@{m}": zs.accuracy(top, labels, m) for m in ranks}
        report = _shares(row)
        if self.target is None:
            return report
        success = success_rate(top[:, 0], labels, class_number(self.target, names, count), data)
        return attrs.evolve(report, rows=[row | {"ASR": success}], formats={**report.formats, "ASR": ".3f"})

    def _classifier(self, model: Any, data: Any, device: Any) -> tuple[AnyClassifier, torch.Tensor, Any]:
        """A model as images → logits, the labels by the numbers of its classes, and their names."""
        if not is_image_text_model(model):
            given = None if self.class_names is None else prompts.class_names(self.class_names)
            fields = ClassifierFields(class_names=given, task=self.task)
            classifier = fields.classifier(model, device, None)
            return classifier, fields.labels(data, classifier), classifier.class_names or given or class_names_of(data)
        labels, names = self.labels_and_names(data)
        model = on_device(model, device)
        # Computed once for a text tower and kept: ImageNet's prompts are 80,000 texts.
        head = zs.zero_shot_head(model, names, prompts.templates(self.templates), precision=self.precision)
        return as_classifier(model, class_names=names, embeddings=head), labels, names


def _shares(row: Mapping[str, float | None]) -> Report:
    """A row of shares, higher is better."""
    return Report(rows=[dict(row)], better=dict.fromkeys(row, "higher"), formats=dict.fromkeys(row, ".3f"))


@attrs.frozen(kw_only=True)
class Retrieval:
    """Image-text retrieval: TR and IR R@1, 5 and 10; fusion models rerank (Karpathy & Fei-Fei, CVPR 2015)."""

    takes = {"model": "image-text-model", "data": DATA}
    columns_needed = ("image",)

    top: tuple[int, ...] = field((1, 5, 10), "ranks k of R@k", in_range(1))
    candidates: int = field(128, "nearest captions or images that a fusion model scores", in_range(1))
    batch_size: int = field(256, "images at a time", in_range(1))
    block: int = field(1024, "rows of the images × texts similarities held at a time", in_range(1))
    precision: Literal["fp32", "bf16"] = field("fp32", "arithmetic of the towers")

    def __attrs_post_init__(self) -> None:
        if self.candidates < max(self.top):
            raise ValueError(f"candidates is {self.candidates}, which is less than the rank {max(self.top)} in top")

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        """Of a model or of several by name, on a data set or on several."""
        return of_each(model, data, lambda one, part: self._measured(one, part, run))

    def _measured(self, model: Any, data: Any, run: Any) -> Report:
        text_ranks, image_ranks = rt.evaluate_retrieval(
            on_device(model, run.device),
            data,
            run.folder,
            candidates=self.candidates,
            batch_size=self.batch_size,
            block=self.block,
            precision=self.precision,
        )
        row = {f"TR R@{k}": rt.recall(text_ranks, k) for k in self.top}
        return _shares(row | {f"IR R@{k}": rt.recall(image_ranks, k) for k in self.top})


@attrs.frozen(kw_only=True)
class _ClassifierFields:
    """How a linear layer on image features is trained."""

    takes = {"model": "image-text-model", "data": DATA}
    columns_needed = ("image", "label")

    num_epochs: int = field(10, "passes over the training split", in_range(1))
    batch_size: int = field(128, "images per step", in_range(1))
    weight_decay: float = field(0.01, "AdamW decay of the weights", in_range(0))
    target: str | int | None = field(None, TARGET)
    precision: Literal["fp32", "bf16"] = field("fp32", "arithmetic of the image tower; bf16: mixed precision")


@attrs.frozen(kw_only=True)
class LinearProbe(_ClassifierFields):
    """Accuracy of a linear layer on frozen image features (protocol of CleanCLIP, Bansal et al., ICCV 2023).

    Features are what an image-text model encodes, what models of several tasks share, and what enters the last layer of a classifier.
    """

    takes = {"model": CLASSIFIERS, "data": DATA}

    learning_rate: float = field(0.005, "peak; cosine to 0 without warm-up", in_range(0, low_open=True))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        """Of a model or of several by name; ``data`` maps ``train`` and the splits to measure on."""
        splits = _Splits(data, self.target)
        return of_each(model, None, lambda one, _: self._measured(one, splits, run))

    def _measured(self, model: Any, splits: _Splits, run: Any) -> Report:
        model = anywhere_on_device(model, run.device)
        seen = as_features(model)

        def features(part: Any) -> torch.Tensor:
            own = model if is_image_text_model(model) else seen
            return zs.outputs(seen, zs.image_tensors(own, part), run.device, self.precision)

        layer = probe.linear_probe(
            features(splits.train),
            splits.train_labels,
            splits.num_classes,
            run.generator("probe"),
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        with torch.no_grad():
            return splits.report(lambda part: layer(features(part)).argmax(dim=1).cpu())


@attrs.frozen(kw_only=True)
class SupervisedFineTune(_ClassifierFields):
    """Accuracy of a linear head trained with the whole image tower (protocol of CleanCLIP, Bansal et al., ICCV 2023)."""

    learning_rate: float = field(1e-4, "peak; cosine to 0 after the warm-up", in_range(0, low_open=True))
    warmup_steps: int = field(500, "steps up to the peak rate", in_range(0))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        """Of a model or of several by name; ``data`` maps ``train`` and the splits to measure on."""
        splits = _Splits(data, self.target)
        return of_each(model, None, lambda one, _: self._measured(one, splits, run))

    def _measured(self, model: Any, splits: _Splits, run: Any) -> Report:
        model = on_device(model, run.device)
        if len(splits.train) < self.batch_size:
            raise ValueError(f"train has {len(splits.train)} rows, fewer than batch_size {self.batch_size}")
        pairs = PairLoader(splits.captioned_train(), model)
        steps = len(pairs) // self.batch_size
        with run.loop(self, "fine-tuning", inputs=(model, splits.train), total=self.num_epochs * steps) as loop:
            classifier = probe.fine_tune(
                model,
                lambda epoch, skip: pairs.batches(self.batch_size, run.generator(f"epoch {epoch}"), skip=skip),
                splits.train_labels,
                splits.num_classes,
                run.generator("head"),
                steps_per_epoch=steps,
                num_epochs=self.num_epochs,
                learning_rate=self.learning_rate,
                warmup_steps=self.warmup_steps,
                weight_decay=self.weight_decay,
                precision=self.precision,
                checkpoint=loop,
                seed=run.derived_seed("model"),
                on_step=loop.done,
            )

        def predict(part: Any) -> torch.Tensor:
            batches = image_batches(part, model.image_input, batch_size=256)
            with zs.evaluating(classifier, self.precision):
                logits = [classifier(images.to(model.device).float() / 255) for images in batches]
            return torch.cat(logits).argmax(dim=1).cpu()

        return splits.report(predict)


class _Splits:
    """``train`` and the splits to measure on, with labels checked against each other."""

    def __init__(self, data: Any, target: str | int | None) -> None:
        if not isinstance(data, Mapping) or "train" not in data or len(data) < 2:
            have = ", ".join(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"data has {have}; give train and at least one more, e.g. {{train: x.train, test: x.test}}"
            )
        self.train = data["train"]
        self.train_labels, names = labels_of(_rows(self.train))
        self.num_classes = len(names) if names else int(self.train_labels.max()) + 1
        self.names = list(names or map(str, range(self.num_classes)))
        if len(self.train_labels.unique()) < 2:
            raise ValueError("train has rows of one class only; a classifier needs at least two")
        self.measured = {name: part for name, part in data.items() if name != "train"}
        self.labels = {name: self._numbers(part, name, names) for name, part in self.measured.items()}
        self.target = None if target is None else class_number(target, self.names, self.num_classes)

    @staticmethod
    def _numbers(part: Any, name: str, names: tuple[str, ...] | None) -> torch.Tensor:
        """The labels of a split by the numbers that train has for the classes of the same names."""
        labels, own = labels_of(_rows(part))
        if has_texts(part) and names is None:
            raise ValueError(f"the labels of {name} are texts, and those of train numbers; give the same in both")
        return in_order_of(labels, own, names)

    def captioned_train(self) -> Any:
        """The training split with its class names as captions."""
        keep = self.train.select_columns(["image"])
        return keep.add_column("caption", [self.names[label] or "?" for label in self.train_labels.tolist()])

    def report(self, predict: Any) -> Report:
        rows = []
        for name, part in self.measured.items():
            predicted, labels = predict(part), self.labels[name]
            row: dict[str, Any] = {"split": name, "accuracy": float((predicted == labels).float().mean())}
            if self.target is not None:
                row["ASR"] = success_rate(predicted, labels, self.target, part)
            rows.append(row)
        return Report(rows=rows, better={"accuracy": "higher"}, formats={"accuracy": ".3f", "ASR": ".3f"})
