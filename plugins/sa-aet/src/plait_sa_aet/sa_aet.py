"""SA-AET from its first to its last step: :func:`sa_aet`.

Jia et al., "Semantic-Aligned Adversarial Evolution Triangle for High-Transferability Vision-Language Attack",
TPAMI 47(10), 2025 (arXiv 2411.02669), which extends Gao et al., "Boosting Transferability in Vision-Language Attacks
via Diversification along the Intersection Region of Adversarial Trajectory", ECCV 2024 (arXiv 2403.12445).

The paper's full text was not available: equations are those that its framework figure names, and the order of steps is
that of the released code's behaviour. In the order in which a batch goes through them:

1. the semantic projection of a corpus of captions (Eq. 16, 17), once for all batches: :func:`semantic_projection`;
2. a word of each caption is swapped so that the caption leaves its clean image (Eq. 7);
3. sign steps on the images, away from those captions, in which the gradient is measured inside the evolution triangle
   (:data:`LAWS`), at the best of several mixtures (Eq. 5), and the image moves from where it is (Eq. 6):
   :func:`evolve_images`;
4. from the clean captions again, a word is swapped, away from the clean, the final and the previous image (Eq. 7).

The attacks that it is compared with are in :mod:`plait_sa_aet.baselines`. Beside this file lie what earlier attacks have
in common with it: the rescaled views (:mod:`~plait_sa_aet.views`), the swap of words (:mod:`~plait_sa_aet.text_attack`)
and where its words come from (:mod:`~plait_sa_aet.word_candidates`), the random numbers
(:mod:`~plait_sa_aet.randomness`), the attacked model (:mod:`~plait_sa_aet.source`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plait_sa_aet.choices import ProjectionMode, Triangle
from plait_sa_aet.images import checked_images
from plait_sa_aet.randomness import Law, Randomness, Triple
from plait_sa_aet.source import Source, frozen
from plait_sa_aet.text_attack import WordAttackResult, WordChange, word_attack
from plait_sa_aet.views import ScaledViews, Views
from plait_sa_aet.word_candidates import WordCandidates


@dataclass(frozen=True)
class Batch:
    """B images with M captions.

    Attributes:
        images: float32 [B, 3, H, W] in [0, 1], at the source model's size.
        captions: M cleaned texts.
        txt2img: int64 [M] in [0, B), the image of each caption; every image owns at least one.
    """

    images: Tensor
    captions: Sequence[str]
    txt2img: Tensor


@dataclass(frozen=True)
class Words:
    """How captions are attacked: where candidates come from, and the options of :func:`word_attack`."""

    candidates: WordCandidates
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adversarial:
    """What an attack made of a batch.

    Attributes:
        images: float32 [B, 3, H, W] in [0, 1], within epsilon of the clean ones, not rounded.
        captions: M texts.
        changes: the words that differ. unattackable: captions without any word to attack.
        trace: of every image step: losses of the views, chosen triple, losses of the candidates.
    """

    images: Tensor
    captions: list[str]
    changes: Sequence[WordChange] = ()
    unattackable: Sequence[int] = ()
    num_rejected: int = 0
    previous_images: Tensor | None = None
    trace: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def with_words(cls, found: WordAttackResult, **parts: Any) -> Adversarial:
        """The captions and changes of a word attack, beside ``parts``."""
        return cls(
            captions=list(found.captions),
            changes=found.changes,
            unattackable=found.unattackable,
            num_rejected=found.num_rejected_multiword,
            **parts,
        )


def sa_aet(
    source: Source,
    batch: Batch,
    rng: Randomness,
    *,
    corpus: SemanticProjection | Sequence[str] | None,
    words: Words | None,
    ratios: Sequence[float] = (0.6, 0.2, 0.2),
    project_words: bool = False,
    **image_options: Any,
) -> Adversarial:
    """Images and captions of a batch, changed so that other models do not find the one by the other (SA-AET).

    Args:
        corpus: texts, of whose features the projection is made, or what :func:`semantic_projection` made of them, once
            for all batches; None: features as they are.
        words: None leaves the captions as they are.
        ratios: weights of the clean, the final and the previous image in the last choice of words (Eq. 7).
        project_words: also project the references of the words.
        image_options: of :func:`evolve_images`: epsilon, step_size, num_steps, num_samples, triangle, …

    Raises:
        ValueError: an input or option that :func:`semantic_projection`, :func:`caption_targets`, :func:`evolve_images` or
            :func:`~plait_sa_aet.text_attack.word_attack` refuses.
        NotDifferentiableError: the source's features do not depend differentiably on the images.
    """
    # 1. Eq. 16, 17: the projection P
    projection = corpus
    if projection is not None and not isinstance(projection, SemanticProjection):
        projection = semantic_projection(source.text_features(projection))
    project = projection.apply if projection is not None and project_words else None
    with torch.no_grad():
        clean = source.image_features(batch.images)

    # 2. Words that lead away from the clean images; what they say only guides the images
    away = list(batch.captions)
    if words is not None:
        away = _swapped(source, batch, words, [clean], [1.0], project).captions

    # 3. Eq. 5, 6: the images, away from those captions
    targets = caption_targets(source.text_features(away), batch.txt2img, len(batch.images), projection)
    evolved = evolve_images(source, batch.images, targets, rng, **image_options)
    changed = {"images": evolved.images, "previous_images": evolved.previous_images, "trace": evolved.trace}
    if words is None:
        return Adversarial(captions=list(batch.captions), **changed)

    # 4. Eq. 7: words again, from the clean captions
    with torch.no_grad():
        references = [clean, source.image_features(evolved.images), source.image_features(evolved.previous_images)]
    return Adversarial.with_words(_swapped(source, batch, words, references, ratios, project), **changed)


def _swapped(
    source: Source, batch: Batch, words: Words, features: Sequence[Tensor], weights: Sequence[float], project: Any
) -> WordAttackResult:
    """A word of each caption swapped so that −Σ_k w_k ⟨E_T(caption), reference_k⟩ grows (Eq. 7)."""
    owners = [reference[batch.txt2img.to(reference.device)] for reference in features]
    return word_attack(
        source, batch.captions, words.candidates, owners, list(weights), project=project, **words.options
    )


# -------------------------------------------------------------------------------------------------- 1. the projection


DEFAULT_TOP_K = 30
COMMON_DIRECTION = 0.3  # least share of the energy in u₁ for which drop_top was seen not to hurt


@dataclass(frozen=True)
class SemanticProjection:
    """A symmetric idempotent matrix P [D, D], stored as the directions it drops or keeps.

    As ``⟨x P, g P⟩ = ⟨x, g P⟩``, texts are projected once and images never. Nothing is re-normalised.

    Attributes:
        mode: how P was made, see :func:`semantic_projection`.
        rank: trace of P, the number of directions kept.
        singular_values: [min(D, N)] of the corpus, float64, descending.
        basis: float64; u₁ [D] where P = I − u₁u₁ᵀ, else the kept directions U [D, rank], P = UUᵀ;
            [D, 0] for ``none``, where P = I.
        num_texts: N, texts in the corpus.
    """

    mode: ProjectionMode
    rank: int
    singular_values: Tensor
    basis: Tensor
    num_texts: int

    @property
    def rho_1(self) -> float:
        """S₀² / ΣS², the share of the corpus's energy in its first direction."""
        energy = self.singular_values.square()
        return float(energy[0] / energy.sum())

    def apply(self, text_features: Tensor) -> Tensor:
        """Features [M, D] → [M, D], each times P, in the type they came in."""
        if self.mode == "none":
            return text_features
        features, basis = text_features.double(), self.basis.to(text_features.device)
        if basis.ndim == 1:
            projected = features - torch.outer(features @ basis, basis)
        else:
            projected = features @ basis @ basis.T
        return projected.to(text_features.dtype)

    def matrix(self) -> Tensor:
        """P itself, float64 [D, D]."""
        return self.apply(torch.eye(len(self.basis), dtype=torch.float64, device=self.basis.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, as safetensors wants them; :meth:`from_state_dict` reads them back."""
        return {
            "mode": torch.tensor(list(self.mode.encode()), dtype=torch.uint8),
            "rank": torch.tensor(self.rank),
            "singular_values": self.singular_values,
            "basis": self.basis,
            "num_texts": torch.tensor(self.num_texts),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> SemanticProjection:
        """What :meth:`state_dict` wrote."""
        return cls(
            mode=bytes(state["mode"].tolist()).decode(),  # type: ignore[arg-type]
            rank=int(state["rank"]),
            singular_values=state["singular_values"],
            basis=state["basis"],
            num_texts=int(state["num_texts"]),
        )


def semantic_projection(
    corpus: Tensor, mode: ProjectionMode = "drop_top", *, rank: int | None = None, rank_tol: float = 1e-5
) -> SemanticProjection:
    """The projection of a corpus (Eq. 16, 17); thin SVD ``Cᵀ = U S Vᵀ``, in float64.

    The paper's abstract speaks of projecting onto the corpus's subspace. The released code (``drop_top``) does something
    else: it removes the first left singular vector, the direction most texts share, and keeps all others, idle ones too.

    ==========  =======================================================================================
    drop_top    P = U[:, 1:] U[:, 1:]ᵀ. With N ≥ D that is I − u₁u₁ᵀ, so directions that no text uses
                stay; with N < D it keeps N − 1 directions (fewer where texts repeat: what no text
                uses is arbitrary there)
    span        P = U_k U_kᵀ over the singular values above ``rank_tol`` · S₀: the corpus's span
    top_k       P = U_k U_kᵀ over the first ``rank`` (30) singular values
    none        P = I
    ==========  =======================================================================================

    Args:
        corpus: C [N, D], the source's features of N ≥ 2 texts, rows of length 1.
        rank: directions that ``top_k`` keeps, 1 to min(D, N).
        rank_tol: in (0, 1), ``span`` only.

    Warns:
        UserWarning: ``drop_top`` where texts share no direction (ρ₁ < 0.3), so a meaningful one goes;
            fewer texts than dimensions (not with ``none``).

    Raises:
        ValueError: fewer than two texts, features not finite or all zero, nothing left to project on, or an argument
            out of range.
    """
    if mode not in get_args(ProjectionMode):
        raise ValueError(f"projection {mode!r}; allowed are {', '.join(get_args(ProjectionMode))}")
    if corpus.ndim != 2 or len(corpus) < 2:
        raise ValueError(f"a corpus of shape {tuple(corpus.shape)}; the projection needs [N, D] with at least 2 texts")
    if not corpus.isfinite().all() or not corpus.any():
        raise ValueError("the corpus's features have to be finite and not all zero")
    if rank is not None and mode != "top_k":
        raise ValueError(f"rank {rank} is for top_k; {mode} finds its own")
    if not 0 < rank_tol < 1:
        raise ValueError(f"rank_tol {rank_tol}; it has to lie between 0 and 1")
    C = corpus.detach().double()
    N, D = C.shape
    if mode in ("drop_top", "none") and N >= D:
        # The Gram matrix halves the digits of small singular values; only the first vector is used here.
        energies, vectors = torch.linalg.eigh(C.T @ C)
        S, U = energies.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    else:
        _, S, Vh = torch.linalg.svd(C, full_matrices=False)
        U = Vh.T

    if mode == "none":
        basis, kept = U[:, :0], D
    elif mode == "drop_top" and N >= D:
        basis, kept = U[:, 0], D - 1
    elif mode == "drop_top":
        used = int((S[0] * D * torch.finfo(S.dtype).eps < S).sum())
        if used < 2:
            raise ValueError(f"the {N} texts of the corpus are all alike, so drop_top leaves nothing; give other texts")
        basis, kept = U[:, 1:used], used - 1
    elif mode == "span":
        kept = int((S / S[0] > rank_tol).sum())
        basis = U[:, :kept]
    else:
        kept = DEFAULT_TOP_K if rank is None else rank
        if not 1 <= kept <= len(S):
            raise ValueError(f"the rank of top_k is {kept}; {N} texts of {D} dimensions allow 1 to {len(S)}")
        basis = U[:, :kept]
    projection = SemanticProjection(mode, kept, S, basis.contiguous(), N)

    if mode != "none" and N < D:
        warnings.warn(f"{N} texts span no {D} dimensions; {mode} keeps {kept} directions", stacklevel=2)
    if mode == "drop_top" and projection.rho_1 < COMMON_DIRECTION:
        warnings.warn(
            f"the texts share no direction (rho_1 = {projection.rho_1:.2f}, below {COMMON_DIRECTION}), so drop_top "
            "removes a meaningful one and is likely to hurt; try projection none",
            stacklevel=2,
        )
    return projection


def draw_corpus(captions: Sequence[str], fraction: float, generator: torch.Generator) -> list[str]:
    """``int(fraction · count)`` captions, without replacement, in the order drawn.

    Raises:
        ValueError: fraction outside (0, 1], or fewer than two captions drawn.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"corpus fraction {fraction}; it has to lie in (0, 1]")
    count = int(fraction * len(captions))
    if count < 2:
        raise ValueError(
            f"a fraction of {fraction} of {len(captions)} captions is {count}; the corpus needs at least 2"
        )
    return [captions[i] for i in torch.randperm(len(captions), generator=generator)[:count].tolist()]


# ------------------------------------------------------------------------------------------ 3. the evolution triangle


# A law draws ``(a, b, c)``, weights of the **current** iterate, the **clean** image and the **previous** iterate, sum 1.
# The released code of SA-AET and DRA draws whole percents ``(n1, n2, n3)`` one after the other, ``n1`` first, so even
# DRA's law favours the current iterate.
#
# =============  ==========================================  =======================================================
# law            region                                      facts
# =============  ==========================================  =======================================================
# sub            current < previous < clean (SA-AET)         784 triples; mean (0.1197, 0.5991, 0.2812);
#                                                            n1 ≤ 32, n2 ≥ 35, n3 ≤ 49; 11 proposals per draw
# full           the whole triangle (DRA)                    4,851 triples; mean (0.4933, 0.2533, 0.2533)
# uniform        the whole triangle, Dirichlet(1, 1, 1)      mean (1/3, 1/3, 1/3); not the released law
# uniform_sub    SA-AET's piece, sorted Dirichlet(1, 1, 1)   mean (1/9, 11/18, 5/18); not the released law
# =============  ==========================================  =======================================================
#
# ``sub`` is one of the six pieces that the medians cut, the one at the clean corner and the clean–previous edge.


def propose(random: Random) -> tuple[int, int, int]:
    """Percents of current, clean, previous: sum 100, the first two at least 1, the last at least 0."""
    n1 = random.randint(1, 100)
    if 100 - n1 > 1:
        n2 = random.randint(1, 100 - n1)
    else:
        n1, n2 = 98, 1
    return n1, n2, 100 - n1 - n2


def full(random: Random) -> Triple:
    """DRA: percents of at least 1 each."""
    while True:
        n1, n2, n3 = propose(random)
        if n3 >= 1:
            return n1 / 100, n2 / 100, n3 / 100


def sub(random: Random) -> Triple:
    """SA-AET: current < previous < clean."""
    while True:
        n1, n2, n3 = propose(random)
        if n1 < n3 < n2:
            return n1 / 100, n2 / 100, n3 / 100


def uniform(random: Random) -> Triple:
    """Dirichlet(1, 1, 1): the gaps that two uniform points leave on [0, 1]."""
    low, high = sorted((random.random(), random.random()))
    return low, high - low, 1 - high


def uniform_sub(random: Random) -> Triple:
    """Uniform on SA-AET's piece: Dirichlet(1, 1, 1), smallest to current, middle to previous, largest to clean."""
    current, previous, clean = sorted(uniform(random))
    return current, clean, previous


LAWS: dict[str, Law] = {"sub": sub, "full": full, "uniform": uniform, "uniform_sub": uniform_sub}
# "none": no mixtures, the gradient is taken at the current iterate (SGA)


# ------------------------------------------------------------------------------------------------------ 3. the images


@dataclass(frozen=True)
class EvolvedImages:
    """What the steps arrived at.

    Attributes:
        images: v_T, float32 [B, 3, H, W].
        previous_images: v_{T−1}, float32 [B, 3, H, W].
        trace: per step, as plain numbers: ``view_losses`` [V]; ``triples``, the chosen (current, clean, previous)
            weights, [1, 3] or [B, 3], none in the first step; ``mixture_losses`` and ``candidate_losses`` [K], means
            over the batch, none where there was nothing to choose.
    """

    images: Tensor
    previous_images: Tensor
    trace: list[dict[str, Any]]


def caption_targets(
    text_features: Tensor, txt2img: Tensor | Sequence[int], num_images: int, projection: SemanticProjection | None
) -> Tensor:
    """G [B, D]: per image, the sum of its captions' projected features, ``G_i = Σ_m P g_m``.

    Args:
        text_features: g [M, D], rows of length 1.
        txt2img: [M] in [0, B), the image of each caption.
        projection: P; None for the identity.

    Raises:
        ValueError: txt2img of another length or out of range, or an image without a caption (it would get noise only).
    """
    owner = torch.as_tensor(txt2img, device=text_features.device)
    if owner.shape != text_features.shape[:1]:
        raise ValueError(f"txt2img of shape {tuple(owner.shape)} for {len(text_features)} captions")
    outside = ((owner < 0) | (owner >= num_images)).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"txt2img[{outside[0]}] is {int(owner[outside[0]])}; it has to be the index of one of {num_images} images"
        )
    without = (torch.bincount(owner, minlength=num_images) == 0).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"images {without} have no caption; each needs at least one")
    features = text_features if projection is None else projection.apply(text_features)
    # float64: the order of an image's captions must not show.
    targets = torch.zeros(num_images, features.shape[1], dtype=torch.float64, device=features.device)
    return targets.index_add_(0, owner, features.double()).to(text_features.dtype)


