"""How much of what a model retrieves right it retrieves wrong after an attack that was made for another model.

Protocol of SA-AET (Jia et al., TPAMI 2025) and of the attacks before it: all images and all captions of the gallery
are adversarial; text retrieval (TR) ranks captions for every image, image retrieval (IR) images for every caption.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from PIL import Image
from plait_clip import (
    ImageInput,
    ImageTextModel,
    captions_of,
    evaluating,
    image_batches,
    image_features,
    on_device,
    open_image,
    ranks_by_model,
    text_features,
    undecoded,
)
from torch import Tensor

PIXELS = "pixels"


# --- What is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transferred:
    """One attack as one model sees it.

    Attributes:
        source, target: names of the attacked pairs and of the model; "" for a single one without a name.
        model: the target.
        before, after: what it makes of the clean pairs and of the attacked ones.
        rates: "ASR" (the mean of both tasks at the least k), "TR ASR@k" and "IR ASR@k", in percent.
        resampling: the ASR, in percent, of clean images that are only brought to the size of the attacked ones.
        through: what brought the attacked images to their size; None where they are not square.
    """

    source: str
    target: str
    model: ImageTextModel
    before: Retrieval
    after: Retrieval
    rates: Mapping[str, float]
    resampling: float
    through: ImageInput | None


def attack_transfer(
    models: Mapping[str, ImageTextModel],
    clean: Gallery,
    attacked: Mapping[str, Gallery],
    folder: Path,
    device: Any,
    *,
    top: Sequence[int] = (1, 5, 10),
    track: Callable[[Iterable[tuple[str, str]]], Iterable[tuple[str, str]]] = iter,
    **options: Any,
) -> Iterator[Transferred]:
    """Every attack under every model, one model after the other; the clean pairs are retrieved once for each.

    Args:
        models, attacked: name → model, and name of the model that was attacked → pairs.
        folder: for files meanwhile.
        top: ranks k of ASR@k.
        options: of :func:`retrieve`.

    Raises:
        ValueError: see :func:`retrieve` and :func:`attack_success_rate`; names the model and the pairs.
    """
    last = None
    for target, source in track([(target, source) for target in models for source in attacked]):
        with naming("model", target):
            if target != last:
                model = on_device(models[target], device)
                before = retrieve(model, clean, folder, **options)
                resampled: dict[Any, float] = {}
                last = target
            with naming("data", source):
                after = retrieve(model, attacked[source], folder, **options)
            through = _resolution(clean, attacked[source], models.get(source) if source else None)
            floats = PIXELS in attacked[source].rows.column_names
            key = (through and geometry(through), floats)
            if key not in resampled:
                resampled[key] = 0.0
                if through is not None and geometry(through) != geometry(model.image_input):
                    same = ResampledGallery(clean.rows, clean.captions, clean.owner, through=through, floats=floats)
                    resampled[key] = success_rates(before, retrieve(model, same, folder, **options), top)["ASR"]
            rates = success_rates(before, after, top)
        yield Transferred(source, target, model, before, after, rates, resampled[key], through)


@contextlib.contextmanager
def naming(what: str, name: str = "") -> Iterator[None]:
    """Sentences about an input say which it is."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{what} {name}".rstrip() + f": {error}") from error


def success_rates(before: Retrieval, after: Retrieval, top: Sequence[int]) -> dict[str, float]:
    """ASR, TR ASR@k and IR ASR@k in percent; ASR is the mean of both tasks at the least k."""
    tasks = {"TR": (before.text_ranks, after.text_ranks), "IR": (before.image_ranks, after.image_ranks)}
    rates = {f"{task} ASR@{k}": attack_success_rate(*tasks[task], k) for task in tasks for k in top}
    return {"ASR": fmean(rates[f"{task} ASR@{min(top)}"] for task in tasks)} | rates


def attack_success_rate(clean: Tensor, attacked: Tensor, k: int) -> float:
    """ASR@k in percent, to 2 decimals: of the queries that are right without the attack, how many are wrong with it.

    A query is right if its rank is below ``k``. Queries that are wrong anyway do not count.

    Args:
        clean, attacked: int64 [N], rank from 0 of the match of each query, without and with the attack.

    Raises:
        ValueError: other shapes, k < 1, or no query is right without the attack.
    """
    if clean.shape != attacked.shape or clean.ndim != 1:
        raise ValueError(f"clean ranks {tuple(clean.shape)} and attacked ranks {tuple(attacked.shape)}; give as many")
    if k < 1:
        raise ValueError(f"k is {k}; ranks are counted from k = 1")
    right = clean < k
    num_right = int(right.sum())
    if num_right == 0:
        raise ValueError(
            f"no query is right without the attack at k = {k}, so there is no success rate; take a larger k, or a model "
            "that fits the data"
        )
    return round(100 * int((right & (attacked >= k)).sum()) / num_right, 2)


