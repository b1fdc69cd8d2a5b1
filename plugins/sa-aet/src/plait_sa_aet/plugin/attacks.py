"""``attack``: sa-aet, dra, sga, co-attack, sep-attack, bert-attack, pgd and pgd-cos."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
from plait import PlaitError, hookimpl
from plait.fields import doc, in_range, one_of, output_path
from plait.importing import import_code
from plait_clip.fingerprint import fingerprint
from plait_clip.loader import check_captions, image_batches, undecoded
from plait_clip.model import ImageTextModel
from plait_clip.plugin.errors import as_plait_errors
from plait_clip.plugin.models import on_device
from plait_clip.retrieval import captions_of

from plait_sa_aet import attack as algorithm
from plait_sa_aet.attack import Adversarial, Batch, Words
from plait_sa_aet.captions import clean_caption
from plait_sa_aet.image_attack import quantize
from plait_sa_aet.plugin.findings import Findings, empty_record, note
from plait_sa_aet.plugin.shards import (
    Shards,
    changed_features,
    digest,
    export,
    image_names,
    rows_of,
    with_other_columns,
)
from plait_sa_aet.projection import SemanticProjection, draw_corpus, semantic_projection
from plait_sa_aet.randomness import Official, PerImage
from plait_sa_aet.source import NotDifferentiableError, Source, frozen
from plait_sa_aet.stop_words import STOP_WORDS, read_stop_words
from plait_sa_aet.triangle import TRIANGLES
from plait_sa_aet.views import ScaledViews

GENERATORS = ("mlm", "token-embedding", "context-counts", "synonyms")
_FOR_MLM = ("logit_threshold", "position_offset", "bpe_topk", "bpe_max", "bpe_pieces")
SHARD_IMAGES = 64

OneBatch = Callable[[Source, Batch, Any], Adversarial]


# ------------------------------------------------------------------------------- fields that several attacks share


@attrs.frozen(kw_only=True)
class Attack:
    """What all attacks share: batches, arithmetic, rounding, where the pairs go."""

    batch_size: int = attrs.field(default=8, validator=in_range(1), metadata=doc("images attacked at a time"))
    official: bool = attrs.field(
        default=False,
        metadata=doc(
            "the released code's choices where null is the default: position_offset 0, allow_multiword, quantize none, "
            "rng official; with mlm, special tokens may replace words, and models without fusion read captions as its tokenizer "
            "respells them"
        ),
    )
    quantize: Literal["round", "floor", "none"] | None = attrs.field(
        default=None,
        validator=one_of("round", "floor", "none", None),
        metadata=doc("8-bit rounding, inside the budget; none keeps float32 in a column pixels; default: round"),
    )
    rng: Literal["per_image", "official"] | None = attrs.field(
        default=None,
        validator=one_of("per_image", "official", None),
        metadata=doc(
            "random numbers for each image by its row, or one NumPy and one Python stream from the run's seed"
        ),
    )
    precision: Literal["fp32", "bf16"] = attrs.field(
        default="fp32", validator=one_of("fp32", "bf16"), metadata=doc("arithmetic of the towers")
    )
    channels_last: bool = attrs.field(default=False, metadata=doc("memory layout that suits ResNets on GPUs"))
    compile: bool = attrs.field(default=False, metadata=doc("torch.compile the image tower"))
    save_to: Path | None = attrs.field(
        default=None,
        metadata=output_path(
            "also write PNG files under the images' own names, captions.jsonl, changes.jsonl, trace.jsonl and "
            "projection.safetensors to this folder"
        ),
    )

    @property
    def rounding(self) -> str:
        return self.quantize or ("none" if self.official else "round")

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

    @property
    def draws_officially(self) -> bool:
        return self.rng == "official" or (self.rng is None and self.official)

    def __attrs_post_init__(self) -> None:
        if 0 < self.reach < 1 / 255 and self.rounding != "none":
            raise PlaitError(
                f"epsilon is {self.reach:.5f}, below one 8-bit level (1/255); give more, or quantize: none"
            )
        if self.save_to is not None:
            for place in (self.save_to, *self.save_to.parents):
                if place.exists() and not place.is_dir():
                    here = "which is a file" if place == self.save_to else f"but {place} is a file"
                    raise PlaitError(f"save_to is {str(self.save_to)!r}, {here}; name a folder")

    def without_effect(self) -> list[str]:
        """A sentence for every field that was set and changes nothing."""
        return []

    def _were_set(self, reason: str, *names: str) -> list[str]:
        """A sentence if some of these fields differ from their defaults."""
        fields = attrs.fields_dict(type(self))
        found = [name for name in names if name in fields and getattr(self, name) != fields[name].default]
        return [f"{reason}, so {', '.join(found)} {'has' if len(found) == 1 else 'have'} no effect"] if found else []

    def check(self, model: ImageTextModel) -> None:
        """Refuse a model that the fields do not suit, before the work starts."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        """What every batch needs is made once; returns the attack of one batch."""
        raise NotImplementedError

    @hookimpl
    def attack(self, model: Any, data: Any, run: Any) -> datasets.Dataset:
        try:
            return self._checked_attack(model, data, run)
        except NotDifferentiableError as error:
            raise PlaitError(str(error)) from error

    def _checked_attack(self, model: Any, data: Any, run: Any) -> datasets.Dataset:
        with as_plait_errors():
            model = on_device(model, run.device)
            self.check(model)
            undecoded(data)
            check_captions(data)
            for sentence in self.without_effect():
                run.warn(sentence)
            with frozen(model):
                source = Source(model, precision=self.precision, channels_last=self.channels_last, compile=self.compile)
                return self._attacked(source, data, run)

    def _attacked(self, source: Source, data: datasets.Dataset, run: Any) -> datasets.Dataset:
        made_by = digest(f"{self!r} seed {run.seed} step {run.step} files {_contents(self)}", source.model, data)
        folder = run.folder / f"shards-{made_by}"
        shards = Shards(folder, changed_features(data, source.image_size, self.keeps_floats))
        findings = Findings()
        texts = [clean_caption(text) for text in captions_of(data)[0]]
        one_batch = self.prepare(source, texts, run, findings)
        official = Official(run.seed) if self.draws_officially else None
        size = self.batch_size * max(1, SHARD_IMAGES // self.batch_size)
        starts = range(0, len(data), size)
        batches = run.track(range(-(-len(data) // self.batch_size)), "attacking")

        for index, start in enumerate(starts):
            rows_here = range(start, min(start + size, len(data)))
            record = shards.record(index)
            if record is None:
                rows, record = self._shard(source, one_batch, data.select(rows_here), start, official, run, batches)
                shards.write(index, rows, record)
            else:
                for _ in rows_here[:: self.batch_size]:
                    next(batches)
                if official is not None:
                    official.load_state_dict(record["rng"])
        next(batches, None)
        for record in shards.records(len(starts)):
            findings.add(record)
        run.add(findings.report())
        if self.save_to is not None:
            made_of = {"model_sha256": fingerprint(source.model.state_dict()), "corpus_sha256": findings.corpus_sha256}
            export(self.save_to, shards, len(starts), findings.projection, made_of)
        return with_other_columns(data, shards.dataset(len(starts)), folder)

    def _shard(
        self,
        source: Source,
        one_batch: OneBatch,
        part: datasets.Dataset,
        start: int,
        official: Official | None,
        run: Any,
        batches: Iterator[int],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Attack the rows of ``part``, the first of which is ``start``: their new columns, and what was done."""
        names = image_names(part, start)
        captions, owners = captions_of(part)
        rows: list[dict[str, Any]] = []
        record = empty_record()
        resize = source.model.image_input.resize
        for pixels in image_batches(part, source.image_size, batch_size=self.batch_size, resize=resize):
            number = next(batches)
            here = range(len(rows), len(rows) + len(pixels))
            own = ((owners >= here.start) & (owners < here.stop)).nonzero().flatten()
            txt2img = owners[own] - here.start
            plain = [captions[m] for m in own.tolist()]
            batch = Batch(
                pixels.to(source.device).float() / 255,
                [clean_caption(text) for text in plain],
                txt2img.to(source.device),
            )
            ids = [start + row for row in here]
            rng = official or PerImage(run.derived_seed("noise"), ids, device=source.device)
            found = one_batch(source, batch, rng)
            images = quantize(found.images, batch.images, self.reach, self.rounding) if self.reach else batch.images
            note(record, found, batch, ids, float((images - batch.images).abs().max()))
            if found.trace:
                run.log(step=number, **{"loss of the last step, by batch": sum(found.trace[-1]["view_losses"])})
            attacked = found.captions if self.attacks_captions else plain
            texts = [text or before for text, before in zip(attacked, plain, strict=True)]
            floats = images if self.keeps_floats else None
            if floats is not None and self.reach >= 1 / 255:  # 8-bit copies keep the budget, too
                images = quantize(found.images, batch.images, self.reach, "round")
            rows += rows_of(part, images, texts, txt2img, names[here.start : here.stop], floats)
        if official is not None:
            record["rng"] = official.state_dict()
        return rows, record


