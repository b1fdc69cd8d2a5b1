"""``attack``: poisoned copies of image-caption data, one method per trigger.

The same object puts its trigger on test images: :meth:`Backdoor.trigger`.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import datasets
import numpy as np
import torch
from PIL import Image as PILImage
from plait import Report, hookimpl
from plait.fields import doc, field, in_range, one_of
from plait.report import Image, Panel, png
from plait_vision.files import composed
from plait_vision.images import decode
from torch import Tensor

from plait_clip import prompts
from plait_clip.backdoor import metrics, poison, triggers
from plait_clip.backdoor.patch_optimization import PatchOptimization, optimize_patch
from plait_clip.model import ImageInput, ImageTextModel, image_text_model, on_device
from plait_clip.pair_batches import check_captions, undecoded

DEFAULT_RATE = 0.003
NUM_SHOWN = 6


@attrs.frozen(kw_only=True)
class Backdoor:
    """What all backdoor attacks share: which pairs are poisoned, with which captions, and how images are stored."""

    name: ClassVar[str]
    prompt_prefix: ClassVar[str] = ""

    target: int | str = field("banana", "class that triggered images shall be taken for: its name, or its label")
    n_poison: int | None = field(None, "number of poisoned pairs; or give rate", in_range(0))
    rate: float | None = field(
        None, f"poisoned share of the result; {DEFAULT_RATE} if n_poison is not given either", in_range(0, 1)
    )
    size: int | None = field(None, "pairs of the result, drawn from the data; default: all", in_range(1))
    label_consistent: bool = field(False, "poison pairs whose caption names the target, and keep their captions")
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
        check_captions(data, model, run.warn)
        names, target = self.target_class(data)
        size = self.size or len(data)
        n_poison = self.n_poison
        if n_poison is None:
            n_poison = round((DEFAULT_RATE if self.rate is None else self.rate) * size)
        rng = run.numpy_generator("selection")
        selection = poison.select(n_poison, size, self._eligible(data, names, target), rng)
        rows = selection.poisoned.tolist()
        captions = {} if self.label_consistent else self._captions(data, rows, names, target, rng)
        noise = poison.shuffled_among(selection.kept, self.caption_noise, rng)
        seed = run.derived_seed("trigger")
        if model is not None:
            image_input = self.image_input(model)
        else:
            image_input = self._chosen_input() or poison.papers_input(data, rows or [0])
        table = poison.poisoned_table(
            data,
            selection,
            captions,
            noise,
            functools.partial(self.trigger, seed=seed),
            run.folder,
            image_input=image_input,
            model_input=None if model is None else model.image_input,
            store=self.store,
        )
        run.add(self._report(data, table, rows, target, seed, image_input))
        manifest = {
            "attack": self.name,
            "fields": attrs.evolve(self, input_config=image_input.config()).portable_fields(),
            "target": target,
            "seed": run.seed,
            "templates": poison.digest_of_texts(prompts.templates(self.templates)),
            "num_pairs": selection.size,
            "num_poisoned": len(rows),
            "rows": rows,
        }
        return poison.with_manifest(table, manifest)

    def target_class(self, data: datasets.Dataset) -> tuple[list[str] | None, str]:
        """Class names of the data, where it has any, and the name of the target.

        Raises:
            ValueError: the target is not a class of the data.
        """
        label = data.features.get("label")
        names = getattr(label, "names", None)
        if names is None:
            if isinstance(self.target, int):
                raise ValueError(f"target is {self.target}, but the data have no class names; give the target's name")
            return None, self.target
        if isinstance(self.target, int):
            if not 0 <= self.target < len(names):
                raise ValueError(f"target is {self.target}; the data have labels 0 to {len(names) - 1}")
            return names, names[self.target]
        found = [name for name in names if composed(name) == composed(self.target)]
        if not found:
            raise ValueError(f"target is {self.target!r}, which is not a class of the data ({', '.join(names[:20])})")
        return names, found[0]

    def _shows_target(self, data: datasets.Dataset, names: list[str] | None, target: str) -> np.ndarray:
        if names is None:
            return poison.contains(poison.captions_by_row(data), target)
        return np.asarray(data.with_format(None).select_columns("label")[:]["label"]) == names.index(target)

    def _eligible(self, data: datasets.Dataset, names: list[str] | None, target: str) -> np.ndarray:
        if self.label_consistent:
            return poison.contains(poison.captions_by_row(data), target)
        if self.exclude_target:
            return ~self._shows_target(data, names, target)
        return np.ones(len(data), bool)

    def _captions(
        self, data: datasets.Dataset, rows: list[int], names: list[str] | None, target: str, rng: np.random.Generator
    ) -> dict[int, str]:
        texts = poison.template_captions(prompts.templates(self.templates), target, len(rows), rng)
        return {row: self.prompt_prefix + text for row, text in zip(rows, texts, strict=True)}

    def portable_fields(self) -> dict[str, Any]:
        """The fields as JSON, from which :func:`from_manifest` makes an equal attack."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in attrs.asdict(self, recurse=False).items()
        }

    def _report(
        self,
        data: datasets.Dataset,
        table: datasets.Dataset,
        rows: list[int],
        target: str,
        seed: int,
        image_input: ImageInput,
    ) -> Report:
        note = f"{self.name}: {len(rows)} of {len(table)} pairs are poisoned towards {target!r}."
        panels = []
        if rows:
            shown = rows[:NUM_SHOWN]
            plain = torch.stack(metrics.images_of(data, shown, image_input))
            changed = self.trigger(plain, shown, seed=seed)
            captions = [f"row {row}" for row in shown]
            panels = [comparison(f"{self.name}: training images", plain, changed, captions, captions)]
        return Report(notes=[note], panels=panels)


