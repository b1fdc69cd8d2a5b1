"""``optimize``: clip-contrastive."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import attrs
from plait import PlaitError, hookimpl
from plait.fields import doc, in_range, one_of

from plait_clip import training
from plait_clip.loader import Batch, Pairs, undecoded
from plait_clip.model import ImageTextModel
from plait_clip.plugin.errors import as_plait_errors
from plait_clip.plugin.processes import train_in_processes


@attrs.frozen(kw_only=True)
class ClipContrastive:
    """Contrastive training of image and text towers on pairs (CLIP, Radford et al., ICML 2021)."""

    num_epochs: int = attrs.field(default=10, validator=in_range(1), metadata=doc("passes over the data"))
    batch_size: int = attrs.field(
        default=128, validator=in_range(2), metadata=doc("pairs contrasted with one another, over all processes")
    )
    learning_rate: float = attrs.field(default=1e-3, validator=in_range(0, low_open=True), metadata=doc("peak rate"))
    warmup_steps: int = attrs.field(
        default=50, validator=in_range(0), metadata=doc("optimizer steps up to the peak rate; then a cosine to 0")
    )
    weight_decay: float = attrs.field(
        default=0.1, validator=in_range(0), metadata=doc("AdamW decay of weights with two or more axes")
    )
    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.98), validator=in_range(0, 1, high_open=True), metadata=doc("AdamW averaging of moments")
    )
    epsilon: float = attrs.field(
        default=1e-6, validator=in_range(0, low_open=True), metadata=doc("AdamW divisor floor")
    )
    loss: Literal["softmax", "sigmoid"] = attrs.field(
        default="softmax", validator=one_of("softmax", "sigmoid"), metadata=doc("CLIP's loss, or SigLIP's")
    )
    train: Literal["both", "image", "text"] = attrs.field(
        default="both",
        validator=one_of("both", "image", "text"),
        metadata=doc("which tower learns; logit scale and bias always do"),
    )
    accumulation: int = attrs.field(
        default=1, validator=in_range(1), metadata=doc("batches per optimizer step; each keeps its own negatives")
    )
    precision: Literal["fp32", "bf16"] = attrs.field(
        default="fp32", validator=one_of("fp32", "bf16"), metadata=doc("bf16: mixed precision, fp32 weights and losses")
    )
    max_grad_norm: float | None = attrs.field(
        default=None, validator=in_range(0, low_open=True), metadata=doc("gradients are cut to this norm")
    )
    max_log_scale: float = attrs.field(
        default=training.MAX_LOG_SCALE, validator=in_range(0), metadata=doc("upper bound of logit_scale (a logarithm)")
    )
    num_processes: int = attrs.field(
        default=1, validator=in_range(1), metadata=doc("GPUs (without GPUs: CPU processes) that share every batch")
    )
    workers: int = attrs.field(
        default=0, validator=in_range(0, 256), metadata=doc("processes that decode images of sets too big to be held")
    )
    held_gigabytes: float = attrs.field(
        default=2.0, validator=in_range(0), metadata=doc("decoded images up to this size stay in memory")
    )
    checkpoint_minutes: float = attrs.field(
        default=10.0, validator=in_range(0), metadata=doc("minutes between checkpoints within an epoch")
    )
    on_divergence: Literal["raise", "restore"] = attrs.field(
        default="raise",
        validator=one_of("raise", "restore"),
        metadata=doc("a loss that is not finite: fail, or warn and give back the last good weights"),
    )

    def __attrs_post_init__(self) -> None:
        if self.batch_size % self.num_processes:
            raise PlaitError(f"batch_size {self.batch_size} cannot be shared by num_processes {self.num_processes}")

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> ImageTextModel:
        if not isinstance(model, ImageTextModel):
            raise PlaitError(f"model is a {type(model).__name__}; an image-text model of plait-clip is needed")
        with as_plait_errors():
            model = copy.deepcopy(model).to(run.device)
            try:
                self.steps_per_epoch(len(undecoded(data)))  # fails before anything is decoded
                if self.num_processes > 1:
                    train_in_processes(self, model, data, run)
                else:
                    pairs = Pairs(data, model, held_bytes=int(self.held_gigabytes * 2**30), workers=self.workers)
                    self.train_here(model, pairs, run)
            except training.DivergedError as error:
                if self.on_divergence == "raise":
                    raise
                run.warn(str(error))
        return model.requires_grad_(True).eval()

    def steps_per_epoch(self, num_rows: int) -> int:
        """Optimizer steps in a pass over ``num_rows`` pairs; the rest of the rows is left out.

        Raises:
            ValueError: there is not even one.
        """
        needed = self.batch_size * self.accumulation
        if num_rows < needed:
            raise ValueError(f"the data has {num_rows} rows, fewer than batch_size × accumulation = {needed}")
        return num_rows // needed

    def train_here(self, model: ImageTextModel, pairs: Pairs, run: Any, accelerator: Any = None) -> None:
        """Train in this process, which is one of ``accelerator``'s where that is given."""
        steps_per_epoch = self.steps_per_epoch(len(pairs))
        if self.loss == "softmax" and model.logit_bias is not None:
            raise ValueError("the model has a logit bias (SigLIP), which the softmax loss ignores; use loss: sigmoid")
        if self.train != "both" and not model.image_prefixes:
            raise ValueError(f"train is {self.train!r}, but a {type(model).__name__} does not tell its towers apart")
        for name, parameter in model.named_parameters():
            belongs = name.startswith(model.image_prefixes) == (self.train == "image")
            shared = name.endswith(("logit_scale", "logit_bias", "log_scale"))
            parameter.requires_grad_(self.train == "both" or belongs or shared)
        num_steps = self.num_epochs * steps_per_epoch
        part = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        cut = 0

        def batches(epoch: int, skip: int) -> Iterator[Batch]:
            nonlocal cut
            for batch in pairs.batches(self.batch_size, run.generator(f"epoch {epoch}"), skip=skip, part=part):
                cut += int(batch.truncated.sum())
                yield batch

        def report(step: int, values: dict[str, float]) -> None:
            run.log(step=step, **values)
            next(progress, None)

        progress = run.track(range(num_steps), "training", total=num_steps)
        training.train(
            model,
            batches,
            {"softmax": training.contrastive_loss, "sigmoid": training.pairwise_loss}[self.loss],
            training.adamw(
                model,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                betas=self.betas,
                eps=self.epsilon,
            ),
            lambda step: training.warmup_cosine(
                step, peak=self.learning_rate, warmup_steps=self.warmup_steps, num_steps=num_steps
            ),
            num_epochs=self.num_epochs,
            steps_per_epoch=steps_per_epoch,
            accumulation=self.accumulation,
            precision=self.precision,
            max_grad_norm=self.max_grad_norm,
            max_log_scale=self.max_log_scale,
            seed=run.derived_seed("model"),
            checkpoint=run.folder / "training.pt",
            data_name=f"{self.loss} {pairs.name}",
            checkpoint_seconds=60 * self.checkpoint_minutes,
            on_step=report,
            accelerator=accelerator,
        )
        if cut:
            run.warn(f"{cut} times a caption was longer than the model's {model.context_length} tokens and was cut")
