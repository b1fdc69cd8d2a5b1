"""A linear layer on the image features, alone or with the image tower under it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from plait_vision import finite_loss
from torch import Tensor, nn

from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import PairBatch
from plait_clip.training import Checkpoint, adamw, train, warmup_cosine


def linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    num_epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 0.005,
    weight_decay: float = 0.01,
) -> nn.Linear:
    """Fit a linear classifier with cross-entropy: AdamW, cosine to 0 without warm-up, no decay of the bias.

    Args:
        features: [N, D] un-normalised image features of a frozen tower, float32.
        labels: int64 [N].

    Raises:
        FloatingPointError: the loss is not finite.
    """
    layer = nn.utils.skip_init(nn.Linear, features.shape[1], num_classes)
    bound = features.shape[1] ** -0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    layer.to(features.device)
    labels = labels.to(features.device)
    optimizer = adamw(layer, learning_rate=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)
    steps_per_epoch = -(-len(features) // batch_size)
    step = 0
    for _ in range(num_epochs):
        for rows in torch.randperm(len(features), generator=generator).to(features.device).split(batch_size):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(
                    step, peak=learning_rate, warmup_steps=0, num_steps=num_epochs * steps_per_epoch
                )
            loss = F.cross_entropy(layer(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        finite_loss(loss, step)  # not after every batch, which would wait for the device
    return layer


class Classifier(nn.Module):
    """An image tower and a linear layer: images [N, 3, H, W] in [0, 1] → logits [N, K]."""

    def __init__(self, model: ImageTextModel, layer: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.model.encode_image(images))


def fine_tune(
    model: ImageTextModel,
    batches: Callable[[int, int], Iterable[PairBatch]],
    labels: Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    steps_per_epoch: int,
    num_epochs: int = 10,
    learning_rate: float = 1e-4,
    warmup_steps: int = 500,
    weight_decay: float = 0.01,
    precision: str = "fp32",
    checkpoint: Checkpoint | None = None,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> Classifier:
    """Train a linear head and the whole image tower (a copy of it) with cross-entropy.

    Args:
        batches: as :func:`plait_clip.training.train` takes them; ``labels[batch.rows]`` are their classes.
        labels: int64 [N] of the whole set.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        width = model.encode_image(torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)).shape[1]
        layer = nn.utils.skip_init(nn.Linear, width, num_classes).to(model.device)
        bound = width**-0.5
        for parameter in layer.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(model.image_prefixes) if model.image_prefixes else True)
    classifier = Classifier(model, layer)
    labels = labels.to(model.device)
    num_steps = num_epochs * steps_per_epoch
    train(
        classifier,
        batches,
        lambda module, batch: F.cross_entropy(module(batch.pixels).float(), labels[batch.rows]),
        adamw(classifier, learning_rate=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8),
        lambda step: warmup_cosine(step, peak=learning_rate, warmup_steps=warmup_steps, num_steps=num_steps),
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
        precision=precision,
        seed=seed,
        checkpoint=checkpoint,
        on_step=on_step,
    )
    return classifier.eval()