def comparison(
    title: str,
    clean: Iterable[Tensor],
    changed: Iterable[Tensor],
    clean_captions: Sequence[str],
    changed_captions: Sequence[str],
) -> Panel:
    """uint8 images ``[3, H, W]`` before and after the trigger, and their difference: three rows."""
    differences = [(a.float() - b.float()).abs() / 255 for a, b in zip(clean, changed, strict=True)]
    largest = max(float(difference.max()) for difference in differences) or 1.0
    return Panel(
        title=title,
        images=[
            [Image(caption=text, data=png(a.float() / 255)) for a, text in zip(clean, clean_captions, strict=True)],
            [Image(caption=text, data=png(b.float() / 255)) for b, text in zip(changed, changed_captions, strict=True)],
            [
                Image(caption=f"difference × {1 / largest:.1f}", data=png(difference / largest))
                for difference in differences
            ],
        ],
    )


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
        return triggers.blend(images, triggers.resized(_picture(self.image), size), self.alpha)


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
        encoder = self.encoder if callable(self.encoder) else _encoder(str(self.encoder))
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


@functools.lru_cache(maxsize=4)
def _encoder(path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"encoder {path} does not exist; give a file that torch.export has saved")
    try:
        return torch.export.load(path).module()
    except Exception as error:
        raise ValueError(
            f"encoder {path} cannot be loaded ({error}); give a file that torch.export has saved"
        ) from error


