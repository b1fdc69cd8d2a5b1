"""``evaluate: transfer``: attack success rates of adversarial pairs, source by target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
from plait import Report, hookimpl
from plait.fields import field, in_range

from plait_sa_aet.captions import MAX_WORDS, clean_caption, num_cut

if TYPE_CHECKING:
    from plait_clip import ImageTextModel


@attrs.frozen(kw_only=True)
class Transfer:
    """Attack success rate on image-text retrieval, for every source and target (Jia et al., TPAMI 2025)."""

    takes = {"model": "image-text-model", "data": "dataset", "reference": "dataset"}
    columns_needed = {"data": ("image",), "reference": ("image",)}

    top: tuple[int, ...] = field((1, 5, 10), "ranks k of R@k and ASR@k", in_range(1))
    candidates: int = field(128, "nearest captions or images that a fusion model scores", in_range(1))
    source: str | None = field(None, "name of the model that was attacked, where data is one dataset without a name")
    clean_captions: bool = field(
        True, "clean the captions of both sides as the attacks do, so that only what they changed differs"
    )
    mixed_kinds: bool = field(
        False, "allow contrastive and fusion models in one table, whose scores are not made in the same way"
    )
    reader: Literal["attacker", "defender"] = field(
        "attacker",
        "who reads the table: a high success rate is good for an attacker, a low one for a defender, whose data may be "
        "restored images of any name, so that his table tells no white-box attacks from transferred ones",
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
        from plait_clip import captions_of

        from plait_sa_aet import transfer_report
        from plait_sa_aet.transfer import Gallery, attack_transfer, check_same_pairs, naming

        models, sources = self._named(model, data)
        cleaning = clean_caption if self.clean_captions else str
        with naming("reference"):
            clean = Gallery.of(reference, cleaning)
        attacked = {}
        for name, rows in sources.items():
            with naming("data", name):
                attacked[name] = Gallery.of(rows, cleaning)
                check_same_pairs(clean, attacked[name])
        if self.clean_captions and (cut := num_cut(captions_of(reference)[0])):
            run.warn(
                f"{cut} of {len(clean.captions)} captions have more than {MAX_WORDS} words and are compared by these"
            )
        pairs = [(source, target) for target in models for source in attacked]
        shown = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0]) if self.num_panels else None
        scoring: dict[str, Any] = {"candidates": self.candidates, "precision": self.precision}
        table, recalls, panels = [], {}, []
        for one in attack_transfer(
            models, clean, attacked, run.folder, run.device, top=self.top, batch_size=self.batch_size,
            track=lambda work: run.track(work, "retrieving"), **scoring,
        ):  # fmt: skip
            table.append(transfer_report.rates_row(one))
            recalls[one.target] = transfer_report.recall_row(one.target, one.before, self.top)
            if (one.source, one.target) == shown:
                panels = [transfer_report.pictures(one, clean, attacked[one.source], self.num_panels, **scoring)]
        run.add(transfer_report.clean_recall(list(recalls.values())))
        report, warning = transfer_report.success(table, attacked, panels, reader=self.reader)
        if warning:
            run.warn(warning)
        return report

    def _named(self, model: Any, data: Any) -> tuple[dict[str, ImageTextModel], dict[str, Any]]:
        """Models and datasets by name; the name of a single one is empty."""
        from plait_clip import ImageTextModel

        from plait_sa_aet.transfer import check_one_kind

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
                raise ValueError(f"{f'model {name}'.rstrip()} is a {kind}; expected an image-text model of plait-clip")
        if not self.mixed_kinds:
            try:
                check_one_kind(models)
            except ValueError as error:
                raise ValueError(f"{error}, or set mixed_kinds: true") from error
        return models, sources
