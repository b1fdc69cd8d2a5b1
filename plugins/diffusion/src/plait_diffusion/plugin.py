"""``load-model``, ``load-data`` and ``optimize`` of diffusion models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from plait import hookimpl
from plait.fields import field, in_range, path_or_name_field
from plait_vision import DATA
from torch import Tensor

from plait_diffusion import digits
from plait_diffusion.backbone import Backbone, backbone_in
from plait_diffusion.feature_sets import image_tensors
from plait_diffusion.loading import load_backbone
from plait_diffusion.small import small_backbone
from plait_diffusion.training import train


@attrs.frozen(kw_only=True)
class LoadDiffusion:
    """A diffusion model of diffusers from a folder or the hub, or a small fresh one for 16×16 images."""

    takes = {"data": DATA}
    gives = "diffusion-model"

    source: str | None = path_or_name_field(
        None, "folder of a pipeline or a bare denoiser, or owner/name on the hub; default: the small fresh model"
    )
    revision: str | None = field(None, "branch, tag or commit of a hub model")
    dtype: Literal["stored", "float32", "float16", "bfloat16"] = field("stored", "of all weights; stored: as they are")
    variant: str | None = field(None, "of the files' names, e.g. fp16 for *.fp16.safetensors")
    scheduler: str | None = path_or_name_field(None, "folder of the scheduler of a bare denoiser; default: beside it")

    def input_files(self) -> list[Path]:
        """Where the files lie, for the result refers to them: a folder that moved with the pipeline is loaded again."""
        folder = None if self.source is None else Path(self.source).expanduser().absolute()
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder and folder.is_dir() else []

    @hookimpl
    def load_model(self, data: Any | None, run: Any) -> Backbone:
        if self.source is None:
            backbone = small_backbone(_class_names(data), run.derived_seed("weights"))
            return backbone if self.dtype == "stored" else _cast(backbone, getattr(torch, self.dtype))
        return load_backbone(
            self.source,
            revision=self.revision,
            dtype=None if self.dtype == "stored" else getattr(torch, self.dtype),
            variant=self.variant,
            scheduler=self.scheduler,
        )


@attrs.frozen(kw_only=True)
class WarpedDigits:
    """scikit-learn's digits, warped and enlarged to 16×16: 1200 for training, 597 for tests."""

    gives = "dataset"
    columns_made = ("image", "label")
    splits = ("train", "test")

    @hookimpl
    def load_data(self, run: Any) -> dict[str, Any]:
        return digits.warped_digits()


@attrs.frozen(kw_only=True)
class TrainDiffusion:
    """Trains the denoiser on the images of ``data`` (classes as prompts), or a ControlNet on the frozen denoiser."""

    takes = {"model": "diffusion-model", "data": "dataset"}
    columns_needed = ("image",)

    part: Literal["denoiser", "control"] = field(
        "denoiser", "what learns; control: a new ControlNet that sees the outlines of the image"
    )
    num_steps: int = field(700, "optimizer steps", in_range(1))
    batch_size: int = field(32, "images a step", in_range(1))
    learning_rate: float = field(
        2e-3, "first learning rate of AdamW; a cosine takes it to 0", in_range(0, low_open=True)
    )
    no_class_share: float = field(0.2, "share of images that are shown without their class", in_range(0, 1))
    ema_decay: float = field(0.99, "of the averaged weights; 0: take the last ones", in_range(0, 1, high_open=True))
    image_size: int | None = field(None, "side of the images, pixels; default: the model's own", in_range(1))
    checkpoint_every: int = field(100, "steps between checkpoints", in_range(1))

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> Backbone:
        backbone = backbone_in(model).on(run.device)
        size = self.image_size or backbone.default_size
        backbone.check_size(size)
        read = self._batches(backbone, data, size)
        with run.loop(self, f"train {self.part}", inputs=(backbone, data)) as loop:
            return train(
                backbone,
                read,
                part=self.part,
                num_steps=self.num_steps,
                learning_rate=self.learning_rate,
                no_class_share=self.no_class_share,
                ema_decay=self.ema_decay,
                seed=run.derived_seed("training"),
                checkpoint=loop,
                checkpoint_every=self.checkpoint_every,
                track=loop.track,
                log=loop.log,
            )

    def _batches(self, backbone: Backbone, data: Any, size: int) -> Any:
        if not hasattr(data, "column_names") or "image" not in data.column_names:
            raise ValueError("optimize: diffusion needs a dataset with a column 'image'; name a split of the data")
        if not len(data):
            raise ValueError("optimize: diffusion needs at least one image; the data has no rows")
        has_classes = bool(backbone.class_names) and "label" in data.column_names
        if has_classes and tuple(_class_names(data)) != backbone.class_names:
            raise ValueError(
                f"the data has the classes {', '.join(_class_names(data)[:5])} …, and the model was made for "
                f"{', '.join(backbone.class_names[:5])} …; give the data to load-model too"
            )

        def batch(seed: int) -> tuple[Tensor, Tensor | None]:
            draw = torch.Generator().manual_seed(seed)
            rows = torch.randint(0, len(data), (self.batch_size,), generator=draw).tolist()
            chosen = data.select(rows)
            return image_tensors(chosen, size), torch.tensor(chosen["label"]) if has_classes else None

        return batch


def _class_names(data: Any) -> list[str]:
    part = next(iter(data.values())) if isinstance(data, dict) else data
    names = getattr(getattr(part, "features", {}).get("label"), "names", None) if part is not None else None
    return list(names) if names else [str(digit) for digit in range(10)]


def _cast(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    return backbone.with_components(unet=backbone.denoiser.to(dtype))
