"""``evaluate: transfer``: attack success rates of adversarial pairs, source by target."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal

import attrs
import numpy as np
import torch
from plait import Report, hookimpl
from plait.fields import field, in_range
from plait.report import Image, Panel, png
from plait_clip import ImageInput, ImageTextModel, captions_of, on_device, open_image, recall, undecoded
from torch import Tensor

from plait_sa_aet import transfer
from plait_sa_aet.captions import MAX_WORDS, clean_caption, num_cut
from plait_sa_aet.transfer import PIXELS, Gallery, Retrieval, geometry

GAIN = 10  # of the difference in the pictures
OTHERS = "others (mean)"
RESAMPLING = "resampling alone"
ALL = "all"

Row = dict[str, Any]


@attrs.frozen(kw_only=True)
class Transfer:
    """Attack success rate on image-text retrieval, for every source and target (Jia et al., TPAMI 2025)."""

    top: tuple[int, ...] = field((1, 5, 10), "ranks k of R@k and ASR@k", in_range(1))
    candidates: int = field(128, "nearest captions or images that a fusion model scores", in_range(1))
    source: str | None = field(None, "name of the model that was attacked, where data is one dataset without a name")
    clean_captions: bool = field(
        True, "clean the captions of both sides as the attacks do, so that only what they changed differs"
    )
    mixed_kinds: bool = field(
        False, "allow contrastive and fusion models in one table, whose scores are not made in the same way"
    )
    num_panels: int = field(4, "pairs shown in the report: clean, adversarial, difference", in_range(0))
    batch_size: int = field(256, "images at a time", in_range(1))
    precision: Literal["fp32", "bf16"] = field("fp32", "arithmetic of the towers")

    def __attrs_post_init__(self) -> None:
        if not self.top:
            raise ValueError("top is empty; give at least one rank, such as [1, 5, 10]")
        if self.candidates < max(self.top):
            raise ValueError(f"candidates is {self.candidates}, which is less than the rank {max(self.top)} in top")

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any, run: Any) -> Report:
        models, sources = self._named(model, data)
        cleaning = clean_caption if self.clean_captions else str
        with _naming("reference"):
            clean = Gallery.of(reference, cleaning)
        attacked = {}
        for name, rows in sources.items():
            with _naming(_label("data", name)):
                attacked[name] = Gallery.of(rows, cleaning)
                transfer.check_same_pairs(clean, attacked[name])
        if self.clean_captions and (cut := num_cut(captions_of(reference)[0])):
            run.warn(
                f"{cut} of {len(clean.captions)} captions have more than {MAX_WORDS} words and are compared by these"
            )
        return self._report(models, clean, attacked, run)

    def _named(self, model: Any, data: Any) -> tuple[dict[str, ImageTextModel], dict[str, Any]]:
        """Models and datasets by name; the name of a single one is empty."""
        models = dict(model) if isinstance(model, Mapping) else {"": model}
        sources = dict(data) if isinstance(data, Mapping) else {self.source or "": data}
        if isinstance(data, Mapping) and self.source is not None:
            raise ValueError(f"source is {self.source!r}, but data names its sources: {', '.join(data)}; leave it out")
        for what, found in (("model", models), ("data", sources)):
            if not found:
                raise ValueError(f"{what} is empty; give at least one")
        for name, found in models.items():
            if not isinstance(found, ImageTextModel):
                kind = type(found).__name__
                raise ValueError(f"{_label('model', name)} is a {kind}; expected an image-text model of plait-clip")
        if not self.mixed_kinds:
            try:
                transfer.check_one_kind(models)
            except ValueError as error:
                raise ValueError(f"{error}, or set mixed_kinds: true") from error
        return models, sources

    def _report(
        self, models: Mapping[str, ImageTextModel], clean: Gallery, attacked: Mapping[str, Gallery], run: Any
    ) -> Report:
        table: list[Row] = []
        recalls: list[Row] = []
        panels: list[Panel] = []
        pairs = [(source, target) for target in models for source in attacked]
        shown = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0]) if self.num_panels else None
        work = [(target, source) for target in models for source in (None, *attacked)]
        for target, source in run.track(work, "retrieving", total=len(work)):
            with _naming(_label("model", target)):
                if source is None:  # once for each target, before its sources
                    model = on_device(models[target], run.device)
                    before = self._retrieve(model, clean, run)
                    resampled: dict[Any, float] = {}
                    recalls.append(_identity("", target) | self._recalls(before))
                    continue
                with _naming(_label("data", source)):
                    after = self._retrieve(model, attacked[source], run)
                through = _resolution(clean, attacked[source], models.get(source) if source else None)
                floats = PIXELS in attacked[source].rows.column_names
                key = (through and geometry(through), floats)
                if key not in resampled:
                    resampled[key] = self._resampling(model, clean, through, floats, before, run)
                row = _identity(source, target) | self._rates(before, after)
                table.append(row | {RESAMPLING: resampled[key]})
                if (source, target) == shown:
                    title = " → ".join(filter(None, shown)) or "attack"
                    pictures = self._pictures(model, clean, attacked[source], before, after, through)
                    panels.append(Panel(title=title, images=pictures))
        place = {source: i for i, source in enumerate(attacked)}
        table.sort(key=lambda row: place[row.get("source", "")])  # targets keep their order
        notes = [
            "ASR@k: of the queries answered within the first k without the attack, the share (%) that is not with it; "
            "all images and all captions of the gallery are adversarial. TR: image → caption, IR: caption → image. "
            "ASR is the mean of TR and IR ASR@1. White-box: the target is the model that was attacked."
        ]
        worst = max(table, key=lambda row: row[RESAMPLING])
        if worst[RESAMPLING] > 0:
            pair = " → ".join(worst[name] for name in ("source", "target") if name in worst) or "this attack"
            run.warn(
                f"the attacked images have another size than the target's: resizing clean images in the same way already "
                f"gives {pair} an ASR of {worst[RESAMPLING]:.2f}; see the column {RESAMPLING!r}"
            )
            notes.append(
                f"{RESAMPLING}: the ASR of clean images that were only brought to the size of the attacked ones; so much "
                "of ASR is not the attack's doing."
            )
        else:
            for row in table:
                del row[RESAMPLING]
        rates = [name for name in table[0] if "ASR" in name]
        run.add(Report(title="clean recall", rows=recalls, formats={n: ".3f" for n in recalls[0] if "R@" in n}))
        return Report(
            rows=[*table, *_means(table, rates)],
            better=dict.fromkeys(rates, "higher"),
            formats=dict.fromkeys([*rates, RESAMPLING], ".2f"),
            panels=panels,
            notes=notes,
        )

    def _resampling(
        self,
        model: ImageTextModel,
        clean: Gallery,
        through: ImageInput | None,
        floats: bool,
        before: Retrieval,
        run: Any,
    ) -> float:
        """ASR of clean images that go through the size of an attack's."""
        if through is None or geometry(through) == geometry(model.image_input):
            return 0.0
        gallery = transfer.ResampledGallery(clean.rows, clean.captions, clean.owner, through=through, floats=floats)
        return self._rates(before, self._retrieve(model, gallery, run))["ASR"]

    def _retrieve(self, model: ImageTextModel, pairs: Gallery, run: Any) -> Retrieval:
        return transfer.retrieve(
            model, pairs, run.folder,
            candidates=self.candidates, batch_size=self.batch_size, precision=self.precision,
        )  # fmt: skip

    def _recalls(self, found: Retrieval) -> Row:
        ranks = {"TR": found.text_ranks, "IR": found.image_ranks}
        return {f"{task} R@{k}": recall(ranks[task], k) for task in ranks for k in self.top}

    def _rates(self, before: Retrieval, after: Retrieval) -> Row:
        """The numbers of one row, in percent."""
        tasks = {
            "TR": (before.text_ranks, after.text_ranks),
            "IR": (before.image_ranks, after.image_ranks),
        }
        rates = {f"{task} ASR@{k}": transfer.attack_success_rate(*tasks[task], k) for task in tasks for k in self.top}
        return {"ASR": fmean(rates[f"{task} ASR@{min(self.top)}"] for task in tasks)} | rates

    def _pictures(
        self,
        model: ImageTextModel,
        clean: Gallery,
        attacked: Gallery,
        before: Retrieval,
        after: Retrieval,
        through: ImageInput | None,
    ) -> list[list[Image]]:
        """Images whose captions are not found any more come first: clean, adversarial, difference."""
        fooled = (before.text_ranks == 0) & (after.text_ranks > 0)
        rows = fooled.int().argsort(descending=True, stable=True)[: self.num_panels].tolist()
        find = partial(transfer.top_captions, model, rows=rows, candidates=self.candidates, precision=self.precision)
        pictures = []
        for row, first, now in zip(rows, find(clean, before), find(attacked, after), strict=True):
            changed = _image(attacked, row)
            unchanged = _image_like(clean, row, changed, through)
            amplified = (0.5 + GAIN * (changed - unchanged)).clamp(0, 1)
            pictures.append(
                [
                    Image(caption=f"clean; retrieved first: {first}", data=png(unchanged)),
                    Image(caption=f"adversarial; retrieved first: {now}", data=png(changed)),
                    Image(
                        caption=f"{GAIN} × difference; {_changed_caption(clean, attacked, row)}", data=png(amplified)
                    ),
                ]
            )
        return pictures


