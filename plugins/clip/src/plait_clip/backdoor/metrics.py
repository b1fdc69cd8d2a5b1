"""How well a backdoor works on a model, and how well suspicion scores find poisoned pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from plait_clip.backdoor.poison import Trigger, pixels, prepared
from plait_clip.model import ImageInput, ImageTextModel
from plait_clip.pair_batches import open_image, undecoded
from plait_clip.zero_shot import accuracy, top_classes

FEW_CLASSES = 20


@dataclass(frozen=True)
class BackdoorMetrics:
    """Shares in [0, 1]; ``clean`` and ``success`` map m to CA@m and ASR@m.

    Attributes:
        triggered: TA, the share of triggered images that are still taken for what they are.
        target_clean: CA@1 of the target class; ``None`` if no test image shows it.
    """

    clean: dict[int, float]
    success: dict[int, float]
    triggered: float
    target_clean: float | None


def backdoor_metrics(
    clean_top: Tensor,
    triggered_top: Tensor,
    labels: Tensor,
    target: int,
    ranks: Sequence[int],
    exclude_target: bool = True,
) -> BackdoorMetrics:
    """CA@m, ASR@m, TA and the target's CA from the nearest classes of clean and of triggered images.

    Args:
        clean_top, triggered_top: int64 ``[N, M]``, the M nearest classes of each image, nearest first.
        labels: int64 ``[N]``.
        exclude_target: leave out images of the target class from ASR and TA; False counts them, as the authors' code.

    Raises:
        ValueError: every image is of the target class, and they are to be left out.
    """
    asked = labels != target if exclude_target else torch.ones_like(labels, dtype=torch.bool)
    if not asked.any():
        raise ValueError("all test images show the target class; ASR needs images of other classes")
    wanted = torch.full_like(labels[asked], target)
    of_target = labels == target
    return BackdoorMetrics(
        clean={m: accuracy(clean_top, labels, m) for m in ranks},
        success={m: accuracy(triggered_top[asked], wanted, m) for m in ranks},
        triggered=accuracy(triggered_top[asked], labels[asked], 1),
        target_clean=accuracy(clean_top[of_target], labels[of_target], 1) if of_target.any() else None,
    )


def ranks_for(num_classes: int, wanted: Sequence[int]) -> list[int]:
    """The m that say something: below the number of classes, and at most 3 if there are few classes."""
    most = num_classes - 1 if num_classes >= FEW_CLASSES else min(3, num_classes - 1)
    return sorted({m for m in wanted if m <= most} | {1})


def triggered_batches(
    data: datasets.Dataset,
    trigger: Trigger,
    image_input: ImageInput,
    model_input: ImageInput,
    *,
    batch_size: int = 256,
    threads: int = 4,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images with the trigger, in order, as the model takes them: uint8 ``[B, 3, S, S]``, and which it left as they are.

    What is random in the trigger depends on the row number alone.

    Args:
        image_input: brings images to size before the trigger.
        model_input: brings them to the model's size after it.
    """
    cells = undecoded(data).select_columns("image")
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(cells), batch_size):
            rows = range(start, min(start + batch_size, len(cells)))
            plain = prepared(list(pool.map(open_image, cells[start : rows.stop]["image"], rows)), image_input)
            changed = trigger(plain, rows)
            seen = _to_model(changed, model_input)
            yield seen, (seen == _to_model(plain, model_input)).flatten(1).all(dim=1)


def classify_triggered(
    model: ImageTextModel,
    head: Tensor,
    data: datasets.Dataset,
    trigger: Trigger,
    image_input: ImageInput,
    *,
    top: int,
    batch_size: int = 256,
    precision: str = "fp32",
) -> tuple[Tensor, int]:
    """Int64 ``[N, top]``, the nearest classes of all images with the trigger, and how many images it left as they are.

    Args:
        head: ``[K, D]``, see :func:`plait_clip.zero_shot.zero_shot_head`.
        image_input: brings images to size before the trigger.
    """
    unchanged = 0

    def images() -> Iterator[Tensor]:
        nonlocal unchanged
        for seen, same in triggered_batches(data, trigger, image_input, model.image_input, batch_size=batch_size):
            unchanged += int(same.sum())
            yield seen

    return top_classes(model, head, images(), top=top, precision=precision), unchanged


def _to_model(images: Tensor, model_input: ImageInput) -> Tensor:
    if images.shape[-2:] == (model_input.size, model_input.size):
        return images
    return prepared([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], model_input)


def images_of(data: datasets.Dataset, rows: Sequence[int], image_input: ImageInput | None = None) -> list[Tensor]:
    """Some images, uint8 ``[3, H, W]`` each: as the trigger meets them, or at their own size."""
    cells = undecoded(data)
    pictures = [open_image(cells[row]["image"], row) for row in rows]
    return [pixels(picture) for picture in pictures] if image_input is None else list(prepared(pictures, image_input))


# --- Detection ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectionMetrics:
    """``precision`` and ``recall`` map k to their value among the k highest scores; the areas may be ``None``."""

    precision: dict[int, float]
    recall: dict[int, float]
    auroc: float | None
    average_precision: float | None


def scores_of(data: datasets.Dataset, column: str) -> np.ndarray:
    """``[N]`` float, a column of suspicion scores; a missing score is NaN.

    Raises:
        ValueError: the column is missing or holds no numbers.
    """
    if column not in data.column_names:
        raise ValueError(f"column {column!r} is missing; the data have {', '.join(data.column_names)}")
    feature = data.features[column]
    kind = feature.dtype if isinstance(feature, datasets.Value) else str(feature)
    if not kind.startswith(("float", "int", "uint")):
        raise ValueError(f"column {column!r} holds {kind}; scores are numbers")
    return np.asarray(data.with_format(None).select_columns(column)[:][column], float)


def detection_metrics(scores: np.ndarray, flags: np.ndarray, ks: Sequence[int]) -> DetectionMetrics:
    """How well high scores find the flagged rows.

    Args:
        scores: ``[N]``, higher is more suspicious; NaN (not scored) ranks below all others. Ties go to the first row.
        flags: ``[N]`` bool.
        ks: sizes of the lists that are looked at, each up to N.

    Returns:
        The areas under the ROC and the precision-recall curve are ``None`` if all rows or none are flagged.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    finite = np.where(np.isnan(scores), -np.inf, scores)
    # Ranks instead of values: scikit-learn takes no infinities.
    _, ranks = np.unique(finite, return_inverse=True)
    hits = np.cumsum(flags[np.argsort(-ranks, kind="stable")])
    both = 0 < flags.sum() < len(flags)
    return DetectionMetrics(
        precision={k: float(hits[k - 1] / k) for k in ks},
        recall={k: float(hits[k - 1] / max(1, flags.sum())) for k in ks},
        auroc=float(roc_auc_score(flags, ranks)) if both else None,
        average_precision=float(average_precision_score(flags, ranks)) if both else None,
    )