@attrs.frozen(kw_only=True, slots=False)
class AttacksImages:
    """The budget and the steps of image attacks."""

    epsilon: float = attrs.field(
        default=8 / 255, validator=in_range(0, 1), metadata=doc("largest change of a pixel, in [0, 1] units")
    )
    num_steps: int = attrs.field(default=10, validator=in_range(1), metadata=doc("sign-gradient steps"))
    micro_batch: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("images per forward pass; changes memory, not results")
    )

    @property
    def reach(self) -> float:
        return self.epsilon

    def pgd_options(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "num_steps": self.num_steps, "micro_batch": self.micro_batch}


@attrs.frozen(kw_only=True, slots=False)
class StepsFreely(AttacksImages):
    """Steps of a given size from a random start."""

    step_size: float = attrs.field(
        default=2 / 255, validator=in_range(0, low_open=True), metadata=doc("change of a pixel in a step")
    )
    random_start: bool = attrs.field(default=True, metadata=doc("start anywhere in the budget, not at the clean image"))

    def step_options(self) -> dict[str, Any]:
        names = ("epsilon", "num_steps", "step_size", "random_start", "micro_batch")
        return {name: getattr(self, name) for name in names}


@attrs.frozen(kw_only=True, slots=False)
class SeesScaledViews(StepsFreely):
    """Gradients summed over rescaled, noisy copies of the image."""

    scales: tuple[float, ...] = attrs.field(
        default=(0.5, 0.75, 1.25, 1.5),
        validator=in_range(0, low_open=True),
        metadata=doc("factors of the rescaled views"),
    )
    scale_noise_std: float = attrs.field(
        default=0.05, validator=in_range(0), metadata=doc("noise of the rescaled views, in [0, 1] units")
    )
    resize_antialias: bool = attrs.field(default=False, metadata=doc("bicubic resizing with antialiasing"))

    def view_options(self) -> dict[str, Any]:
        views = ScaledViews(self.scales, noise_std=self.scale_noise_std, antialias=self.resize_antialias)
        return {**self.step_options(), "views": views}

    def without_effect(self) -> list[str]:
        found: list[str] = super().without_effect()  # type: ignore[misc]
        if not self.scales:
            found += self._were_set("scales is empty", "scale_noise_std", "resize_antialias")  # type: ignore[attr-defined]
        return found

    def check(self, model: ImageTextModel) -> None:
        for scale in self.scales:
            if int(scale * model.image_size) < 1:
                raise PlaitError(f"scale {scale} leaves nothing of a {model.image_size} pixel image; take a larger one")


