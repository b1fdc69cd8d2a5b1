"""An ablation of TA-Cleaner: its counterfactual texts as hard negatives, without CleanCLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import torch
import torch.nn.functional as F
from plait_clip import Checkpoint, ImageTextModel
from plait_clip.backdoor import FineTuning, ViewBatch, fine_tune, steps_of_epoch, view_batches
from torch import Tensor

from plait_ta_cleaner.subcaptions import Draw
from plait_ta_cleaner.ta_cleaner import (
    OnStep,
    image_to_text_loss,
    num_subtext_rows,
    subtext_rows,
    text_to_image_loss,
    texts_of_step,
)


def hard_negative_loss(model: ImageTextModel, batch: ViewBatch, negatives: Sequence[str]) -> Tensor:
    """L_clip with counterfactual texts as further columns of its image → text half."""
    images = F.normalize(model.encode_image(batch.images.float() / 255).float(), dim=-1)
    texts = F.normalize(model.encode_text([*batch.captions, *negatives]).float(), dim=-1)
    captions, others = texts[: len(images)], texts[len(images) :]
    scale = model.logit_scale.float().exp()
    owners = torch.zeros(len(others), dtype=torch.long, device=images.device)
    i2t = image_to_text_loss(images, captions, others, owners, scale)
    return (i2t + text_to_image_loss(images, captions, scale)) / 2


def fine_tune_with_hard_negatives(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    draw: Draw,
    n_subtext: float,
    training: FineTuning,
    *,
    seed: int = 0,
    num_workers: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = lambda step, values: None,
) -> None:
    """Plain contrastive fine-tuning in place, with :func:`hard_negative_loss`.

    Args:
        n_subtext: as of :class:`plait_ta_cleaner.ta_cleaner.Alignment`; others as of
            :func:`plait_ta_cleaner.ta_cleaner.ta_cleaner`.
    """
    k = num_subtext_rows(n_subtext, len(pairs))
    chosen: dict[int, Tensor] = {}

    def batches(epoch: int, skip: int) -> Iterator[ViewBatch]:
        chosen.clear()
        chosen[epoch] = subtext_rows(len(pairs), k, seed, epoch)
        return view_batches(
            pairs, model, batch_size=training.batch_size, seed=seed, epoch=epoch, num_workers=num_workers, skip=skip
        )

    def loss(model: ImageTextModel, batch: ViewBatch) -> Tensor:
        texts = texts_of_step(batch, chosen[batch.epoch], draw, negatives_required=True)
        return hard_negative_loss(model, batch, texts.negatives)

    steps = steps_of_epoch(pairs, training.batch_size)
    fine_tune(model, batches, loss, steps, training, seed=seed, checkpoint=checkpoint, on_step=on_step)
