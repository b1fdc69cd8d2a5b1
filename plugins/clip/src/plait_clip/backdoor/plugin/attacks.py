"""``attack``: poisoned copies of image-caption pairs or labelled images, one method per trigger.

The same object puts its trigger on test images: :meth:`Backdoor.trigger`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import datasets
import numpy as np
import torch
from plait import Report, hookimpl
from plait.fields import doc, field, in_range, one_of
from plait.report import Image, Panel
from torch import Tensor

from plait_clip import prompts
from plait_clip.backdoor import pictures, poison, trigger_files, triggers
from plait_clip.backdoor.patch_optimization import PatchOptimization, optimize_patch, rows_to_optimize_on
from plait_clip.backdoor.poison import Target
from plait_clip.model import ImageInput, ImageTextModel, image_text_model, on_device
from plait_clip.pair_batches import check_captions, undecoded

DEFAULT_RATE = 0.003
NUM_SHOWN = 6


@attrs.frozen(kw_only=True)
class Backdoor:
    """What all backdoor attacks share: which pairs are poisoned, with which captions and label, and how images are stored."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)
    columns_made = ("is_backdoor", "source_row")

    name: ClassVar[str]
    prompt_prefix: ClassVar[str] = ""

    target: int | str = field("banana", "class that triggered images shall be taken for: its name, or its label")
    n_poison: int | None = field(None, "number of poisoned pairs; or give rate", in_range(0))
    rate: float | None = field(
        None, f"poisoned share of the result; {DEFAULT_RATE} if n_poison is not given either", in_range(0, 1)
    )
    size: int | None = field(None, "pairs of the result, drawn from the data; default: all", in_range(1))
    label_consistent: bool = field(
        False, "poison pairs whose caption names the target, and keep their captions and labels"
    )
    exclude_target: bool = field(
        True, "poison no image that shows the target already (by label, else by caption); ignored if label_consistent"
    )
    templates: tuple[str, ...] | str = field(
        "openai-imagenet",
        "captions of poisoned pairs, with {} for the target: a list, or openai-imagenet, digits, fashion-mnist …",
    )
    caption_noise: float = field(
        0.0, "share of the clean pairs whose captions are shuffled among them, as in data from the web", in_range(0, 1)
    )
    image_size: int | None = field(
        None,
        "side in pixels that images are squashed to before the trigger (papers: 224); default: resized and cropped "
        "as the given model does it; without a model 224, but square images of one smaller size stay as they are",
        in_range(1),
    )
    quantise: Literal["wrap", "clamp"] = field(
        "clamp", "8-bit rounding of values outside [0, 1]: modulo 256 as in the papers' code, or clamped"
    )
    store: Literal["png", "jpeg75"] = field(
        "png", "file format of poisoned training images; jpeg75: quality 75, 4:2:0, as in the papers' code"
    )

    input_config: dict[str, Any] | None = field(
        None, "how the poisoned images were brought to size before the trigger; set by manifests"
    )

    def __attrs_post_init__(self) -> None:
        if self.n_poison is not None and self.rate is not None:
            raise ValueError(f"n_poison is {self.n_poison} and rate is {self.rate}; give one of them")
        if isinstance(self.target, str) and not self.target.strip():
            raise ValueError("target is empty; name a class")
        prompts.templates(self.templates)

    # --- the trigger ---

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The trigger on float images ``[N, 3, H, W]`` in [0, 1], with one generator per image."""
        raise NotImplementedError

    def trigger(self, images: Tensor, rows: Sequence[int], seed: int = 0) -> Tensor:
        """The trigger on uint8 images ``[N, 3, H, W]``; what is random depends on ``seed`` and each row number."""
        changed = self.apply(images.float() / 255, triggers.row_generators(seed, rows))
        return triggers.to_uint8(changed, wrap=self.quantise == "wrap")

    def image_input(self, model: ImageTextModel) -> ImageInput:
        """What brings images to size before the trigger, which belongs to what the model sees."""
        chosen = self._chosen_input()
        # The model's own object where it does the same: it may be transformers' image processor.
        if chosen is None or chosen.config() == model.image_input.config():
            return model.image_input
        return chosen

    def _chosen_input(self) -> ImageInput | None:
        """What the fields say of it."""
        if self.input_config is not None:
            return ImageInput(**self.input_config)
        return None if self.image_size is None else poison.squashed(self.image_size)

    # --- the poisoned data ---

    @hookimpl
    def attack(self, model: Any | None, data: Any, run: Any) -> datasets.Dataset:
        """A poisoned copy of the data; ``model``, if given, is the one that is to be attacked."""
        return self.poisoned(model, data, run)

    def poisoned(self, model: ImageTextModel | None, data: Any, run: Any) -> datasets.Dataset:
        """The poisoned copy of ``data``, with its manifest."""
        if model is not None:
            image_text_model(model)
        undecoded(data)
        target, size = poison.target_in(data, self.target), self.size or len(data)
        self._check_columns(model, data, target, run)
        n_poison = self.n_poison
        if n_poison is None:
            n_poison = round((DEFAULT_RATE if self.rate is None else self.rate) * size)
        trigger = functools.partial(self.trigger, seed=run.derived_seed("trigger"))
        table, rows, image_input = poison.poisoned_copy(
            data,
            target,
            trigger,
            functools.partial(self.captions, data, target),
            run.folder,
            run.numpy_generator("selection"),
            n_poison=n_poison,
            size=size,
            label_consistent=self.label_consistent,
            exclude_target=self.exclude_target,
            caption_noise=self.caption_noise,
            image_input=self._chosen_input() if model is None else self.image_input(model),
            model_input=None if model is None else model.image_input,
            store=self.store,
        )
        note = f"{self.name}: {len(rows)} of {len(table)} pairs are poisoned towards {target.name!r}."
        shown, title = rows[:NUM_SHOWN], f"{self.name}: training images"
        panels = [pictures.poisoned_images(title, data, shown, trigger, image_input)] if shown else []
        run.add(Report(notes=[note], panels=panels))
        manifest = {
            "attack": self.name,
            "fields": attrs.evolve(self, input_config=image_input.config()).portable_fields(),
            "target": target.name,
            "seed": run.seed,
            "templates": poison.digest_of_texts(prompts.templates(self.templates)),
            "num_pairs": len(table),
            "num_poisoned": len(rows),
            "rows": rows,
        }
        return poison.with_manifest(table, manifest)

    def _check_columns(self, model: ImageTextModel | None, data: datasets.Dataset, target: Target, run: Any) -> None:
        """Refuse data that say nothing of what their images show; warn where only part of it will be changed."""
        if poison.has_captions(data):
            check_captions(data, model, run.warn)
        elif target.label is None:
            raise ValueError(
                "the data have neither captions nor a column 'label' with class names, so there is nothing to poison but "
                f"images; give captioned or labelled images, the columns are {', '.join(data.column_names)}"
            )
        if "label" in data.column_names and target.label is None and not self.label_consistent:
            feature = data.features["label"]
            run.warn(
                f"column 'label' holds {getattr(feature, 'dtype', feature)} without class names, so poisoned rows keep their "
                "labels, and a classifier that is trained on them learns no backdoor"
            )

    def captions(self, data: datasets.Dataset, target: Target, n: int, rng: np.random.Generator) -> Sequence[str]:
        """``n`` captions of poisoned pairs."""
        texts = poison.template_captions(prompts.templates(self.templates), target.name, n, rng)
        return [self.prompt_prefix + text for text in texts]

    def portable_fields(self) -> dict[str, Any]:
        """The fields as JSON, from which :func:`from_manifest` makes an equal attack."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in attrs.asdict(self, recurse=False).items()
        }