@attrs.frozen(kw_only=True, slots=False)
class SwapsWords:
    """Which words of the captions may be swapped for which."""

    text: bool = attrs.field(default=True, metadata=doc("attack the captions too; false: the images alone"))
    generator: str | None = attrs.field(
        default=None,
        metadata=doc(
            "where candidate words come from; must be set if text: mlm, token-embedding, context-counts, synonyms, or "
            "package.module:Class or folder/file.py:Class with propose(words, index, k)"
        ),
    )
    generator_source: str | None = attrs.field(
        default=None,
        metadata=doc(
            "mlm: folder or hub name of a masked language model; synonyms: YAML or JSON file; context-counts: text file, "
            "a caption a line (default: the data's captions)"
        ),
    )
    synonyms: dict[str, tuple[str, ...]] | None = attrs.field(
        default=None, metadata=doc("word: words that may stand for it, instead of a file")
    )
    text_budget: int = attrs.field(default=1, validator=in_range(0), metadata=doc("words changed in a caption"))
    top_k: int = attrs.field(default=10, validator=in_range(1), metadata=doc("candidates for a word"))
    logit_threshold: float = attrs.field(
        default=0.3, validator=in_range(), metadata=doc("mlm: least logit of a candidate; 0: none")
    )
    position_offset: Literal[0, 1] | None = attrs.field(
        default=None,
        validator=one_of(0, 1, None),
        metadata=doc("mlm: row of a word's prediction; 0 reads the word before, as the released code; default: 1"),
    )
    bpe_topk: int = attrs.field(
        default=4, validator=in_range(1), metadata=doc("mlm: candidates for each piece of a word")
    )
    bpe_max: int = attrs.field(default=24, validator=in_range(1), metadata=doc("mlm: combinations of pieces scored"))
    bpe_pieces: int = attrs.field(default=12, validator=in_range(1), metadata=doc("mlm: pieces of a word looked at"))
    allow_multiword: bool | None = attrs.field(
        default=None, metadata=doc("a candidate may be several words, as in the released code; default: false")
    )
    mask_token: str = attrs.field(default="[UNK]", metadata=doc("stands for a word when its importance is measured"))
    max_length: int | None = attrs.field(
        default=None,
        validator=in_range(4),
        metadata=doc("tokens of a caption that are attacked; default: 77, or 30 for fusion models"),
    )
    stop_words: Path | None = attrs.field(
        default=None, metadata=doc("file of words never touched, one a line; default: English function words")
    )
    # A field, so that the file is an input of the step: where it changes, the step runs again.
    generator_file: Path | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()  # type: ignore[misc]
        if self.text:
            self._check_words()
            if self.generator not in GENERATORS:
                file = _file_of(str(self.generator))
                if file is not None and not os.path.isfile(file):
                    raise PlaitError(f"generator is {self.generator!r}, but there is no file {file}")
                object.__setattr__(self, "generator_file", file)

    def without_effect(self) -> list[str]:
        found: list[str] = super().without_effect()  # type: ignore[misc]
        told: Any = self._were_set  # type: ignore[attr-defined]
        if not self.text:
            return found + told(
                "text is false", "generator", "generator_source", "synonyms", "text_budget", "top_k", "ratios",
                "project_words", *_FOR_MLM, "allow_multiword", "mask_token", "max_length", "stop_words",
            )  # fmt: skip
        if self.generator != "mlm":
            found += told(f"generator is {self.generator}", *_FOR_MLM)
        if self.generator == "token-embedding" or ":" in str(self.generator):
            found += told(f"generator is {self.generator}", "generator_source")
        if self.generator in ("token-embedding", "context-counts"):
            found += told(f"generator {self.generator} gives single words only", "allow_multiword")
        return found

    @property
    def attacks_captions(self) -> bool:
        return self.text

    def _check_words(self) -> None:
        allowed = ", ".join(GENERATORS)
        if self.generator is None:
            raise PlaitError(f"generator is not set; give one of {allowed}, or text: false to attack the images alone")
        if self.generator not in GENERATORS and ":" not in self.generator:
            raise PlaitError(
                f"generator is {self.generator!r}; allowed is {allowed}, package.module:Class or folder/file.py:Class"
            )
        if self.generator == "mlm" and self.generator_source is None:
            raise PlaitError("generator mlm needs generator_source: a folder or hub name of a masked language model")
        if self.generator == "synonyms" and (self.synonyms is None) == (self.generator_source is None):
            raise PlaitError("generator synonyms needs either synonyms, a table, or generator_source, a file of one")
        if self.synonyms is not None and self.generator != "synonyms":
            raise PlaitError(f"synonyms is set, but generator is {self.generator!r}; set generator: synonyms")

    def words(self, source: Source, captions: Sequence[str], official: bool, findings: Findings) -> Words | None:
        """The candidates and options of the word attack; None: captions stay as they are.

        Raises:
            ValueError, OSError: the generator's source cannot be read, or the model has no word embeddings.
        """
        if not self.text:
            findings.notes.append(
                "No word of the captions is changed: text is false, so the images alone are attacked."
            )
            return None
        max_length = self.max_length or (30 if source.model.kind == "fusion" else 77)
        options = {
            "budget": self.text_budget,
            "top_k": self.top_k,
            "stop_words": STOP_WORDS if self.stop_words is None else read_stop_words(self.stop_words),
            "mask_token": self.mask_token,
            "max_length": max_length,
        }
        candidates = self._candidates(source, captions, official, max_length)
        if official and self.generator == "mlm" and source.model.kind != "fusion":
            source.rewrite = candidates.respelled
        return Words(candidates, options)

    def _candidates(self, source: Source, captions: Sequence[str], official: bool, max_length: int) -> Any:
        from plait_sa_aet import word_candidates as candidates

        allow_multiword = official if self.allow_multiword is None else self.allow_multiword
        if self.generator == "mlm":
            return candidates.MaskedLanguageModel.from_pretrained(
                self.generator_source,
                top_k=self.top_k,
                logit_threshold=self.logit_threshold,
                max_length=max_length,
                position_offset=self.position_offset if self.position_offset is not None else int(not official),
                bpe_topk=self.bpe_topk,
                bpe_max=self.bpe_max,
                bpe_pieces=self.bpe_pieces,
                allow_multiword=allow_multiword,
                allow_special=official,
                device=source.device,
            )
        if self.generator == "token-embedding":
            from plait_sa_aet.token_embeddings import token_embedding_candidates

            return token_embedding_candidates(source.model)
        if self.generator == "context-counts":
            return candidates.ContextCounts.fit(_lines(self.generator_source) if self.generator_source else captions)
        if self.generator == "synonyms":
            if self.synonyms is not None:
                return candidates.Synonyms(self.synonyms, allow_multiword=allow_multiword)
            return candidates.Synonyms.from_file(self.generator_source, allow_multiword=allow_multiword)
        own = _own_generator(str(self.generator))
        if self.allow_multiword is not None or official or not hasattr(own, "allow_multiword"):
            try:
                own.allow_multiword = allow_multiword
            except AttributeError as error:
                raise ValueError(
                    f"generator {self.generator!r} has no attribute allow_multiword that can be set; let it have one"
                ) from error
        return own


