"""UBT as a method of plait: which pairs are suspicious (``extract-feature``), and a cleaned model (``defend``)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs
import datasets
import numpy as np
from plait import hookimpl
from plait.fields import field, in_range, output_field
from plait_clip import PairLoader, as_given, first_captions
from plait_clip.backdoor import SUSPICIOUS, flags_of, model_and_pairs, sound_copy

from plait_ubt.embeddings import CaptionedImages
from plait_ubt.evidence import Evidence
from plait_ubt.options import Detection, ForgetLoss, RankMode, Scope, TokenSelection, UbtOptions
from plait_ubt.report import report, verdict
from plait_ubt.ubt import find_suspicious, ubt


@attrs.frozen(kw_only=True)
class Ubt:
    """UBT: overfit to expose poisoned pairs, then unlearn only their tokens (Liang et al., 2024)."""

    takes = {"model": "image-text-model", "data": "dataset", "reference": "image-text-model"}
    columns_needed = ("image",)

    rank_mode: RankMode = field(
        "low_reference", "suspicious are the pairs least similar to the reference model, or most similar to the suspect"
    )
    n_suspicious: float | None = field(
        None,
        "suspicious pairs, or a share of all up to 0.5; default max(2000, 0.4 %), at most a quarter",
        in_range(0, low_open=True),
    )
    n_normal: int | None = field(None, "normal pairs; default half of all, at most 50 n_suspicious", in_range(1))
    detection: Detection = field(
        "overfit",
        "what ranks the suspicious pairs: the overfitted model; or, to ablate, the suspected model, the first "
        "split itself, the column is_backdoor",
    )
    overfit_normal_weight: float = field(
        1.0, "α, weight of the normal pairs while overfitting; 0: fastest", in_range(0)
    )
    num_overfit_epochs: int = field(15, "passes over the suspicious pairs; 10 do with α = 0", in_range(1, 50))
    overfit_learning_rate: float = field(1e-5, "peak rate of overfitting", in_range(0, low_open=True))
    overfit_batch_size: int = field(128, "pairs a step", in_range(2))
    min_gap_change: float = field(
        0.01, "overfitting ends when the score gap changes by a smaller share than this; 0: never early", in_range(0)
    )
    n_top: int = field(64, "k, the pairs taken for poisoned", in_range(8))
    min_concentration: float = field(1.0, "κ below which no shortcut is seen and the model is kept", in_range(0))
    force: bool = field(False, "unlearn whatever κ is")
    n_unlearn: int = field(64, "pairs to unlearn, at most n_top", in_range(4))
    token_selection: TokenSelection = field(
        "lift", "what is forgotten: over-represented words, leave-one-out words, random spans, whole captions"
    )
    max_forget_words: int = field(3, "words taken by lift", in_range(1, 10))
    loo_ratio: float = field(0.25, "share of a caption's words taken by loo", in_range(0, 1, low_open=True))
    forget_loss: ForgetLoss = field("hinge", "max(0, c − m)², (c + τ)², or ascent on the cross-entropy")
    forget_weight: float = field(4.0, "weight of forgetting", in_range(0))
    forget_target: float = field(0.0, "m of hinge, τ ≥ 0 of square, a cosine", in_range(-1, 1))
    retain_weight: float = field(1.0, "weight of the contrastive loss of normal pairs", in_range(0))
    keep_weight: float = field(0.0, "weight of (1 − c)² of the words that are not forgotten", in_range(0))
    n_retain: int = field(512, "normal pairs used for retention", in_range(1))
    unlearn_batch_size: int = field(64, "pairs to unlearn in a step, at most n_unlearn", in_range(1))
    retain_batch_size: int = field(64, "normal pairs a step", in_range(2))
    num_unlearn_steps: int = field(20, "steps of unlearning", in_range(0, 200))
    unlearn_learning_rate: float = field(5e-6, "rate of unlearning, constant", in_range(0, low_open=True))
    betas: tuple[float, float] = field((0.9, 0.999), "of AdamW, both trainings", in_range(0, 1, high_open=True))
    max_grad_norm: float | None = field(1.0, "the gradient of unlearning is clipped to it", in_range(0, low_open=True))
    text_grad: bool = field(True, "forgetting moves the text tower too; false spares the target class")
    scope: Scope = field("all", "the parameters that unlearning may change")
    label_consistent: bool = field(
        False, "declare that poison may carry true captions: the report then warns about recall"
    )
    keep_overfit: Path | None = output_field(
        None, "folder for the overfitted model, whose backdoor is stronger; not kept by default"
    )

    renamed_fields: ClassVar[dict[str, str]] = {
        "overfit_epochs": "num_overfit_epochs",
        "overfit_lr": "overfit_learning_rate",
        "unlearn_steps": "num_unlearn_steps",
        "unlearn_lr": "unlearn_learning_rate",
    }

    def __attrs_post_init__(self) -> None:
        self.options()

    def options(self) -> UbtOptions:
        """The same settings for the plain functions.

        Raises:
            ValueError: settings that do not go together.
        """
        return UbtOptions(**{one.name: getattr(self, one.name) for one in dataclasses.fields(UbtOptions)})

    gives = {"defend": "model", "extract_feature": "data"}
    columns_made = {"extract_feature": ("suspicion", "similarity", "stage", "is_suspect")}

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> Any:
        """A cleaned copy of ``model``, or an unchanged one where the suspicious captions share no word.

        Args:
            data: the pairs that the model was trained on, or a mapping with them as ``suspicious``.
            reference: a clean model; needed unless ``rank_mode`` is ``top_poisoned``.
        """
        suspected, table = model_and_pairs(model, data, SUSPICIOUS, "ubt", run.device, run.warn)
        with self._arguments(suspected, table, reference, run) as arguments:
            cleaned, evidence = ubt(**arguments)
        self._report(evidence, run)
        if not evidence.coherent:
            run.warn(f"{verdict(evidence)}; the model is returned unchanged")
        return as_given(cleaned, model)

    @hookimpl
    def extract_feature(self, model: Any, data: Any, run: Any) -> datasets.Dataset:
        """The pairs with columns ``suspicion`` (larger: more suspicious), ``similarity`` (of the first split), ``stage``
        (rest, suspicious, top, unlearn) and the boolean ``is_suspect``, of the pairs taken for poisoned (none where the
        suspicious captions share no word); no weight is changed.

        Args:
            model: the suspected model, or a mapping with ``suspected`` and ``reference``.
            data: the pairs that it was trained on, or a mapping with them as ``suspicious``.
        """
        models = model if isinstance(model, Mapping) else {"suspected": model}
        if "suspected" not in models or not set(models) <= {"suspected", "reference"}:
            raise ValueError(f"model is given {', '.join(models)}; give suspected and reference, or one model")
        suspected, table = model_and_pairs(models["suspected"], data, SUSPICIOUS, "ubt", run.device, run.warn)
        with self._arguments(suspected, table, models.get("reference"), run) as arguments:
            evidence = find_suspicious(**arguments)
        self._report(evidence, run)
        if not evidence.coherent:
            run.warn(f"{verdict(evidence)}; no pair is marked as suspect")
        suspect = np.zeros(len(table), bool)
        suspect[evidence.top] = evidence.coherent
        stage = np.full(len(table), "rest", dtype=object)
        stage[evidence.split.suspicious] = "suspicious"
        stage[evidence.top] = "top"
        stage[evidence.unlearn_rows] = "unlearn"
        columns = {
            "suspicion": evidence.suspicion,
            "similarity": evidence.similarity,
            "stage": stage,
            "is_suspect": suspect,
        }
        table = table.remove_columns([name for name in columns if name in table.column_names])
        for name, values in columns.items():
            table = table.add_column(name, values.tolist())
        return table

    @contextlib.contextmanager
    def _arguments(self, model: Any, table: datasets.Dataset, reference: Any, run: Any) -> Iterator[dict[str, Any]]:
        """What both hooks give to the algorithm, and checkpoints for as long as it runs."""
        if self.rank_mode == "top_poisoned":
            reference = None
        if reference is not None:
            reference = sound_copy(reference, run.device)
        inputs = (model, reference, table)
        with (
            run.loop(self, "similarity of all pairs", inputs=inputs) as ranking,
            run.loop(self, "overfit", inputs=inputs) as overfitting,
        ):
            yield {
                "model": model,
                "pairs": _captioned_images(table, model),
                "reference": reference,
                "options": self.options(),
                "reference_pairs": None if reference is None else _captioned_images(table, reference),
                "poisoned_rows": np.flatnonzero(flags_of(table)) if self.detection == "oracle" else None,
                "seed_for": run.derived_seed,
                "rank_checkpoint": ranking,
                "overfit_checkpoint": overfitting,
                "track": run.track,
                "log": run.log,
                "warn": run.warn,
            }

    def _report(self, evidence: Evidence, run: Any) -> None:
        if self.keep_overfit is not None and evidence.overfitted is not None:
            overfitted: Any = evidence.overfitted
            overfitted.save_pretrained(self.keep_overfit)
            run.warn(f"{self.keep_overfit} holds a model with a stronger backdoor than the suspected one")
        run.add(report(evidence, label_consistent=self.label_consistent))


def _captioned_images(table: datasets.Dataset, model: Any) -> CaptionedImages:
    """Images at the model's size, and the first caption of every image."""
    loader = PairLoader(table, model)
    return CaptionedImages(
        first_captions(table), lambda rows: loader.read([int(row) for row in rows], [0.0] * len(rows)).pixels
    )