def similarity_loss(image_features: Tensor, targets: Tensor) -> Tensor:
    """L = −(1/B) Σ_i ⟨E_I(x)_i, G_i⟩ of features and targets [B, D]; the attack increases it."""
    return -(image_features * targets).sum(dim=-1).mean()


def evolve_images(
    source: Source,
    images: Tensor,
    targets: Tensor,
    rng: Randomness,
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    num_samples: int = 5,
    triangle: Triangle = "sub",
    project_candidates: bool = True,
    selection: Literal["batch", "image"] = "batch",
    views: Views = ScaledViews(),  # noqa: B008
    random_start: bool = True,
    micro_batch: int | None = None,
) -> EvolvedImages:
    """Move images away from their targets within an L∞ ball (Eq. 5, 6).

    Costs ``V·B + (T−1)(2K+V)·B`` forward and ``V·B + (T−1)(K+V)·B`` backward passes of single images, with V views;
    without mixtures (``triangle="none"``) or with one there is nothing to choose, and K counts as 0.

    Args:
        images: v, clean images [B, 3, H, W] in [0, 1].
        targets: G [B, D] of :func:`caption_targets`.
        rng: start, triples and the noise of the views.
        epsilon: radius of the ball in [0, 1].
        step_size: α > 0. num_steps: T ≥ 1. num_samples: K ≥ 1 mixtures per step.
        triangle: law of the mixtures, see :data:`LAWS`.
        project_candidates: clip candidates to the ball before they are compared.
        selection: ``"batch"`` takes the mixture that is best on average for all images, as the released code does, so
            an image's result depends on its batch; ``"image"`` chooses for each.
        views: whose losses are summed in a step, see :mod:`plait_sa_aet.views`.
        random_start: start from a uniform point of the ball, else from v.
        micro_batch: most images in one pass through the encoder; bounds the memory, not the result.

    Raises:
        ValueError: images that are not floats in [0, 1], targets of another shape, an argument out of range.
        NotDifferentiableError: the source's features do not depend differentiably on the images.
    """
    v = checked_images(images).to(source.device)
    G = targets.to(v)
    _check(v, G, epsilon, step_size, num_steps, num_samples, triangle, selection, micro_batch)
    lower, upper = (v - epsilon).clamp(min=0), (v + epsilon).clamp(max=1)

    x, h = v, None
    if random_start:
        x = (v + rng.init(v.shape, -epsilon, epsilon).to(v)).clamp(0, 1)
    trace = []
    with frozen(source.model):
        for _ in range(num_steps):
            z = x
            step: dict[str, Any] = {"triples": [], "mixture_losses": [], "candidate_losses": []}
            if h is not None and triangle != "none":
                count = 1 if selection == "batch" else len(v)
                # [K, 1 or B, 3]; all K drawn before any gradient
                triples = torch.stack([rng.triple(LAWS[triangle], count) for _ in range(num_samples)]).to(v)
                a, b, c = triples[..., None, None, None].unbind(dim=2)
                mixtures = a * x + b * v + c * h
                best = torch.zeros(count, dtype=torch.long, device=v.device)
                if num_samples > 1:  # Eq. 5: where does a step from x raise the loss most?
                    losses, gradients = _losses_and_gradients(source, mixtures, G, micro_batch)
                    candidates = x + step_size * gradients.sign_()
                    if project_candidates:
                        candidates = candidates.clamp(lower, upper)
                    values = _losses(source, candidates, G, micro_batch)
                    best = (values.mean(dim=1, keepdim=True) if selection == "batch" else values).argmax(dim=0)
                    step["mixture_losses"], step["candidate_losses"] = losses.mean(dim=1), values.mean(dim=1)
                z = mixtures[best, torch.arange(len(v), device=v.device)]
                step["triples"] = triples[best, torch.arange(count, device=v.device)]
            # Eq. 6: the gradient is that at z, the step starts from x
            step["view_losses"], gradient = _summed_over_views(source, z, G, views, rng, micro_batch)
            x, h = (x + step_size * gradient.sign()).clamp(lower, upper), x
            trace.append(step)
    return EvolvedImages(x, h, [{name: _numbers(value) for name, value in step.items()} for step in trace])


