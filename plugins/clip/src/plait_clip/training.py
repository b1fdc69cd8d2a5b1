"""Contrastive training of image-text models, and its loop for any loss: resumable, and whole again after divergence."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar

import attrs
import torch
from plait_vision import own_modes
from torch import Tensor, nn

from plait_clip.losses import clip_loss, sigmoid_loss
from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import PairBatch, PairLoader

MAX_LOG_SCALE = 4.6052  # ln 100

Module = TypeVar("Module", bound=nn.Module)
LossFn = Callable[[Any, Any], "Tensor | Mapping[str, Tensor]"]


class Checkpoint(Protocol):
    """Where a training that can be killed keeps its state, such as a :class:`plait.loops.Loop`."""

    def load(self) -> Any:
        """The last saved state, or None."""

    def save(self, state: Any) -> None:
        """Replace the saved state, in one piece."""


class DivergedError(RuntimeError):
    """The loss was not finite; the model holds its last good weights again.

    Attributes:
        step: the optimizer step at which it was found.
        loss: what it was.
        restored_step: the step whose weights the model holds.
    """

    def __init__(self, step: int, loss: float, restored_step: int) -> None:
        self.step, self.loss, self.restored_step = step, loss, restored_step
        super().__init__(
            f"the loss is {loss} at step {step}; the weights of step {restored_step} are restored; "
            "lower the learning rate"
        )


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those of fewer than two axes do not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of a step counted from 0: linear up to ``peak``, then half a cosine to 0 at ``num_steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup_steps) / max(num_steps - warmup_steps, 1)))


def clamp_logit_scale(model: nn.Module, maximum: float = MAX_LOG_SCALE) -> None:
    """Keep the log of the scale in [0, maximum], where the model has one."""
    scale = getattr(model, "logit_scale", None)
    if scale is not None:
        with torch.no_grad():
            scale.clamp_(0, maximum)


def as_given(trained: Module, given: nn.Module) -> Module:
    """A trained copy as it is handed back: in evaluation mode, and frozen where ``given``, the original, is."""
    for ours, theirs in zip(trained.parameters(), given.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return trained.eval()


def learn_only(model: ImageTextModel, tower: str) -> None:
    """Freeze what is in the other tower than ``image`` or ``text``; logit scale and bias learn with either. ``both``: nothing.

    Raises:
        ValueError: the model does not tell its towers apart.
    """
    if tower == "both":
        return
    if not model.image_prefixes:
        raise ValueError(f"train is {tower!r}, but a {type(model).__name__} does not tell its towers apart")
    for name, parameter in model.named_parameters():
        belongs = name.startswith(model.image_prefixes) == (tower == "image")
        if not belongs and not name.endswith(("logit_scale", "logit_bias", "log_scale")):
            parameter.requires_grad_(False)


def check_weights(model: nn.Module) -> None:
    """Every weight is finite.

    Raises:
        ValueError: names the first tensor that holds NaN or infinity.
    """
    if (name := _first_not_finite(model.state_dict())) is not None:
        raise ValueError(f"the model's weight {name} holds NaN or infinity; load a sound model")


def _first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; a GPU is waited for once."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return None
    device = next(iter(floating.values())).device  # a model may lie on several
    sound = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in floating.values()])
    return next((name for name, is_sound in zip(floating, sound.tolist(), strict=True) if not is_sound), None)


def contrastive_loss(model: ImageTextModel, batch: PairBatch) -> Tensor:
    """CLIP's loss of a batch, over the batches of all processes together."""
    images, texts = _embed(model, batch)
    return clip_loss(images, texts, model.logit_scale.float().exp(), model.logit_bias)


def pairwise_loss(model: ImageTextModel, batch: PairBatch) -> Tensor:
    """SigLIP's loss of a batch, over the batches of all processes together.

    Raises:
        TypeError: the model has no bias for its logits.
    """
    if model.logit_bias is None:
        raise TypeError("the sigmoid loss needs a model with a logit bias, such as SigLIP; use the softmax loss")
    images, texts = _embed(model, batch)
    return sigmoid_loss(images, texts, model.logit_scale.float().exp(), model.logit_bias)


