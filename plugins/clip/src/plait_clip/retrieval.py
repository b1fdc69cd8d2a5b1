"""Image-text retrieval: recall of the matching captions (TR) and images (IR), in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor

from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import caption_column, check_captions, image_batches, undecoded
from plait_clip.zero_shot import evaluating, image_features


def captions_of(dataset: datasets.Dataset) -> tuple[list[str], Tensor]:
    """All captions, image by image, and the row of the image of each: M texts, int64 [M].

    Raises:
        ValueError: a caption is empty, or there is no such column.
    """
    check_captions(dataset)
    column = caption_column(dataset)
    cells = dataset.with_format(None).select_columns(column)[:][column]
    lists = [[cell] if isinstance(cell, str) else cell for cell in cells]
    owner = torch.repeat_interleave(torch.arange(len(lists)), torch.tensor([len(options) for options in lists]))
    return [text for options in lists for text in options], owner


def text_features(
    model: ImageTextModel, texts: Sequence[str], *, batch_size: int = 1024, precision: str = "fp32"
) -> Tensor:
    """[M, D] of length 1, float32, on the model's device; equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    parts = []
    with evaluating(model, precision):
        for start in range(0, len(unique), batch_size):
            parts.append(F.normalize(model.encode_text(unique[start : start + batch_size]).float(), dim=-1))
    return torch.cat(parts)[torch.tensor([place[text] for text in texts], device=model.device)]


def retrieval_ranks(images: Tensor, texts: Tensor, owner: Tensor, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Rank, from 0, of the best matching caption of every image and of the image of every caption.

    Equal similarities keep the order of the rows. Similarities exist for ``block`` rows at a time.

    Args:
        images: [N, D] and texts: [M, D], of length 1.
        owner: int64 [M] ascending, the image of each text; every image owns at least one.

    Returns:
        int64 [N] (text retrieval) and int64 [M] (image retrieval), on the CPU.
    """
    owner = owner.to(images.device)
    first = torch.searchsorted(owner, torch.arange(len(images) + 1, device=images.device))
    text_ranks = torch.cat(
        [
            _best_ranks(images[rows] @ texts.T, first[rows], first[rows + 1])
            for rows in torch.arange(len(images), device=images.device).split(block)
        ]
    )
    image_ranks = torch.cat(
        [
            _best_ranks(texts[rows] @ images.T, owner[rows], owner[rows] + 1)
            for rows in torch.arange(len(texts), device=images.device).split(block)
        ]
    )
    return text_ranks.cpu(), image_ranks.cpu()


def _best_ranks(scores: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Place of the best of the columns [start, stop) among all columns, for every row of ``scores``."""
    column = torch.arange(scores.shape[1], device=scores.device)
    right = (column >= start[:, None]) & (column < stop[:, None])
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    place = (right & (scores == best)).int().argmax(dim=1, keepdim=True)
    return (scores > best).sum(dim=1) + ((scores == best) & (column < place)).sum(dim=1)


def reranked_ranks(
    model: ImageTextModel,
    batches: Iterable[Tensor],
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    owner: Tensor,
    folder: Path,
    *,
    candidates: int = 128,
    batch_size: int = 64,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """:func:`retrieval_ranks` of a fusion model: the nearest candidates are ordered anew by their match score.

    Args:
        batches: the images once more, [B, 3, S, S], uint8 or float in [0, 1].
        folder: their states are in a file there as long as the call lasts.
        candidates: how many nearest captions (images) are scored; whatever is not among them ranks last.
        batch_size: pairs scored at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        states = _image_states(model, batches, len(images), Path(scratch) / "image_states.bin", precision)
        return _reranked(model, states, images, texts, captions, owner.cpu(), candidates, batch_size, precision)


def _reranked(
    model: ImageTextModel,
    states: Tensor,
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    owner: Tensor,
    candidates: int,
    batch_size: int,
    precision: str,
) -> tuple[Tensor, Tensor]:

    def scores(rows: Tensor, columns: Tensor) -> Tensor:
        with evaluating(model, precision):
            return torch.cat(
                [
                    model.match_states(states[r].to(model.device).float(), [captions[i] for i in c.tolist()])
                    .float()
                    .cpu()
                    for r, c in zip(rows.split(batch_size), columns.split(batch_size), strict=True)
                ]
            )

    text_ranks = torch.full((len(images),), len(texts), dtype=torch.long)
    for i in range(len(images)):
        near = (texts @ images[i]).topk(min(candidates, len(texts))).indices.cpu()
        ordered = near[scores(torch.full_like(near, i), near).argsort(descending=True, stable=True)]
        hits = (owner[ordered] == i).nonzero()
        if len(hits):
            text_ranks[i] = hits[0, 0]
    image_ranks = torch.full((len(texts),), len(images), dtype=torch.long)
    for j in range(len(texts)):
        near = (images @ texts[j]).topk(min(candidates, len(images))).indices.cpu()
        ordered = near[scores(near, torch.full_like(near, j)).argsort(descending=True, stable=True)]
        hits = (ordered == owner[j]).nonzero()
        if len(hits):
            image_ranks[j] = hits[0, 0]
    return text_ranks, image_ranks


def _image_states(model: ImageTextModel, batches: Iterable[Tensor], count: int, path: Path, precision: str) -> Tensor:
    """What :meth:`match_states` needs of every image, [N, P, C], in a memory-mapped file."""
    states: Tensor | None = None
    done = 0
    for images in batches:
        pixels = images.to(model.device)
        pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
        with evaluating(model, precision):
            found = model.image_states(pixels).float().cpu()
        if states is None:
            size = count * found[0].numel()
            states = torch.from_file(str(path), shared=True, size=size).view(count, *found.shape[1:])
        states[done : done + len(found)] = found
        done += len(found)
    assert states is not None
    return states


def evaluate_retrieval(
    model: ImageTextModel,
    dataset: datasets.Dataset,
    folder: Path,
    *,
    candidates: int = 128,
    batch_size: int = 256,
    block: int = 1024,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Ranks for a dataset with ``image`` and ``captions``; fusion models rerank their nearest candidates."""
    undecoded(dataset)
    captions, owner = captions_of(dataset)

    def batches() -> Iterable[Tensor]:
        return image_batches(dataset, model.image_input, batch_size=batch_size)

    images = torch.cat(list(image_features(model, batches(), precision=precision)))
    texts = text_features(model, captions, precision=precision)
    return ranks_by_model(
        model, batches, images, texts, captions, owner, folder, candidates=candidates, block=block, precision=precision
    )


def ranks_by_model(
    model: ImageTextModel,
    batches: Callable[[], Iterable[Tensor]],
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    owner: Tensor,
    folder: Path,
    *,
    candidates: int = 128,
    block: int = 1024,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """As the model itself ranks: by cosine, or for a fusion model by :func:`reranked_ranks`.

    Args:
        batches: gives the images once more, [B, 3, S, S], uint8 or float in [0, 1].
        images: [N, D] and texts: [M, D], the model's features, of length 1.

    Raises:
        ValueError: features are not finite.
    """
    for what, features in (("image", images), ("text", texts)):
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"the {what} embeddings are not finite; load a sound model")
    if model.kind != "fusion":
        return retrieval_ranks(images, texts, owner, block=block)
    return reranked_ranks(
        model, batches(), images, texts, captions, owner, folder, candidates=candidates, precision=precision
    )


def recall(ranks: Tensor, k: int) -> float:
    """Share of ranks below ``k``."""
    return (ranks < k).double().mean().item()