# ------------------------------------------------------------------------------------------------- the attacks


@attrs.frozen(kw_only=True)
class SaAet(SwapsWords, SeesScaledViews, Attack):
    """Semantic-aligned adversarial evolution triangle: images and captions (Jia et al., TPAMI 2025)."""

    triangle: Literal["sub", "full", "uniform", "uniform_sub", "none"] = attrs.field(
        default="sub",
        validator=one_of(*TRIANGLES),
        metadata=doc(
            "where mixtures lie: sub-triangle (SA-AET), whole triangle (DRA), uniform in it, or no mixtures (SGA)"
        ),
    )
    num_samples: int = attrs.field(default=5, validator=in_range(1), metadata=doc("mixtures that a step chooses from"))
    project_candidates: bool = attrs.field(
        default=True, metadata=doc("clip candidates to the budget before they are compared; DRA does not")
    )
    selection: Literal["batch", "image"] = attrs.field(
        default="batch", validator=one_of("batch", "image"), metadata=doc("one mixture for the batch, or one per image")
    )
    projection: Literal["drop_top", "span", "top_k", "none"] = attrs.field(
        default="drop_top",
        validator=one_of("drop_top", "span", "top_k", "none"),
        metadata=doc(
            "of text features in the image loss: without their first direction, onto their span, first k, none"
        ),
    )
    projection_rank: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("directions of top_k; default: 30")
    )
    rank_tol: float = attrs.field(
        default=1e-5,
        validator=in_range(0, 1, low_open=True, high_open=True),
        metadata=doc("span: least relative singular value"),
    )
    corpus: Path | None = attrs.field(
        default=None, metadata=doc("text file, a caption a line, of the projection; default: the data's captions")
    )
    corpus_fraction: float = attrs.field(
        default=0.4, validator=in_range(0, 1, low_open=True), metadata=doc("share of the corpus that is drawn")
    )
    ratios: tuple[float, float, float] = attrs.field(
        default=(0.6, 0.2, 0.2),
        validator=in_range(0),
        metadata=doc("weights of clean, final and previous image in the last choice of words"),
    )
    project_words: bool = attrs.field(default=False, metadata=doc("project features in the choice of words too"))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if len(self.ratios) != 3:
            raise PlaitError(f"ratios has {len(self.ratios)} values; give three: clean, final and previous image")
        if sum(self.ratios) <= 0:
            raise PlaitError(f"ratios are {list(self.ratios)}; at least one has to be above 0")
        if self.projection_rank is not None and self.projection != "top_k":
            raise PlaitError(f"projection_rank is for projection: top_k, which is {self.projection!r}")

    def without_effect(self) -> list[str]:
        found = super().without_effect()
        if self.projection == "none":
            names = ("corpus", "corpus_fraction", "rank_tol", *(("project_words",) if self.text else ()))
            found += self._were_set("projection is none", *names)
        elif self.projection != "span":
            found += self._were_set(f"projection is {self.projection}", "rank_tol")
        if self.triangle == "none":
            found += self._were_set("triangle is none", "num_samples", "project_candidates", "selection")
        elif self.num_samples == 1:
            found += self._were_set("num_samples is 1", "project_candidates", "selection")
        return found

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        words = self.words(source, captions, self.official, findings)
        projection = self._projection(source, captions, run, findings)
        image_options = {
            **self.view_options(),
            "triangle": self.triangle,
            "num_samples": self.num_samples,
            "project_candidates": self.project_candidates,
            "selection": self.selection,
        }
        return partial(
            algorithm.sa_aet,
            projection=projection,
            words=words,
            ratios=self.ratios,
            project_words=self.project_words,
            image_options=image_options,
        )

    def _projection(
        self, source: Source, captions: Sequence[str], run: Any, findings: Findings
    ) -> SemanticProjection | None:
        if self.projection == "none":
            return None
        corpus = captions if self.corpus is None else _lines(self.corpus)
        drawn = draw_corpus(corpus, self.corpus_fraction, run.generator("corpus"))
        features = source.text_features(drawn)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = semantic_projection(features, self.projection, rank=self.projection_rank, rank_tol=self.rank_tol)
        for warning in caught:
            run.warn(str(warning.message))
        findings.projection = found
        findings.corpus = "the captions under attack" if self.corpus is None else self.corpus.name
        findings.corpus_sha256 = hashlib.sha256("\n".join(drawn).encode()).hexdigest()
        return found