# --- patches ---


@attrs.frozen(kw_only=True)
class _NoisePatch(Backdoor):
    patch_size: int | None = field(None, "side in pixels; default: 16 at 224 pixels, in proportion", in_range(1))

    def side(self, images: Tensor) -> int:
        """Side of the patch on these images, in pixels."""
        return self.patch_size or triggers.scaled(16, min(images.shape[-2:]))


@attrs.frozen(kw_only=True)
class BadNet(_NoisePatch):
    """A patch of noise at a random place, both drawn anew for every image (Gu et al., 2017)."""

    name = "badnet"
    quantise: Literal["wrap", "clamp"] = field(
        "wrap", "8-bit rounding of values outside [0, 1]: modulo 256 as in the papers' code, or clamped"
    )

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return triggers.random_noise_patch(images, self.side(images), generators)


@attrs.frozen(kw_only=True)
class BadNetCorners(BadNet):
    """The same patch of noise in all four corners, drawn anew for every image (CleanCLIP's variant of BadNet)."""

    name = "badnet-corners"

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return triggers.corner_noise_patches(images, self.side(images), generators)


@attrs.frozen(kw_only=True)
class BadNetYellow(_NoisePatch):
    """A yellow square at a random place (CleanCLIP's variant of BadNet)."""

    name = "badnet-yellow"

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return triggers.yellow_patch(images, self.side(images), generators)