def _label(what: str, name: str) -> str:
    return f"{what} {name}".rstrip()


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Sentences about an input say which it is."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{what}: {error}") from error


def _identity(source: str, target: str) -> Row:
    """The text columns of a row; what has no name is left out."""
    named = {name: value for name, value in (("source", source), ("target", target)) if value}
    if len(named) == 2:
        named["setting"] = "white-box" if source == target else "transfer"
    return named


def _resolution(clean: Gallery, attacked: Gallery, model: ImageTextModel | None) -> ImageInput | None:
    """What brought the attacked images to their size: the attacked model's input, or what they look like.

    None where they are not square.
    """
    changed = _image(attacked, 0)
    height, width = changed.shape[1:]
    if height != width:
        return None
    if model is not None and model.image_size == height:
        return model.image_input
    cuts = ("crop", "squash") if model is None else (model.image_input.resize,)
    ways = [ImageInput(height, [0.0] * 3, [1.0] * 3, resize=cut) for cut in cuts]
    return min(ways, key=lambda way: float((_image_like(clean, 0, changed, way) - changed).abs().mean()))


def _means(table: Sequence[Row], rates: Sequence[str]) -> list[Row]:
    """Rows for the mean of every source over the other targets, and of all sources, where there are several."""
    moved = [row for row in table if row.get("setting") == "transfer"]

    def mean(source: str, rows: Sequence[Row]) -> list[Row]:
        numbers = {name: fmean(row[name] for row in rows) for name in rates if len(rows) > 1}
        return [{"source": source, "target": OTHERS, "setting": "transfer"} | numbers] if numbers else []

    sources = list(dict.fromkeys(row["source"] for row in moved))
    own = [row for source in sources for row in mean(source, [row for row in moved if row["source"] == source])]
    return own + mean(ALL, moved if len(sources) > 1 else [])


