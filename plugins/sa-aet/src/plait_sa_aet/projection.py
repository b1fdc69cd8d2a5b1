"""The semantic projection P, from the singular vectors of the text features of a corpus (SA-AET, Eq. 16-17).

The paper's abstract speaks of projecting onto the corpus's subspace. The released code (``drop_top``) does something
else: it removes the first left singular vector, the direction most texts share, and keeps all others, idle ones too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["drop_top", "span", "top_k", "none"]
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

    mode: Mode
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
    corpus: Tensor, mode: Mode = "drop_top", *, rank: int | None = None, rank_tol: float = 1e-5
) -> SemanticProjection:
    """The projection of a corpus; thin SVD ``Cᵀ = U S Vᵀ``, in float64.

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
    if mode not in get_args(Mode):
        raise ValueError(f"projection {mode!r}; allowed are {', '.join(get_args(Mode))}")
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
