"""``optimize: semiddm-weather``: every setting of the trainer as a field, the preset's where it is not given."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from plait import Report, Run, hookimpl
from plait.fields import code_field, field, in_range
from plait.importing import named_object
from plait.report import Image, Panel, png

from plait_semiddm_weather.model import WeatherRestorer
from plait_semiddm_weather.plugin.images import Images, images_of
from plait_semiddm_weather.semiddm_weather import Result, semiddm_weather
from plait_semiddm_weather.settings import AS_RELEASED, Architecture, Training, preset

# Training fields that are no settings of the algorithm of the same name.
OWN_FIELDS = ("preset", "training", "as_released", "scorer", "num_panels")
NETWORKS = {"wavelet-regression": "regression", "patch-ddim": "patch-ddim"}


@attrs.frozen(kw_only=True)
class TrainWeatherRestorer:
    """SemiDDM-Weather (arXiv 2409.19679): one diffusion GAN for several weathers, from pairs and unlabelled images.

    Fields that are not given are the preset's; the package's README lists them.
    """

    takes = {"model": "restorer", "data": "dataset"}
    gives = "restorer"
    columns_needed = ("image",)  # labelled ones need a target too

    preset: Literal["small", "paper", "full256"] = field(
        "small", "small: CPU, minutes; paper: as published; full256: crops of 256 pixels, one GPU"
    )
    training: Literal[
        "semiddm",
        "supervised",
        "mean-teacher",
        "static-pseudo",
        "bank-no-content",
        "bank-score-only",
        "bank-confidence",
        "oracle-screen",
        "wavelet-regression",
        "patch-ddim",
    ] = field(
        "semiddm", "what becomes of unlabelled images: the paper's way or a baseline; the last two are other networks"
    )
    as_released: bool = field(
        False, "the released code's deviations from its own idea, where their fields are not given"
    )
    num_panels: int = field(2, "labelled images shown in the report with their restorations", in_range(0))

    crop_size: int | None = field(None, "side of a training window, in pixels", in_range(2))
    batch_size: int | None = field(
        None, "labelled images a step, and as many unlabelled; 1 to 4, or a multiple of 4", in_range(1)
    )
    num_steps_stage1: int | None = field(
        None, "supervised steps; of a model to go on from, with training: supervised only", in_range(0)
    )
    num_steps_stage2: int | None = field(None, "semi-supervised steps", in_range(0))
    num_epochs_stage1: int | None = field(None, "instead of steps", in_range(0))
    num_epochs_stage2: int | None = field(None, "instead of steps", in_range(0))
    learning_rate_g: float | None = field(None, "of the generator's Adam", in_range(0, low_open=True))
    learning_rate_d: float | None = field(None, "of the discriminator's Adam", in_range(0, low_open=True))
    adam_betas: tuple[float, float] | None = field(None, "of both", in_range(0, 1, high_open=True))
    learning_rate_schedule_stage1: Literal["constant", "cosine"] | None = field(None, "of stage 1")
    learning_rate_schedule_stage2: Literal["constant", "cosine"] | None = field(None, "of stage 2")
    final_learning_rate_share: float | None = field(None, "where the cosine ends", in_range(0, 1))
    r1_gamma: float | None = field(None, "γ of the R1 penalty", in_range(0))
    r1_interval: int | None = field(None, "steps between penalties; 0: none", in_range(0))
    adversarial_weight: float | None = field(None, "of the generator's adversarial loss", in_range(0))
    recon_weight: float | None = field(None, "of the supervised reconstruction loss", in_range(0))
    recon_l1_fraction: float | None = field(None, "share of L1 in it; the rest is squared error", in_range(0, 1))
    perceptual_weight: float | None = field(None, "of the perceptual loss, which needs vgg16", in_range(0))
    vgg16: Path | None = field(None, "file with torchvision's weights of VGG16; never downloaded")
    unsup_weight: float | None = field(None, "λ_max of the unsupervised losses", in_range(0))
    unsup_rampup: int | None = field(None, "steps (or epochs) until λ_max; small: half of stage 2", in_range(0))
    unsup_recon_weight: float | None = field(None, "of L1 to the pseudo-label", in_range(0))
    contrast_weight: float | None = field(None, "of the contrastive loss", in_range(0))
    contrast: Literal["wavelet", "vgg19"] | None = field(None, "features of the contrastive loss")
    vgg19: Path | None = field(None, "file with torchvision's weights of VGG19; never downloaded")
    content_gate: Literal["l1", "low-band", "ssim"] | None = field(None, "distance between teacher and student")
    content_threshold: float | None = field(None, "it has to be smaller than this", in_range(0))
    student_gate_view: Literal["strong", "weak"] | None = field(None, "what the student restores for the gate")
    confidence_threshold: float | None = field(
        None, "training bank-confidence: largest std over 4 samples", in_range(0)
    )
    ema_decay: float | None = field(None, "of the teacher", in_range(0, 1, high_open=True))
    scorer: str | None = code_field(
        None,
        "ranker, nss, brisque, pyiqa:NAME; or code ./file.py:function, [N, 3, H, W] in [0, 1] → [N], higher is better",
        words=("ranker", "nss", "brisque"),
    )
    scorer_weights: Path | None = field(None, "parameter file of a metric of pyiqa; never downloaded")
    ranker_pairs: Literal["blends", "restorations", "both"] | None = field(None, "what the ranker learns to order")
    ranker_steps: int | None = field(None, "steps of the ranker", in_range(1))
    refit_scorer: bool | None = field(None, "fit it anew though the model to go on from has one")
    strong_aug: Literal["none", "mild", "official"] | None = field(
        None, "what the student's unlabelled input goes through"
    )
    bank_crops: int | None = field(None, "windows of an unlabelled image; 1: its centre", in_range(1))
    curriculum: dict[str, int] | None = field(None, "weather (column weather) → step or epoch at which it joins")
    images_per_epoch: dict[str, int] | None = field(None, "weather → images of it drawn for each epoch")
    half_scale: bool | None = field(None, "compare images of half the scale, as released")
    unsup_grad: Literal["x0", "none"] | None = field(
        None, "none: the unsupervised losses carry no gradient, as released"
    )
    pseudo_label: Literal["updated", "old"] | None = field(None, "which entry of the bank is the target")
    teacher_start: Literal["student", "random"] | None = field(None, "the teacher's first weights in stage 2")
    separate_steps: bool | None = field(None, "one step of Adam for each half of the batch, as released")
    scale_r1: bool | None = field(None, "λ applies to the unlabelled part's R1 too")
    precision: Literal["fp32", "bf16"] | None = field(None, "of the networks; R1 stays in float32")
    checkpoint_every: int | None = field(None, "steps between checkpoints", in_range(1))

    wavelet: str | None = field(None, "of PyWavelets, with the images' sub-bands; the networks' own stay Haar")
    num_train_timesteps: int | None = field(None, "T", in_range(1, 16))
    beta_min: float | None = field(None, "of the schedule", in_range(0, low_open=True))
    beta_max: float | None = field(None, "of the schedule", in_range(0, low_open=True))
    base_channels: int | None = field(None, "n of the generator, a multiple of 4", in_range(4))
    channel_mult: tuple[int, ...] | None = field(None, "channels of the levels, in n", in_range(1))
    layers_per_block: int | None = field(None, "blocks a level", in_range(1))
    attention_levels: tuple[int, ...] | None = field(
        None, "levels with attention; the bottleneck always has it", in_range(0)
    )
    output: Literal["tanh", "residual"] | None = field(None, "head: as published, or added to the input")
    dropout: float | None = field(None, "in the generator; with it a run depends on the device", in_range(0, 0))
    latent_dim: int | None = field(None, "numbers in z", in_range(1))
    latent_embed_dim: int | None = field(None, "width of its embedding", in_range(1))
    mapping_layers: int | None = field(None, "layers of its mapping", in_range(1))
    disc_base_channels: int | None = field(None, "n of the discriminator", in_range(1))
    disc_num_layers: int | None = field(None, "its stages", in_range(3))
    time_embed_dim: int | None = field(None, "its embedding of t, even", in_range(4))
    conditional_discriminator: bool | None = field(None, "it sees the degraded image too")
    patch_size: int | None = field(None, "training patch-ddim: side of a patch", in_range(8))

    def __attrs_post_init__(self) -> None:
        self.settings()

    def settings(self) -> tuple[Architecture, Training]:
        """The networks and the training.

        Raises:
            ValueError: values that do not go together.
        """
        given = {
            one.name: value
            for one in attrs.fields(type(self))
            if one.name not in OWN_FIELDS and (value := getattr(self, one.name)) is not None
        }
        if self.scorer is not None and self._code is None:
            given["scorer"] = self.scorer
        if self._code is not None:
            given["scorer"] = "ranker"  # replaced by the function
        if self.training in NETWORKS:
            given |= {"kind": NETWORKS[self.training], "rule": "supervised"}
        else:
            given["rule"] = self.training
        architecture, training = preset(self.preset, **{**(AS_RELEASED if self.as_released else {}), **given})
        training.check(architecture)
        return architecture, training

    @property
    def _code(self) -> str | None:
        """The user's own scorer, as module and name."""
        is_code = self.scorer is not None and ":" in self.scorer and not self.scorer.startswith("pyiqa:")
        return self.scorer if is_code else None

    @hookimpl
    def optimize(self, model: Any | None, data: Any, run: Run) -> WeatherRestorer:
        """A trained model. ``data`` is ``{labelled: …, unlabelled: …}``; ``model`` is one to go on from, or left out."""
        architecture, training = self.settings()
        if model is not None and not isinstance(model, WeatherRestorer):
            raise ValueError(f"model is a {type(model).__name__}; give one of semiddm-weather, or leave it out")
        if model is not None:
            training.check(model.architecture)
        labelled, unlabelled = images_of(data, training.crop_size, training.rule != "supervised")
        scorer = None
        if self._code is not None:
            scorer = named_object(self._code, inspect.isfunction, "a function of images [N, 3, H, W]")
        datasets = [part.dataset for part in (labelled, unlabelled) if part is not None]
        with run.loop(self, "train", inputs=(model, datasets)) as loop:
            result = semiddm_weather(
                labelled,
                unlabelled,
                architecture,
                training,
                model=model,
                scorer=scorer,
                seed=run.derived_seed("training"),
                device=run.device,
                checkpoint=loop,
                track=loop.track,
                log=loop.log,
                warn=run.warn,
            )
        self._report(result, labelled, unlabelled, run)
        return result.model

    def _report(self, result: Result, labelled: Images, unlabelled: Images | None, run: Run) -> None:
        notes = []
        if result.funnel:
            shares = ", ".join(f"{name} {share:.2f}" for name, share in result.funnel.items())
            notes.append(f"Of the teacher's results, share that was {shares}.")
        if result.bank_psnr is not None:
            notes.append(
                "PSNR of the bank: {:.2f} dB at the beginning of stage 2, {:.2f} dB at its end.".format(
                    *result.bank_psnr
                )
            )
        rows = []
        if self.num_panels:
            rows = [self._panel("labelled", labelled, result, run)]
            if unlabelled is not None:
                rows.append(self._panel("unlabelled", unlabelled, result, run))
        run.add(Report(title="training", panels=rows, notes=notes))

    def _panel(self, title: str, images: Images, result: Result, run: Run) -> Panel:
        """Rows of input, bank, student, teacher and truth."""
        lines = []
        for row in range(min(self.num_panels, len(images))):
            image = images[row][0] if images.paired else images[row]
            line = [("input", image)]
            if not images.paired and result.bank is not None and len(result.bank) == len(images):
                line.append(("bank", result.bank.get(torch.tensor([row]))[0]))
            seed = run.derived_seed(f"panel/{row}")
            line += [
                ("student", result.model.restore(image[None], [seed], weights="student")[0, 0]),
                ("teacher", result.model.restore(image[None], [seed], weights="teacher")[0, 0]),
            ]
            if (truth := images.truth(row)) is not None:
                line.append(("target", truth))
            lines.append([Image(caption=caption, data=png(picture.clone())) for caption, picture in line])
        return Panel(title=title, images=lines)