@attrs.frozen(kw_only=True)
class Dra(SaAet):
    """Diversification along the trajectory's intersection region: images and captions (Gao et al., ECCV 2024)."""

    triangle: Literal["sub", "full", "uniform", "uniform_sub", "none"] = attrs.field(
        default="full",
        validator=one_of(*TRIANGLES),
        metadata=doc(
            "where mixtures lie: whole triangle (DRA), sub-triangle (SA-AET), uniform in it, or no mixtures (SGA)"
        ),
    )
    project_candidates: bool = attrs.field(
        default=False, metadata=doc("clip candidates to the budget before they are compared; SA-AET does")
    )
    projection: Literal["drop_top", "span", "top_k", "none"] = attrs.field(
        default="none",
        validator=one_of("drop_top", "span", "top_k", "none"),
        metadata=doc("of text features in the image loss; DRA has none"),
    )


@attrs.frozen(kw_only=True)
class Sga(SwapsWords, SeesScaledViews, Attack):
    """Set-level guidance attack: images in several scales and captions (Lu et al., ICCV 2023)."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        return partial(
            algorithm.sa_aet,
            projection=None,
            words=self.words(source, captions, self.official, findings),
            ratios=(0.0, 1.0, 0.0),  # the last choice of words sees the final images alone
            image_options={**self.view_options(), "triangle": "none"},
        )


@attrs.frozen(kw_only=True)
class CoAttack(SwapsWords, AttacksImages, Attack):
    """Co-Attack: captions first, then images away from them (Zhang et al., ACM MM 2022)."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        words = self.words(source, captions, self.official, findings)
        return partial(algorithm.co_attack, words=words, **self.pgd_options())