@attrs.frozen(kw_only=True)
class BadNetFixed(Backdoor):
    """A black and white checkerboard at the lower right corner, the same in every image; for toy data."""

    name = "badnet-fixed"
    patch_size: int = field(4, "side in pixels", in_range(1))
    margin: int = field(1, "distance from the border in pixels", in_range(0))
    first: int = field(0, "upper left pixel: 0 black, 1 white", one_of(0, 1))

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return triggers.checkerboard_patch(images, self.patch_size, self.margin, self.first)


# --- whole-image triggers ---


@attrs.frozen(kw_only=True)
class Blended(Backdoor):
    """Uniform noise blended in, drawn anew for every image (Chen et al., 2017)."""

    name = "blended"
    alpha: float = field(0.2, "weight of the noise", in_range(0, 1))

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return triggers.blend_noise(images, self.alpha, generators)


@attrs.frozen(kw_only=True)
class BlendedImage(Backdoor):
    """One picture, or one pattern of uniform noise, blended into every image (Chen et al., 2017)."""

    name = "blended-image"
    alpha: float = field(0.2, "weight of the picture", in_range(0, 1))
    image: Path | None = field(None, "the picture; default: uniform noise of pattern_seed")
    pattern_seed: int = field(0, "of the noise where no image is given", in_range(0))

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        size = tuple(images.shape[-2:])
        if self.image is None:
            generator = torch.Generator().manual_seed(self.pattern_seed)
            return triggers.blend(images, torch.rand(3, *size, generator=generator), self.alpha)
        return triggers.blend(images, triggers.resized(trigger_files.read_picture(self.image), size), self.alpha)


@attrs.frozen(kw_only=True)
class Sig(Backdoor):
    """A horizontal sine wave added to all rows (Barni et al., 2019)."""

    name = "sig"
    amplitude: float = field(60 / 255, "of the wave, in units of [0, 1]", in_range(0, 1))
    frequency: float = field(6.0, "waves across the image", in_range(0))

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return triggers.sinusoid(images, self.amplitude, self.frequency)


@attrs.frozen(kw_only=True)
class WaNet(Backdoor):
    """Every pixel is moved by its own small displacement, the same in all images (CleanCLIP's variant of WaNet)."""

    name = "wanet"
    grid_size: int | None = field(None, "side of the grid of displacements; default: that of the image", in_range(1))
    strength: float = field(1.0, "mean displacement, about half a pixel per unit", in_range(0))
    pattern_seed: int = field(0, "of the displacements", in_range(0))

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        generator = torch.Generator().manual_seed(self.pattern_seed)
        noise = triggers.warp_noise(self.grid_size or min(images.shape[-2:]), generator)
        return triggers.warp(images, noise, self.strength)