def _check(
    v: Tensor,
    G: Tensor,
    epsilon: float,
    step_size: float,
    num_steps: int,
    num_samples: int,
    triangle: str,
    selection: str,
    micro_batch: int | None,
) -> None:
    if G.ndim != 2 or len(G) != len(v) or not G.isfinite().all():
        raise ValueError(f"targets of shape {tuple(G.shape)}; expected finite [{len(v)}, D]")
    if not 0 <= epsilon <= 1 or not step_size > 0:
        raise ValueError(f"epsilon {epsilon} and step_size {step_size}; they have to lie in [0, 1] and above 0")
    if num_steps < 1 or num_samples < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError(
            f"num_steps {num_steps}, num_samples {num_samples}, micro_batch {micro_batch}; each has to be at least 1"
        )
    if triangle not in get_args(Triangle) or selection not in ("batch", "image"):
        raise ValueError(
            f"triangle {triangle!r}, selection {selection!r}; allowed are {', '.join(get_args(Triangle))}, and batch or image"
        )


def _losses(source: Source, stacks: Tensor, targets: Tensor, micro_batch: int | None) -> Tensor:
    """[K, B] losses of K stacks of images [K, B, 3, H, W]; forward only."""
    flat, repeated = stacks.flatten(0, 1), targets.repeat(len(stacks), 1)
    size = micro_batch or len(flat)
    with torch.no_grad():
        losses = [
            -(source.image_features(part) * target).sum(dim=-1)
            for part, target in zip(flat.split(size), repeated.split(size), strict=True)
        ]
    return torch.cat(losses).view(stacks.shape[:2])