def _image(pairs: Gallery, row: int) -> Tensor:
    """One image as it is given to models, float32 [3, H, W] in [0, 1]."""
    if PIXELS in pairs.rows.column_names:
        return pairs.rows.with_format("torch", columns=[PIXELS])[row][PIXELS]
    return _as_tensor(np.asarray(_picture(pairs, row).convert("RGB")).transpose(2, 0, 1))


def _image_like(pairs: Gallery, row: int, other: Tensor, through: ImageInput | None) -> Tensor:
    """One image at the size of another, brought there as that was."""
    height, width = other.shape[1:]
    picture = _picture(pairs, row)
    if (picture.width, picture.height) == (width, height):
        return _image(pairs, row)
    if through is not None:
        return _as_tensor(through.from_pil(picture))
    return _as_tensor(np.asarray(picture.convert("RGB").resize((width, height))).transpose(2, 0, 1))


def _picture(pairs: Gallery, row: int) -> Any:
    return open_image(undecoded(pairs.rows)[row]["image"], row)


def _as_tensor(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels.copy()).float() / 255


def _changed_caption(clean: Gallery, attacked: Gallery, row: int) -> str:
    """The first caption of an image that the attack changed: [old → new] words."""
    start, stop = (int(i) for i in torch.searchsorted(clean.owner, torch.tensor([row, row + 1])))
    own = range(start, stop)
    chosen = next((i for i in own if clean.captions[i] != attacked.captions[i]), start)
    old, new = clean.captions[chosen].split(), attacked.captions[chosen].split()
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        before, after = " ".join(old[i:j]), " ".join(new[k:m])
        parts.append(before if kind == "equal" else f"[{before} → {after}]")
    return " ".join(parts)