# --- The pairs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """N images and their M captions.

    Attributes:
        rows: the dataset; where it has a column ``pixels`` (float32 [3, S, S] in [0, 1]), that is the image.
        captions: all captions, image by image.
        owner: int64 [M] ascending, the image of each caption.
    """

    rows: datasets.Dataset
    captions: Sequence[str]
    owner: Tensor

    def image(self, row: int) -> Tensor:
        """One image as it is given to models, float32 [3, H, W] in [0, 1]."""
        if PIXELS in self.rows.column_names:
            return self.rows.with_format("torch", columns=[PIXELS])[row][PIXELS]
        return _as_tensor(np.asarray(self._picture(row).convert("RGB")).transpose(2, 0, 1))

    def image_like(self, row: int, other: Tensor, through: ImageInput | None) -> Tensor:
        """One image at the size of another, brought there as that was."""
        height, width = other.shape[1:]
        picture = self._picture(row)
        if (picture.width, picture.height) == (width, height):
            return self.image(row)
        if through is not None:
            return _as_tensor(through.from_pil(picture))
        return _as_tensor(np.asarray(picture.convert("RGB").resize((width, height))).transpose(2, 0, 1))

    def _picture(self, row: int) -> Image.Image:
        return open_image(undecoded(self.rows)[row]["image"], row)

    @classmethod
    def of(cls, rows: datasets.Dataset, clean: Callable[[str], str] = str) -> Gallery:
        """The pairs of a dataset; a caption that ``clean`` leaves nothing of stays as it is.

        Raises:
            ValueError: it is not a dataset, has no row, lacks a column, a caption is empty, or a column ``pixels`` holds
                something else.
        """
        undecoded(rows)
        exact = rows.features.get(PIXELS)
        if exact is not None and not (
            isinstance(exact, datasets.Array3D) and exact.shape[0] == 3 and exact.dtype.startswith("float")
        ):
            raise ValueError(f"the column {PIXELS!r} holds {exact}; give floats [3, H, W] in [0, 1]")
        captions, owner = captions_of(rows)
        return cls(rows, [clean(text) or text for text in captions], owner)

    def image_batches(self, model: ImageTextModel, batch_size: int) -> Iterator[Tensor]:
        """All images in order: uint8 at the model's size, or float32 in [0, 1] at their own.

        Raises:
            ValueError: an image cannot be read, or pixels lie outside [0, 1].
        """
        if PIXELS not in self.rows.column_names:
            yield from image_batches(self.rows, model.image_input, batch_size=batch_size)
            return
        exact = self.rows.with_format("torch", columns=[PIXELS])
        for start in range(0, len(exact), batch_size):
            batch = exact[start : start + batch_size][PIXELS]
            good = ((batch >= 0) & (batch <= 1)).flatten(1).all(dim=1)  # NaN is neither
            if not bool(good.all()):
                raise ValueError(f"row {start + int(good.int().argmin())}: pixels lie outside [0, 1]")
            yield batch


@dataclass(frozen=True)
class ResampledGallery(Gallery):
    """Clean pairs whose images go through an attack's resolution first, unchanged otherwise.

    Attributes:
        through: how the attacked model brings images to its size.
        floats: the attack's images are given to models as floats at their own size, as those of a column ``pixels``.
    """

    through: ImageInput
    floats: bool = False

    def image_batches(self, model: ImageTextModel, batch_size: int) -> Iterator[Tensor]:
        for batch in image_batches(self.rows, self.through, batch_size=batch_size):
            if self.floats:
                yield batch.float() / 255
                continue
            pictures = [Image.fromarray(levels) for levels in batch.permute(0, 2, 3, 1).numpy()]
            yield torch.stack([torch.from_numpy(model.image_input.from_pil(p).copy()) for p in pictures])


def _resolution(clean: Gallery, attacked: Gallery, model: ImageTextModel | None) -> ImageInput | None:
    """What brought the attacked images to their size: the attacked model's input, or what they look like.

    None where they are not square.
    """
    changed = attacked.image(0)
    height, width = changed.shape[1:]
    if height != width:
        return None
    if model is not None and model.image_size == height:
        return model.image_input
    cuts = ("crop", "squash") if model is None else (model.image_input.resize,)
    ways = [ImageInput(height, [0.0] * 3, [1.0] * 3, resize=cut) for cut in cuts]
    return min(ways, key=lambda way: float((clean.image_like(0, changed, way) - changed).abs().mean()))


def _as_tensor(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels.copy()).float() / 255


def check_same_pairs(clean: Gallery, attacked: Gallery) -> None:
    """Both have as many images with as many captions each, in one order as far as names of images and labels tell.

    Raises:
        ValueError: says what differs.
    """
    if len(clean.rows) != len(attacked.rows):
        raise ValueError(f"it has {len(attacked.rows)} rows, the reference {len(clean.rows)}; give the attacked rows")
    for row, (name, other) in enumerate(zip(*_names(clean.rows, attacked.rows), strict=True)):
        if name and other and other != name:
            raise ValueError(f"row {row} is image {other}, and {name} in the reference; give both in one order")
    if all("label" in gallery.rows.column_names for gallery in (clean, attacked)):
        labels = [gallery.rows.with_format(None).select_columns("label")[:]["label"] for gallery in (clean, attacked)]
        for row, (label, other) in enumerate(zip(*labels, strict=True)):
            if label != other:
                raise ValueError(f"row {row} has label {other}, and {label} in the reference; give both in one order")
    before, after = clean.owner.bincount(), attacked.owner.bincount()
    if not torch.equal(before, after):
        row = int((before != after).int().argmax())
        raise ValueError(f"row {row} has {int(after[row])} captions, and {int(before[row])} in the reference")


def _names(*parts: datasets.Dataset) -> list[list[str]]:
    """The names of the images of every part, without ending; with their folders where all parts know them."""
    if all("file_name" in rows.column_names for rows in parts):
        return [[str(Path(name).with_suffix("")) if name else "" for name in rows["file_name"][:]] for rows in parts]
    return [[Path(path).stem if path else "" for path in _paths(rows)] for rows in parts]


def _paths(rows: datasets.Dataset) -> Iterator[str | None]:
    """The paths in the image column; the images' bytes stay where they are."""
    cells = undecoded(rows).select_columns("image").with_format("arrow")
    for batch in cells.iter(batch_size=256):
        yield from pyarrow.compute.struct_field(batch["image"], "path").to_pylist()


