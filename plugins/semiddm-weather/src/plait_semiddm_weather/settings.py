"""What can be chosen: the networks (:class:`Architecture`), the training (:class:`Training`) and the presets of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from plait_semiddm_weather.augmentation import Strength
from plait_semiddm_weather.bank import ContentGate, Gates
from plait_semiddm_weather.networks import check_batch_size
from plait_semiddm_weather.scorers import RankerPairs

Kind = Literal["diffusion", "regression", "patch-ddim"]
Rule = Literal[
    "semiddm",
    "supervised",
    "mean-teacher",
    "static-pseudo",
    "bank-no-content",
    "bank-score-only",
    "bank-confidence",
    "oracle-screen",
]
SCORED: tuple[Rule, ...] = ("semiddm", "bank-no-content", "bank-score-only")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The networks; the defaults are the preset ``small``.

    Attributes:
        kind: ``diffusion``: the wavelet diffusion GAN; ``regression``: the same generator, one evaluation, no noise;
            ``patch-ddim``: WeatherDiff's rule.
        conditional_discriminator: the discriminator sees the degraded image too (not published).
    """

    kind: Kind = "diffusion"
    wavelet: str = "haar"
    num_train_timesteps: int = 4
    beta_min: float = 0.1
    beta_max: float = 20.0
    base_channels: int = 16
    channel_mult: tuple[int, ...] = (1, 2)
    layers_per_block: int = 1
    attention_levels: tuple[int, ...] = ()
    output: Literal["tanh", "residual"] = "residual"
    dropout: float = 0.0
    latent_dim: int = 32
    latent_embed_dim: int = 64
    mapping_layers: int = 2
    disc_base_channels: int = 8
    disc_num_layers: int = 4
    time_embed_dim: int = 64
    conditional_discriminator: bool = False
    patch_size: int = 64

    @property
    def multiple_of(self) -> int:
        """Sides of images are padded to a multiple of this."""
        levels = len(self.channel_mult)
        return int(2 ** (levels - 1)) if self.kind == "patch-ddim" else int(2 ** (levels + 1))

    def to_config(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """From the values of ``config.json``.

        Raises:
            ValueError: a value that this version does not know.
        """
        known = {one.name for one in fields(cls)}
        if unknown := [name for name in config if name not in known]:
            raise ValueError(f"config.json has {unknown[0]!r}, which this version does not know; update the package")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training; the defaults are the preset ``small``. ``as_released`` gives the released code's deviations.

    Lengths are in steps, or in epochs where ``num_epochs_*`` are given; ``curriculum`` and ``unsup_rampup`` count in
    the same unit.

    Attributes:
        rule: what becomes of unlabelled images: ``semiddm``, or a baseline (see the README).
        unsup_rampup: until the unlabelled part has its full weight; ``None``: half of stage 2.
        content_threshold: largest distance, exclusive, between teacher and student.
        student_gate_view: which view the student restores for the gates.
        ranker_pairs: what the ranker is fitted on.
        curriculum: weather → when its images join.
        images_per_epoch: weather → how many of its images are drawn for each epoch.
        half_scale, unsup_grad, pseudo_label, teacher_start, separate_steps, scale_r1: their defaults
            mend what the released code gets wrong.
    """

    rule: Rule = "semiddm"
    crop_size: int = 64
    batch_size: int = 8
    num_steps_stage1: int = 240
    num_steps_stage2: int = 80
    num_epochs_stage1: int | None = None
    num_epochs_stage2: int | None = None
    learning_rate_g: float = 1e-3
    learning_rate_d: float = 2e-4
    adam_betas: tuple[float, float] = (0.5, 0.9)
    learning_rate_schedule_stage1: Literal["constant", "cosine"] = "cosine"
    learning_rate_schedule_stage2: Literal["constant", "cosine"] = "cosine"
    final_learning_rate_share: float = 0.1
    r1_gamma: float = 0.02
    r1_interval: int = 15
    adversarial_weight: float = 1.0
    recon_weight: float = 5.0
    recon_l1_fraction: float = 0.8
    perceptual_weight: float = 0.0
    vgg16: Path | None = None
    unsup_weight: float = 0.5
    unsup_rampup: int | None = None
    unsup_recon_weight: float = 5.0
    contrast_weight: float = 0.0
    contrast: Literal["wavelet", "vgg19"] = "wavelet"
    vgg19: Path | None = None
    content_gate: ContentGate = "l1"
    content_threshold: float = 0.15
    student_gate_view: Literal["strong", "weak"] = "strong"
    confidence_threshold: float = 0.02
    ema_decay: float = 0.98
    scorer: str = "ranker"
    scorer_weights: Path | None = None
    ranker_pairs: RankerPairs = "blends"
    ranker_steps: int = 400
    refit_scorer: bool = False
    strong_aug: Strength = "mild"
    bank_crops: int = 1
    curriculum: Mapping[str, int] = field(default_factory=dict)
    images_per_epoch: Mapping[str, int] = field(default_factory=dict)
    half_scale: bool = False
    unsup_grad: Literal["x0", "none"] = "x0"
    pseudo_label: Literal["updated", "old"] = "updated"
    teacher_start: Literal["student", "random"] = "student"
    separate_steps: bool = False
    scale_r1: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: int = 50

    @property
    def gates(self) -> Gates:
        """The gates of the bank."""
        content = self.content_gate if self.rule == "semiddm" else None
        return Gates(True, self.rule in ("semiddm", "bank-no-content"), content, self.content_threshold)

    def check(self, architecture: Architecture) -> None:
        """Refuse what cannot be trained, before any work.

        Raises:
            ValueError: which value, and what is allowed.
        """
        check_batch_size(self.batch_size)
        if self.crop_size % architecture.multiple_of:
            raise ValueError(f"crop_size is {self.crop_size}; it has to be a multiple of {architecture.multiple_of}")
        if architecture.kind == "diffusion" and self.crop_size < 2**architecture.disc_num_layers:
            raise ValueError(
                f"crop_size is {self.crop_size}, which leaves the discriminator nothing after its "
                f"{architecture.disc_num_layers} stages; take {2**architecture.disc_num_layers} or more"
            )
        if architecture.kind != "diffusion" and self.rule != "supervised":
            raise ValueError(f"rule is {self.rule!r}; a {architecture.kind} network is trained by supervised alone")
        if self.perceptual_weight > 0 and self.vgg16 is None:
            raise ValueError(
                f"perceptual_weight is {self.perceptual_weight} and vgg16 is not given; its weights are never downloaded: "
                "give the file of torchvision's vgg16, or set perceptual_weight to 0"
            )
        if self.contrast_weight > 0 and self.contrast == "vgg19" and self.vgg19 is None:
            raise ValueError(
                f"contrast_weight is {self.contrast_weight} and vgg19 is not given; its weights are never downloaded: "
                "give the file of torchvision's vgg19, or set contrast: wavelet"
            )
        if not (self.scorer in ("ranker", "nss", "brisque") or self.scorer.startswith("pyiqa:")):
            raise ValueError(f"scorer is {self.scorer!r}; allowed is ranker, nss, brisque or pyiqa:NAME")


AS_RELEASED: Mapping[str, Any] = {
    "half_scale": True,
    "unsup_grad": "none",
    "pseudo_label": "old",
    "teacher_start": "random",
    "separate_steps": True,
    "scale_r1": False,
    "learning_rate_schedule_stage1": "constant",
}

# The networks and the training that differ from ``small``.
PRESETS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "small": ({}, {}),
    "paper": (
        {
            "base_channels": 128,
            "channel_mult": (1, 2, 2, 2),
            "layers_per_block": 2,
            "attention_levels": (1,),
            "output": "tanh",
            "latent_dim": 100,
            "latent_embed_dim": 256,
            "mapping_layers": 4,
            "disc_base_channels": 64,
            "time_embed_dim": 256,
        },
        {
            "batch_size": 64,
            "num_epochs_stage1": 500,
            "num_epochs_stage2": 650,
            "learning_rate_g": 1.6e-4,
            "learning_rate_d": 1.25e-4,
            "learning_rate_schedule_stage1": "constant",
            "final_learning_rate_share": 0.0625,
            "perceptual_weight": 10.0,
            "unsup_weight": 0.08,
            "unsup_rampup": 250,
            "unsup_recon_weight": 1.0,
            "contrast_weight": 5.0,
            "contrast": "vgg19",
            "ema_decay": 0.996,
            "scorer": "pyiqa:musiq-paq2piq",
            "strong_aug": "official",
            "curriculum": {"raindrops": 0, "rain": 151, "snow": 301},
            "images_per_epoch": {"snow": 4500},
        },
    ),
    "full256": (
        {
            "base_channels": 64,
            "channel_mult": (1, 2, 2, 2, 4),
            "layers_per_block": 2,
            "attention_levels": (3,),
            "output": "tanh",
            "latent_dim": 100,
            "latent_embed_dim": 256,
            "mapping_layers": 4,
            "disc_base_channels": 64,
            "disc_num_layers": 5,
            "time_embed_dim": 256,
            "patch_size": 256,
        },
        {
            "crop_size": 256,
            "batch_size": 16,
            "num_epochs_stage1": 500,
            "num_epochs_stage2": 650,
            "learning_rate_g": 1.6e-4,
            "learning_rate_d": 1e-4,
            "r1_gamma": 1.0,
            "r1_interval": 10,
            "final_learning_rate_share": 0.0625,
            "perceptual_weight": 10.0,
            "unsup_weight": 0.08,
            "unsup_rampup": 250,
            "unsup_recon_weight": 1.0,
            "contrast_weight": 5.0,
            "contrast": "vgg19",
            "ema_decay": 0.996,
            "strong_aug": "official",
        },
    ),
}


def preset(name: str, **given: Any) -> tuple[Architecture, Training]:
    """The networks and the training of a preset, with other values where ``given`` has them.

    Raises:
        ValueError: no such preset or value.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed is {', '.join(PRESETS)}")
    networks, training = (dict(part) for part in PRESETS[name])
    of_networks = {one.name for one in fields(Architecture)}
    of_training = {one.name for one in fields(Training)}
    for key, value in given.items():
        if key not in of_networks | of_training:
            raise ValueError(f"there is no setting {key!r}")
        (networks if key in of_networks else training)[key] = value
    for stage in ("stage1", "stage2"):  # a length in steps replaces the preset's in epochs
        if f"num_steps_{stage}" in given and f"num_epochs_{stage}" not in given:
            training[f"num_epochs_{stage}"] = None
    return Architecture(**networks), Training(**training)
