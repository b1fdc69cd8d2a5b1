"""The word attack on captions: swap a word so that the caption leaves its image.

The text half of SA-AET (Jia et al., TPAMI 2025), shared by SGA and DRA, and the BERT-Attack baseline of Co-Attack (Zhang
et al., MM 2022). All captions of a batch advance together: one encode for the importance of all their words, then one per
round, in which every unfinished caption tries its next most important word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from plait_sa_aet.stop_words import STOP_WORDS
from plait_sa_aet.word_candidates import WordCandidates


class TextEncoder(Protocol):
    """The text side of the attacked model."""

    def text_features(self, texts: list[str]) -> Tensor:
        """[N, D], rows of length 1."""
        ...

    def raw_text_features(self, texts: list[str]) -> Tensor:
        """[N, D], as the model makes them."""
        ...


@dataclass
class WordChange:
    """One replaced word.

    Attributes:
        caption: which caption.
        index: which of its words.
        old: the word before.
        new: the word after.
        importance: KL divergence when the word is masked, ≥ 0.
        score_before: what the attack maximises, before this change.
        score_after: the same, after it.
    """

    caption: int
    index: int
    old: str
    new: str
    importance: float
    score_before: float
    score_after: float


@dataclass
class WordAttackResult:
    """Adversarial captions.

    Attributes:
        captions: as many as were given, in their order.
        changes: every replaced word, in the order of captions and of time.
        unattackable: captions without any word that may be changed; they come back as they were.
        num_rejected_multiword: proposals of several words that were dropped.
    """

    captions: list[str]
    changes: list[WordChange]
    unattackable: list[int]
    num_rejected_multiword: int


# (features [S, D], features of the original captions [S, D], numbers of their captions [S]) -> scores [S]
_Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Caption:
    """One caption on its way through the rounds."""

    number: int
    original: list[str]
    importance: dict[int, float]  # of the words that may be changed
    words: list[str] = field(init=False)
    queue: list[int] = field(init=False)
    num_changes: int = 0

    def __post_init__(self) -> None:
        self.words = list(self.original)
        self.queue = sorted(self.importance, key=lambda index: -self.importance[index])  # stable for ties

    def sentence(self, index: int, word: str) -> str:
        return " ".join([*self.words[:index], word, *self.words[index + 1 :]])


def word_attack(
    source: TextEncoder,
    captions: Sequence[str],
    candidates: WordCandidates,
    references: Sequence[Tensor],
    weights: Sequence[float],
    *,
    budget: int = 1,
    top_k: int = 10,
    stop_words: Collection[str] = STOP_WORDS,
    mask_token: str = "[UNK]",
    max_length: int = 77,
    project: Callable[[Tensor], Tensor] | None = None,
) -> WordAttackResult:
    """Swap words so that −Σ_k w_k ⟨E_T(caption), reference_k⟩ grows.

    Args:
        source: the attacked model; its normalised text features are used.
        captions: M cleaned captions, words between single spaces.
        candidates: proposes words for the places of the original captions.
        references: K tensors [M, D]: features of each caption's image (clean, adversarial, previous).
        weights: K numbers.
        budget: words that may change per caption, ≥ 0.
        top_k: candidates asked for per word, ≥ 1.
        stop_words: neither replaced nor written in.
        mask_token: what stands for a word while its importance is measured.
        max_length: tokens that the source reads; a word behind them is not touched.
        project: P of the semantic projection, symmetric, [M, D] -> [M, D]; measures ⟨P E_T(caption), reference_k⟩.

    Raises:
        ValueError: references and weights do not fit each other or the captions, or a number is out of range.
    """
    if not references or len(references) != len(weights):
        raise ValueError(f"{len(references)} references and {len(weights)} weights; give one weight per reference")
    for k, reference in enumerate(references):
        if reference.ndim != 2 or len(reference) != len(captions):
            raise ValueError(f"reference {k} is {list(reference.shape)}; it needs one row for {len(captions)} captions")
    # P is symmetric, so ⟨P f, ref⟩ = ⟨f, P ref⟩; the weighted sum of the references is all that the score needs.
    projected = [reference.detach() if project is None else project(reference.detach()) for reference in references]
    target = sum(w * reference.double().cpu() for w, reference in zip(weights, projected, strict=True))

    def leaves_image(features: Tensor, _originals: Tensor, numbers: Tensor) -> Tensor:
        return -(features * target[numbers]).sum(dim=1)

    return _attack(
        source.text_features, leaves_image, captions, candidates, budget, top_k, stop_words, mask_token, max_length
    )


def bert_words(
    source: TextEncoder,
    captions: Sequence[str],
    candidates: WordCandidates,
    *,
    budget: int = 1,
    top_k: int = 10,
    stop_words: Collection[str] = STOP_WORDS,
    mask_token: str = "[UNK]",
    max_length: int = 77,
) -> WordAttackResult:
    """Swap words so that KL(softmax e(original) ‖ softmax e(changed)) grows, e the un-normalised text embedding.

    The text-only baseline; images play no part. Arguments as in :func:`word_attack`.

    Raises:
        ValueError: a number is out of range.
    """

    def leaves_original(features: Tensor, originals: Tensor, _numbers: Tensor) -> Tensor:
        return divergence(originals, features)

    return _attack(
        source.raw_text_features,
        leaves_original,
        captions,
        candidates,
        budget,
        top_k,
        stop_words,
        mask_token,
        max_length,
    )


def divergence(original: Tensor, changed: Tensor) -> Tensor:
    """KL(softmax original ‖ softmax changed) over the last dimension, [..., D] -> [...]."""
    log_p, log_q = functional.log_softmax(original, dim=-1), functional.log_softmax(changed, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _attack(
    encode: Callable[[list[str]], Tensor],
    score: _Score,
    captions: Sequence[str],
    candidates: WordCandidates,
    budget: int,
    top_k: int,
    stop_words: Collection[str],
    mask_token: str,
    max_length: int,
) -> WordAttackResult:
    if budget < 0 or top_k < 1:
        raise ValueError(f"budget is {budget} and top_k {top_k}; budget is at least 0 and top_k at least 1")
    words = [caption.split(" ") for caption in captions]
    attackable = [_attackable(some, stop_words, max_length) for some in words]
    result = WordAttackResult(list(captions), [], [i for i, places in enumerate(attackable) if not places], 0)
    if budget == 0 or not any(attackable):
        return result

    originals, importance = _importance(encode, captions, words, attackable, mask_token)
    unfinished = [_Caption(i, words[i], importance[i]) for i, places in enumerate(attackable) if places]
    if hasattr(candidates, "prepare"):
        candidates.prepare([captions[caption.number] for caption in unfinished])
    rejected_before = getattr(candidates, "num_rejected_multiword", 0)

    while True:
        trials: list[tuple[_Caption, int, list[str]]] = []  # one word of each unfinished caption
        for caption in unfinished:
            while caption.queue:
                index = caption.queue.pop(0)
                proposals, rejected = _usable(candidates, caption.original, index, top_k, stop_words)
                result.num_rejected_multiword += rejected
                if proposals:
                    # "No change" competes, and wins ties since it comes first.
                    trials.append((caption, index, [caption.words[index], *proposals]))
                    break
        if not trials:
            break
        result.changes += _round(encode, score, trials, originals)
        unfinished = [caption for caption, _, _ in trials if caption.num_changes < budget]
        for caption, _, _ in trials:
            result.captions[caption.number] = " ".join(caption.words)

    result.changes.sort(key=lambda change: change.caption)
    result.num_rejected_multiword += getattr(candidates, "num_rejected_multiword", 0) - rejected_before
    return result


def _attackable(words: Sequence[str], stop_words: Collection[str], max_length: int) -> list[int]:
    # A word has at least one piece, so a place behind the cut is a piece behind the cut.
    read = words[: max(0, max_length - 1)]
    return [index for index, word in enumerate(read) if word and word.lower() not in stop_words]


def _importance(
    encode: Callable[[list[str]], Tensor],
    captions: Sequence[str],
    words: Sequence[Sequence[str]],
    attackable: Sequence[Sequence[int]],
    mask_token: str,
) -> tuple[Tensor, list[dict[int, float]]]:
    """Features of the captions, [M, D], and I_j = KL(caption ‖ caption with word j masked) of their attackable words."""
    masked = [(i, j) for i, places in enumerate(attackable) for j in places]
    sentences = [" ".join([*words[i][:j], mask_token, *words[i][j + 1 :]]) for i, j in masked]
    features = _encode_once(encode, [*captions, *sentences])
    originals = features[: len(captions)]
    owners = torch.tensor([i for i, _ in masked])
    divergences = divergence(originals[owners], features[len(captions) :]).tolist()
    importance: list[dict[int, float]] = [{} for _ in captions]
    for (i, j), value in zip(masked, divergences, strict=True):
        importance[i][j] = value
    return originals, importance


def _usable(
    candidates: WordCandidates, words: Sequence[str], index: int, top_k: int, stop_words: Collection[str]
) -> tuple[list[str], int]:
    """The proposals that may be written in, each once, and how many of several words were dropped."""
    multiword = getattr(candidates, "allow_multiword", False)
    usable: dict[str, None] = {}
    rejected = 0
    for word in _proposed(candidates, words, index, top_k):
        if word in (words[index], "") or "##" in word or word.lower() in stop_words:
            continue
        if " " in word and not multiword:
            rejected += 1
        else:
            usable[word] = None
    return list(usable), rejected


def _proposed(candidates: WordCandidates, words: Sequence[str], index: int, top_k: int) -> list[str]:
    found = candidates.propose(words, index, top_k)
    proposals: list[Any]
    try:
        proposals = [word for word, _ in found]
    except (TypeError, ValueError):
        proposals = [None]
    if not all(isinstance(word, str) for word in proposals):
        raise ValueError(
            f"{type(candidates).__name__}.propose returned {str(found)[:80]} for {words[index]!r}; it has to return a "
            "list of pairs (word, score)"
        )
    return proposals


def _round(
    encode: Callable[[list[str]], Tensor],
    score: _Score,
    trials: Sequence[tuple[_Caption, int, list[str]]],
    originals: Tensor,
) -> list[WordChange]:
    """Try one word of each caption; write in the first of the best."""
    sentences = [caption.sentence(index, word) for caption, index, words in trials for word in words]
    numbers = torch.tensor([caption.number for caption, _, words in trials for _ in words])
    scores = score(_encode_once(encode, sentences), originals[numbers], numbers)
    changes = []
    for (caption, index, words), tried in zip(
        trials, scores.split([len(words) for _, _, words in trials]), strict=True
    ):
        best = int(tried.argmax())
        if best == 0:
            continue
        importance, before, after = caption.importance[index], tried[0].item(), tried[best].item()
        changes.append(WordChange(caption.number, index, words[0], words[best], importance, before, after))
        caption.words[index] = words[best]
        caption.num_changes += 1
    return changes


def _encode_once(encode: Callable[[list[str]], Tensor], sentences: Sequence[str]) -> Tensor:
    """[N, D] in float64 on the CPU, so that equal features get equal scores; equal sentences are encoded once."""
    unique = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentences))}
    features = encode(list(unique)).detach().cpu().double()
    return features[torch.tensor([unique[sentence] for sentence in sentences])]
