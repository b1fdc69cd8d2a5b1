"""Classifiers: ``load-model``, ``optimize: classifier-training``, ``evaluate: accuracy``, ``attack: fgsm`` and ``pgd-logits``."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import plait
from plait import Report, hookimpl
from plait.fields import REQUIRED, field, in_range
from plait.freezing import thawed
from plait.weights import read_weights

from plait_vision.kinds import ALL_TASKS, CLASSIFIERS, DATA, TEMPLATES, Loss, Norm

# Reading a pipeline needs the fields alone: whatever imports torch waits until something is computed.
if TYPE_CHECKING:
    from torch import Tensor

    from plait_vision.classifiers import AnyClassifier, Classifier
    from plait_vision.labelled import ImageRows


@attrs.frozen(kw_only=True)
class ClassifierFields:
    """How a model that is no classifier becomes one; fields of everything that takes a classifier."""

    class_names: tuple[str, ...] | None = field(
        None, "names of the classes in the order of the labels, for an image-text model; default: the data's"
    )
    templates: tuple[str, ...] = field(TEMPLATES, "texts with {} for the class, for an image-text model")
    task: str | None = field(None, "which task of a model of several; '*' takes the mean of their logits")

    def classifier(
        self, model: Any, device: Any, names: Sequence[str] | None, *, prepared: bool = False, all_tasks: bool = False
    ) -> AnyClassifier:
        """Of a model on a device, which is moved as a copy.

        Args:
            names: those of the data's classes.
            prepared: see :func:`plait_vision.as_classifier`.
            all_tasks: a model of several tasks, where none is named, answers with the mean of all.
        """
        from plait_vision.classifiers import as_classifier, is_image_text_model, is_multi_task_model, on_device

        model = on_device(model, device)
        names = self.class_names or (names if is_image_text_model(model) else None)
        task = ALL_TASKS if all_tasks and self.task is None and is_multi_task_model(model) else self.task
        return as_classifier(model, class_names=names, templates=self.templates, task=task, prepared=prepared)

    def classifier_and_labels(self, model: Any, data: Any, device: Any) -> tuple[AnyClassifier, Tensor]:
        """Of a model on a device and a data set: the classifier, and the labels by the numbers of its classes."""
        from plait_vision.labelled import labels_of

        classifier = self.classifier(model, device, labels_of(data)[1])
        return classifier, self.labels(data, classifier)

    def labels(self, data: Any, classifier: AnyClassifier) -> Tensor:
        """The data's labels by the numbers of the classifier's classes.

        Raises:
            ValueError: a class is none of the classifier's; the labels are texts, and nothing tells their numbers.
        """
        from plait_vision.labelled import has_texts, in_order_of, labels_of

        labels, names = labels_of(data)
        if not has_texts(data):
            return in_order_of(labels, None if self.class_names else names, classifier.class_names)
        known = classifier.class_names or self.class_names
        if known is None:
            raise ValueError(
                "the labels are texts, and the model has no names for its classes, so that their numbers are not known; set "
                "class_names, in the order of the model's classes"
            )
        return in_order_of(labels, names, known)


# ---------------------------------------------------------------------------------------------- models


@attrs.frozen(kw_only=True)
class _Network:
    """What networks of libraries have in common."""

    gives = "classifier"
    takes = {"data": DATA}

    architecture: str = field(REQUIRED, "name of the network, as the library calls it")
    weights: Path | None = field(
        None, "file or folder of weights; without, they are drawn; a head for other classes is fresh"
    )
    num_classes: int | None = field(None, "default: those of the data, else of the weights", in_range(2))
    size: int | None = field(
        None,
        "side that images are brought to; default: as the library's weights want it, of a fresh network as they are",
        in_range(1),
    )
    mean: tuple[float, float, float] | None = field(
        None, "of each channel in [0, 1]; default: the library's", in_range()
    )
    std: tuple[float, float, float] | None = field(
        None, "of each channel; default: the library's", in_range(0, low_open=True)
    )
    arguments: dict[str, Any] = field(attrs.Factory(dict), "more arguments of the network")

    def _preparation(self, found: dict[str, Any]) -> dict[str, Any]:
        given = {"mean": self.mean, "std": self.std}
        found = found | {name: list(value) for name, value in given.items() if value is not None}
        return found | ({"size": self.size, "shorter": None} if self.size is not None else {})

    def _built(self, builder: Any, data: Any, run: Any, **facts: Any) -> Classifier:
        import torch

        from plait_vision import networks

        state = None if self.weights is None else read_weights(self.weights)
        names, count = _classes(data)
        count = self.num_classes or count or (networks.outputs_of(state) if state else None)
        if count is None:
            raise ValueError("the number of classes is not known; give from: {data: …}, or num_classes")
        if names is not None and len(names) != count:
            names = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.derived_seed("weights"))
            classifier: Classifier = plait.build_module(
                builder,
                architecture=self.architecture,
                num_classes=count,
                arguments=self.arguments,
                class_names=None if names is None else list(names),
                **facts,
            )
        if self.weights is not None:
            state = read_weights(self.weights, expected=classifier.network.state_dict())
            fresh = networks.load_weights(classifier.network, state, self.weights, count)
            if fresh:
                run.warn(f"{', '.join(fresh)} are fresh: the weights are of another number of classes than {count}")
        return classifier.eval()


@attrs.frozen(kw_only=True)
class Torchvision(_Network):
    """A classifier of torchvision, fresh or with weights from a file; the data sets its classes."""

    stem: Literal["imagenet", "small"] = field(
        "imagenet", "first layers of a ResNet; small: 3 × 3 and no pooling, for images of 64 pixels and less"
    )

    @hookimpl
    def load_model(self, data: Any | None, run: Any) -> Classifier:
        """A ``plait_vision.Classifier``, in evaluation mode."""
        from plait_vision import networks

        networks.check_torchvision(self.architecture)
        found = networks.torchvision_preparation(self.architecture, self.weights is not None)
        return self._built(
            networks.torchvision_classifier, data, run, preparation=self._preparation(found), stem=self.stem
        )


@attrs.frozen(kw_only=True)
class Timm(_Network):
    """A classifier of timm, fresh or with weights from a file; the data sets its classes."""

    @hookimpl
    def load_model(self, data: Any | None, run: Any) -> Classifier:
        """A ``plait_vision.Classifier``, in evaluation mode."""
        from plait_vision import networks

        networks.check_timm(self.architecture)
        found = networks.timm_preparation(self.architecture, self.arguments, self.weights is not None)
        return self._built(networks.timm_classifier, data, run, preparation=self._preparation(found))


@attrs.frozen(kw_only=True)
class Transformers:
    """An image classifier of transformers from a local folder, with its image processor."""

    gives = "classifier"

    folder: Path = field(REQUIRED, "folder of save_pretrained: the model, and its image processor")

    @hookimpl
    def load_model(self, run: Any) -> Classifier:
        """A ``plait_vision.Classifier``, in evaluation mode."""
        from plait_vision import networks

        return networks.read_transformers(Path(self.folder))


def _classes(data: Any) -> tuple[tuple[str, ...] | None, int | None]:
    if data is None:
        return None, None
    from plait_vision.labelled import labels_of

    part = _train(data)
    if len(part) == 0:
        raise ValueError("the data has no rows; give at least one")
    labels, names = labels_of(part)
    return names, len(names) if names else int(labels.max()) + 1


def _train(data: Any) -> Any:
    if not isinstance(data, Mapping):
        part = data
    elif "train" in data:
        part = data["train"]
    else:
        raise ValueError(f"the data has no split train but {', '.join(map(str, data)) or 'none'}; pick one of them")
    if not hasattr(part, "column_names"):
        raise ValueError(f"the data is of type {type(part).__name__}; expected a dataset, or splits with train")
    return part


# ---------------------------------------------------------------------------------------------- training


@attrs.frozen(kw_only=True)
class ClassifierTraining(ClassifierFields):
    """Plain supervised training: cross-entropy on images and labels, all weights.

    Of an image-text model the embeddings of the classes' texts stay fixed, so that its image tower is trained.
    """

    takes = {"model": CLASSIFIERS, "data": DATA}
    columns_needed = ("image", "label")

    num_epochs: int = field(10, "passes over the data", in_range(1))
    batch_size: int = field(64, "images in a step", in_range(1))
    learning_rate: float = field(1e-3, "of the first step", in_range(0, low_open=True))
    optimizer: Literal["adamw", "sgd"] = field("adamw", "how a step is made of a gradient")
    momentum: float = field(0.9, "of sgd", in_range(0, 1, high_open=True))
    weight_decay: float = field(0.01, "decay of the weights: decoupled in adamw, L2 in sgd", in_range(0))
    schedule: Literal["cosine", "constant"] = field("cosine", "learning rate over the steps: to 0, or as it is")
    label_smoothing: float = field(0.0, "share of the target that all classes get", in_range(0, 1, high_open=True))
    flip: bool = field(False, "turn images left to right, every other one, drawn anew in each epoch")
    crop_padding: int = field(
        0, "shift images inside a black border of so many pixels, drawn anew in each epoch", in_range(0)
    )
    precision: Literal["fp32", "bf16"] = field("fp32", "arithmetic of the model; bf16: mixed precision")

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> Any:
        """A trained copy of the model, in evaluation mode; of a source with splits, trained on ``train``."""
        import torch

        from plait_vision.classifiers import evaluating, on_device
        from plait_vision.labelled import ImageRows, check_labels, class_names_of
        from plait_vision.supervised import Settings, train_classifier

        part = _train(data)
        images = ImageRows(part)
        trained = copy.deepcopy(on_device(model, run.device))
        trained = thawed(trained) if isinstance(trained, torch.nn.Module) else trained
        classifier = self.classifier(trained, run.device, class_names_of(part))
        labels = self.labels(part, classifier)
        with evaluating(classifier), torch.no_grad():
            outputs = classifier(images.stacked([0], classifier.preparation).to(run.device)).shape[1]
        check_labels(labels, outputs)
        classifier.train()
        settings = Settings(**{one.name: getattr(self, one.name) for one in dataclasses.fields(Settings)})
        with run.loop(self, "training", inputs=(model, part)) as loop:
            train_classifier(
                classifier,
                lambda rows: images.stacked(rows, classifier.preparation),
                labels,
                settings,
                seed=run.derived_seed("training"),
                device=run.device,
                checkpoint=loop,
                track=loop.track,
                log=loop.log,
            )
        return trained.eval()


# ---------------------------------------------------------------------------------------------- accuracy


@attrs.frozen(kw_only=True)
class Accuracy(ClassifierFields):
    """Share of images whose class is named, of one model or several, on one data set or several."""

    takes = {"model": CLASSIFIERS, "data": DATA}
    columns_needed = ("image", "label")

    top: tuple[int, ...] = field(
        (1,), "ranks k: the class is among the k likeliest; those of k ≥ classes are left out", in_range(1)
    )
    target: str | int | None = field(
        None, "class name or number; adds ASR: share of the rows of other classes that are called this"
    )
    per_class: bool = field(False, "add a table with the accuracy of each class")
    batch_size: int = field(256, "images at a time", in_range(1))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        """A row for each model and data set."""
        from plait_vision.labelled import ImageRows, class_names_of

        models = model if isinstance(model, Mapping) else {"": model}
        parts = data if isinstance(data, Mapping) else {"": data}
        if not models or not parts:
            raise ValueError(f"there is no {'data set' if models else 'model'} to measure; give at least one")
        rows, by_class = [], []
        for part_name, part in parts.items():
            images = ImageRows(part)
            names = class_names_of(part)
            for model_name, one in models.items():
                index = {
                    **({"model": str(model_name)} if isinstance(model, Mapping) else {}),
                    **({"data": str(part_name)} if isinstance(data, Mapping) else {}),
                }
                classifier = self.classifier(one, run.device, names)
                classes = self.labels(part, classifier)
                top, loss, count = self._answers(classifier, images, classes, run, " ".join(index.values()))
                if classifier.class_names is None and names is not None and len(names) != count:
                    which = " on ".join(index.values()) or "the model"
                    run.warn(
                        f"{which}: {count} classes without names, and the data has {len(names)} with names; they went together by "
                        "number, which is wrong where the data lacks a class: name all by class_names of its loader"
                    )
                known = classifier.class_names or self.class_names or names
                rows.append(index | self._row(top, loss, classes, known, part))
                by_class += [index | row for row in _by_class(top, classes, known)] if self.per_class else []
        if by_class:
            run.add(
                Report(
                    title="Accuracy by class", rows=by_class, better={"accuracy": "higher"}, formats={"accuracy": ".3f"}
                )
            )
        shares = {name for row in rows for name in row if name == "accuracy" or name.startswith("top-")}
        formats = dict.fromkeys([*shares, "loss", "ASR"], ".3f")
        better: dict[str, Any] = {**dict.fromkeys(shares, "higher"), "loss": "lower"}
        return Report(rows=rows, better=better, formats=formats)

    def _answers(
        self, classifier: AnyClassifier, images: ImageRows, labels: Tensor, run: Any, what: str
    ) -> tuple[Tensor, float, int]:
        """The likeliest classes, int64 [N, max(top)], the mean cross-entropy, and how many classes the model tells apart."""
        import torch
        import torch.nn.functional as F

        from plait_vision.classifiers import evaluating
        from plait_vision.labelled import as_pixels, check_labels

        found: list[Tensor] = []
        order: list[int] = []
        loss, count = 0.0, 0
        with evaluating(classifier), torch.no_grad():
            for batch in run.track(
                images.by_size(self.batch_size), f"accuracy {what}".strip(), -(-len(images) // self.batch_size)
            ):
                for rows, levels in batch:
                    logits = classifier(as_pixels(levels.to(run.device)))
                    count = logits.shape[1]
                    check_labels(labels[rows], count)
                    loss += F.cross_entropy(logits, labels[rows].to(logits.device), reduction="sum").item()
                    found.append(logits.topk(min(max(self.top), logits.shape[1]), dim=1).indices.cpu())
                    order += rows
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss{f' of {what}' if what else ''} is {loss}: the model's weights or outputs are not finite"
            )
        answers = torch.cat(found)
        return answers[torch.tensor(order).argsort()], loss / len(images), count

    def _row(
        self, top: Tensor, loss: float, labels: Tensor, names: Sequence[str] | None, data: Any
    ) -> dict[str, float | None]:
        from plait_vision.labelled import class_number, success_rate

        row: dict[str, float | None] = {}
        for rank in self.top:
            if rank <= top.shape[1]:
                hit = (top[:, :rank] == labels[:, None]).any(1).double().mean().item()
                row["accuracy" if rank == 1 else f"top-{rank}"] = hit
        row["loss"] = loss
        if self.target is not None:
            target = class_number(
                self.target, names, int(max(top.max(), labels.max())) + 1 if names is None else len(names)
            )
            row["ASR"] = success_rate(top[:, 0], labels, target, data)
        return row


def _by_class(top: Tensor, labels: Tensor, names: Sequence[str] | None) -> list[dict[str, Any]]:
    found = []
    for label in labels.unique().tolist():
        mine = labels == label
        share = (top[mine, 0] == label).double().mean().item()
        found.append({"class": str(names[label] if names else label), "images": int(mine.sum()), "accuracy": share})
    return found


# ---------------------------------------------------------------------------------------------- attacks


@attrs.frozen(kw_only=True)
class _LogitAttack(ClassifierFields):
    """What attacks on logits have in common."""

    takes = {"model": CLASSIFIERS, "data": DATA}

    epsilon: float = field(8 / 255, "largest change, in [0, 1] units", in_range(0, low_open=True))
    target: str | int | None = field(None, "class name or number to lead to; default: away from the label")
    batch_size: int = field(64, "images attacked at a time; changes memory, not results", in_range(1))

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return ("image", "label") if self.target is None else ("image",)

    @property
    def reach(self) -> Norm:
        """The norm of the budget."""
        return "linf"

    def __attrs_post_init__(self) -> None:
        if self.reach == "linf" and self.epsilon * 255 < 1 - 1e-6:
            raise ValueError(
                f"epsilon is {self.epsilon:.5f}, below one 8-bit level (1/255), so that no pixel could change"
            )

    def changed(
        self, classifier: AnyClassifier, images: Tensor, classes: Tensor, rows: Sequence[int], seed: int
    ) -> Tensor:
        """The attacked images, not rounded."""
        raise NotImplementedError

    @hookimpl
    def attack(self, model: Any, data: Any, run: Any) -> Any:
        """The data with ``image`` replaced, 8-bit PNG; the budget holds after rounding."""
        from plait_vision.attacking import over_splits

        return over_splits(data, lambda part, split: self._attacked(model, part, split, run))

    def _attacked(self, model: Any, data: Any, split: str, run: Any) -> Any:
        import torch

        from plait_vision.adversarial import to_eight_bits
        from plait_vision.attacking import with_attacked_images
        from plait_vision.classifiers import evaluating
        from plait_vision.labelled import ImageRows, as_pixels, check_labels, class_names_of, class_number

        ImageRows(data)  # refuses what is no data set of images
        names = class_names_of(data)
        classifier = self.classifier(model, run.device, names)
        if self.target is None:
            classes = self.labels(data, classifier)
        else:
            known = classifier.class_names or self.class_names or names
            classes = torch.full((len(data),), class_number(self.target, known, len(known) if known else 2**31))
        seed = run.derived_seed(f"start {split}".strip())

        def attack(rows: Sequence[int], levels: Tensor) -> Tensor:
            images, mine = as_pixels(levels.to(run.device)), classes[list(rows)].to(run.device)
            with torch.no_grad():
                check_labels(mine, classifier(images[:1]).shape[1])
            changed = self.changed(classifier, images, mine, rows, seed)
            return to_eight_bits(changed.detach().cpu(), levels, self.epsilon, self.reach)

        with evaluating(classifier):
            return with_attacked_images(
                data, attack, method=self, run=run, inputs=(model, data), batch_size=self.batch_size, split=split
            )


@attrs.frozen(kw_only=True)
class Fgsm(_LogitAttack):
    """FGSM on a classifier's logits: one step along the sign of the gradient (Goodfellow et al., ICLR 2015)."""

    def changed(
        self, classifier: AnyClassifier, images: Tensor, classes: Tensor, rows: Sequence[int], seed: int
    ) -> Tensor:
        from plait_vision.adversarial import fgsm

        return fgsm(classifier, images, classes, self.epsilon, targeted=self.target is not None)