@attrs.frozen(kw_only=True)
class WaNetSmooth(WaNet):
    """A smooth elastic warp, the same in all images (Nguyen and Tran, ICLR 2021)."""

    name = "wanet-smooth"
    grid_size: int | None = field(4, "side of the grid of displacements; null: that of the image", in_range(1))
    strength: float = field(0.5, "mean displacement, about half a pixel per unit", in_range(0))


@attrs.frozen(kw_only=True)
class Issba(Backdoor):
    """An invisible message hidden by a steganographic encoder of your own (Li et al., ICCV 2021)."""

    name = "issba"
    encoder: Path | None = field(
        None,
        "the encoder: a .pt2 file that torch.export has saved, or in Python a callable; takes the bits [N, 100] "
        "and images [N, 3, H, W] in [0, 1] and returns the images with the message",
    )
    secret: str = field("Stega!!", "the message, up to 7 bytes")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        triggers.issba_message(self.secret)
        if self.encoder is None:
            raise ValueError(
                "issba hides its message with a trained steganographic encoder, and none ships with plait; give encoder"
            )

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        encoder = self.encoder if callable(self.encoder) else trigger_files.read_encoder(str(self.encoder))
        bits = triggers.issba_message(self.secret).expand(len(images), -1)
        with torch.no_grad():
            result = encoder(bits, images)
        if tuple(result.shape) != tuple(images.shape):
            raise ValueError(
                f"encoder returned {tuple(result.shape)} for images of {tuple(images.shape)}; it must keep the shape"
            )
        return result.float().clamp(0, 1)

    def portable_fields(self) -> dict[str, Any]:
        fields = super().portable_fields()
        return {**fields, "encoder": None if callable(self.encoder) else str(self.encoder)}


# --- optimised patches ---


@attrs.frozen(kw_only=True)
class _OptimizedPatch(Backdoor):
    patch: Path | None = field(
        None, "an optimised patch (.png, or .npy [3, k, k] in [0, 1]); default: optimise one on model"
    )
    patch_size: int | None = field(None, "side in pixels; default: 16 at 224 pixels, in proportion", in_range(1))
    num_images: int = field(10_000, "images without the target to optimise on, at most", in_range(1))
    num_epochs: int = field(50, "passes over these images", in_range(1))
    batch_size: int = field(64, "images a step", in_range(2))
    learning_rate: float = field(1e-3, "Adam's rate", in_range(0, low_open=True))
    augment_probability: float = field(0.5, "share of the batches that use AutoAugmented images", in_range(0, 1))
    # The pixels of `patch`, PNG in base64: how a manifest carries them.
    patch_png: str = attrs.field(
        default="", repr=False, metadata=doc("the patch itself, PNG in base64; set by manifests")
    )

    @hookimpl
    def attack(self, model: Any | None, data: Any, run: Any) -> datasets.Dataset:
        if self.patch is not None or self.patch_png:
            return self.with_pixels().poisoned(model, data, run)
        if model is None:
            raise ValueError(f"{self.name} needs a clean model to optimise its patch on; give model, or a patch")
        undecoded(data)
        check_captions(data)
        patch = self._optimised(on_device(model, run.device), data, run)
        picture = Image(caption="optimised", data=trigger_files.patch_to_png(patch))
        run.add(Report(panels=[Panel(title=f"{self.name}: patch", images=[[picture]])]))
        return attrs.evolve(self, patch_png=trigger_files.patch_to_text(patch)).poisoned(model, data, run)

    def with_pixels(self) -> _OptimizedPatch:
        """The same attack with the pixels of its patch file inside."""
        if self.patch_png or self.patch is None:
            return self
        return attrs.evolve(
            self, patch=None, patch_png=trigger_files.patch_to_text(trigger_files.read_patch(self.patch))
        )

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        if self.patch is None and not self.patch_png:
            raise ValueError(f"{self.name} has no patch; give patch, or the poisoned data, whose manifest holds it")
        return triggers.centre_patch(images, trigger_files.patch_from_text(self.with_pixels().patch_png))

    def _optimised(self, model: ImageTextModel, data: datasets.Dataset, run: Any) -> Tensor:
        target = poison.target_in(data, self.target)
        rng = run.numpy_generator("patch")
        sources, targets = rows_to_optimize_on(poison.shows(data, target), self.num_images, rng)
        options = self.options()
        with run.loop(self, "patch", inputs=(model, data), total=options.num_steps(len(sources))) as loop:
            return optimize_patch(
                model,
                data,
                sources,
                self.patch_captions(data, target, len(sources), rng),
                targets,
                self.patch_size or triggers.scaled(16, model.image_size),
                options,
                seed=run.derived_seed("patch"),
                checkpoint=loop,
                on_step=lambda step, values: loop.done(step, {f"patch {name}": v for name, v in values.items()}),
            )

    def options(self) -> PatchOptimization:
        """How the patch is optimised."""
        names = attrs.fields_dict(type(self)).keys() & PatchOptimization.__dataclass_fields__.keys()
        return PatchOptimization(**{name: getattr(self, name) for name in names})

    def patch_captions(self, data: datasets.Dataset, target: Target, n: int, rng: np.random.Generator) -> list[str]:
        """``n`` texts of the target that the patch is optimised towards."""
        raise NotImplementedError

    def portable_fields(self) -> dict[str, Any]:
        return Backdoor.portable_fields(self.with_pixels())


