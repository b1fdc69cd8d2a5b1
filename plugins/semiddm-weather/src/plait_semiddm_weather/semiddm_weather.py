"""SemiDDM-Weather: one wavelet diffusion GAN for several weathers, trained on pairs and on images without a clean version.

Long et al., arXiv 2409.19679. :func:`semiddm_weather` is the method from first to last; its parts follow in its order:
stage 1 on pairs, the scorer, the bank of pseudo-labels, stage 2 with a mean teacher whose results are screened. Plain
PyTorch; the numbers (1) to (9) are those of the README's section on the method.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_semiddm_weather import baselines, losses
from plait_semiddm_weather.augmentation import check_crop, random_crop, strong
from plait_semiddm_weather.bank import Bank, content_distance, passes
from plait_semiddm_weather.model import WeatherRestorer, derived_seed, new_scorer
from plait_semiddm_weather.sampling import Batches
from plait_semiddm_weather.scorers import (
    NaturalStatistics,
    RankerSettings,
    Score,
    brisque,
    checked,
    fit_ranker,
    identity_of,
    pyiqa_scorer,
)
from plait_semiddm_weather.settings import SCORED, Architecture, Training

SCORER_IMAGES = 256  # labelled images that the scorer is fitted on, at most
CONFIDENCE_SAMPLES = 4

Track = Callable[[Iterable[int], str], Iterable[int]]


class Pairs(Protocol):
    """Labelled images: row → degraded and clean, float ``[3, H, W]`` in [0, 1]; ``domains`` are their weathers."""

    @property
    def domains(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> tuple[Tensor, Tensor]: ...


class Photos(Protocol):
    """Unlabelled images: row → float ``[3, H, W]`` in [0, 1]; ``truth`` (where it is known) is for diagnostics only."""

    @property
    def domains(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Tensor: ...

    def truth(self, row: int, /) -> Tensor | None: ...


class Checkpoint(Protocol):
    """Where a training goes on from: ``load`` gives the last saved state, or ``None``."""

    def load(self) -> Any: ...

    def save(self, state: Any) -> None: ...


class _Forgetful:
    def load(self) -> None:
        return None

    def save(self, state: Any) -> None:
        return None


def _no_track(steps: Iterable[int], _: str) -> Iterable[int]:
    return steps


@dataclass
class Result:
    """What a training gives.

    Attributes:
        model: student, teacher, discriminator and scorer, in evaluation mode.
        bank: the pseudo-labels, where there is a stage 2.
        bank_psnr: mean PSNR of the bank in dB at the beginning and at the end of stage 2, where the truth is known.
        funnel: of the candidates of stage 2, the share that passed each gate before the next was asked.
    """

    model: WeatherRestorer
    bank: Bank | None
    bank_psnr: tuple[float, float] | None
    funnel: dict[str, float]


def semiddm_weather(
    labelled: Pairs,
    unlabelled: Photos | None,
    architecture: Architecture | None = None,
    training: Training | None = None,
    *,
    model: WeatherRestorer | None = None,
    scorer: Score | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Checkpoint | None = None,
    track: Track = _no_track,
    log: Callable[..., None] = lambda **values: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Result:
    """Train on pairs and on unlabelled images.

    Args:
        labelled, unlabelled: ``None`` of the latter where the rule is ``supervised``.
        model: one to go on from. ``supervised`` then trains it longer; every other rule begins with stage 2.
        scorer: ``[N, 3, H, W] → [N]``, higher is better, in place of that of ``training``.
        checkpoint: where the training goes on from after a kill, to the same bits.
        track: around the steps of every part. log: curves. warn: sentences about what went wrong.

    Raises:
        ValueError: values that cannot be trained, no images, images smaller than a crop, a loss that is not finite.
    """
    architecture = model.architecture if model is not None else architecture or Architecture()
    training = training or Training()
    training.check(architecture)
    if unlabelled is None and training.rule != "supervised":
        raise ValueError(f"rule {training.rule!r} needs unlabelled images; give some, or take supervised")
    checkpoint = checkpoint or _Forgetful()
    device = torch.device(device)
    going_on = model is not None
    model = copy.deepcopy(model) if model is not None else WeatherRestorer(architecture, derived_seed(seed, "weights"))
    model = model.to(device)
    task = _Task(labelled, training, seed, device, checkpoint, track, log, checkpoint.load() or {})

    # Stage 1: pairs alone.
    snapshots: list[Tensor] = []
    if not going_on or training.rule == "supervised":
        label = "continued" if going_on else "stage 1"
        snapshots = _stage(task, model, label, training.num_steps_stage1, training.num_epochs_stage1)
    # The scorer, from pairs of versions of the labelled images.
    _fit_scorer(task, model, snapshots, scorer)
    bank, bank_psnr, funnel = None, None, _Funnel()
    if training.rule != "supervised":
        assert unlabelled is not None
        # The bank of pseudo-labels, and stage 2.
        judge = None if training.rule not in SCORED else _judge(model, training, scorer, device)
        screen = _Screen(task, model, _Crops.of(unlabelled, training, seed), judge, funnel)
        _stage(task, model, "continued", training.num_steps_stage2, training.num_epochs_stage2, screen)
        bank = screen.bank
        if screen.first_psnr is not None:
            bank_psnr = (screen.first_psnr, screen.psnr())
    _look_for_score_hacking(task, model, warn)
    model.zero_grad(set_to_none=True)
    return Result(model.eval().cpu(), bank, bank_psnr, funnel.shares())


@dataclass
class _Task:
    """What all parts of a training share. ``state`` is what was saved before a kill."""

    labelled: Pairs
    training: Training
    seed: int
    device: torch.device
    checkpoint: Checkpoint
    track: Track
    log: Callable[..., None]
    state: dict[str, Any]

    def random(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, name))

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    def pairs(self, rows: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Degraded and clean crops ``[B, 3, c, c]``, flipped now and then."""
        crops = [random_crop(self.labelled[int(row)], self.training.crop_size, random) for row in rows]
        degraded, clean = (torch.stack(part).to(self.device) for part in zip(*crops, strict=True))
        return degraded, clean

    def centre_pairs(self) -> tuple[Tensor, Tensor]:
        """The centre crops of the labelled images (at most 256, spread evenly)."""
        count = min(len(self.labelled), SCORER_IMAGES)
        rows = torch.linspace(0, len(self.labelled) - 1, count).round().long()
        found = [tuple(_centre(x, self.training.crop_size) for x in self.labelled[int(row)]) for row in rows]
        degraded, clean = (torch.stack(part) for part in zip(*found, strict=True))
        return degraded, clean


