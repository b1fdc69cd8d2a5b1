"""``optimize``: clip-contrastive."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import attrs
from plait import hookimpl
from plait.fields import field, in_range

if TYPE_CHECKING:
    from plait_clip.model import ImageTextModel
    from plait_clip.training import ContrastiveTraining


@attrs.frozen(kw_only=True)
class ClipContrastive:
    """Contrastive training of image and text towers on pairs (CLIP, Radford et al., ICML 2021)."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

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
    max_log_scale: float = field(4.6052, "upper bound of logit_scale, a logarithm (4.6052: ln 100)", in_range(0))
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
        from plait.freezing import thawed

        from plait_clip import training
        from plait_clip.model import image_text_model
        from plait_clip.pair_batches import PairLoader, undecoded
        from plait_clip.plugin.processes import train_in_processes

        trained: ImageTextModel = thawed(copy.deepcopy(image_text_model(model))).to(run.device)
        options = self.options()
        # Fails before anything is decoded.
        num_steps = self.num_epochs * options.steps_per_epoch(len(undecoded(data)))
        with run.loop(self, "training", inputs=(model, data), total=num_steps) as loop:
            try:
                if self.num_processes > 1:
                    train_in_processes(self, trained, data, run, loop)
                else:
                    held = int(self.held_gigabytes * 2**30)
                    training.train_contrastively(
                        trained,
                        PairLoader(data, trained, held_bytes=held, workers=self.workers),
                        options,
                        generator=run.generator,
                        seed=run.derived_seed("model"),
                        checkpoint=loop,
                        on_step=loop.done,
                        warn=run.warn,
                    )
            except training.DivergedError as error:
                if self.on_divergence == "raise":
                    raise
                run.warn(str(error))
        return training.as_given(trained, model)

    def options(self) -> ContrastiveTraining:
        """The same settings for the plain function."""
        from plait_clip.training import ContrastiveTraining

        names = attrs.fields_dict(ContrastiveTraining)
        return ContrastiveTraining(**{name: getattr(self, name) for name in names})
