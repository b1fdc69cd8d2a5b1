"""``evaluate: transfer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import numpy as np
import torch
from plait import PlaitError, Report, hookimpl
from plait.fields import doc, in_range, one_of
from plait.report import Image, Panel, png
from plait_clip.loader import undecoded
from plait_clip.model import ImageTextModel
from plait_clip.plugin.errors import as_plait_errors
from plait_clip.plugin.models import on_device
from plait_clip.retrieval import recall

from plait_sa_aet.transfer import (
    Retrieval,
    attack_success_rate,
    best_captions,
    check_same_rows,
    pixel_batches,
    retrieve,
)

OTHERS = "others (mean)"
Row = dict[str, Any]


@attrs.frozen(kw_only=True)
class Transfer:
    """Attack success rates of adversarial pairs on other models, source × target (Lu et al., ICCV 2023)."""

    source: str | None = attrs.field(
        default=None, metadata=doc("name of the model that was attacked, where data is one data set and no mapping")
    )
    top: tuple[int, ...] = attrs.field(
        default=(1, 5, 10), validator=in_range(1), metadata=doc("ranks k of ASR@k and R@k")
    )
    clean_captions: bool = attrs.field(
        default=True, metadata=doc("clean the captions of both sides as the attacks do: lower case, no punctuation")
    )
    mixed_kinds: bool = attrs.field(
        default=False,
        metadata=doc("allow contrastive and fusion models in one table, whose scores are not made in the same way"),
    )
    candidates: int = attrs.field(
        default=128, validator=in_range(1), metadata=doc("nearest captions or images that a fusion model scores")
    )
    batch_size: int = attrs.field(default=256, validator=in_range(1), metadata=doc("images at a time"))
    precision: Literal["fp32", "bf16"] = attrs.field(
        default="fp32", validator=one_of("fp32", "bf16"), metadata=doc("arithmetic of the towers")
    )
    num_panels: int = attrs.field(
        default=4, validator=in_range(0), metadata=doc("pairs shown in the report: clean, adversarial, difference")
    )

    def __attrs_post_init__(self) -> None:
        if not self.top:
            raise PlaitError("top is empty; give at least one rank")
        if self.candidates < max(self.top):
            raise PlaitError(f"candidates is {self.candidates}, which is less than the rank {max(self.top)} in top")

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any, run: Any) -> Report:
        with as_plait_errors():
            targets = dict(model) if isinstance(model, Mapping) else {"model": model}
            attacked = dict(data) if isinstance(data, Mapping) else {self.source or "source": data}
            self._check(targets, attacked, reference)
            table: list[Row] = []
            recalls: list[Row] = []
            panels: list[Panel] = []
            for name, target in run.track(targets.items(), "targets", total=len(targets)):
                target = on_device(target, run.device)
                clean = self._retrieve(target, reference, run)
                recalls.append({"target": name, **self._recalls(clean)})
                for source, pairs in attacked.items():
                    found = self._retrieve(target, pairs, run)
                    table.append({"source": source, "target": name, **self._rates(name, clean, found)})
                    if source != name and not panels and self.num_panels:
                        panels.append(self._panel(f"{source} → {name}", target, reference, pairs, clean, found))
        run.add(Report(rows=recalls, title="clean recall", better={}, formats=dict.fromkeys(recalls[0], ".3f")))
        rates = [name for name in table[0] if name not in ("source", "target")]
        table.sort(key=lambda row: list(attacked).index(row["source"]))
        table += _means(table, rates)
        return Report(
            rows=table,
            better=dict.fromkeys(rates, "higher"),
            formats=dict.fromkeys(rates, ".2f"),
            panels=panels,
            notes=[
                "ASR@k: of the queries answered within the first k before the attack, the share (%) that is not any more, "
                "with all images and all captions of the gallery adversarial. TR: image → caption, IR: caption → image. "
                "ASR is the mean of TR and IR ASR@1."
            ],
        )

    def _check(self, targets: Mapping[str, Any], attacked: Mapping[str, Any], reference: Any) -> None:
        if not targets or not attacked:
            raise PlaitError("model or data is empty; give at least one model and one attacked data set")
        for name, target in targets.items():
            if not isinstance(target, ImageTextModel):
                raise PlaitError(
                    f"model {name} is a {type(target).__name__}; an image-text model of plait-clip is needed"
                )
        kinds = {name: target.kind for name, target in targets.items()}
        if len(set(kinds.values())) > 1 and not self.mixed_kinds:
            listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
            raise PlaitError(
                f"{listed}: contrastive models rank by cosine, fusion models by a match score; evaluate them in steps of "
                f"their own, or set mixed_kinds: true"
            )
        undecoded(reference)
        for name, pairs in attacked.items():
            undecoded(pairs)
            check_same_rows(reference, pairs, f"data {name}")

    def _retrieve(self, target: ImageTextModel, data: Any, run: Any) -> Retrieval:
        return retrieve(
            target,
            data,
            run.folder,
            clean_captions=self.clean_captions,
            candidates=self.candidates,
            batch_size=self.batch_size,
            precision=self.precision,
        )

    def _recalls(self, found: Retrieval) -> Row:
        row = {f"TR R@{k}": recall(found.text_ranks, k) for k in self.top}
        return row | {f"IR R@{k}": recall(found.image_ranks, k) for k in self.top}

    def _rates(self, target: str, clean: Retrieval, found: Retrieval) -> Row:
        try:
            text = {k: attack_success_rate(clean.text_ranks, found.text_ranks, k) for k in self.top}
            image = {k: attack_success_rate(clean.image_ranks, found.image_ranks, k) for k in self.top}
        except ValueError as error:
            raise PlaitError(f"target {target}: {error}") from error
        first = min(self.top)
        row: Row = {"ASR": (text[first] + image[first]) / 2}
        row |= {f"TR ASR@{k}": text[k] for k in self.top}
        return row | {f"IR ASR@{k}": image[k] for k in self.top}

    def _panel(
        self, title: str, target: ImageTextModel, reference: Any, pairs: Any, clean: Retrieval, found: Retrieval
    ) -> Panel:
        """Pairs for which the attack succeeded first; what the target retrieves for the image, before and after."""
        success = (clean.text_ranks == 0) & (found.text_ranks > 0)
        rows = success.int().argsort(descending=True, stable=True)[: self.num_panels].tolist()
        before = torch.cat(list(pixel_batches(reference.select(rows), target, len(rows))))
        after = torch.cat(list(pixel_batches(pairs.select(rows), target, len(rows))))
        options = {"candidates": self.candidates, "precision": self.precision}
        said = best_captions(target, before, clean, **options), best_captions(target, after, found, **options)
        grid = []
        for i, row in enumerate(rows):
            x, y = _floats(before[i]), _floats(after[i])
            first = int((clean.owner == row).nonzero()[0])
            grid.append(
                [
                    Image(caption=f"clean: {clean.captions[first]} — retrieved: {said[0][i]}", data=_enlarged(x)),
                    Image(caption=f"adversarial: {found.captions[first]} — retrieved: {said[1][i]}", data=_enlarged(y)),
                    *([] if x.shape != y.shape else [Image(caption="10 × difference, grey is none", data=_enlarged(0.5 + 10 * (y - x)))]),
                ]
            )  # fmt: skip
        return Panel(title=title, images=grid)


def _means(table: list[Row], rates: list[str]) -> list[Row]:
    """Of every source over the other targets, and of all sources."""
    transfer = [row for row in table if row["source"] != row["target"]]
    if len(transfer) < 2:
        return []

    def mean(rows: list[Row]) -> Row:
        return {name: float(np.mean([row[name] for row in rows])) for name in rates}

    sources = list(dict.fromkeys(row["source"] for row in transfer))
    own = [
        {"source": source, "target": OTHERS, **mean([row for row in transfer if row["source"] == source])}
        for source in sources
    ]
    return [*own, {"source": "all", "target": OTHERS, **mean(transfer)}] if len(sources) > 1 else own


def _floats(image: torch.Tensor) -> torch.Tensor:
    return image.float() if image.is_floating_point() else image.float() / 255


def _enlarged(image: torch.Tensor) -> bytes:
    """PNG of [3, S, S]; small images are enlarged so that their pixels can be seen."""
    factor = max(1, 96 // image.shape[-1])
    return png(image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2))