# Stage 1, and the labelled part of stage 2


def discriminator_step(
    model: WeatherRestorer, clean: Tensor, condition: Tensor, random: torch.Generator, r1_gamma: float
) -> tuple[Tensor, Tensor, float]:
    """L_D (1), its R1 penalty (2) and the share of states that the discriminator tells apart.

    Args:
        clean: ``s_0 = W(y) / 2``. condition: ``c = W(x)``. r1_gamma: 0: no penalty in this step.
    """
    t, less, noisier, latent = _draw(model, clean, random)
    with torch.no_grad():
        fake = model.diffusion.posterior(model.student(noisier, condition, t, latent).float(), noisier, t, random)
    judge, shown = _judging(model), _shown(model, condition)
    less.requires_grad_(r1_gamma > 0)
    with torch.autocast(clean.device.type, enabled=torch.is_autocast_enabled(clean.device.type) and r1_gamma == 0):
        real_logits = judge(less, t, noisier, *shown).float()  # R1 is a second derivative: float32
    fake_logits = judge(fake, t, noisier, *shown).float()
    penalty = losses.r1_penalty(real_logits, less, r1_gamma) if r1_gamma > 0 else real_logits.new_zeros(())
    right = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
    return losses.discriminator_loss(real_logits, fake_logits), penalty, right.item()