@attrs.frozen(kw_only=True)
class PgdLogits(_LogitAttack):
    """PGD on a classifier's logits: projected steps along the gradient (Madry et al., ICLR 2018)."""

    norm: Norm = field("linf", "of the budget: largest change of a value, or length of the change of an image")
    num_steps: int = field(10, "gradient steps", in_range(1))
    step_size: float | None = field(
        None, "change in a step, in [0, 1] units; default: 2.5 · epsilon / num_steps", in_range(0, low_open=True)
    )
    random_start: bool = field(True, "start anywhere in the budget, not at the clean image")
    loss: Loss = field("cross-entropy", "what is increased: the loss, or the margin of the other classes")

    @property
    def reach(self) -> Norm:
        return self.norm

    def changed(
        self, classifier: AnyClassifier, images: Tensor, classes: Tensor, rows: Sequence[int], seed: int
    ) -> Tensor:
        from plait_vision.adversarial import pgd, start_noise

        return pgd(
            classifier,
            images,
            classes,
            self.epsilon,
            norm=self.norm,
            step_size=self.step_size or 2.5 * self.epsilon / self.num_steps,
            num_steps=self.num_steps,
            noise=start_noise(images, rows, self.epsilon, self.norm, seed) if self.random_start else None,
            loss=self.loss,
            targeted=self.target is not None,
        )
