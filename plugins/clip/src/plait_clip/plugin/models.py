"""``load-model``: open-clip and transformers-clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from plait import hookimpl
from plait.fields import REQUIRED, field, in_range, path_or_name_field

import plait_clip as clip  # torch and open_clip take seconds to import: they wait until something is computed


@attrs.frozen(kw_only=True)
class OpenClip:
    """An open_clip model: fresh, pretrained, from a checkpoint or from a folder."""

    takes = {"data": "dataset"}
    gives = "image-text-model"

    architecture: str | None = path_or_name_field(
        None,
        "architecture name of open_clip, path of an open_clip JSON, hf-hub:owner/name, or tiny (8 px) or tiny-28 "
        "(28 px) for the toy data; default: tiny, or what the checkpoint says",
    )
    config: dict[str, Any] | None = field(
        None, "open_clip configuration (embed_dim, vision_cfg, text_cfg) instead of architecture"
    )
    pretrained: str | None = field(None, "tag of pretrained weights of open_clip")
    checkpoint: Path | None = field(
        None, "folder of a saved model, or weights file of open_clip, OpenAI or CleanCLIP (.safetensors, .pt)"
    )
    image_size: int | None = field(None, "side of the images instead of the architecture's, pixels", in_range(1))
    context_length: int = field(14, "tokens per text of tiny and tiny-28", in_range(3, 4096))

    def __attrs_post_init__(self) -> None:
        if self.architecture is not None and self.config is not None:
            raise ValueError("architecture and config are both given; give one")
        if self.pretrained is not None and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint are both given; give one")
        if self.pretrained is not None and (self.architecture is None or self.architecture.startswith("tiny")):
            raise ValueError(f"pretrained is {self.pretrained!r} without an architecture of open_clip; name one")

    @hookimpl
    def load_model(self, data: Any | None, run: Any) -> clip.ImageTextModel:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.derived_seed("weights"))
            model = self._model(data)
        return model.eval().to(run.device)

    def _model(self, data: Any | None) -> clip.ImageTextModel:
        name = self.architecture
        if self.checkpoint is not None and self.checkpoint.is_dir():
            return clip.architectures.from_folder(self.checkpoint)
        if self.checkpoint is not None and name is None and self.config is None:
            return clip.architectures.from_checkpoint(self.checkpoint)
        if self.config is not None:
            model = clip.architectures.from_config(clip.architectures.with_image_size(self.config, self.image_size))
        elif name is None or name in clip.architectures.TINY:
            words = _words(data) if data is not None else []
            model = clip.architectures.tiny(name or "tiny", words, context_length=self.context_length)
        elif name.startswith("hf-hub:"):
            model = clip.architectures.from_hub(name.removeprefix("hf-hub:"))
        elif self.pretrained is not None:
            model = clip.architectures.from_tag(name, self.pretrained, self.image_size)
        else:
            config = clip.architectures.with_image_size(
                clip.architectures.open_clip_architecture(name), self.image_size
            )
            model = clip.architectures.from_config(config)
        if self.checkpoint is not None:
            clip.architectures.load_weights(model, self.checkpoint)
        return model


@attrs.frozen(kw_only=True)
class TransformersClip:
    """A CLIP, SigLIP or BLIP image-text matching model of transformers."""

    gives = "image-text-model"

    source: str = path_or_name_field(REQUIRED, "local folder, or owner/name on the Hugging Face hub")
    revision: str | None = field(None, "branch, tag or commit of a hub model")

    @hookimpl
    def load_model(self, run: Any) -> clip.ImageTextModel:
        folder = Path(self.source).expanduser()
        if (folder / "plait.json").is_file():
            model = clip.ImageTextModel.from_pretrained(folder)
        else:
            model = clip.TransformersModel.from_source(self.source, self.revision)
        return model.eval().to(run.device)


def _words(data: Any) -> list[str]:
    """All captions and class names of a dataset or of the datasets of a mapping."""
    found: dict[str, None] = {}
    for part in data.values() if isinstance(data, dict) else [data]:
        column = clip.caption_column(part)
        for cell in part.with_format(None).select_columns(column)[:][column]:
            found.update(dict.fromkeys([cell] if isinstance(cell, str) else cell))
        found.update(dict.fromkeys(getattr(part.features.get("label"), "names", None) or []))
    return list(found)