def check_one_kind(models: Mapping[str, ImageTextModel]) -> None:
    """All models compare embeddings, or all score pairs.

    Raises:
        ValueError: some do and some do not, so that their rows of one table would not compare.
    """
    kinds: dict[str, list[str]] = {}
    for name, model in models.items():
        kinds.setdefault(model.kind, []).append(name)
    if len(kinds) > 1:
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        raise ValueError(f"models of different embedding kinds in one table ({found}); evaluate each kind by itself")


def geometry(image_input: ImageInput) -> Hashable:
    """Equal for two that bring every image to the same pixels; what they subtract and divide by is no matter."""
    processor = getattr(image_input, "processor", None)
    own = None if processor is None else processor.to_json_string()
    return type(image_input).__name__, image_input.size, image_input.resize, image_input.interpolation, own


# --- Retrieval ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """What a model makes of pairs.

    Attributes:
        images, texts: [N, D] and [M, D], of length 1, on the model's device.
        text_ranks: int64 [N], rank from 0 of the best own caption of each image.
        image_ranks: int64 [M], rank from 0 of the image of each caption.
    """

    images: Tensor
    texts: Tensor
    text_ranks: Tensor
    image_ranks: Tensor


def retrieve(
    model: ImageTextModel,
    gallery: Gallery,
    folder: Path,
    *,
    candidates: int = 128,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Retrieval:
    """Rank all captions for every image and all images for every caption.

    Similarity is the cosine. A fusion model scores the nearest ``candidates`` anew with its matching head; what is not
    among them ranks last. Memory: all embeddings, a batch of images, 1,024 rows of similarities; a fusion model's
    image states lie in a file in ``folder`` meanwhile.

    Raises:
        ValueError: an image cannot be read, or embeddings are not finite.
    """

    def batches() -> Iterator[Tensor]:
        return gallery.image_batches(model, batch_size)

    images = torch.cat(list(image_features(model, batches(), precision=precision)))
    texts = text_features(model, gallery.captions, precision=precision)
    ranks = ranks_by_model(
        model, batches, images, texts, gallery.captions, gallery.owner, folder,
        candidates=candidates, precision=precision,
    )  # fmt: skip
    return Retrieval(images, texts, *ranks)


def top_captions(
    model: ImageTextModel,
    gallery: Gallery,
    found: Retrieval,
    rows: Sequence[int],
    *,
    candidates: int = 128,
    precision: str = "fp32",
) -> list[str]:
    """The caption that the model ranks first for each of the images in ``rows``."""
    similarities = found.images[list(rows)] @ found.texts.T
    if model.kind != "fusion":
        return [gallery.captions[i] for i in similarities.argmax(dim=1).tolist()]
    chosen = Gallery(gallery.rows.select(rows), (), torch.empty(0))
    texts: list[str] = []
    for images in chosen.image_batches(model, 1):
        pixels = images if images.is_floating_point() else images.float() / 255
        near = similarities[len(texts)].topk(min(candidates, len(gallery.captions))).indices.tolist()
        with evaluating(model, precision):
            states = model.image_states(pixels.to(model.device)).float()
            scores = model.match_states(states.expand(len(near), -1, -1), [gallery.captions[i] for i in near])
        texts.append(gallery.captions[near[int(scores.argmax())]])
    return texts
