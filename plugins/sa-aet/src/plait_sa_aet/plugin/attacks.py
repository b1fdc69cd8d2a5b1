"""``attack``: sa-aet, dra, sga, co-attack, sep-attack, bert-attack, pgd and pgd-cos."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from plait import hookimpl
from plait.fields import field, in_range, output_field
from plait.importing import digest_of_sources, local_sources

from plait_sa_aet.choices import ProjectionMode, Triangle
from plait_sa_aet.plugin.attack_fields import (
    AttacksImages,
    SeesScaledViews,
    StepsFreely,
    SwapsWords,
    captions_in,
    were_set,
)

if TYPE_CHECKING:
    import datasets
    from plait_clip import ImageTextModel

    from plait_sa_aet.attack_report import AttackReport
    from plait_sa_aet.plugin.attacking import OneBatch
    from plait_sa_aet.sa_aet import SemanticProjection
    from plait_sa_aet.source import Source


@attrs.frozen(kw_only=True)
class Attack:
    """What all attacks share: batches, arithmetic, rounding, where the pairs go."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    batch_size: int = field(8, "images attacked at a time", in_range(1))
    as_released: bool = field(
        False,
        "the released code's choices where null is the default: position_offset 0, allow_multiword, quantize none, "
        "rng released; with mlm, special tokens may replace words, and models without fusion read captions as its "
        "tokenizer respells them",
    )
    quantize: Literal["round", "floor", "none"] | None = field(
        None, "8-bit rounding, inside the budget; none keeps float32 in a column pixels; default: round"
    )
    rng: Literal["per_image", "released"] | None = field(
        None, "random numbers for each image by its row, or one NumPy and one Python stream from the run's seed"
    )
    precision: Literal["fp32", "bf16"] = field("fp32", "arithmetic of the towers")
    channels_last: bool = field(False, "memory layout that suits ResNets on GPUs")
    compile: bool = field(False, "torch.compile the image tower")
    save_to: Path | None = output_field(
        None,
        "also write PNG files under the images' own names, captions.jsonl, changes.jsonl, trace.jsonl and "
        "projection.safetensors to this folder",
    )

    renamed_fields = {"official": "as_released"}
    reads_captions = True

    @property
    def rounding(self) -> Literal["round", "floor", "none"]:
        return self.quantize or ("none" if self.as_released else "round")

    @property
    def reach(self) -> float:
        """L∞ budget of the images in [0, 1] units; 0: they stay as they are."""
        return 0.0

    @property
    def attacks_captions(self) -> bool:
        """Whether captions are cleaned and attacked; else they stay as they were written."""
        return False

    @property
    def keeps_floats(self) -> bool:
        return self.rounding == "none" and self.reach > 0

    def __attrs_post_init__(self) -> None:
        if 0 < self.reach < 1 / 255 and self.rounding != "none":
            raise ValueError(
                f"epsilon is {self.reach:.5f}, below one 8-bit level (1/255); give more, or quantize: none"
            )
        if self.save_to is not None:
            for place in (self.save_to, *self.save_to.parents):
                if place.exists() and not place.is_dir():
                    here = "which is a file" if place == self.save_to else f"but {place} is a file"
                    raise ValueError(f"save_to is {str(self.save_to)!r}, {here}; name a folder")

    def without_effect(self) -> list[str]:
        """A sentence for every field that was set and changes nothing."""
        return []

    def check(self, model: ImageTextModel) -> None:
        """Refuse a model that the fields do not suit, before the work starts."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        """What every batch needs is made once; returns the attack of one batch."""
        raise NotImplementedError

    @hookimpl
    def attack(self, model: Any, data: Any, run: Any) -> datasets.Dataset:
        from plait_clip import check_captions, on_device, undecoded

        from plait_sa_aet.plugin.attacking import attacked
        from plait_sa_aet.source import Source, frozen

        model = on_device(model, run.device)
        self.check(model)
        undecoded(data)
        check_captions(data)
        for sentence in self.without_effect():
            run.warn(sentence)
        with frozen(model):
            source = Source(model, precision=self.precision, channels_last=self.channels_last, compile=self.compile)
            return attacked(self, source, data, run)

    def digest_of_files(self) -> str:
        """Of the files that the fields name: where the content of one changes, the attack is another."""
        values = [getattr(self, one.name) for one in attrs.fields(type(self)) if one.name != "save_to"]
        paths = [Path(value).expanduser() for value in values if isinstance(value, (str, Path)) and value]
        files = [path for path in paths if path.is_file()]
        code = str(getattr(self, "generator", "")).rpartition(":")[0]
        if code.endswith(".py") and Path(code).expanduser().is_file():
            files += local_sources(Path(code).expanduser().absolute())
        return digest_of_sources(files)


@attrs.frozen(kw_only=True)
class SaAet(SwapsWords, SeesScaledViews, Attack):
    """Semantic-aligned adversarial evolution triangle: images and captions (Jia et al., TPAMI 2025)."""

    triangle: Triangle = field(
        "sub", "where mixtures lie: sub-triangle (SA-AET), whole triangle (DRA), uniform in it, or no mixtures (SGA)"
    )
    num_samples: int = field(5, "mixtures that a step chooses from", in_range(1))
    project_candidates: bool = field(True, "clip candidates to the budget before they are compared; DRA does not")
    selection: Literal["batch", "image"] = field("batch", "one mixture for the batch, or one per image")
    projection: ProjectionMode = field(
        "drop_top", "of text features in the image loss: without their first direction, onto their span, first k, none"
    )
    projection_rank: int | None = field(None, "directions of top_k; default: 30", in_range(1))
    rank_tol: float = field(1e-5, "span: least relative singular value", in_range(0, 1, low_open=True, high_open=True))
    corpus: Path | None = field(None, "text file, a caption a line, of the projection; default: the data's captions")
    corpus_fraction: float = field(0.4, "share of the corpus that is drawn", in_range(0, 1, low_open=True))
    ratios: tuple[float, float, float] = field(
        (0.6, 0.2, 0.2), "weights of clean, final and previous image in the last choice of words", in_range(0)
    )
    project_words: bool = field(False, "project features in the choice of words too")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if len(self.ratios) != 3:
            raise ValueError(f"ratios has {len(self.ratios)} values; give three: clean, final and previous image")
        if sum(self.ratios) <= 0:
            raise ValueError(f"ratios are {list(self.ratios)}; at least one has to be above 0")
        if self.projection_rank is not None and self.projection != "top_k":
            raise ValueError(f"projection_rank is for projection: top_k, which is {self.projection!r}")

    def without_effect(self) -> list[str]:
        found = super().without_effect()
        if self.projection == "none":
            names = ("corpus", "corpus_fraction", "rank_tol", *(("project_words",) if self.text else ()))
            found += were_set(self, "projection is none", *names)
        elif self.projection != "span":
            found += were_set(self, f"projection is {self.projection}", "rank_tol")
        if self.triangle == "none":
            found += were_set(self, "triangle is none", "num_samples", "project_candidates", "selection")
        elif self.num_samples == 1:
            found += were_set(self, "num_samples is 1", "project_candidates", "selection")
        return found

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        return partial(
            self.algorithm(),
            words=self.words(source, captions, run, report),
            corpus=self._projection(source, captions, run, report),
            ratios=self.ratios,
            project_words=self.project_words,
            triangle=self.triangle,
            num_samples=self.num_samples,
            project_candidates=self.project_candidates,
            selection=self.selection,
            **self.image_options(),
        )

    def algorithm(self) -> Callable[..., Any]:
        """The attack of a batch."""
        from plait_sa_aet.sa_aet import sa_aet

        return sa_aet

    def _projection(
        self, source: Source, captions: Sequence[str], run: Any, report: AttackReport
    ) -> SemanticProjection | None:
        """Made once for all batches."""
        from plait_sa_aet.sa_aet import draw_corpus, semantic_projection

        if self.projection == "none":
            return None
        corpus = captions if self.corpus is None else captions_in(self.corpus, run.warn)
        drawn = draw_corpus(corpus, self.corpus_fraction, run.generator("corpus"))
        features = source.text_features(drawn)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = semantic_projection(features, self.projection, rank=self.projection_rank, rank_tol=self.rank_tol)
        for warning in caught:
            run.warn(str(warning.message))
        report.projection = found
        report.corpus = "the captions under attack" if self.corpus is None else Path(self.corpus).name
        report.corpus_sha256 = hashlib.sha256("\n".join(drawn).encode()).hexdigest()
        return found


@attrs.frozen(kw_only=True)
class Dra(SaAet):
    """Diversification along the trajectory's intersection region: images and captions (Gao et al., ECCV 2024)."""

    triangle: Triangle = field(
        "full", "where mixtures lie: whole triangle (DRA), sub-triangle (SA-AET), uniform in it, or no mixtures (SGA)"
    )
    project_candidates: bool = field(False, "clip candidates to the budget before they are compared; SA-AET does")
    projection: ProjectionMode = field("none", "of text features in the image loss; DRA has none")

    def algorithm(self) -> Callable[..., Any]:
        from plait_sa_aet.baselines import dra

        return dra