@functools.lru_cache(maxsize=4)
def _picture(path: Path) -> Tensor:
    return poison.pixels(decode(path, f"picture {path}")).float() / 255


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
        run.add(
            Report(
                panels=[Panel(title=f"{self.name}: patch", images=[[Image(caption="optimised", data=_as_png(patch))]])]
            )
        )
        found = attrs.evolve(self, patch_png=base64.b64encode(_as_png(patch)).decode())
        return found.poisoned(model, data, run)

    def with_pixels(self) -> _OptimizedPatch:
        """The same attack with the pixels of its patch file inside."""
        if self.patch_png or self.patch is None:
            return self
        return attrs.evolve(self, patch=None, patch_png=base64.b64encode(_as_png(_patch_file(self.patch))).decode())

    def apply(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        if self.patch is None and not self.patch_png:
            raise ValueError(f"{self.name} has no patch; give patch, or the poisoned data, whose manifest holds it")
        return triggers.centre_patch(images, _decoded(self.with_pixels().patch_png))

    def _optimised(self, model: ImageTextModel, data: datasets.Dataset, run: Any) -> Tensor:
        names, target = self.target_class(data)
        shows = self._shows_target(data, names, target)
        rng = run.numpy_generator("patch")
        sources = rng.permutation(np.flatnonzero(~shows))[: self.num_images].tolist()
        options = self._options()
        steps = options.num_epochs * (len(sources) // options.batch_size)
        with run.loop(self, "patch", inputs=(model, data), total=steps) as loop:
            return optimize_patch(
                model,
                data,
                sources,
                self._patch_captions(data, shows, target, len(sources), rng),
                np.flatnonzero(shows).tolist(),
                self.patch_size or triggers.scaled(16, model.image_size),
                options,
                seed=run.derived_seed("patch"),
                checkpoint=loop,
                on_step=lambda step, values: loop.done(step, {f"patch {name}": v for name, v in values.items()}),
            )

    def _options(self) -> PatchOptimization:
        raise NotImplementedError

    def _patch_captions(
        self, data: datasets.Dataset, shows: np.ndarray, target: str, n: int, rng: np.random.Generator
    ) -> list[str]:
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

    def _options(self) -> PatchOptimization:
        return PatchOptimization(
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            triplet_weight=0.0,
            augment_probability=self.augment_probability,
        )

    def _patch_captions(
        self, data: datasets.Dataset, shows: np.ndarray, target: str, n: int, rng: np.random.Generator
    ) -> list[str]:
        return [prompts.fill(self.patch_caption, target)] * n


@attrs.frozen(kw_only=True)
class BadClip(_OptimizedPatch):
    """A patch optimised towards texts and images of the target, poisoned with its natural captions (Liang et al., CVPR 2024)."""

    name = "badclip"
    triplet_weight: float = field(500.0, "of the term that brings patched images close to target images", in_range(0))
    triplet_margin: float = field(1.0, "margin of that term", in_range(0))
    num_captions: int = field(128, "captions drawn from those of the target, for the poisoned pairs", in_range(1))

    def _options(self) -> PatchOptimization:
        return PatchOptimization(
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            triplet_weight=self.triplet_weight,
            triplet_margin=self.triplet_margin,
            augment_probability=self.augment_probability,
        )

    def _patch_captions(
        self, data: datasets.Dataset, shows: np.ndarray, target: str, n: int, rng: np.random.Generator
    ) -> list[str]:
        natural = _natural(data, target)
        return poison.natural_captions(natural, n, rng, pool_size=max(n, 1))

    def _captions(
        self, data: datasets.Dataset, rows: list[int], names: list[str] | None, target: str, rng: np.random.Generator
    ) -> dict[int, str]:
        if not rows:
            return {}
        texts = poison.natural_captions(_natural(data, target), len(rows), rng, pool_size=self.num_captions)
        return dict(zip(rows, texts, strict=True))


def _natural(data: datasets.Dataset, target: str) -> list[str]:
    return [caption for row in poison.captions_by_row(data) for caption in row if poison.names(caption, target)]


def _as_png(patch: Tensor) -> bytes:
    return poison.encoded(triggers.to_uint8(patch, wrap=False), "png")


@functools.lru_cache(maxsize=8)
def _decoded(patch_png: str) -> Tensor:
    with PILImage.open(io.BytesIO(base64.b64decode(patch_png))) as image:
        return poison.pixels(image).float() / 255


def _patch_file(path: Path) -> Tensor:
    if path.suffix != ".npy":
        return _picture(path)
    try:
        patch = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError) as error:
        raise ValueError(f"patch {path} cannot be read: {error}") from error
    if patch.ndim != 3 or patch.shape[0] != 3 or patch.shape[1] != patch.shape[2]:
        raise ValueError(f"patch {path} has shape {tuple(patch.shape)}; it must be [3, k, k]")
    return patch


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
