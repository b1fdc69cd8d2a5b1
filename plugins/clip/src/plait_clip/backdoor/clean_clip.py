"""CleanCLIP (Bansal et al., ICCV 2023): fine-tuning on clean pairs with an in-modal term that cuts the backdoor.

A method that extends CleanCLIP takes the pieces from here: :func:`view_batches`, :func:`encode_views`,
:func:`clean_clip_loss` and :func:`fine_tune`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from plait_clip.backdoor.eda import Synonyms, eda
from plait_clip.backdoor.losses import self_supervised_loss
from plait_clip.losses import clip_loss
from plait_clip.model import ImageInput, ImageTextModel
from plait_clip.pair_batches import caption_column, open_image, undecoded
from plait_clip.training import Checkpoint, LossFn, adamw, train, warmup_cosine

# --- Step 1: the two views of a batch --------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewBatch:
    """B pairs and their augmented views.

    Attributes:
        epoch: counted from 0.
        rows: int64 [B], the row numbers in the dataset.
        images: uint8 [B, 3, S, S]; augmented_images: the same after AutoAugment, ``None`` if not asked for.
        captions, augmented_captions: B texts each; the latter are ``None`` if not asked for.
    """

    epoch: int
    rows: Tensor
    images: Tensor
    captions: list[str]
    augmented_images: Tensor | None = None
    augmented_captions: list[str] | None = None

    def to(self, device: torch.device | str) -> ViewBatch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def view_batches(
    pairs: datasets.Dataset,
    model: ImageTextModel,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment_images: bool = False,
    synonyms: Synonyms | None = None,
    resample_captions: bool = False,
    num_workers: int = 0,
    skip: int = 0,
) -> Iterator[ViewBatch]:
    """The shuffled batches of one epoch, an incomplete last one dropped.

    Each view is a function of (seed, epoch, row) alone, whatever ``num_workers`` is.

    Args:
        pairs: columns ``image`` and ``captions`` (or ``caption``).
        model: gives the size of the images.
        epoch: counted from 0.
        augment_images: add AutoAugmented images (of the image as stored, before it is resized).
        synonyms: add EDA views of the captions with these synonyms.
        resample_captions: a new EDA view in every epoch instead of one for all.
        skip: leave out the first batches (to resume after an interruption).

    Raises:
        ValueError: there are fewer pairs than ``batch_size``, a caption is missing, or an image cannot be read.
    """
    caption_column(pairs)
    steps_of_epoch(pairs, batch_size)
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    loader = DataLoader(
        _Views(undecoded(pairs), model.image_input, seed, epoch, augment_images),
        batch_size=batch_size,
        sampler=torch.randperm(len(pairs), generator=generator).tolist()[skip * batch_size :],
        drop_last=True,
        num_workers=num_workers,
        collate_fn=partial(_collate, epoch),
        generator=generator,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        if synonyms is None:
            yield batch
            continue
        when = epoch if resample_captions else "once"
        augmented = [
            eda(caption, synonyms, random.Random(f"eda/{seed}/{when}/{row}/{caption}"))
            for row, caption in zip(batch.rows.tolist(), batch.captions, strict=True)
        ]
        yield replace(batch, augmented_captions=augmented)


@dataclass(frozen=True)
class _Views(Dataset):
    pairs: datasets.Dataset
    image_input: ImageInput
    seed: int
    epoch: int
    augment_images: bool

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Any] | str:
        try:
            return self._views(row)
        except ValueError as error:  # its sentence, without a worker's traceback
            return str(error)

    def _views(self, row: int) -> dict[str, Any]:
        pair = self.pairs[row]
        # To RGB first: AutoAugment fails on palette and CMYK images.
        image = open_image(pair["image"], row).convert("RGB")
        captions = pair["captions"] if "captions" in pair else [pair["caption"]]
        chosen = random.Random(f"caption/{self.seed}/{self.epoch}/{row}").choice(captions)
        item = {"row": row, "image": self.image_input.from_pil(image), "caption": chosen}
        if self.augment_images:
            augmented = auto_augment(image, seed_of("auto-augment", self.seed, self.epoch, row))
            item["augmented_image"] = self.image_input.from_pil(augmented)
        return item


def _collate(epoch: int, found: Sequence[dict[str, Any] | str]) -> ViewBatch | str:
    """The batch, or what is wrong with one of its rows."""
    items: list[dict[str, Any]] = []
    for item in found:
        if isinstance(item, str):
            return item
        items.append(item)

    def images(name: str) -> Tensor | None:
        return torch.from_numpy(np.stack([item[name] for item in items])) if name in items[0] else None

    return ViewBatch(
        epoch=epoch,
        rows=torch.tensor([item["row"] for item in items]),
        images=images("image"),
        captions=[item["caption"] for item in items],
        augmented_images=images("augmented_image"),
    )


@cache
def _policy() -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import AutoAugment

    return AutoAugment()


def auto_augment(image: Image.Image, seed: int) -> Image.Image:
    """AutoAugment (Cubuk et al., CVPR 2019) with the ImageNet policy; a function of image and seed."""
    augment = _policy()
    # torchvision draws from the global generator; its state is put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return augment(image)


def seed_of(*names: Any) -> int:
    """A seed in [0, 2**63) made of the names."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- Step 2: one forward pass of both views --------------------------------------------------------------------


