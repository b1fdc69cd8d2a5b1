"""UBT as a method of plait: which pairs are suspicious (``extract-feature``), and a cleaned model (``defend``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
import numpy as np
import torch
from plait import PlaitError, hookimpl
from plait.fields import doc, in_range, one_of, output_path
from plait_clip.backdoor.plugin.defences import SUSPICIOUS, copy_of, part_of, scratch, sound_copy
from plait_clip.backdoor.poison import flags_of
from plait_clip.loader import Pairs as LoadedPairs
from plait_clip.loader import check_captions, first_captions
from plait_clip.plugin.errors import as_plait_errors

from plait_ubt import tokens, ubt
from plait_ubt.evidence import Evidence, report

__plait_api__ = "0.1"


@attrs.frozen(kw_only=True)
class Ubt:
    """UBT: overfit to expose poisoned pairs, then unlearn only their tokens (Liang et al., 2024)."""

    rank_mode: Literal["low_reference", "top_poisoned"] = attrs.field(
        default="low_reference",
        validator=one_of("low_reference", "top_poisoned"),
        metadata=doc("suspicious are the pairs least similar to the reference model, or most similar to the suspect"),
    )
    n_suspicious: float | None = attrs.field(
        default=None,
        validator=in_range(0, low_open=True),
        metadata=doc("suspicious pairs, or a share of all up to 0.5; default max(2000, 0.4 %), at most a quarter"),
    )
    n_normal: int | None = attrs.field(
        default=None,
        validator=in_range(1),
        metadata=doc("normal pairs; default half of all, at most 50 n_suspicious"),
    )
    detection: Literal["overfit", "suspected", "reference", "oracle"] = attrs.field(
        default="overfit",
        validator=one_of("overfit", "suspected", "reference", "oracle"),
        metadata=doc(
            "what ranks the suspicious pairs: the overfitted model; or, to ablate, the suspected model, the first "
            "split itself, the column is_backdoor"
        ),
    )
    overfit_normal_weight: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("α, weight of the normal pairs while overfitting; 0: fastest")
    )
    overfit_epochs: int = attrs.field(
        default=15, validator=in_range(1, 50), metadata=doc("passes over the suspicious pairs; 10 do with α = 0")
    )
    overfit_lr: float = attrs.field(
        default=1e-5, validator=in_range(0, low_open=True), metadata=doc("peak rate of overfitting")
    )
    overfit_batch_size: int = attrs.field(default=128, validator=in_range(2), metadata=doc("pairs a step"))
    min_gap_change: float = attrs.field(
        default=0.01,
        validator=in_range(0),
        metadata=doc("overfitting ends when the score gap changes by a smaller share than this; 0: never early"),
    )
    n_top: int = attrs.field(default=64, validator=in_range(8), metadata=doc("k, the pairs taken for poisoned"))
    min_concentration: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("κ below which no shortcut is seen and the model is kept")
    )
    force: bool = attrs.field(default=False, metadata=doc("unlearn whatever κ is"))
    n_unlearn: int = attrs.field(default=64, validator=in_range(4), metadata=doc("pairs to unlearn, at most n_top"))
    token_selection: Literal["lift", "loo", "span", "all"] = attrs.field(
        default="lift",
        validator=one_of("lift", "loo", "span", "all"),
        metadata=doc("what is forgotten: over-represented words, leave-one-out words, random spans, whole captions"),
    )
    max_forget_words: int = attrs.field(default=3, validator=in_range(1, 10), metadata=doc("words taken by lift"))
    loo_ratio: float = attrs.field(
        default=0.25, validator=in_range(0, 1, low_open=True), metadata=doc("share of a caption's words taken by loo")
    )
    forget_loss: ubt.ForgetLoss = attrs.field(
        default="hinge",
        validator=one_of("hinge", "square", "ascent"),
        metadata=doc("max(0, c − m)², (c + τ)², or ascent on the cross-entropy"),
    )
    forget_weight: float = attrs.field(default=4.0, validator=in_range(0), metadata=doc("weight of forgetting"))
    forget_target: float = attrs.field(
        default=0.0, validator=in_range(-1, 1), metadata=doc("m of hinge, τ ≥ 0 of square, a cosine")
    )
    retain_weight: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("weight of the contrastive loss of normal pairs")
    )
    keep_weight: float = attrs.field(
        default=0.0, validator=in_range(0), metadata=doc("weight of (1 − c)² of the words that are not forgotten")
    )
    n_retain: int = attrs.field(default=512, validator=in_range(1), metadata=doc("normal pairs used for retention"))
    unlearn_batch_size: int = attrs.field(
        default=64, validator=in_range(1), metadata=doc("pairs to unlearn in a step, at most n_unlearn")
    )
    retain_batch_size: int = attrs.field(default=64, validator=in_range(2), metadata=doc("normal pairs a step"))
    unlearn_steps: int = attrs.field(default=20, validator=in_range(0, 200), metadata=doc("steps of unlearning"))
    unlearn_lr: float = attrs.field(
        default=5e-6, validator=in_range(0, low_open=True), metadata=doc("rate of unlearning, constant")
    )
    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), validator=in_range(0, 1, high_open=True), metadata=doc("of AdamW, both trainings")
    )
    max_grad_norm: float | None = attrs.field(
        default=1.0, validator=in_range(0, low_open=True), metadata=doc("the gradient of unlearning is clipped to it")
    )
    text_grad: bool = attrs.field(
        default=True, metadata=doc("forgetting moves the text tower too; false spares the target class")
    )
    scope: ubt.Scope = attrs.field(
        default="all",
        validator=one_of("all", "visual", "text", "proj"),
        metadata=doc("the parameters that unlearning may change"),
    )
    label_consistent: bool = attrs.field(
        default=False, metadata=doc("declare that poison may carry true captions: the report then warns about recall")
    )
    keep_overfit: Path | None = attrs.field(
        default=None,
        metadata=output_path("folder for the overfitted model, whose backdoor is stronger; not kept by default"),
    )

    def __attrs_post_init__(self) -> None:
        if self.n_unlearn > self.n_top:
            raise PlaitError(f"n_unlearn is {self.n_unlearn}; allowed is up to n_top, {self.n_top}")
        share = self.n_suspicious is not None and self.n_suspicious < 1
        if share and self.n_suspicious > 0.5:
            raise PlaitError(f"n_suspicious is {self.n_suspicious}; allowed is a share up to 0.5 or a number of pairs")
        if self.n_suspicious is not None and not share and self.n_suspicious != int(self.n_suspicious):
            raise PlaitError(f"n_suspicious is {self.n_suspicious}; allowed is a share up to 0.5 or a whole number")
        if self.forget_loss == "square" and self.forget_target < 0:
            raise PlaitError(
                f"forget_target is {self.forget_target}; the square loss would pull the pairs together below 0"
            )
        if self.forget_loss == "ascent" and self.retain_batch_size < 8:
            raise PlaitError(f"retain_batch_size is {self.retain_batch_size}; forget_loss 'ascent' needs at least 8")

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> Any:
        """A cleaned copy of ``model``, or an unchanged one where the suspicious captions share no word.

        Args:
            data: the pairs that the model was trained on, or a mapping with them as ``suspicious``.
            reference: a clean model; needed unless ``rank_mode`` is ``top_poisoned``.
        """
        table, model = part_of(data, SUSPICIOUS, "ubt"), copy_of(model, run)
        with _one_sentence():
            evidence = self._inspect(model, table, reference, run)
            run.add(report(evidence))
            if not evidence.coherent:
                run.warn(f"{evidence.verdict}; the model is returned unchanged")
                return model.eval()
            retain = torch.randperm(len(evidence.split.normal), generator=run.generator("retain"))[: self.n_retain]
            cleaned = ubt.unlearn(
                model,
                evidence.pairs,
                evidence.unlearn_rows,
                evidence.split.normal[np.sort(retain.numpy())],
                evidence.caption_split,
                forget_loss=self.forget_loss,
                forget_weight=self.forget_weight,
                forget_target=self.forget_target,
                retain_weight=self.retain_weight,
                keep_weight=self.keep_weight,
                unlearn_batch_size=self.unlearn_batch_size,
                retain_batch_size=self.retain_batch_size,
                num_steps=self.unlearn_steps,
                lr=self.unlearn_lr,
                betas=self.betas,
                max_grad_norm=self.max_grad_norm,
                text_grad=self.text_grad,
                scope=self.scope,
                seed=run.derived_seed("unlearn"),
                track=run.track,
                log=run.log,
            )
        cleaned.zero_grad(set_to_none=True)
        return cleaned

    @hookimpl
    def extract_feature(self, model: Any, data: Any, run: Any) -> datasets.Dataset:
        """The pairs with columns ``suspicion`` (larger: more suspicious), ``similarity`` (of the first split) and
        ``stage`` (rest, suspicious, top, unlearn); no weight is changed.

        Args:
            model: the suspected model, or a mapping with ``suspected`` and ``reference``.
            data: the pairs that it was trained on, or a mapping with them as ``suspicious``.
        """
        models = model if isinstance(model, Mapping) else {"suspected": model}
        if "suspected" not in models or not set(models) <= {"suspected", "reference"}:
            raise PlaitError(f"model is given {', '.join(models)}; give suspected and reference, or one model")
        data = part_of(data, SUSPICIOUS, "ubt")
        with _one_sentence():
            evidence = self._inspect(copy_of(models["suspected"], run), data, models.get("reference"), run)
        run.add(report(evidence))
        stage = np.full(len(data), "rest", dtype=object)
        for name, rows in (
            ("suspicious", evidence.split.suspicious),
            ("top", evidence.top),
            ("unlearn", evidence.unlearn_rows),
        ):
            stage[rows] = name
        data = data.remove_columns([c for c in ("suspicion", "similarity", "stage") if c in data.column_names])
        return (
            data.add_column("suspicion", evidence.suspicion.tolist())
            .add_column("similarity", evidence.similarity.tolist())
            .add_column("stage", stage.tolist())
        )

    def _inspect(self, model: Any, data: datasets.Dataset, reference: Any | None, run: Any) -> Evidence:
        """Steps 0 to 4: rank, overfit, rank again, find the forget words."""
        n_suspicious, n_normal = self._sizes(len(data))
        check_captions(data, model, run.warn)
        pairs = _pairs(data, model)
        lettered = sum(map(tokens.has_letters, pairs.captions))
        if lettered < len(pairs) / 2:
            run.warn(f"{len(pairs) - lettered} captions hold no letter; their words are taken to be split by blanks")

        # Steps 0 and 1
        ranks_low = self.rank_mode == "low_reference"
        if ranks_low and reference is None:
            raise PlaitError("rank_mode low_reference needs a clean model as reference; give one, or use top_poisoned")
        if not ranks_low:
            run.warn("pairs are ranked by the suspected model itself, which finds fewer of the poisoned ones")
        ranker = sound_copy(reference, run) if ranks_low else model
        folder = scratch(run, self, torch.nn.ModuleList([model, ranker]), data)
        similarity = ubt.similarities(
            ranker,
            _pairs(data, ranker) if ranks_low else pairs,
            range(len(pairs)),
            store=folder / "similarity.npy",
            track=run.track,
            description="similarity of all pairs",
        )
        split_by = ubt.split_low_reference if ranks_low else ubt.split_top_poisoned
        split = split_by(similarity, n_suspicious, n_normal)
        if len(split.normal) < (n_normal if self.n_normal else 1):
            raise PlaitError(
                f"n_normal is {n_normal}, but {len(split.normal)} pairs are left for it; lower n_suspicious"
            )

        # Steps 2 and 3
        first = -similarity if ranks_low else similarity
        suspicion = first.copy()
        scorer, gaps = model, []
        if self.detection == "overfit":
            scorer, gaps = ubt.overfit(
                model,
                pairs,
                split,
                normal_weight=self.overfit_normal_weight,
                num_epochs=self.overfit_epochs,
                lr=self.overfit_lr,
                betas=self.betas,
                batch_size=self.overfit_batch_size,
                n_top=self.n_top,
                min_gap_change=self.min_gap_change,
                seed=run.derived_seed("overfit"),
                checkpoint=folder / "overfit.pt",
                track=run.track,
                log=run.log,
            )
            if self.keep_overfit is not None:
                scorer.save_pretrained(self.keep_overfit)
                run.warn(f"{self.keep_overfit} holds a model with a stronger backdoor than the suspected one")
        if self.detection in ("overfit", "suspected"):
            scores = ubt.similarities(scorer, pairs, split.suspicious.tolist(), track=run.track)
            suspicion[split.suspicious] = 2 + scores  # above every pair outside D_susp
        elif self.detection == "reference":
            scores = first[split.suspicious]
        else:
            split, scores = _oracle(data, split, run.numpy_generator("oracle"), self.n_top)
            suspicion[split.suspicious] = 2 + scores
        top = ubt.most_similar(split.suspicious, scores, self.n_top)

        # Step 4
        top_captions = [pairs.captions[row] for row in top]
        normal_captions = [pairs.captions[row] for row in split.normal]
        folding = tokens.plural_folding([*top_captions, *normal_captions])
        lifts = tokens.word_lifts(top_captions, normal_captions, folding)
        kappa = tokens.concentration(lifts)
        words = tokens.select_forget_words(lifts, self.max_forget_words) if self.token_selection == "lift" else []
        coherent = kappa >= self.min_concentration or self.force
        candidates = top[: self.n_unlearn]
        caption_split = self._caption_split(pairs, scorer, words, folding, candidates)
        anything = torch.Generator().manual_seed(0)
        unlearn_rows = np.array([row for row in candidates if caption_split(int(row), anything).forget], dtype=int)
        if coherent and len(unlearn_rows) == 0:
            raise PlaitError(
                f"none of the {len(candidates)} pairs to unlearn holds a forget word ({', '.join(words) or 'none was found'}); "
                "use token_selection span or all"
            )
        return Evidence(
            pairs=pairs,
            similarity=similarity,
            suspicion=suspicion,
            split=split,
            scores=scores,
            top=top,
            unlearn_rows=unlearn_rows,
            num_dropped=len(candidates) - len(unlearn_rows),
            lifts=lifts,
            kappa=kappa,
            min_concentration=self.min_concentration,
            coherent=coherent,
            forget_words=words,
            gap=ubt.score_gap(scores, self.n_top),
            overfit_epochs=len(gaps),
            token_selection=self.token_selection,
            caption_split=caption_split,
            label_consistent=self.label_consistent,
        )

    def _caption_split(
        self, pairs: ubt.Pairs, scorer: Any, words: list[str], folding: Mapping[str, str], rows: np.ndarray
    ) -> Callable[[int, torch.Generator], tokens.CaptionSplit]:
        captions = pairs.captions
        if self.token_selection == "span":
            return lambda row, generator: tokens.split_at_random_span(captions[row], generator)
        if self.token_selection == "lift":
            found = {row: tokens.split_at_words(captions[row], words, folding) for row in rows.tolist()}
        elif self.token_selection == "loo":
            found = {
                row: ubt.split_by_leave_one_out(scorer, pairs.images([row])[0], captions[row], self.loo_ratio)
                for row in rows.tolist()
            }
        else:
            found = {row: tokens.whole_caption(captions[row]) for row in rows.tolist()}
        return lambda row, generator: found[row]

    def _sizes(self, total: int) -> tuple[int, int]:
        """n_suspicious and n_normal for ``total`` pairs."""
        asked = self.n_suspicious
        if asked is None and total < 1000:
            raise PlaitError(
                f"the data hold {total} pairs; give n_suspicious a value (the default is for 1,000 or more)"
            )
        if asked is None:
            n_suspicious = min(max(2000, int(0.004 * total)), total // 4)
        else:
            n_suspicious = int(asked * total) if asked < 1 else int(asked)
        n_normal = self.n_normal or min(total // 2, 50 * n_suspicious, total - n_suspicious)
        if n_suspicious + n_normal > total or n_normal < 1:
            raise PlaitError(
                f"n_suspicious is {n_suspicious} and n_normal {n_normal}; together they may be at most the "
                f"{total} pairs of the data"
            )
        if self.n_top > n_suspicious:
            raise PlaitError(f"n_top is {self.n_top}; allowed is up to n_suspicious, {n_suspicious}")
        batch_size = min(self.overfit_batch_size, n_suspicious)
        if self.detection == "overfit" and self.overfit_normal_weight > 0 and n_normal < batch_size:
            raise PlaitError(f"n_normal is {n_normal}; with overfit_normal_weight it must fill a batch of {batch_size}")
        return n_suspicious, n_normal


def _pairs(data: datasets.Dataset, model: Any) -> ubt.Pairs:
    """Images at the model's size, and the first caption of every image."""
    loaded = LoadedPairs(data, model)
    return ubt.Pairs(
        first_captions(data), lambda rows: loaded.read([int(row) for row in rows], [0.0] * len(rows)).pixels
    )


def _oracle(
    data: datasets.Dataset, split: ubt.Split, draw: np.random.Generator, n_top: int
) -> tuple[ubt.Split, np.ndarray]:
    """The truth in place of the ranking, as an upper bound; the only place that reads ``is_backdoor``."""
    poisoned = np.flatnonzero(flags_of(data))
    if len(poisoned) == 0:
        raise PlaitError("detection is oracle, but no pair is marked in is_backdoor")
    rows = draw.permutation(poisoned)[:n_top]
    normal = split.normal[~np.isin(split.normal, poisoned)]
    return ubt.Split(suspicious=rows, normal=normal), np.ones(len(rows), np.float32)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        with as_plait_errors():
            yield
    except ubt.DivergedError as error:
        raise PlaitError(str(error)) from error
