"""Trigger patches optimised on a clean model: BadCLIP (Liang et al., CVPR 2024) and TrojVQA (Walmer et al., CVPR 2022).

Both move the embedding of patched images towards texts of the target class; BadCLIP moreover towards images of the
target class and away from the images' own embedding. The model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import plait_vision
import torch
import torch.nn.functional as F
from torch import Tensor

from plait_clip.backdoor.clean_clip import auto_augment, seed_of
from plait_clip.backdoor.triggers import centre_patch
from plait_clip.losses import clip_loss
from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import open_image, undecoded
from plait_clip.training import Checkpoint
from plait_clip.zero_shot import evaluating


@dataclass(frozen=True, kw_only=True)
class PatchOptimization:
    """How a patch is optimised; the defaults are BadCLIP's.

    Attributes:
        triplet_weight, triplet_margin: of the term with target images; a weight of 0 leaves TrojVQA's objective.
        augment_probability: share of the batches that use AutoAugmented images.
    """

    num_epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3
    triplet_weight: float = 500.0
    triplet_margin: float = 1.0
    augment_probability: float = 0.5

    def num_steps(self, num_images: int) -> int:
        """Steps of :func:`optimize_patch` on so many images."""
        return self.num_epochs * (num_images // self.batch_size)


def rows_to_optimize_on(
    shows_target: np.ndarray, num_images: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Rows without the target, drawn, at most ``num_images``, and all rows that show it.

    Args:
        shows_target: ``[N]`` bool.
    """
    others = rng.permutation(np.flatnonzero(~shows_target))[:num_images]
    return others.tolist(), np.flatnonzero(shows_target).tolist()


def optimize_patch(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    source_rows: Sequence[int],
    captions: Sequence[str],
    target_rows: Sequence[int],
    size: int,
    options: PatchOptimization,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> Tensor:
    """A patch ``[3, size, size]`` in [0, 1] for the middle of an image.

    Args:
        pairs: the dataset that the rows belong to.
        source_rows: images that do not show the target, one for each of ``captions``.
        captions: texts of the target class.
        target_rows: images of the target class, drawn with replacement; needed for the triplet term only.
        size: side of the patch, in pixels of the model's input.
        checkpoint: lets an interrupted call resume after its last epoch, to the same result.

    Raises:
        ValueError: there are fewer source rows than one batch, or no target row for the triplet term.
        FloatingPointError: the loss is not finite.
    """
    if len(source_rows) < options.batch_size:
        raise ValueError(
            f"{len(source_rows)} images do not show the target, fewer than one batch of {options.batch_size} to optimise "
            "the patch on; lower the batch size"
        )
    if options.triplet_weight and not len(target_rows):
        raise ValueError("no image shows the target, and the patch needs some to come close to; check target")
    device = model.device
    cells = undecoded(pairs)
    generator = torch.Generator().manual_seed(seed)
    # δ starts from noise around mid-grey.
    patch = (0.5 + 0.25 * torch.randn(3, size, size, generator=generator)).clamp(0, 1).to(device).requires_grad_()
    adam = torch.optim.Adam([patch], lr=options.learning_rate)
    start, step = 0, 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        start, step = state["epoch"], state["step"]
        with torch.no_grad():
            patch.copy_(state["patch"])
        adam.load_state_dict(state["adam"])
        generator.set_state(state["generator"])
    was = [parameter.requires_grad for parameter in model.parameters()]
    with plait_vision.evaluating(model):
        model.requires_grad_(False)
        try:
            for epoch in range(start, options.num_epochs):
                order = torch.randperm(len(source_rows), generator=generator).tolist()
                for first in range(0, len(order) - options.batch_size + 1, options.batch_size):
                    index = order[first : first + options.batch_size]
                    augment = float(torch.rand((), generator=generator)) < options.augment_probability
                    chosen = [source_rows[i] for i in index]
                    images = _images(cells, chosen, model, seed_of("patch", seed, epoch) if augment else None)
                    # The model may be in double precision or half; the patch is in float.
                    patched = F.normalize(model.encode_image(centre_patch(images, patch.clamp(0, 1))).float(), dim=-1)
                    with evaluating(model):
                        texts = F.normalize(model.encode_text([captions[i] for i in index]).float(), dim=-1)
                    losses = {"text": clip_loss(patched, texts, model.logit_scale.detach().float().exp())}
                    if options.triplet_weight:
                        drawn = torch.randint(len(target_rows), (len(index),), generator=generator).tolist()
                        positives = _images(cells, [target_rows[i] for i in drawn], model, None)
                        with evaluating(model):
                            negative = F.normalize(model.encode_image(images).float(), dim=-1)
                            positive = F.normalize(model.encode_image(positives).float(), dim=-1)
                        losses["triplet"] = F.triplet_margin_loss(patched, positive, negative, options.triplet_margin)
                    loss = losses["text"] + options.triplet_weight * losses.get("triplet", 0.0)
                    plait_vision.finite_loss(loss, step)
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                    on_step(step, {name: value.item() for name, value in {**losses, "loss": loss}.items()})
                    step += 1
                if checkpoint is not None:
                    state = {"patch": patch.detach(), "adam": adam.state_dict(), "generator": generator.get_state()}
                    checkpoint.save({**state, "epoch": epoch + 1, "step": step})
        finally:
            for parameter, trainable in zip(model.parameters(), was, strict=True):
                parameter.requires_grad_(trainable)
    return patch.detach().clamp(0, 1).cpu()


def _images(cells: Any, rows: Sequence[int], model: ImageTextModel, augment_seed: int | None) -> Tensor:
    """Images of the rows, [B, 3, S, S] in [0, 1] on the model's device, AutoAugmented if a seed is given."""
    pictures = [open_image(cells[row]["image"], row).convert("RGB") for row in rows]
    if augment_seed is not None:
        pictures = [auto_augment(image, seed_of(augment_seed, row)) for image, row in zip(pictures, rows, strict=True)]
    stacked = np.stack([model.image_input.from_pil(image) for image in pictures])
    return torch.from_numpy(stacked).to(model.device).float() / 255