@dataclass(frozen=True)
class Embeddings:
    """Unit-norm embeddings of a batch of B pairs, ``[B, D]`` each, and the factor of the cosine.

    ``extra_texts [E, D]`` are the embeddings of texts that were passed along.
    """

    images: Tensor
    augmented_images: Tensor
    texts: Tensor
    augmented_texts: Tensor
    extra_texts: Tensor
    scale: Tensor


def encode_views(model: ImageTextModel, batch: ViewBatch, extra_texts: Sequence[str] = ()) -> Embeddings:
    """Encode 2B images in one pass and 2B (and ``extra_texts``) texts in another.

    One pass, so that the statistics of a BatchNorm model mix both views as in the original.
    """
    if batch.augmented_images is None or batch.augmented_captions is None:
        raise ValueError("the batch has no augmented views; load it with augment_images and synonyms")
    size = len(batch.images)
    pixels = torch.cat([batch.images, batch.augmented_images]).float() / 255
    images = F.normalize(model.encode_image(pixels).float(), dim=-1)
    texts = F.normalize(model.encode_text([*batch.captions, *batch.augmented_captions, *extra_texts]).float(), dim=-1)
    return Embeddings(
        images=images[:size],
        augmented_images=images[size:],
        texts=texts[:size],
        augmented_texts=texts[size : 2 * size],
        extra_texts=texts[2 * size :],
        scale=model.logit_scale.float().exp(),
    )


# --- Steps 3 to 5: the loss ------------------------------------------------------------------------------------


def clean_clip_loss(embeddings: Embeddings, clip_weight: float = 1.0, self_supervised_weight: float = 1.0) -> Tensor:
    """L = λ_clip·L_clip + λ_ss·L_ss."""
    e = embeddings
    cross_modal = clip_loss(e.images, e.texts, e.scale)
    in_modal = self_supervised_loss(e.images, e.augmented_images, e.texts, e.augmented_texts, e.scale)
    return clip_weight * cross_modal + self_supervised_weight * in_modal