def _losses_and_gradients(
    source: Source, stacks: Tensor, targets: Tensor, micro_batch: int | None
) -> tuple[Tensor, Tensor]:
    """[K, B] losses of K stacks of images [K, B, 3, H, W], and the gradient of each image's loss."""
    flat, repeated = stacks.detach().flatten(0, 1), targets.repeat(len(stacks), 1)
    size = micro_batch or len(flat)
    losses, gradients = [], []
    for part, target in zip(flat.split(size), repeated.split(size), strict=True):
        with torch.enable_grad():
            loss = -(source.image_features(part.requires_grad_()) * target).sum(dim=-1)
            gradients += torch.autograd.grad(loss.sum(), part)
        losses.append(loss.detach())
    return torch.cat(losses).view(stacks.shape[:2]), torch.cat(gradients).view(stacks.shape)


def _summed_over_views(
    source: Source, z: Tensor, targets: Tensor, views: Views, rng: Randomness, micro_batch: int | None
) -> tuple[Tensor, Tensor]:
    """[V] losses of the views of z, and the gradient [B, 3, H, W] of their sum."""
    # In two stages, so that micro-batches bound what the encoder keeps for the backward pass.
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        seen = views(z, rng)
        seen = seen if isinstance(seen, Tensor) else torch.stack(list(seen))
    losses, gradients = _losses_and_gradients(source, seen, targets, micro_batch)
    return losses.mean(dim=1), torch.autograd.grad(seen, z, gradients)[0]


def _numbers(value: Tensor | list[float]) -> list[Any]:
    return value.tolist() if isinstance(value, Tensor) else value