@attrs.frozen(kw_only=True)
class SepAttack(SwapsWords, AttacksImages, Attack):
    """PGD on images and BERT-Attack on captions, separately."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        words = self.words(source, captions, self.official, findings)
        return partial(algorithm.sep_attack, words=words, **self.pgd_options())


@attrs.frozen(kw_only=True)
class BertAttack(SwapsWords, Attack):
    """BERT-Attack on captions alone (Li et al., EMNLP 2020)."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.text:
            raise PlaitError("text is false, but bert-attack attacks nothing but captions; take another attack")

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        words = self.words(source, captions, self.official, findings)
        assert words is not None
        return lambda source, batch, rng: algorithm.bert(source, batch, words=words)


@attrs.frozen(kw_only=True)
class Pgd(AttacksImages, Attack):
    """PGD on images alone, away from their own embedding (Madry et al., ICLR 2018; as in Co-Attack)."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        return partial(algorithm.pgd_kl, **self.pgd_options())


@attrs.frozen(kw_only=True)
class PgdCos(StepsFreely, Attack):
    """Sign steps on images alone, away from their captions: SA-AET without its ideas, for comparison."""

    def prepare(self, source: Source, captions: Sequence[str], run: Any, findings: Findings) -> OneBatch:
        return partial(algorithm.pgd_cos, image_options=self.step_options())


# ---------------------------------------------------------------------------------------------- what fields name


def _lines(path: str | Path) -> list[str]:
    """The captions in a text file, cleaned; empty lines are left out."""
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the captions {path} cannot be read ({error})") from error
    captions = [clean for line in lines if (clean := clean_caption(line))]
    if not captions:
        raise ValueError(f"the file {path} has no caption; write one a line")
    return captions


def _contents(instance: Any) -> list[str]:
    """Digests of the files that the fields name."""
    values = (getattr(instance, field.name) for field in attrs.fields(type(instance)) if field.name != "save_to")
    paths = [Path(value).expanduser() for value in values if isinstance(value, (str, Path)) and value]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def _own_generator(target: str) -> Any:
    """An object of the user's class ``package.module:Class`` or ``folder/file.py:Class``; both from the current folder.

    Raises:
        ValueError: it cannot be imported or made, or has no method ``propose``.
    """
    place, _, name = target.rpartition(":")
    try:
        module = import_code(place)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"generator {target!r} cannot be imported ({_reason(error)})") from error
    if not callable(make := getattr(module, name, None)):
        what = "is no class" if hasattr(module, name) else "is not there"
        raise ValueError(f"generator {target!r}: {name!r} {what}; name a class of {place}")
    try:
        found = make()
    except Exception as error:
        raise ValueError(f"generator {target!r} cannot be made without arguments ({_reason(error)})") from error
    if not callable(getattr(found, "propose", None)):
        raise ValueError(f"generator {target!r} has no method propose(words, index, k)")
    return found


def _file_of(target: str) -> Path | None:
    """The file of ``package.module:Class`` or ``folder/file.py:Class``, None where there is none; nothing is imported."""
    place = target.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(os.path.expanduser(place))
    places: Sequence[str] | None = [os.getcwd(), *sys.path]
    spec = None
    for depth in range(1, place.count(".") + 2):
        spec = PathFinder.find_spec(".".join(place.split(".")[:depth]), places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, (ImportError, FileNotFoundError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
