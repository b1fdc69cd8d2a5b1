"""Several tasks at once: toy data, a small model with a head per task, its training, and accuracy per task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import torch
from plait import Report, hookimpl
from plait.fields import REQUIRED, field, in_range, path_or_name_field
from plait.report import Image, Panel, png
from plait_vision import evaluating, on_device

from plait_wemoe.evaluation import bytes_on_disk, routing_figure, scores, stored_numbers, task_routing
from plait_wemoe.folders import ModelFolder
from plait_wemoe.four_tasks import task_dataset
from plait_wemoe.heads import CosineHead, join_head
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.plugin.merging import DATA, WITH_HEADS, ReadsData
from plait_wemoe.pool import label_names
from plait_wemoe.supervised import LabelledTask, labelled_tasks, of_tasks, train_tasks
from plait_wemoe.tasks import MultiTaskModel
from plait_wemoe.texts import text_classifier
from plait_wemoe.vit import seeded_vit


@attrs.frozen(kw_only=True)
class FourTasks:
    """Small classification tasks from packaged digits and photographs, 16×16: train and test of one of four."""

    gives = "dataset"
    columns_made = ("image", "label")
    splits = ("train", "test")

    task: Literal["digits", "clutter", "rotated", "textures"] = field(
        REQUIRED, "which: digits, digits over photos, digits turned and renamed, textures"
    )

    @hookimpl
    def load_data(self, run: Any) -> Any:
        return task_dataset(self.task, run.seed)


@attrs.frozen(kw_only=True)
class MultiTaskViT:
    """A small fresh vision transformer with one cosine head per task of ``data``."""

    takes = {"data": DATA}
    gives = "multi-task-model"
    columns_needed = ("label",)

    image_size: int = field(16, "side, pixels", in_range(1))
    patch_size: int = field(4, "side of a patch, pixels", in_range(1))
    embed_dim: int = field(48, "hidden size", in_range(1))
    depth: int = field(4, "blocks", in_range(1))
    num_heads: int = field(4, "attention heads", in_range(1))
    logit_scale: float = field(10.0, "factor of the cosines", in_range(0, low_open=True))

    @hookimpl
    def load_model(self, data: Any, run: Any) -> MultiTaskModel:
        if not isinstance(data, Mapping):
            raise ValueError("multi-task-vit needs a mapping from task to labelled data")
        if self.image_size % self.patch_size or self.embed_dim % self.num_heads:
            raise ValueError("patch_size must divide image_size, and num_heads must divide embed_dim")
        sizes = {name: getattr(self, name) for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads")}
        encoder = seeded_vit(run.derived_seed("weights"), **sizes)
        draw = run.generator("heads")
        heads = {
            task: CosineHead(
                torch.randn(len(names), self.embed_dim, generator=draw) * self.embed_dim**-0.5, self.logit_scale
            )
            for task, names in label_names(data).items()
        }
        missing = [task for task in data if task not in heads]
        if missing:
            raise ValueError(f"the data of task {missing[0]!r} declares no class names; make its label a ClassLabel")
        return MultiTaskModel(encoder, heads).to(run.device)


@attrs.frozen(kw_only=True)
class TextClassifier:
    """A classifier of texts, of transformers; ``data``, one labelled data set, gives it a head for its classes."""

    takes = {"data": "dataset"}
    columns_needed = ("label",)

    source: str = path_or_name_field(REQUIRED, "local folder of save_pretrained, or owner/name on the Hugging Face hub")

    @hookimpl
    def load_model(self, data: Any | None, run: Any) -> torch.nn.Module:
        names = None if data is None else label_names({"": data}).get("")
        if data is not None and names is None:
            raise ValueError("data declares no class names; give one data set whose label is a ClassLabel")
        return text_classifier(self.source, names, run.derived_seed("head")).to(run.device)


@attrs.frozen(kw_only=True)
class FolderModel:
    """A model that stays in its folder of safetensors: merges that need the weights alone read it tensor by tensor."""

    gives = "model-folder"

    folder: Path = field(
        REQUIRED, "folder as save_pretrained writes it: safetensors (also in shards), configuration, tokenizer"
    )

    def input_files(self) -> list[Path]:
        """Where the files lie, for the result refers to them: a folder that moved with the pipeline is loaded again."""
        return (
            sorted(file for file in self.folder.absolute().iterdir() if file.is_file()) if self.folder.is_dir() else []
        )

    @hookimpl
    def load_model(self, run: Any) -> ModelFolder:
        return ModelFolder(self.folder)


@attrs.frozen(kw_only=True)
class MultiTaskTraining(ReadsData):
    """Supervised training on the tasks of ``data``: pre-training, one expert, or joint training."""

    takes = {"model": WITH_HEADS, "data": DATA}
    columns_needed = ("label",)
    renamed_fields: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}

    num_steps: int = field(250, "optimizer steps", in_range(0))
    batch_size: int = field(64, "images per task and step", in_range(1))
    learning_rate: float = field(1e-3, "of AdamW", in_range(0, low_open=True))
    weight_decay: float = field(0.01, "of AdamW", in_range(0))
    trainable: str | None = field(None, "regular expression for names of encoder parameters; default: all")
    train_heads: bool = field(False, "train the heads too")
    examples_per_class: int | None = field(None, "use the first ones of every class only; default: all", in_range(1))

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> torch.nn.Module:
        several, data = of_tasks(model, data)
        if several is not model and len(data) > 1:
            raise ValueError(
                f"a {type(model).__name__} has one head, and data are of the tasks {', '.join(data)}; give those of one task"
            )
        tasks = labelled_tasks(data, several, self.tokenizer, self.image_processor, run.warn, self.examples_per_class)
        with run.loop(self, "train", inputs=(model, data)) as loop:
            trained = train_tasks(
                several,
                tasks,
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                seed=run.derived_seed("batches"),
                device=run.device,
                trainable=self.trainable,
                train_heads=self.train_heads,
                checkpoint=loop,
                track=loop.track,
                log=loop.log,
            )
        # A classifier comes back as one, its own head in its place.
        return trained if several is model else join_head(trained.encoder, next(iter(trained.task_heads)))


@attrs.frozen(kw_only=True)
class MultiTaskAccuracy(ReadsData):
    """Accuracy of every task and their mean, size, and what the routers do."""

    takes = {"model": (*WITH_HEADS, "model-folder"), "data": DATA}
    columns_needed = ("label",)

    batch_size: int = field(128, "inputs at a time", in_range(1))
    batches: tuple[Literal["one-task", "mixed"], ...] = field(
        ("one-task",), "one-task: a batch holds one task's images in order; mixed: all, shuffled"
    )
    routing: tuple[Literal["sample", "batch", "fixed"], ...] = field(
        (), "routings to measure of models that route; default: the one each model is set to"
    )
    pictures: bool = field(True, "draw routing weights and first choices")

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        models = model if isinstance(model, Mapping) else {"": model}
        if not models:
            raise ValueError("there is no model to evaluate; give one, or a mapping from name to model")
        rows, panels, metrics = [], [], dict[str, None]()
        for name, one in models.items():
            one, labelled = of_tasks(one, data)
            tasks = labelled_tasks(labelled, one, self.tokenizer, self.image_processor, run.warn)
            metrics |= dict.fromkeys([*tasks, "mean"])
            one = on_device(one, run.device)
            size = {"parameters": stored_numbers(one), "bytes on disk": bytes_on_disk(one)}
            label = {"method": name} if name else {}
            with evaluating(one):
                mixed = partial(run.generator, "mixed")
                measured = scores(one, tasks, self.batch_size, self.batches, self.routing, mixed)
                rows += [{**label, **row, **size} for row in measured]
                if self.pictures and one.mixture is not None:
                    panels += self._panels(name, one.mixture, tasks)
        better: dict[str, Literal["higher", "lower"]] = {**dict.fromkeys(metrics, "higher"), "bytes on disk": "lower"}
        return Report(
            rows=rows,
            better=better,
            formats=dict.fromkeys(metrics, ".1f") | dict.fromkeys(("parameters", "bytes on disk"), ".0f"),
            panels=panels,
        )

    def _panels(self, name: str, mixture: WeightEnsemblingMoE, tasks: Mapping[str, LabelledTask]) -> list[Panel]:
        columns = {task: part.inputs for task, part in tasks.items()}
        means, shares = task_routing(mixture, columns, self.batch_size)
        experts = list(mixture.experts)
        drawn = [(means, "mean coefficient"), (shares, "share of samples with this first choice")]
        return [
            Panel(
                title=f"{name}: {text}, task × expert".removeprefix(": "),
                images=[[Image(caption=text, data=png(routing_figure(values, list(columns), experts, text)))]],
            )
            for values, text in drawn
        ]