# --- Step 6: the training --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How a defence trains: AdamW, linear warm-up, cosine to zero. The defaults are CleanCLIP's.

    Attributes:
        warmup_steps: optimisation steps; below 1, a share of all steps.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        as_released: follow the authors' code in two places. The step index counts epochs from 1 while the schedule ends
            after ``num_epochs``: the warm-up is skipped and the rate rises again in the last epoch. And parameters
            whose name contains bn, ln, bias or logit_scale are spared weight decay, rather than those of fewer than
            two dimensions.
        optimizer_state: with ``as_released``, the state of an AdamW over :func:`released_groups` to start from; of a
            checkpoint: :func:`released_optimizer_state`.
    """

    num_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-5
    warmup_steps: float = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    precision: str = "fp32"
    as_released: bool = False
    optimizer_state: Mapping[str, Any] | None = None


def fine_tune(
    model: ImageTextModel,
    batches: Callable[[int, int], Iterable[Any]],
    loss_fn: LossFn,
    steps_per_epoch: int,
    options: FineTuning,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> None:
    """Train ``model`` in place by :func:`plait_clip.training.train`, whose arguments and errors these are."""
    num_steps = options.num_epochs * steps_per_epoch
    warmup = options.warmup_steps if options.warmup_steps >= 1 else options.warmup_steps * num_steps
    # The authors' first epoch is number 1: their training starts one epoch into the schedule.
    first = steps_per_epoch if options.as_released else 0

    def rate(step: int) -> float:
        return warmup_cosine(step + first, peak=options.learning_rate, warmup_steps=int(warmup), num_steps=num_steps)

    train(
        model,
        batches,
        loss_fn,
        optimizer(model, options),
        rate,
        num_epochs=options.num_epochs,
        steps_per_epoch=steps_per_epoch,
        precision=options.precision,
        seed=seed,
        checkpoint=checkpoint,
        on_step=on_step,
    )


def optimizer(model: nn.Module, options: FineTuning) -> torch.optim.AdamW:
    """AdamW with the weight decay of ``options``."""
    if not options.as_released:
        return adamw(
            model,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            betas=options.betas,
            eps=options.eps,
        )
    groups = released_groups(model, options.weight_decay)
    result = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)
    if options.optimizer_state is not None:
        result.load_state_dict(dict(options.optimizer_state))
    return result


def released_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by the authors' rule, which goes by names: without weight decay, then with."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    spared, decayed = _by_the_authors_rule(named)
    return [
        {"params": [named[name] for name in spared], "weight_decay": 0.0},
        {"params": [named[name] for name in decayed], "weight_decay": weight_decay},
    ]


def _by_the_authors_rule(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters that are spared weight decay, and of the others."""
    names = list(names)
    spared = [name for name in names if any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    return spared, [name for name in names if name not in spared]


def released_optimizer_state(checkpoint: Any, model: nn.Module) -> dict[str, Any]:
    """The optimizer's state in a checkpoint of the authors' training, for an AdamW over :func:`released_groups`.

    Such a state numbers the parameters in the order in which its own model has them, which is not that of every
    implementation. The weights beside it are in that order too, and have names.

    Args:
        checkpoint: ``{"state_dict": weights by name, "optimizer": state of an AdamW in two groups}``.

    Raises:
        ValueError: it is not such a checkpoint, or one of another model; says what differs.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    state, weights = content.get("optimizer"), content.get("state_dict", content.get("model"))
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError(
            "it has no entry 'optimizer' with an optimizer's state; give a checkpoint of the training itself"
        )
    if not isinstance(weights, Mapping):
        raise ValueError("it has no entry 'state_dict' with the weights, which name the optimizer's parameters")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {_bare(name): name for name in parameters}
    theirs = [own[_bare(name)] for name in weights if _bare(name) in own]
    missing = [name for name in own if own[name] not in theirs]
    if missing:
        raise ValueError(f"it is of another model: it lacks the weights {', '.join(missing[:3])}")
    groups = _by_the_authors_rule(theirs)
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(group) for group in groups]:
        raise ValueError(
            f"its optimizer has groups of {' and '.join(map(str, sizes))} parameters; expected {len(groups[0])} without "
            f"and {len(groups[1])} with weight decay, as in the authors' training"
        )
    number = {name: i for group, stored in zip(groups, state["param_groups"], strict=True)
              for name, i in zip(group, stored["params"], strict=True)}  # fmt: skip
    result = torch.optim.AdamW(released_groups(model, 0.0)).state_dict()
    for group, names, stored in zip(
        result["param_groups"], _by_the_authors_rule(parameters), state["param_groups"], strict=True
    ):
        group.update({key: stored[key] for key in ("lr", "betas", "eps", "weight_decay") if key in stored})
        for i, name in zip(group["params"], names, strict=True):
            moments = state["state"].get(number[name])
            if moments is None:  # a parameter that was never moved
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in moments or moments[key].shape != parameters[name].shape:
                    raise ValueError(f"its {key} of {_bare(name)} is not of the model's shape; it is of another model")
            result["state"][i] = {
                "step": torch.as_tensor(float(moments["step"])),
                **{key: moments[key] for key in ("exp_avg", "exp_avg_sq")},
            }
    if not result["state"]:
        raise ValueError("its optimizer has not made a step yet, so it has no state; leave optimizer_checkpoint out")
    return result


def _bare(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    for prefix in ("module.", "_orig_mod.", "model."):
        name = name.removeprefix(prefix)
    return name


def clean_clip(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    synonyms: Synonyms,
    options: FineTuning,
    *,
    clip_weight: float = 1.0,
    self_supervised_weight: float = 1.0,
    resample_captions: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> None:
    """Fine-tune ``model`` in place on clean pairs; arguments as of :func:`view_batches` and :func:`fine_tune`."""

    def batches(epoch: int, skip: int) -> Iterator[ViewBatch]:
        return view_batches(
            pairs,
            model,
            batch_size=options.batch_size,
            seed=seed,
            epoch=epoch,
            augment_images=True,
            synonyms=synonyms,
            resample_captions=resample_captions,
            num_workers=num_workers,
            skip=skip,
        )

    def loss_fn(model: ImageTextModel, batch: ViewBatch) -> Tensor:
        return clean_clip_loss(encode_views(model, batch), clip_weight, self_supervised_weight)

    steps = steps_of_epoch(pairs, options.batch_size)
    fine_tune(model, batches, loss_fn, steps, options, seed=seed, checkpoint=checkpoint, on_step=on_step)


def steps_of_epoch(pairs: Sized, batch_size: int) -> int:
    """Whole batches of an epoch.

    Raises:
        ValueError: there is none.
    """
    if len(pairs) < batch_size:
        raise ValueError(f"the data have {len(pairs)} pairs, fewer than one batch of {batch_size}; lower batch_size")
    return len(pairs) // batch_size
