"""``extract-feature: content-shift``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
import numpy as np
import torch
from plait import Run, hookimpl
from plait.errors import ConfigurationError
from plait.fields import code_field, field, in_range, method_field, path_or_name_field
from plait.fingerprints import fingerprint
from plait.importing import named_object
from plait_diffusion import Backbone, FeatureSet, Origin, backbone_in, image_tensors, write_features
from plait_vision import DATA, decode, read_table
from torch import Tensor, nn

from plait_content_shift.baselines import mean
from plait_content_shift.content_shift import extract, seed_of_bucket
from plait_content_shift.control_images import ControlImages, canny, has_exact_canny, outlines
from plait_content_shift.ip_adapter import IMAGE_ENCODER, IpAdapter, read_image_encoder, read_ip_adapter
from plait_content_shift.lora_files import read_lora
from plait_content_shift.techniques import Adapter, Bucket, Control, Lora, leaked_labels

OWN = "own"
_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@attrs.frozen(kw_only=True)
class ContentShift:
    """Features of any diffusion extractor under one combination of generation techniques (Meng et al., NeurIPS 2024).

    Several combinations are several steps, whose features ``extract-feature: amalgamation`` fuses.
    """

    takes = {"model": "diffusion-model", "data": DATA}
    gives = "feature-set"

    extractor: Any = method_field("extract_feature", "what is wrapped: gdf, or a method with its prepare and capture")
    name: str = field("", "how tables of evaluations call this combination")
    prompt: str | None = field(
        None, "text for all images, such as the objects in them and their quality; the extractor's"
    )
    captions: Path | None = field(None, "table with columns name and caption: a text for every image")
    caption_column: str | None = field(None, "column of the data with a text for every image; of classes: their names")
    allow_label_prompts: bool = field(
        False, "take texts that name the image's class; a probe of them measures the text"
    )
    control: str | None = path_or_name_field(
        None, "ControlNet: a folder or a name on the hub, or own: the one of the step's model"
    )
    control_image: Literal["canny", "outlines"] = field(
        "canny", "what it is shown: Canny edges, or the gradient's magnitude (the kit's small one)"
    )
    canny_low: int = field(100, "lower threshold of Canny", in_range(0, 255))
    canny_high: int = field(200, "upper threshold of Canny", in_range(0, 255))
    control_scale: float = field(1.0, "of the ControlNet's residuals", in_range(0))
    adapter: str | None = path_or_name_field(
        None, "T2I-Adapter of a U-Net: a folder or a name on the hub; it is shown the control image"
    )
    adapter_scale: float = field(1.0, "of the T2I-Adapter's features", in_range(0))
    ip_adapter: Path | None = field(
        None, "IP-Adapter of a U-Net (.safetensors; plain, plus or full): an image is a prompt beside the text"
    )
    image_encoder: Path | None = field(
        None, "the IP-Adapter's image encoder, a folder; default: image_encoder beside its file"
    )
    image_prompt: Path | None = field(
        None, "image that the IP-Adapter is shown for all images; default: each image itself"
    )
    ip_adapter_scale: float = field(1.0, "of what the IP-Adapter adds", in_range(0))
    control_mode: int | None = field(None, "which of its kinds of image, for a union ControlNet of Flux", in_range(0))
    lora: Path | None = field(None, "LoRA file (.safetensors of peft, diffusers or kohya, LoCon too)")
    lora_scale: float = field(1.0, "of the LoRA", in_range(0))
    function: str | None = code_field(
        None, "your own technique, DenoiserCall → DenoiserCall: ./file.py:name or package.module:name"
    )
    denoise_from: int | None = field(
        None, "denoise from this nominal timestep down to the extractor's before features are read", in_range(1, 999)
    )
    guidance: float = field(1.0, "classifier-free guidance while denoising and drawing; 1: none", in_range(0))
    timestep: int | None = field(None, "nominal; the extractor's", in_range(1, 999))
    num_draws: int = field(1, "draws of noise whose features are averaged", in_range(1))
    noise: int = field(0, "which noise: combinations with equal numbers see equal noise", in_range(0))
    batch_size: int = field(4, "images at a time; a pass has as many times the draws", in_range(1))
    dtype: Literal["float16", "bfloat16", "float32"] = field("float16", "in which features are stored")

    def __attrs_post_init__(self) -> None:
        if self.canny_low >= self.canny_high:
            raise ConfigurationError(
                f"canny_low is {self.canny_low} and canny_high {self.canny_high}; the first must be lower"
            )
        texts = [name for name in ("prompt", "captions", "caption_column") if getattr(self, name) is not None]
        if len(texts) > 1:
            raise ConfigurationError(f"{' and '.join(texts)} are both given; give one text an image")
        for name in ("image_encoder", "image_prompt"):
            if getattr(self, name) is not None and self.ip_adapter is None:
                raise ConfigurationError(
                    f"{name} is for an IP-Adapter, and none is given; give ip_adapter, or leave it out"
                )
        for needed in ("prepare", "capture", "origin"):
            if not callable(getattr(self.extractor, needed, None)):
                raise ConfigurationError(
                    f"extractor is {type(self.extractor).__name__}, which has no {needed}; wrap gdf, or a method with prepare, capture"
                    " and origin as plait_diffusion.Extractor describes them"
                )

    @property
    def columns_needed(self) -> tuple[str, ...]:
        texts = "name" if self.captions is not None else self.caption_column
        return ("image",) if texts is None else ("image", texts)

    @property
    def label(self) -> str:
        """In tables: the name, else what the combination is made of."""
        parts = {
            "prompt": self.prompt is not None or self.caption_column is not None or self.captions is not None,
            "control": self.control is not None,
            "adapter": self.adapter is not None,
            "ip_adapter": self.ip_adapter is not None,
            "lora": self.lora is not None,
            "function": self.function is not None,
            f"from {self.denoise_from}": self.denoise_from is not None,
        }
        return self.name or " + ".join(part for part, used in parts.items() if used) or "plain"

    def nominal(self, backbone: Backbone) -> float:
        """The timestep that features are read at."""
        timestep = self.timestep if self.timestep is not None else self.extractor.origin(backbone, 0).timestep
        if timestep is None:
            raise ValueError("the extractor does not say its timestep; give timestep")
        return float(timestep)

    def seeds(self, run: Run) -> list[int]:
        """Of the noise of every draw."""
        base = int(fingerprint(run.seed, self.noise)[:15], 16)
        return [seed_of_bucket(base, draw) for draw in range(self.num_draws)]

    def bucket(self, backbone: Backbone, run: Run) -> Bucket:
        """The techniques, checked against the model.

        Raises:
            ValueError: one does not fit.
        """
        controls: tuple[Control, ...] = ()
        adapters: tuple[Adapter, ...] = ()
        shown = self._shown(run) if self.control is not None or self.adapter is not None else canny
        if self.control is not None:
            controls = (Control(_controlnet(self.control, backbone), self.control_scale, shown, self.control_mode),)
        if self.adapter is not None:
            adapters = (Adapter(_loaded("T2IAdapter", "adapter", self.adapter, backbone), self.adapter_scale, shown),)
        loras = (Lora(read_lora(self.lora, backbone.components), self.lora_scale),) if self.lora is not None else ()
        bucket = Bucket(
            prompt=self.prompt,
            controls=controls,
            adapters=adapters,
            ip_adapters=() if self.ip_adapter is None else (self._image_prompts(self.ip_adapter, backbone),),
            loras=loras,
            denoise_from=self.denoise_from,
            guidance=self.guidance,
            functions=(named_object(self.function, inspect.isfunction, "a function of a DenoiserCall"),)
            if self.function is not None
            else (),
        )
        bucket.check(backbone, self.nominal(backbone))
        if self.denoise_from is not None and not bucket.steers:
            run.warn(
                "denoise_from without ControlNet, T2I-Adapter, IP-Adapter or LoRA lets the image drift; add a technique that holds it"
            )
        return bucket

    def texts(self, rows: datasets.Dataset) -> list[str] | None:
        """A text for every row; None: one for all.

        Raises:
            ValueError: there is none for a row; one names the row's class and this was not allowed.
        """
        if self.captions is not None:
            texts = _of_table(rows, self.captions)
        elif self.caption_column is not None:
            texts = _of_column(rows, self.caption_column)
        else:
            return None
        labels = _class_names_of(rows)
        leaked = leaked_labels(texts, labels) if labels and not self.allow_label_prompts else []
        if leaked:
            raise ValueError(
                f"the text of row {leaked[0]} names the image's class {labels[leaked[0]]!r}, so that features would hold the label;"
                " write texts without it, or set allow_label_prompts where nothing is learned from them"
            )
        return texts

    @hookimpl
    def extract_feature(self, model: Any, data: Any, run: Run) -> FeatureSet | dict[str, FeatureSet]:
        """A feature set of a dataset, each activation the mean over draws of noise; of a mapping of datasets one each."""
        backbone = backbone_in(model).on(run.device)
        bucket = self.bucket(backbone, run)
        if isinstance(data, Mapping):
            return {
                name: self._extracted(backbone, bucket, part, run, f"{self.label}, {name}")
                for name, part in data.items()
            }
        return self._extracted(backbone, bucket, data, run, self.label)

    def _extracted(self, backbone: Backbone, bucket: Bucket, data: Any, run: Run, name: str) -> FeatureSet:
        if not isinstance(data, datasets.Dataset) or not len(data):
            raise ValueError("content-shift needs a dataset with images, or several by name; the data has none")
        texts, seeds, timestep = self.texts(data), self.seeds(run), self.nominal(backbone)
        origin = self._origin(backbone, seeds[0], timestep, texts)
        size = origin.more.get("image_size") or backbone.default_size

        def compute(start: int, rows: datasets.Dataset) -> dict[str, Tensor]:
            numbers = range(start, start + len(rows))
            prompts = texts[start : start + len(rows)] if texts is not None else None
            images = image_tensors(rows, size).to(backbone.device)
            draws = extract(
                self.extractor, backbone, images, bucket, rows=numbers, seeds=seeds, timestep=timestep, prompts=prompts
            )
            if texts is not None and "attn" in draws[0]:
                raise ValueError(
                    "the attention feature needs one prompt for all images, since tokens of different texts do not compare; leave"
                    " captions out or the attention maps"
                )
            return {name: mean([draw[name].float() for draw in draws]) for name in draws[0]}

        return write_features(
            run,
            self,
            data,
            origin,
            compute,
            batch_size=self.batch_size,
            dtype=_STORED[self.dtype],
            inputs=origin.digest,
            description=f"features, {name}",
        )

    def _image_prompts(self, file: Path, backbone: Backbone) -> IpAdapter:
        weights = read_ip_adapter(file)
        folder = self.image_encoder if self.image_encoder is not None else file.parent / IMAGE_ENCODER
        image = None
        if self.image_prompt is not None:
            pixels = np.asarray(decode(self.image_prompt))
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div_(255)
        return IpAdapter(weights, read_image_encoder(folder, backbone), self.ip_adapter_scale, image, str(file))

    def _shown(self, run: Run) -> ControlImages:
        if self.control_image == "outlines":
            return outlines
        if not has_exact_canny():
            run.warn(
                "OpenCV is not installed: Canny edges are scikit-image's, approximately those that ControlNets were trained with"
            )
        return functools.partial(canny, low=self.canny_low, high=self.canny_high)

    def _origin(self, backbone: Backbone, seed: int, timestep: float, texts: Sequence[str] | None) -> Origin:
        plain: Origin = self.extractor.origin(backbone, seed)
        own = (
            "control",
            "adapter",
            "adapter_scale",
            "ip_adapter_scale",
            "control_image",
            "canny_low",
            "canny_high",
            "control_scale",
            "control_mode",
            "lora_scale",
            "denoise_from",
            "guidance",
        )
        techniques: dict[str, Any] = {name: getattr(self, name) for name in own}
        techniques |= {
            name: None if file is None else file.name
            for name, file in (
                ("lora", self.lora),
                ("ip_adapter", self.ip_adapter),
                ("image_prompt", self.image_prompt),
            )
        }
        techniques["num_draws"] = self.num_draws
        prompt = None if texts is not None else plain.prompt if self.prompt is None else self.prompt
        if texts is not None:
            techniques["texts"] = self.caption_column or str(self.captions)
        return attrs.evolve(
            plain, timestep=timestep, prompt=prompt, seed=seed, more={**plain.more, "techniques": techniques}
        )


def _controlnet(source: str | None, backbone: Backbone) -> nn.Module:
    if source == OWN:
        model = backbone.components.get("controlnet")
        if model is None:
            raise ValueError(
                "control is own, but the model has no ControlNet; train one with optimize: diffusion, part: control"
            )
        return model
    kinds = {"SD3Transformer2DModel": "SD3ControlNetModel", "FluxTransformer2DModel": "FluxControlNetModel"}
    return _loaded(kinds.get(type(backbone.denoiser).__name__, "ControlNetModel"), "control", source, backbone)


def _loaded(kind: str, name: str, source: str | None, backbone: Backbone) -> nn.Module:
    """A model of diffusers beside the backbone, in its dtype and on its device.

    Raises:
        ValueError: there is none, or one of another kind, whose weights would be left at random.
    """
    import diffusers

    cls = getattr(diffusers, kind)
    try:
        found = cls.load_config(source).get("_class_name", kind)
        if found != kind:
            raise ValueError(
                f"{name} is {source!r}, a {found}; a {type(backbone.denoiser).__name__} needs a {kind}, so give one"
            )
        loaded: nn.Module = cls.from_pretrained(source, torch_dtype=backbone.dtype)
    except OSError as error:
        raise ValueError(
            f"{name} is {source!r}, which cannot be read as a {kind}: {str(error).splitlines()[0]}"
        ) from error
    return loaded.to(backbone.device).eval().requires_grad_(False)


def _of_table(rows: datasets.Dataset, path: Path) -> list[str]:
    if "name" not in rows.column_names:
        raise ValueError(f"captions is {path}, but the data has no column 'name' to find them by")
    captions: dict[str, str] = {}
    for line, cells in read_table(path):
        if not {"name", "caption"} <= set(cells):
            raise ValueError(f"{path} has the columns {', '.join(cells)}; name and caption are needed")
        if cells["name"] in captions:
            raise ValueError(f"{path}, line {line}: a second caption for {cells['name']!r}; keep one")
        captions[cells["name"]] = cells["caption"]
    missing = [name for name in rows["name"] if name not in captions]
    if missing:
        raise ValueError(f"{path} has no caption for {missing[0]!r} (of {len(missing)} images); add it")
    return [captions[name] for name in rows["name"]]


def _of_column(rows: datasets.Dataset, column: str) -> list[str]:
    if column not in rows.column_names:
        raise ValueError(f"caption_column is {column!r}; the data has the columns {', '.join(rows.column_names)}")
    if isinstance(rows.features[column], datasets.ClassLabel):
        names = _names_of_classes(rows, column)
        return [names[number] for number in rows.with_format(None)[column]]
    return [str(cell[0] if isinstance(cell, list) else cell) for cell in rows.with_format(None)[column]]


def _names_of_classes(rows: datasets.Dataset, column: str) -> list[str]:
    if column not in rows.column_names:
        raise ValueError(f"the data has no column {column!r} but {', '.join(rows.column_names)}")
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(f"column {column!r} holds {feature}; classes with names are needed")
    return list(feature.names)


def _class_names_of(rows: datasets.Dataset) -> list[str]:
    """The name of every row's class, where the data has classes with names."""
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            return [feature.names[number] for number in rows.with_format(None)[column]]
    return [str(name) for name in rows["category"]] if "category" in rows.column_names else []
