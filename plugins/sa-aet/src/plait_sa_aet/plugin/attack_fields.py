"""Fields that several attacks share, each declared once: the budget, the steps, the rescaled views, the words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from plait.fields import code_field, field, in_range, path_or_name_field
from plait.importing import named_object

from plait_sa_aet.captions import MAX_WORDS, clean_caption, num_cut
from plait_sa_aet.stop_words import STOP_WORDS, read_stop_words

if TYPE_CHECKING:
    from plait_clip import ImageTextModel

    from plait_sa_aet.attack_report import AttackReport
    from plait_sa_aet.sa_aet import Words
    from plait_sa_aet.source import Source

GENERATORS = ("mlm", "token-embedding", "context-counts", "synonyms")
_FOR_MLM = ("logit_threshold", "position_offset", "bpe_topk", "bpe_max", "bpe_pieces")
_NEEDS = {
    "language_model": "mlm",
    "synonyms": "synonyms",
    "synonyms_file": "synonyms",
    "context_file": "context-counts",
}


@attrs.frozen(kw_only=True, slots=False)
class AttacksImages:
    """The budget and the steps of image attacks."""

    epsilon: float = field(8 / 255, "largest change of a pixel, in [0, 1] units", in_range(0, 1))
    num_steps: int = field(10, "sign-gradient steps", in_range(1))
    micro_batch: int | None = field(None, "images per forward pass; changes memory, not results", in_range(1))

    @property
    def reach(self) -> float:
        return self.epsilon

    def image_options(self) -> dict[str, Any]:
        """Arguments of the image attack."""
        return {"epsilon": self.epsilon, "num_steps": self.num_steps, "micro_batch": self.micro_batch}


@attrs.frozen(kw_only=True, slots=False)
class StepsFreely(AttacksImages):
    """Steps of a given size from a random start."""

    step_size: float = field(2 / 255, "change of a pixel in a step", in_range(0, low_open=True))
    random_start: bool = field(True, "start anywhere in the budget, not at the clean image")

    def image_options(self) -> dict[str, Any]:
        return super().image_options() | {"step_size": self.step_size, "random_start": self.random_start}


@attrs.frozen(kw_only=True, slots=False)
class SeesScaledViews(StepsFreely):
    """Gradients summed over rescaled, noisy copies of the image."""

    scales: tuple[float, ...] = field(
        (0.5, 0.75, 1.25, 1.5), "factors of the rescaled views", in_range(0, low_open=True)
    )
    scale_noise_std: float = field(0.05, "noise of the rescaled views, in [0, 1] units", in_range(0))
    resize_antialias: bool = field(False, "bicubic resizing with antialiasing")

    def image_options(self) -> dict[str, Any]:
        from plait_sa_aet.views import ScaledViews

        views = ScaledViews(self.scales, noise_std=self.scale_noise_std, antialias=self.resize_antialias)
        return super().image_options() | {"views": views}

    def without_effect(self) -> list[str]:
        found: list[str] = super().without_effect()  # type: ignore[misc]
        if not self.scales:
            found += were_set(self, "scales is empty", "scale_noise_std", "resize_antialias")
        return found

    def check(self, model: ImageTextModel) -> None:
        for scale in self.scales:
            if int(scale * model.image_size) < 1:
                raise ValueError(f"scale {scale} leaves nothing of a {model.image_size} pixel image; take a larger one")


@attrs.frozen(kw_only=True, slots=False)
class SwapsWords:
    """Which words of the captions may be swapped for which."""

    text: bool = field(True, "attack the captions too; false: the images alone")
    generator: str | None = code_field(
        None,
        "where candidate words come from; must be set if text: mlm, token-embedding, context-counts, synonyms, or "
        "package.module:Class or ./file.py:Class with propose(words, index, k)",
        words=GENERATORS,
    )
    language_model: str | None = path_or_name_field(
        None, "mlm: folder or hub name of a masked language model with WordPiece"
    )
    synonyms: dict[str, tuple[str, ...]] | None = field(None, "synonyms: word: words that may stand for it")
    synonyms_file: Path | None = field(None, "synonyms: YAML or JSON file of such a table, instead of synonyms")
    context_file: Path | None = field(None, "context-counts: text file, a caption a line; default: the data's captions")
    text_budget: int = field(1, "words changed in a caption", in_range(0))
    top_k: int = field(10, "candidates for a word", in_range(1))
    logit_threshold: float = field(0.3, "mlm: least logit of a candidate; 0: none", in_range())
    position_offset: Literal[0, 1] | None = field(
        None, "mlm: row of a word's prediction; 0 reads the word before, as the released code; default: 1"
    )
    bpe_topk: int = field(4, "mlm: candidates for each piece of a word", in_range(1))
    bpe_max: int = field(24, "mlm: combinations of pieces scored", in_range(1))
    bpe_pieces: int = field(12, "mlm: pieces of a word looked at", in_range(1))
    allow_multiword: bool | None = field(
        None, "a candidate may be several words, as in the released code; default: false"
    )
    mask_token: str = field("[UNK]", "stands for a word when its importance is measured")
    max_length: int | None = field(
        None, "tokens of a caption that are attacked; default: 77, or 30 for fusion models", in_range(4)
    )
    stop_words: Path | None = field(None, "file of words never touched, one a line; default: English function words")

    renamed_fields = {"official": "as_released", "generator_source": "language_model"}

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()  # type: ignore[misc]
        if self.text:
            self._check_words()

    def _check_words(self) -> None:
        allowed = ", ".join(GENERATORS)
        if self.generator is None:
            raise ValueError(f"generator is not set; give one of {allowed}, or text: false to attack the images alone")
        if self.generator == "mlm" and self.language_model is None:
            raise ValueError("generator mlm needs language_model: a folder or hub name of a masked language model")
        if self.generator == "synonyms" and (self.synonyms is None) == (self.synonyms_file is None):
            raise ValueError("generator synonyms needs either synonyms, a table, or synonyms_file, a file of one")
        for given, name in _NEEDS.items():
            if getattr(self, given) is not None and self.generator != name:
                raise ValueError(f"{given} is set, but generator is {self.generator!r}; set generator: {name}")

    @property
    def attacks_captions(self) -> bool:
        return self.text

    def without_effect(self) -> list[str]:
        found: list[str] = super().without_effect()  # type: ignore[misc]
        if not self.text:
            return found + were_set(
                self, "text is false", "generator", "language_model", "synonyms", "synonyms_file", "context_file",
                "text_budget", "top_k", "ratios", "project_words", *_FOR_MLM, "allow_multiword", "mask_token",
                "max_length", "stop_words",
            )  # fmt: skip
        if self.generator != "mlm":
            found += were_set(self, f"generator is {self.generator}", *_FOR_MLM)
        if self.generator in ("token-embedding", "context-counts"):
            found += were_set(self, f"generator {self.generator} gives single words only", "allow_multiword")
        return found

    def words(self, source: Source, captions: Sequence[str], run: Any, report: AttackReport) -> Words | None:
        """The candidates and options of the word attack; None: captions stay as they are.

        Args:
            captions: all captions of the data, cleaned.

        Raises:
            ValueError: a file cannot be read, or the model has no word embeddings.
        """
        from plait_sa_aet.sa_aet import Words

        if not self.text:
            report.notes.append("No word of the captions is changed: text is false, so the images alone are attacked.")
            return None
        max_length = self.max_length or (30 if source.model.kind == "fusion" else 77)
        candidates = self._candidates(source, captions, max_length, run)
        if self.as_released and self.generator == "mlm" and source.model.kind != "fusion":  # type: ignore[attr-defined]
            source.rewrite = candidates.respelled
        options = {
            "budget": self.text_budget,
            "top_k": self.top_k,
            "stop_words": STOP_WORDS if self.stop_words is None else read_stop_words(self.stop_words),
            "mask_token": self.mask_token,
            "max_length": max_length,
        }
        return Words(candidates, options)

    def _candidates(self, source: Source, captions: Sequence[str], max_length: int, run: Any) -> Any:
        from plait_sa_aet.token_embeddings import token_embedding_candidates
        from plait_sa_aet.word_candidates import ContextCounts, MaskedLanguageModel, Synonyms

        as_released: bool = self.as_released  # type: ignore[attr-defined]
        allow_multiword = as_released if self.allow_multiword is None else self.allow_multiword
        if self.generator == "mlm":
            assert self.language_model is not None
            return MaskedLanguageModel.from_pretrained(
                self.language_model,
                top_k=self.top_k,
                logit_threshold=self.logit_threshold,
                max_length=max_length,
                position_offset=self.position_offset if self.position_offset is not None else int(not as_released),
                bpe_topk=self.bpe_topk,
                bpe_max=self.bpe_max,
                bpe_pieces=self.bpe_pieces,
                allow_multiword=allow_multiword,
                allow_special=as_released,
                device=source.device,
            )
        if self.generator == "token-embedding":
            return token_embedding_candidates(source.model)
        if self.generator == "context-counts":
            return ContextCounts.fit(captions_in(self.context_file, run.warn) if self.context_file else captions)
        if self.generator == "synonyms":
            if self.synonyms is not None:
                return Synonyms(self.synonyms, allow_multiword=allow_multiword)
            assert self.synonyms_file is not None
            return Synonyms.from_file(self.synonyms_file, allow_multiword=allow_multiword)
        own = _own_generator(str(self.generator))
        if self.allow_multiword is not None or as_released or not hasattr(own, "allow_multiword"):
            try:
                own.allow_multiword = allow_multiword
            except AttributeError as error:
                raise ValueError(
                    f"generator {self.generator!r} has no attribute allow_multiword that can be set; let it have one"
                ) from error
        return own


def were_set(method: Any, reason: str, *names: str) -> list[str]:
    """A sentence if some of these fields of a method differ from their defaults; those that it lacks are passed over."""
    fields = attrs.fields_dict(type(method))
    found = [name for name in names if name in fields and getattr(method, name) != fields[name].default]
    return [f"{reason}, so {', '.join(found)} {'has' if len(found) == 1 else 'have'} no effect"] if found else []


def captions_in(path: Path, warn: Callable[[str], None]) -> list[str]:
    """The captions in a text file, cleaned; empty lines are left out.

    Args:
        warn: is given a sentence where captions are cut.

    Raises:
        ValueError: it cannot be read, or holds no caption.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the captions {path} cannot be read ({error})") from error
    captions = [clean for line in lines if (clean := clean_caption(line))]
    if not captions:
        raise ValueError(f"the file {path} has no caption; write one a line")
    if cut := num_cut(lines):
        warn(f"{cut} of {len(captions)} captions in {path.name} are cut to their first {MAX_WORDS} words")
    return captions


def _own_generator(target: str) -> Any:
    """An object of the user's class ``package.module:Class`` or ``./file.py:Class``.

    Raises:
        ValueError: it cannot be imported or made, or has no method ``propose``.
    """
    make = named_object(target, _proposes, "a class with a method propose(words, index, k)")
    try:
        found = make()
    except Exception as error:
        raise ValueError(f"generator {target!r} cannot be made without arguments ({_reason(error)})") from error
    return found


def _proposes(found: Any) -> bool:
    return isinstance(found, type) and callable(getattr(found, "propose", None))


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, (ImportError, FileNotFoundError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
