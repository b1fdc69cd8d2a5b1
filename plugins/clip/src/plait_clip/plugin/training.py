"""``optimize``: clip-contrastive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import attrs
from plait import hookimpl
from plait.fields import field, in_range
from plait.freezing import thawed

from plait_clip import training
from plait_clip.model import ImageTextModel, image_text_model
from plait_clip.pair_batches import PairBatch, PairLoader, undecoded
from plait_clip.plugin.processes import train_in_processes


@attrs.frozen(kw_only=True)
class ClipContrastive:
    """Contrastive training of image and text towers on pairs (CLIP, Radford et al., ICML 2021)."""

    num_epochs: int = field(10, "passes over the data", in_range(1))
    batch_size: int = field(128, "pairs contrasted with one another, over all processes", in_range(2))
    learning_rate: float = field(1e-3, "peak rate", in_range(0, low_open=True))
    warmup_steps: int = field(50, "optimizer steps up to the peak rate; then a cosine to 0", in_range(0))
    weight_decay: float = field(0.1, "AdamW decay of weights with two or more axes", in_range(0))
    betas: tuple[float, float] = field((0.9, 0.98), "AdamW averaging of moments", in_range(0, 1, high_open=True))
    epsilon: float = field(1e-6, "AdamW divisor floor", in_range(0, low_open=True))
    loss: Literal["softmax", "sigmoid"] = field("softmax", "CLIP's loss, or SigLIP's")
    train: Literal["both", "image", "text"] = field("both", "which tower learns; logit scale and bias always do")
    accumulation: int = field(1, "batches per optimizer step; each keeps its own negatives", in_range(1))
    precision: Literal["fp32", "bf16"] = field("fp32", "bf16: mixed precision, fp32 weights and losses")
    max_grad_norm: float | None = field(None, "gradients are cut to this norm", in_range(0, low_open=True))
    max_log_scale: float = field(training.MAX_LOG_SCALE, "upper bound of logit_scale (a logarithm)", in_range(0))
    num_processes: int = field(1, "GPUs (without GPUs: CPU processes) that share every batch", in_range(1))
    workers: int = field(0, "processes that decode images of sets too big to be held", in_range(0, 256))
    held_gigabytes: float = field(2.0, "decoded images up to this size stay in memory", in_range(0))
    checkpoint_minutes: float = field(10.0, "minutes between checkpoints within an epoch", in_range(0))
    on_divergence: Literal["raise", "restore"] = field(
        "raise", "a loss that is not finite: fail, or warn and give back the last good weights"
    )

    def __attrs_post_init__(self) -> None:
        if self.batch_size % self.num_processes:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared by num_processes {self.num_processes}")

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> ImageTextModel:
        trained: ImageTextModel = thawed(copy.deepcopy(image_text_model(model))).to(run.device)
        # Fails before anything is decoded.
        num_steps = self.num_epochs * self.steps_per_epoch(len(undecoded(data)))
        with run.loop(self, "training", inputs=(model, data), total=num_steps) as loop:
            try:
                if self.num_processes > 1:
                    train_in_processes(self, trained, data, run, loop)
                else:
                    held = int(self.held_gigabytes * 2**30)
                    pairs = PairLoader(data, trained, held_bytes=held, workers=self.workers)
                    self.train_here(trained, pairs, run, checkpoint=loop, on_step=loop.done)
            except training.DivergedError as error:
                if self.on_divergence == "raise":
                    raise
                run.warn(str(error))
        return training.as_given(trained, model)

    def steps_per_epoch(self, num_rows: int) -> int:
        """Optimizer steps in a pass over ``num_rows`` pairs; the rest of the rows is left out.

        Raises:
            ValueError: there is not even one.
        """
        needed = self.batch_size * self.accumulation
        if num_rows < needed:
            raise ValueError(f"the data has {num_rows} rows, fewer than batch_size × accumulation = {needed}")
        return num_rows // needed

    def train_here(
        self,
        model: ImageTextModel,
        pairs: PairLoader,
        run: Any,
        *,
        checkpoint: training.Checkpoint,
        on_step: Callable[[int, dict[str, float]], None],
        accelerator: Any = None,
    ) -> None:
        """Train in this process, which is one of ``accelerator``'s where that is given."""
        if self.loss == "softmax" and model.logit_bias is not None:
            raise ValueError("the model has a logit bias (SigLIP), which the softmax loss ignores; use loss: sigmoid")
        training.learn_only(model, self.train)
        steps_per_epoch = self.steps_per_epoch(len(pairs))
        num_steps = self.num_epochs * steps_per_epoch
        part = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        cut = 0

        def batches(epoch: int, skip: int) -> Iterator[PairBatch]:
            nonlocal cut
            for batch in pairs.batches(self.batch_size, run.generator(f"epoch {epoch}"), skip=skip, part=part):
                cut += int(batch.truncated.sum())
                yield batch

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
            checkpoint=checkpoint,
            checkpoint_seconds=60 * self.checkpoint_minutes,
            on_step=on_step,
            accelerator=accelerator,
        )
        if cut:
            run.warn(f"{cut} times a caption was longer than the model's {model.context_length} tokens and was cut")