def generator_step(
    model: WeatherRestorer, clean: Tensor, condition: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The adversarial part of L_G (3) and ``ŝ_0``, from a pair of its own."""
    t, _, noisier, latent = _draw(model, clean, random)
    predicted = model.student(noisier, condition, t, latent).float()
    fake = model.diffusion.posterior(predicted, noisier, t, random)
    logits = _judging(model)(fake, t, noisier, *_shown(model, condition)).float()
    return losses.adversarial_loss(logits), predicted


def _draw(model: WeatherRestorer, clean: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = torch.randint(model.diffusion.num_steps, (len(clean),), generator=random).to(clean.device)
    less, noisier = model.diffusion.pair(clean, t, random)
    latent = torch.randn(len(clean), model.architecture.latent_dim, generator=random).to(clean.device)
    return t, less, noisier, latent


def _judging(model: WeatherRestorer) -> nn.Module:
    if model.discriminator is None:
        raise ValueError(f"a {model.architecture.kind} network has no discriminator")
    return model.discriminator


def _shown(model: WeatherRestorer, condition: Tensor) -> tuple[Tensor, ...]:
    return (condition,) if model.architecture.conditional_discriminator else ()


def _stage(
    task: _Task,
    model: WeatherRestorer,
    label: str,
    num_steps: int,
    num_epochs: int | None,
    screen: _Screen | None = None,
) -> list[Tensor]:
    """Train for one stage; returns restorations of the labelled images at a third, two thirds and the end of it."""
    training, name = task.training, "stage 1" if screen is None else "stage 2"
    batches = Batches(
        task.labelled.domains,
        training.batch_size,
        curriculum=training.curriculum,
        per_epoch=training.images_per_epoch,
        by_epoch=num_epochs is not None,
        seed=derived_seed(task.seed, label, "labelled"),
    )
    total = num_steps if num_epochs is None else batches.steps(num_epochs)
    stage = _Stage(task, model, label, total, batches, num_epochs is not None, screen)
    snapshot_at = {math.ceil(total * part / 3) for part in (1, 2)} if screen is None else set()
    if stage.restore(name):
        return stage.snapshots
    for step in task.track(range(stage.first, total), name):
        values = stage.step(step)
        if not all(map(math.isfinite, values.values())):
            wrong = next(key for key, value in values.items() if not math.isfinite(value))
            raise ValueError(
                f"{name}, step {step}: {wrong} is {values[wrong]}; lower learning_rate_g or learning_rate_d"
            )
        task.log(step=step, **{f"{name}: {key}": value for key, value in values.items()})
        if step + 1 in snapshot_at and _wants_ranker(task, model):
            stage.snapshots.append(_restored_pairs(task, model, f"{label} {step}"))
        if (step + 1) % training.checkpoint_every == 0:
            stage.save(name, step + 1, done=False)
    if screen is None and _wants_ranker(task, model):
        stage.snapshots.append(_restored_pairs(task, model, f"{label} end"))
    stage.save(name, total, done=True)
    return stage.snapshots


class _Stage:
    """Optimizers, averages and random states of one stage; everything that a checkpoint of it needs."""

    def __init__(
        self,
        task: _Task,
        model: WeatherRestorer,
        label: str,
        total: int,
        batches: Batches,
        by_epoch: bool,
        screen: _Screen | None,
    ) -> None:
        training = task.training
        self.task, self.model, self.screen, self.batches = task, model, screen, batches
        self.total, self.by_epoch, self.first = total, by_epoch, 0
        self.random = task.random(f"{label} labelled")
        self.snapshots: list[Tensor] = []
        self.shape = (
            training.learning_rate_schedule_stage1 if screen is None else training.learning_rate_schedule_stage2
        )
        model.student.train().requires_grad_(True)
        model.teacher.load_state_dict(model.student.state_dict())
        if screen is not None and training.teacher_start == "random":
            fresh = WeatherRestorer(model.architecture, derived_seed(task.seed, "random teacher"))
            model.teacher.load_state_dict(fresh.student.state_dict())
        model.teacher.eval().requires_grad_(False)
        self.optimizer_g = torch.optim.Adam(
            model.student.parameters(), lr=training.learning_rate_g, betas=training.adam_betas
        )
        self.optimizer_d: torch.optim.Adam | None = None
        if model.discriminator is not None:
            model.discriminator.train().requires_grad_(True)
            self.optimizer_d = torch.optim.Adam(
                model.discriminator.parameters(), lr=training.learning_rate_d, betas=training.adam_betas
            )
        self.perceptual: nn.Module | None = None
        if training.perceptual_weight > 0:
            self.perceptual = losses.perceptual_loss(training.vgg16).to(task.device)

    def step(self, step: int) -> dict[str, float]:
        """One iteration of (1) to (3), and of (4) to (8) where there are unlabelled images; then the teacher's (9)."""
        training, model = self.task.training, self.model
        self._set_learning_rates(step)
        degraded, clean = self.task.pairs(self.batches[step], self.random)
        bands, condition = model.to_bands(clean) / 2, model.to_bands(degraded)
        values: dict[str, float] = {}

        def supervised_d() -> None:
            values.update(self._discriminator(bands, condition, self.random, 1.0, self._gamma(step)))

        def supervised_g() -> None:
            values.update(self._supervised(degraded, clean, bands, condition))

        if self.screen is None:
            self._update([supervised_d], [supervised_g])
        elif training.separate_steps:
            self._update([supervised_d], [supervised_g])
            offer = self.screen.offer(step, self._weight(step))
            values |= self._unsupervised_update(offer, step, [], [])
        else:
            offer = self.screen.offer(step, self._weight(step))
            values |= self._unsupervised_update(offer, step, [supervised_d], [supervised_g])
        update_teacher(model.teacher, model.student, step + 1, training.ema_decay)
        return values

    def _unsupervised_update(
        self, offer: _Offer, step: int, for_d: list[Callable[[], object]], for_g: list[Callable[[], object]]
    ) -> dict[str, float]:
        """A step on the gradients of ``for_d`` and ``for_g`` and those of the unlabelled batch."""
        found = dict(offer.shares)
        self._update(
            [
                *for_d,
                lambda: self._discriminator(
                    offer.bands, offer.condition, offer.random, offer.weight, self._gamma(step)
                ),
            ],
            [*for_g, lambda: found.update(self._unsupervised(offer))],
        )
        return found

    def _update(self, for_d: list[Callable[[], object]], for_g: list[Callable[[], object]]) -> None:
        """One step of the discriminator, then one of the generator, each on the sum of the gradients given."""
        discriminator = self.model.discriminator
        if self.optimizer_d is not None:
            self.optimizer_d.zero_grad(set_to_none=True)
            with self.task.autocast():
                for gradients in for_d:
                    gradients()
            self.optimizer_d.step()
            assert discriminator is not None
            discriminator.requires_grad_(False)  # in the generator's step its own gradients are of no use
        self.optimizer_g.zero_grad(set_to_none=True)
        with self.task.autocast():
            for gradients in for_g:
                gradients()
        self.optimizer_g.step()
        if discriminator is not None:
            discriminator.requires_grad_(True)

    def _gamma(self, step: int) -> float:
        interval = self.task.training.r1_interval
        return self.task.training.r1_gamma if interval and step % interval == 0 else 0.0

    def _discriminator(
        self, bands: Tensor, condition: Tensor, random: torch.Generator, weight: float, gamma: float
    ) -> dict[str, float]:
        """Gradients of (1) and (2), added where a step holds both parts."""
        loss, penalty, accuracy = discriminator_step(self.model, bands, condition, random, gamma)
        (weight * loss + (weight if self.task.training.scale_r1 else 1.0) * penalty).backward()
        return {"L_D": loss.item(), "accuracy of D": accuracy}

    def _supervised(self, degraded: Tensor, clean: Tensor, bands: Tensor, condition: Tensor) -> dict[str, float]:
        """Gradients of L_G (3): adversarial, reconstruction and perceptual part."""
        training, model = self.task.training, self.model
        if model.architecture.kind == "patch-ddim":
            loss = baselines.patch_ddim_loss(model.student, degraded, clean, self.random)
            loss.backward()
            return {"loss": loss.item()}
        values = {}
        if model.architecture.kind == "regression":
            predicted, loss = baselines.wavelet_regression(model.student, condition).float(), bands.new_zeros(())
        else:
            adversarial, predicted = generator_step(model, bands, condition, self.random)
            loss, values["adversarial"] = training.adversarial_weight * adversarial, adversarial.item()
        image = model.to_image(predicted, 1.0 if training.half_scale else 2.0)
        reconstruction = losses.reconstruction_loss(image, clean, training.recon_l1_fraction)
        loss = loss + training.recon_weight * reconstruction
        if self.perceptual is not None:
            loss = loss + training.perceptual_weight * self.perceptual(image, clean)
        loss.backward()
        return {**values, "reconstruction": reconstruction.item()}

    def _unsupervised(self, offer: _Offer) -> dict[str, float]:
        """Gradients of λ · [adversarial + L1 + contrast] (8)."""
        training, model = self.task.training, self.model
        adversarial, predicted = generator_step(model, offer.bands, offer.condition, offer.random)
        image = model.to_image(predicted, 1.0 if training.half_scale else 2.0)
        if training.unsup_grad == "none":
            with torch.no_grad():
                image = model.sample(offer.strong, offer.random, "student")
        loss = offer.weight * training.adversarial_weight * adversarial
        unsupervised = training.unsup_recon_weight * F.l1_loss(image, offer.target)
        if training.contrast_weight > 0:
            assert self.screen is not None
            unsupervised = unsupervised + training.contrast_weight * self.screen.contrast(
                image, offer.positive, offer.strong
            )
        (loss + offer.weight * unsupervised).backward()
        return {"unsupervised": unsupervised.item(), "weight of the unsupervised part": offer.weight}

    def _weight(self, step: int) -> float:
        training = self.task.training
        now, rampup = step, training.unsup_rampup
        if rampup is None:
            rampup = self.total // 2
        elif self.by_epoch:
            now = self.batches.epoch(step)
        return unsupervised_weight(now, training.unsup_weight, rampup)

    def _set_learning_rates(self, step: int) -> None:
        training = self.task.training
        factor = learning_rate_factor(self.shape, step, self.total, training.final_learning_rate_share)
        pairs = [(self.optimizer_g, training.learning_rate_g), (self.optimizer_d, training.learning_rate_d)]
        for optimizer, rate in pairs:
            if optimizer is not None:
                optimizer.param_groups[0]["lr"] = rate * factor

    def save(self, name: str, step: int, done: bool) -> None:
        model = self.model
        state: dict[str, Any] = {
            "stage": name,
            "step": step,
            "done": done,
            "student": model.student.state_dict(),
            "teacher": model.teacher.state_dict(),
            "random": self.random.get_state(),
            "snapshots": self.snapshots,
        }
        if model.discriminator is not None:
            state["discriminator"] = model.discriminator.state_dict()
        if not done:
            state["optimizer_g"] = self.optimizer_g.state_dict()
            state["optimizer_d"] = self.optimizer_d.state_dict() if self.optimizer_d is not None else None
        if self.screen is not None:
            state["screen"] = self.screen.state_dict()
        self.task.checkpoint.save({**self.task.state, name: state})
        if done:
            self.task.state = {**self.task.state, name: state}

    def restore(self, name: str) -> bool:
        """Go on from the saved state of this stage, if there is one; whether the stage is over already."""
        state = self.task.state.get(name)
        if state is None:
            return False
        self.model.student.load_state_dict(state["student"])
        self.model.teacher.load_state_dict(state["teacher"])
        if self.model.discriminator is not None:
            self.model.discriminator.load_state_dict(state["discriminator"])
        self.random.set_state(state["random"])
        self.snapshots = list(state["snapshots"])
        if self.screen is not None:
            self.screen.load_state_dict(state["screen"])
        if not state["done"]:
            self.first = state["step"]
            self.optimizer_g.load_state_dict(state["optimizer_g"])
            if self.optimizer_d is not None:
                self.optimizer_d.load_state_dict(state["optimizer_d"])
        return bool(state["done"])


def learning_rate_factor(schedule: str, step: int, total: int, final_share: float) -> float:
    """1, or a cosine from 1 to ``final_share`` over ``total`` steps."""
    if schedule == "constant":
        return 1.0
    return final_share + (1 - final_share) * (1 + math.cos(math.pi * step / max(1, total))) / 2


# The scorer


def _wants_ranker(task: _Task, model: WeatherRestorer) -> bool:
    return task.training.scorer == "ranker" and _wants_scorer(task, model)


def _wants_scorer(task: _Task, model: WeatherRestorer) -> bool:
    training = task.training
    is_stored = training.scorer in ("ranker", "nss") and model.architecture.kind == "diffusion"
    has_it = model.scorer is not None and model.scorer.kind == training.scorer and not training.refit_scorer
    return is_stored and not has_it and training.rule in (*SCORED, "supervised")


def _restored_pairs(task: _Task, model: WeatherRestorer, name: str) -> Tensor:
    """The student's restorations of the centre crops of the labelled images, ``[N, 3, c, c]``."""
    degraded, _ = task.centre_pairs()
    random = task.random(f"restored {name}")
    model.student.eval()
    with torch.no_grad():
        parts = [model.sample(part.to(task.device), random, "student").cpu() for part in degraded.split(16)]
    model.student.train()
    return torch.cat(parts)


def _fit_scorer(task: _Task, model: WeatherRestorer, snapshots: list[Tensor], given: Score | None) -> None:
    if given is not None or not _wants_scorer(task, model):
        return
    degraded, clean = task.centre_pairs()
    if (saved := task.state.get("scorer")) is not None:
        model.scorer = new_scorer(task.training.scorer)
        model.scorer.load_state_dict(saved)
        model.to(task.device)
        return
    if task.training.scorer == "nss":
        scorer: nn.Module = new_scorer("nss")
        assert isinstance(scorer, NaturalStatistics)
        scorer.fit(clean)
    else:
        if not snapshots:
            snapshots = [_restored_pairs(task, model, f"sample {number}") for number in range(3)]
        settings = RankerSettings(num_steps=task.training.ranker_steps, pairs=task.training.ranker_pairs)
        random = task.random("ranker")
        scorer = fit_ranker(clean, degraded, torch.stack(snapshots), settings, random, task.device, task.track)
    model.scorer = scorer.to(task.device)
    task.state = {**task.state, "scorer": scorer.state_dict()}


def _judge(model: WeatherRestorer, training: Training, given: Score | None, device: torch.device) -> _Judge:
    """The scorer that screens, and its identity."""
    if given is not None:
        return _Judge("callable", given)
    if training.scorer in ("ranker", "nss"):
        assert model.scorer is not None
        return _Judge(identity_of(model.scorer), model.scorer)
    if training.scorer == "brisque":
        return _Judge("brisque", brisque())
    name = training.scorer.removeprefix("pyiqa:")
    return _Judge(training.scorer, pyiqa_scorer(name, training.scorer_weights, device))


@dataclass(frozen=True)
class _Judge:
    identity: str
    score: Score

    def __call__(self, images: Tensor) -> Tensor:
        return checked(self.score, images, self.identity).float()


# The bank of pseudo-labels, and what passes into it (sections 2.7 and 2.8)


@dataclass
class _Crops:
    """Fixed windows of the unlabelled images, which are the keys of the bank."""

    photos: Photos
    size: int
    boxes: list[tuple[int, int, int]]  # row, top, left
    domains: list[str]

    @classmethod
    def of(cls, photos: Photos, training: Training, seed: int) -> _Crops:
        """The centre of each image, or ``bank_crops`` places in it."""
        random = torch.Generator().manual_seed(derived_seed(seed, "boxes"))
        boxes = []
        for row in range(len(photos)):
            image = photos[row]
            check_crop(image, training.crop_size)
            down, right = (side - training.crop_size for side in image.shape[-2:])
            if training.bank_crops == 1:
                boxes.append((row, down // 2, right // 2))
                continue
            tops = torch.randint(down + 1, (training.bank_crops,), generator=random)
            lefts = torch.randint(right + 1, (training.bank_crops,), generator=random)
            boxes += [(row, top, left) for top, left in zip(tops.tolist(), lefts.tolist(), strict=True)]
        return cls(photos, training.crop_size, boxes, [photos.domains[row] for row, _, _ in boxes])

    def __len__(self) -> int:
        return len(self.boxes)

    def get(self, keys: Tensor) -> Tensor:
        """``[B, 3, c, c]``."""
        return torch.stack([self._cut(self.photos[row], top, left) for row, top, left in self._of(keys)])

    def truth(self, keys: Tensor) -> Tensor | None:
        """The clean versions, where all are known."""
        found = []
        for row, top, left in self._of(keys):
            image = self.photos.truth(row)
            if image is None:
                return None
            found.append(self._cut(image, top, left))
        return torch.stack(found)

    def _of(self, keys: Tensor) -> list[tuple[int, int, int]]:
        return [self.boxes[key] for key in keys.tolist()]

    def _cut(self, image: Tensor, top: int, left: int) -> Tensor:
        return image[:, top : top + self.size, left : left + self.size]


@dataclass
class _Offer:
    """One batch of unlabelled images with its pseudo-labels."""

    weight: float
    random: torch.Generator
    strong: Tensor
    target: Tensor
    positive: Tensor
    bands: Tensor
    condition: Tensor
    shares: dict[str, float]


class _Funnel:
    """How many candidates there were, and how many passed gate after gate."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def shares(self) -> dict[str, float]:
        seen = self.counts.get("candidates", 0)
        return {name: count / seen for name, count in self.counts.items() if name != "candidates"} if seen else {}


class _Screen:
    """The unlabelled side of stage 2: teacher, gates, bank."""

    def __init__(
        self, task: _Task, model: WeatherRestorer, crops: _Crops, judge: _Judge | None, funnel: _Funnel
    ) -> None:
        training = task.training
        self.task, self.model, self.crops, self.judge, self.funnel = task, model, crops, judge, funnel
        self.random = task.random("continued unlabelled")
        by_epoch = training.num_epochs_stage2 is not None
        self.batches = Batches(
            crops.domains,
            training.batch_size,
            curriculum=training.curriculum,
            per_epoch=training.images_per_epoch,
            by_epoch=by_epoch,
            seed=derived_seed(task.seed, "continued unlabelled"),
        )
        self.contrast: Any = None
        if training.contrast_weight > 0:
            vgg = training.contrast == "vgg19"
            self.contrast = losses.vgg_contrast(training.vgg19) if vgg else losses.wavelet_contrast()
            self.contrast.to(task.device)
        if training.rule == "oracle-screen" and crops.truth(torch.tensor([0])) is None:
            raise ValueError("rule oracle-screen needs the clean versions of the unlabelled images in column target")
        saved = task.state.get("stage 2")
        self.bank = self._first_bank() if saved is None else Bank.from_state(saved["screen"])
        knows_truth = crops.truth(torch.tensor([0])) is not None
        self.first_psnr = self.psnr() if knows_truth else None

    def _first_bank(self) -> Bank:
        """The student's restoration of every window, once, and its score."""
        images, scores = [], []
        random = self.task.random("bank")
        self.model.student.eval()
        for keys in torch.arange(len(self.crops)).split(16):
            with torch.no_grad():
                restored = self.model.sample(self.crops.get(keys).to(self.task.device), random, "student")
            restored = restored.cpu().mul(255).round().div(255)  # what is scored is what is stored
            images.append(restored)
            scores.append(self._score(restored.to(self.task.device), keys).cpu())
        identity = self.judge.identity if self.judge is not None else self.task.training.rule
        return Bank.of(torch.cat(images), torch.cat(scores), identity)

    def _score(self, images: Tensor, keys: Tensor) -> Tensor:
        if self.task.training.rule == "oracle-screen":
            truth = self.crops.truth(keys)
            assert truth is not None
            return -(images - truth.to(images.device)).square().flatten(1).mean(dim=1)
        return self.judge(images) if self.judge is not None else images.new_zeros(len(images))

    def psnr(self) -> float:
        """Mean PSNR of the bank in dB; the truth has to be known."""
        found = []
        for keys in torch.arange(len(self.crops)).split(64):
            truth = self.crops.truth(keys)
            assert truth is not None
            error = (self.bank.get(keys) - truth).square().flatten(1).mean(dim=1).clamp_min(1e-10)
            found.append(-10 * error.log10())
        return float(torch.cat(found).mean())

    def offer(self, step: int, weight: float) -> _Offer:
        """(4) and (5): the teacher restores the plain images, and what passes the gates becomes the pseudo-label."""
        training, device = self.task.training, self.task.device
        keys = self.batches[step]
        plain = self.crops.get(keys).to(device)
        strongly = strong(plain, training.strong_aug, self.random).to(device)
        old = self.bank.get(keys).to(device)
        accepted = self._screened(keys, plain, strongly)
        new = self.bank.get(keys).to(device)
        target = old if training.pseudo_label == "old" else new
        return _Offer(
            weight,
            self.random,
            strongly,
            target,
            new,
            self.model.to_bands(target) / 2,
            self.model.to_bands(strongly),
            {"accepted": accepted},
        )

    def _screened(self, keys: Tensor, plain: Tensor, strongly: Tensor) -> float:
        """Offer the teacher's results to the bank; the share that it took."""
        rule, model = self.task.training.rule, self.model
        if rule == "static-pseudo":
            return 0.0
        with torch.no_grad():
            candidates = model.sample(plain, self.random, "teacher")
        if rule == "mean-teacher":
            self.bank.replace(keys, candidates, torch.zeros(len(keys)), torch.ones(len(keys), dtype=torch.bool))
            return 1.0
        if rule == "bank-confidence":
            accepted = self._is_confident(plain, candidates)
            self.bank.replace(keys, candidates, torch.zeros(len(keys)), accepted)
            self.funnel.add(candidates=len(keys), accepted=int(accepted.sum()))
            return float(accepted.float().mean())
        # What is compared is what would be stored.
        scores = self._score(candidates.mul(255).round().div(255), keys).cpu().double()
        best = self.bank.best_score[keys]
        # The student is asked only where the bank would gain; every other candidate is out already.
        better = (scores > best).nonzero().flatten()
        accepted = torch.zeros(len(keys), dtype=torch.bool)
        counts = {"candidates": len(keys), "better than the bank": len(better)}
        if len(better):
            accepted, counts = self._asked(keys, candidates, scores, better, plain, strongly, counts)
        self.bank.replace(keys, candidates, scores, accepted)
        self.funnel.add(**counts, accepted=int(accepted.sum()))
        return float(accepted.float().mean())

    def _asked(
        self,
        keys: Tensor,
        candidates: Tensor,
        scores: Tensor,
        better: Tensor,
        plain: Tensor,
        strongly: Tensor,
        counts: dict[str, int],
    ) -> tuple[Tensor, dict[str, int]]:
        training, gates = self.task.training, self.task.training.gates
        accepted = torch.zeros(len(keys), dtype=torch.bool)
        if gates.beats_student and training.rule != "oracle-screen":
            view = strongly if training.student_gate_view == "strong" else plain
            self.model.student.eval()
            with torch.no_grad():
                own = self.model.sample(view[better], self.random, "student")
            self.model.student.train()
            student = self._score(own, keys[better]).cpu().double()
            distance = content_distance(training.content_gate, candidates[better], own).cpu()
        else:
            student, distance = torch.full((len(better),), -math.inf), torch.zeros(len(better))
        ok, said = passes(gates, scores[better], student, self.bank.best_score[keys[better]], distance)
        if "student" in said:
            beats = said["bank"] & said["student"]
            counts["and than the student"] = int(beats.sum())
        accepted[better[ok]] = True
        return accepted, counts

    def _is_confident(self, plain: Tensor, candidates: Tensor) -> Tensor:
        with torch.no_grad():
            more = [self.model.sample(plain, self.random, "teacher") for _ in range(CONFIDENCE_SAMPLES - 1)]
        spread = torch.stack([candidates, *more]).std(dim=0).flatten(1).mean(dim=1)
        return (spread < self.task.training.confidence_threshold).cpu()

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.bank.state_dict(),
            "random": self.random.get_state(),
            "funnel": self.funnel.counts,
            "first_psnr": self.first_psnr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bank = Bank.from_state(state)
        self.random.set_state(state["random"])
        self.funnel.counts = dict(state["funnel"])
        self.first_psnr = state["first_psnr"]


# Stage 2: weight (7) and teacher (9) (sections 2.8 and 2.9)


def unsupervised_weight(now: int, maximum: float, rampup: int) -> float:
    """``λ_max · exp(−5 (1 − min(e, r) / r)²)`` at epoch (or step) e; r = 0: λ_max at once."""
    if rampup <= 0:
        return maximum
    return maximum * math.exp(-5 * (1 - min(now, rampup) / rampup) ** 2)


def update_teacher(teacher: nn.Module, student: nn.Module, update: int, decay: float) -> None:
    """``θ_T ← α θ_T + (1 − α) θ_S`` with ``α = min(1 − 1/(k + 1), decay)`` in update k = 1, 2, …: first a running mean."""
    alpha = min(1 - 1 / (update + 1), decay)
    with torch.no_grad():
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 1 - alpha)
        for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
            ours.copy_(theirs)


def _look_for_score_hacking(task: _Task, model: WeatherRestorer, warn: Callable[[str], None]) -> None:
    """Restorations that score above the truth are what the score was trained to like, not better images."""
    if model.scorer is None or task.training.rule not in SCORED:
        return
    _, clean = task.centre_pairs()
    restored = _restored_pairs(task, model, "check")
    ours, theirs = (float(model.score(images.to(task.device)).mean()) for images in (restored, clean))
    if ours > theirs:
        warn(
            f"the scorer prefers restorations ({ours:.3f}) to the clean labelled images ({theirs:.3f}): its choice of "
            "pseudo-labels raises the score and not the images"
        )


def _centre(image: Tensor, size: int) -> Tensor:
    check_crop(image, size)
    top, left = ((side - size) // 2 for side in image.shape[-2:])
    return image[:, top : top + size, left : left + size]
