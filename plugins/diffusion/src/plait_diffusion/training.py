"""Training of a denoiser, or of a ControlNet on a frozen one; resumable, with an exponential moving average."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from plait_vision import finite_loss
from torch import Tensor, nn

from plait_diffusion import families, noise
from plait_diffusion.backbone import Backbone
from plait_diffusion.small import gradient_magnitude, small_controlnet

Part = Literal["denoiser", "control"]
# seed of a step → images [B, 3, S, S] in [0, 1] and class numbers [B], or None for data without classes
Batches = Callable[[int], "tuple[Tensor, Tensor | None]"]


class Checkpoint(Protocol):
    """Where a training that can be killed keeps its state, such as a :class:`plait.loops.Loop`."""

    def load(self) -> Any: ...

    def save(self, state: Any) -> None: ...


def train(
    backbone: Backbone,
    batches: Batches,
    *,
    part: Part = "denoiser",
    num_steps: int,
    learning_rate: float,
    no_class_share: float,
    ema_decay: float,
    seed: int,
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 100,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
    log: Callable[..., None] = lambda **values: None,
) -> Backbone:
    """A backbone with a trained denoiser, or with a ControlNet trained on its frozen denoiser; the one given stays as it is.

    The loss is the mean squared error of the predicted noise (or velocity, as the scheduler says) at a timestep drawn
    uniformly; AdamW with a cosine to 0.

    Args:
        batches: the images and classes of a step; has to give the same for the same seed.
        no_class_share: of images that are shown without their class.
        ema_decay: of the averaged weights that are returned, warmed up; 0: the last weights.
        checkpoint: lets an interrupted call resume, to the same bits.

    Raises:
        ValueError: the scheduler's prediction is of a kind that is not known.
        FloatingPointError: the loss is not finite.
    """
    from diffusers.training_utils import EMAModel

    if noise.is_flow(backbone.scheduler) or noise.is_edm(backbone.scheduler):
        raise ValueError(
            f"optimize: diffusion trains noise or velocity prediction, not a {type(backbone.scheduler).__name__}"
        )
    device = backbone.device
    denoiser = copy.deepcopy(backbone.denoiser)
    learner = denoiser if part == "denoiser" else small_controlnet(denoiser, seed).to(device)
    denoiser.requires_grad_(part == "denoiser")
    learner.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(num_steps, 1)))
    )
    average = EMAModel(learner.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    average.to(device)
    start = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.load_state_dict(state["average"])
        average.to(device)
        start = state["step"]
    alphas = backbone.scheduler.alphas_cumprod.to(device)
    with _own_randomness(device):
        for step in track(range(start, num_steps)):
            loss = _loss(backbone, denoiser, learner, part, batches, alphas, no_class_share, _mixed(seed, step))
            value = finite_loss(loss, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.step(learner.parameters())
            log(step=step, loss=value)
            if checkpoint is not None and (step + 1) % checkpoint_every == 0 and step + 1 < num_steps:
                checkpoint.save(
                    {
                        "learner": learner.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "average": average.state_dict(),
                        "step": step + 1,
                    }
                )
    if ema_decay:
        average.copy_to(learner.parameters())
    for parameter in learner.parameters():
        parameter.grad = None
    name = backbone.denoiser_name if part == "denoiser" else "controlnet"
    return backbone.with_components(**{name: learner})


def _loss(
    backbone: Backbone,
    denoiser: nn.Module,
    learner: nn.Module,
    part: Part,
    batches: Batches,
    alphas: Tensor,
    no_class_share: float,
    seed: int,
) -> Tensor:
    draw = torch.Generator().manual_seed(_mixed(seed, 0))
    images, classes = batches(seed)
    latents = backbone.latents(backbone.moments(images)).clone()
    eps = torch.randn(latents.shape, generator=draw).to(latents)
    timesteps = torch.randint(0, len(alphas), (len(latents),), generator=draw).to(latents.device)
    abar = alphas[timesteps].view(-1, 1, 1, 1)
    sample = abar.sqrt() * latents + (1 - abar).sqrt() * eps
    condition = _condition(backbone, classes, len(latents), no_class_share, images.shape[-1], draw)
    if part == "control":
        outlines = gradient_magnitude(images).to(latents)
        down, mid = learner(sample, timesteps, controlnet_cond=outlines, return_dict=False, **condition)
        condition |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    predicted = denoiser(sample, timesteps, **condition).sample[:, : latents.shape[1]]
    if backbone.scheduler.config.prediction_type == "v_prediction":
        target = abar.sqrt() * eps - (1 - abar).sqrt() * latents
    else:
        target = eps
    return F.mse_loss(predicted.float(), target.float())


def _condition(
    backbone: Backbone, classes: Tensor | None, batch: int, no_class_share: float, size: int, draw: torch.Generator
) -> dict[str, Any]:
    tokens = backbone.components.get("class_tokens")
    if tokens is None or classes is None:
        return families.expanded(backbone.condition([""], size), batch)
    hidden = torch.rand(batch, generator=draw) < no_class_share
    rows = torch.where(hidden, torch.full_like(classes, len(backbone.class_names)), classes)
    return {"encoder_hidden_states": tokens.of_rows(rows).to(backbone.device, backbone.dtype)}


def _mixed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Dropout of a learner draws from its own generators."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