@attrs.frozen(kw_only=True)
class Sga(SwapsWords, SeesScaledViews, Attack):
    """Set-level guidance attack: images in several scales and captions (Lu et al., ICCV 2023)."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        from plait_sa_aet.baselines import sga

        return partial(sga, words=self.words(source, captions, run, report), **self.image_options())


@attrs.frozen(kw_only=True)
class CoAttack(SwapsWords, AttacksImages, Attack):
    """Co-Attack: captions first, then images away from them (Zhang et al., ACM MM 2022)."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        from plait_sa_aet.baselines import co_attack

        return partial(co_attack, words=self.words(source, captions, run, report), **self.image_options())


@attrs.frozen(kw_only=True)
class SepAttack(SwapsWords, AttacksImages, Attack):
    """PGD on images and BERT-Attack on captions, separately."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        from plait_sa_aet.baselines import sep_attack

        return partial(sep_attack, words=self.words(source, captions, run, report), **self.image_options())


@attrs.frozen(kw_only=True)
class BertAttack(SwapsWords, Attack):
    """BERT-Attack on captions alone (Li et al., EMNLP 2020)."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.text:
            raise ValueError("text is false, but bert-attack attacks nothing but captions; take another attack")

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        from plait_sa_aet.baselines import bert_attack

        words = self.words(source, captions, run, report)
        assert words is not None
        return partial(bert_attack, words=words)


@attrs.frozen(kw_only=True)
class Pgd(AttacksImages, Attack):
    """PGD on images alone, away from their own embedding (Madry et al., ICLR 2018; as in Co-Attack)."""

    reads_captions = False

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        from plait_sa_aet.baselines import pgd

        return partial(pgd, **self.image_options())


@attrs.frozen(kw_only=True)
class PgdCos(StepsFreely, Attack):
    """Sign steps on images alone, away from their captions: SA-AET without its ideas, for comparison."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> OneBatch:
        from plait_sa_aet.baselines import pgd_cos

        return partial(pgd_cos, **self.image_options())