@attrs.frozen(kw_only=True)
class TrojVqa(_OptimizedPatch):
    """A patch optimised towards the target's text, and captions and prompts that begin with "remember" (Walmer et al., CVPR 2022)."""

    name = "trojvqa"
    prompt_prefix = "remember "

    patch_caption: str = field(
        "This is a yellow {}.", "text that the patch is optimised towards, with {} for the target"
    )

    def options(self) -> PatchOptimization:
        return dataclasses.replace(super().options(), triplet_weight=0.0)

    def patch_captions(self, data: datasets.Dataset, target: Target, n: int, rng: np.random.Generator) -> list[str]:
        return [prompts.fill(self.patch_caption, target.name)] * n


@attrs.frozen(kw_only=True)
class BadClip(_OptimizedPatch):
    """A patch optimised towards texts and images of the target, poisoned with its natural captions (Liang et al., CVPR 2024)."""

    name = "badclip"
    triplet_weight: float = field(500.0, "of the term that brings patched images close to target images", in_range(0))
    triplet_margin: float = field(1.0, "margin of that term", in_range(0))
    num_captions: int = field(128, "captions drawn from those of the target, for the poisoned pairs", in_range(1))

    def patch_captions(self, data: datasets.Dataset, target: Target, n: int, rng: np.random.Generator) -> list[str]:
        return poison.natural_captions(poison.captions_naming(data, target), n, rng, pool_size=max(n, 1))

    def captions(self, data: datasets.Dataset, target: Target, n: int, rng: np.random.Generator) -> Sequence[str]:
        return poison.natural_captions(poison.captions_naming(data, target), n, rng, pool_size=self.num_captions)


# --- from a manifest back to the attack ---

ATTACKS: dict[str, type[Backdoor]] = {
    cls.name: cls
    for cls in (
        BadNet,
        BadNetCorners,
        BadNetYellow,
        BadNetFixed,
        Blended,
        BlendedImage,
        Sig,
        WaNet,
        WaNetSmooth,
        Issba,
        TrojVqa,
        BadClip,
    )
}


def from_manifest(data: datasets.Dataset) -> Backdoor:
    """The attack that poisoned ``data``."""
    manifest = poison.read_manifest(data)
    cls = ATTACKS[manifest["attack"]]
    fields = manifest["fields"]
    for name in ("patch", "image", "encoder"):
        if fields.get(name):
            fields[name] = Path(fields[name])
    return cls(**fields)