def _embed(model: ImageTextModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
    images = model.encode_image(batch.pixels)
    texts = model.encode_tokens(batch.tokens)[batch.text_index]
    return gather(images.float()), gather(texts.float())


def gather(features: Tensor) -> Tensor:
    """[B, D] of every process → [processes · B, D], with gradients; the identity in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return features
    return _Gather.apply(features)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every process computes the loss of all pairs; DistributedDataParallel takes the mean afterwards.
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def train(
    model: nn.Module,
    batches: Callable[[int, int], Iterable[Any]],
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    *,
    num_epochs: int,
    steps_per_epoch: int,
    accumulation: int = 1,
    precision: str = "fp32",
    max_grad_norm: float | None = None,
    max_log_scale: float = MAX_LOG_SCALE,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    checkpoint_seconds: float = 600.0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    accelerator: Any = None,
) -> None:
    """Train ``model`` in place.

    Args:
        model: an :class:`ImageTextModel`, or any module that ``loss_fn`` can use.
        batches: ``(epoch, skip) -> iterable`` of an epoch's batches without the first ``skip``; the
            same ones whenever it is called with the same numbers. Batches have ``.to(device)``.
        loss_fn: ``(model, batch) -> loss``, or a mapping whose ``"loss"`` is minimised; all its values are logged.
        optimizer: over the model's parameters.
        learning_rate: of an optimizer step counted from 0.
        steps_per_epoch: optimizer steps; an epoch takes ``accumulation`` times as many batches.
        precision: ``"fp32"`` or ``"bf16"`` (autocast; weights and losses stay in fp32).
        max_grad_norm: clip the gradient's norm to this; None: do not clip.
        max_log_scale: ``logit_scale`` is kept in [0, max_log_scale] after every step.
        seed: of whatever the model draws in training (dropout); the global generators are left alone.
        checkpoint: lets an interrupted call resume, with the result of an uninterrupted one; what it loads has to
            come from a call with the same arguments.
        checkpoint_seconds: time between checkpoints within an epoch; every epoch ends with one.
        on_step: called with the step and its losses and learning rate.
        accelerator: a prepared ``accelerate.Accelerator`` in each of several processes; None for one process.

    Raises:
        DivergedError: a loss was not finite; the model holds the weights of its last good state.
        ValueError: the model's weights are not finite before the first step; an epoch has too few batches.
    """
    check_weights(model)
    device = next(model.parameters()).device
    step, num_steps = 0, num_epochs * steps_per_epoch
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    objective: Any = _Objective(model, loss_fn)
    if accelerator is not None:
        objective, optimizer = accelerator.prepare(objective, optimizer)
    main = accelerator is None or accelerator.is_main_process

    last_good = (step, _copy(model))
    pending: tuple[int, dict[str, Tensor], float] | None = None
    saved_at = time.monotonic()

    def settle() -> None:
        """Read the losses of the last step, one step late so that a GPU need not wait for us."""
        nonlocal pending
        if pending is None:
            return
        at, losses, rate = pending
        pending = None
        if accelerator is not None:
            losses = {name: accelerator.reduce(value, "mean") for name, value in losses.items()}
        values = {name: float(value) for name, value in losses.items()}
        if not math.isfinite(values["loss"]):
            model.load_state_dict(last_good[1])
            raise DivergedError(at, values["loss"], last_good[0])
        on_step(at, {**values, "learning_rate": rate})

    def due() -> bool:
        """Whether it is time for a checkpoint; all processes agree."""
        late = time.monotonic() - saved_at > checkpoint_seconds
        if accelerator is None:
            return late
        return step % 50 == 0 and float(accelerator.reduce(torch.tensor(float(late), device=device), "sum")) > 0

    with own_modes(model):
        model.train()
        with _own_randomness(device):
            while step < num_steps:
                epoch, done = divmod(step, steps_per_epoch)
                source = iter(batches(epoch, done * accumulation))
                for _ in range(done, steps_per_epoch):
                    rate = learning_rate(step)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    torch.manual_seed(_mix(seed, step))
                    losses = _accumulate(objective, source, accumulation, device, precision, accelerator)
                    if max_grad_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                    settle()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    clamp_logit_scale(model, max_log_scale)
                    pending = (step, losses, rate)
                    step += 1
                    if step % steps_per_epoch == 0 or due():
                        settle()
                        if _first_not_finite(dict(model.named_parameters())) is None:
                            last_good = (step, _copy(model))
                            if checkpoint is not None and main:
                                checkpoint.save(
                                    {"model": last_good[1], "optimizer": optimizer.state_dict(), "step": step}
                                )
                        saved_at = time.monotonic()
            if last_good[0] != num_steps:  # finite losses, yet the last update broke the weights
                model.load_state_dict(last_good[1])
                raise DivergedError(num_steps, math.nan, last_good[0])


@attrs.frozen(kw_only=True)
class ContrastiveTraining:
    """How :func:`train_contrastively` trains; ``plait show clip-contrastive`` says what each means."""

    num_epochs: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    loss: Literal["softmax", "sigmoid"]
    train: Literal["both", "image", "text"]
    accumulation: int
    precision: Literal["fp32", "bf16"]
    max_grad_norm: float | None
    max_log_scale: float
    checkpoint_minutes: float

    def steps_per_epoch(self, num_rows: int) -> int:
        """Optimizer steps in a pass over ``num_rows`` pairs; the rest of the rows is left out.

        Raises:
            ValueError: there is not even one.
        """
        needed = self.batch_size * self.accumulation
        if num_rows < needed:
            raise ValueError(f"the data has {num_rows} rows, fewer than batch_size × accumulation = {needed}")
        return num_rows // needed


def train_contrastively(
    model: ImageTextModel,
    pairs: PairLoader,
    options: ContrastiveTraining,
    *,
    generator: Callable[[str], torch.Generator],
    seed: int,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    warn: Callable[[str], None] = lambda text: None,
    accelerator: Any = None,
) -> None:
    """Train ``model`` in place on pairs, in this process, which is one of ``accelerator``'s where that is given.

    Args:
        generator: name → source of random numbers, always the same for a name; one is asked for each epoch's order.
        seed, checkpoint, on_step: as of :func:`train`.
        warn: called with a sentence if captions were cut.

    Raises:
        ValueError: the loss or the tower does not suit the model; see also :func:`train`.
        DivergedError: see :func:`train`.
    """
    if options.loss == "softmax" and model.logit_bias is not None:
        raise ValueError("the model has a logit bias (SigLIP), which the softmax loss ignores; use loss: sigmoid")
    learn_only(model, options.train)
    steps_per_epoch = options.steps_per_epoch(len(pairs))
    num_steps = options.num_epochs * steps_per_epoch
    part = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    cut = 0

    def batches(epoch: int, skip: int) -> Iterator[PairBatch]:
        nonlocal cut
        for batch in pairs.batches(options.batch_size, generator(f"epoch {epoch}"), skip=skip, part=part):
            cut += int(batch.truncated.sum())
            yield batch

    train(
        model,
        batches,
        {"softmax": contrastive_loss, "sigmoid": pairwise_loss}[options.loss],
        adamw(
            model,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            betas=options.betas,
            eps=options.epsilon,
        ),
        lambda step: warmup_cosine(
            step, peak=options.learning_rate, warmup_steps=options.warmup_steps, num_steps=num_steps
        ),
        num_epochs=options.num_epochs,
        steps_per_epoch=steps_per_epoch,
        accumulation=options.accumulation,
        precision=options.precision,
        max_grad_norm=options.max_grad_norm,
        max_log_scale=options.max_log_scale,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_seconds=60 * options.checkpoint_minutes,
        on_step=on_step,
        accelerator=accelerator,
    )
    if cut:
        warn(f"{cut} times a caption was longer than the model's {model.context_length} tokens and was cut")


class _Objective(nn.Module):
    """The loss as a module, so that DistributedDataParallel sees every use of the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = self.loss_fn(self.model, batch)
        return {"loss": losses} if isinstance(losses, Tensor) else dict(losses)


def _accumulate(
    objective: Any, source: Iterator[Any], accumulation: int, device: torch.device, precision: str, accelerator: Any
) -> dict[str, Tensor]:
    """Gradients of the mean loss over ``accumulation`` batches; the mean of each loss, detached."""
    sums: dict[str, Tensor] = {}
    for part in range(accumulation):
        batch = next(source, None)
        if batch is None:
            raise ValueError("batches gives fewer batches than steps_per_epoch × accumulation")
        batch = batch.to(device)
        last = part == accumulation - 1
        sync = contextlib.nullcontext() if accelerator is None or last else accelerator.no_sync(objective)
        with sync:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                losses = objective(batch)
            mean = losses["loss"] / accumulation
            mean.backward() if accelerator is None else accelerator.backward(mean)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / accumulation
    return sums


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _mix(seed: int, step: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
