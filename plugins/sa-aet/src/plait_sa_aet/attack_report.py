"""The report of an attack: counts, losses, mixtures, the directions of the corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from plait import Report
from plait.report import Curve, Image, Panel, png

from plait_sa_aet.sa_aet import COMMON_DIRECTION, Adversarial, Batch, SemanticProjection


def empty_record() -> dict[str, Any]:
    """The record of a shard before its first batch."""
    return {"captions": 0, "unattackable": 0, "rejected": 0, "moved": 0.0, "changes": [], "trace": []}


def note(record: dict[str, Any], found: Adversarial, batch: Batch, rows: Sequence[int], moved: float) -> None:
    """Add a batch to the record of its shard.

    Args:
        rows: numbers of the batch's images in the data.
        moved: largest change of a pixel, in [0, 1] units.
    """
    owner = batch.txt2img.tolist()
    of_its_image = [owner[:i].count(image) for i, image in enumerate(owner)]
    for change in found.changes:
        texts = {"clean": batch.captions[change.caption], "adversarial": found.captions[change.caption]}
        fields = {name: value for name, value in asdict(change).items() if name != "caption"}
        place = {"row": rows[owner[change.caption]], "caption": of_its_image[change.caption]}
        record["changes"].append({**place, **texts, **fields})
    record["captions"] += len(batch.captions)
    record["unattackable"] += len(found.unattackable)
    record["rejected"] += found.num_rejected
    record["moved"] = max(record["moved"], moved)
    record["trace"].append({"first_row": rows[0], "steps": list(found.trace)})


class AttackReport:
    """Sums over the records of the shards."""

    def __init__(self) -> None:
        self.projection: SemanticProjection | None = None
        self.corpus = self.corpus_sha256 = ""
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self.moved = 0.0
        self.losses: dict[int, list[float]] = {}
        self.triples: list[tuple[float, ...]] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the record of a shard."""
        self.counts["captions"] += record["captions"]
        self.counts["changed"] += len({(c["row"], c["caption"]) for c in record["changes"]})
        self.counts["unattackable"] += record["unattackable"]
        self.counts["rejected"] += record["rejected"]
        self.moved = max(self.moved, record["moved"])
        for batch in record["trace"]:
            for step, entry in enumerate(batch["steps"]):
                self.losses.setdefault(step, []).append(sum(entry["view_losses"]))
                self.triples += [tuple(triple) for triple in entry["triples"]]

    def made(self) -> Report:
        """Table, curve and pictures."""
        row: dict[str, Any] = {
            "captions": self.counts["captions"],
            "changed": self.counts["changed"],
            "no word to attack": self.counts["unattackable"],
            "largest change of a pixel": self.moved,
        }
        notes, panels, curves = list(self.notes), [], []
        if self.counts["rejected"]:
            notes.append(
                f"{self.counts['rejected']} candidates of several words were dropped (allow_multiword: false)."
            )
        if self.losses:
            mean = [float(np.mean(self.losses[step])) for step in sorted(self.losses)]
            curves.append(Curve(name="loss of the views", x=range(1, len(mean) + 1), y=mean, y_label="loss"))
        if self.projection is not None:
            rho_1 = float(self.projection.rho_1)
            row["rho_1"] = rho_1
            notes.append(
                f"The projection was made of {self.projection.num_texts} captions, drawn from {self.corpus}, and keeps "
                f"{self.projection.rank} directions."
            )
            meaning = (
                f" drop_top removes that direction; it helps where all texts share it (rho_1 above {COMMON_DIRECTION}), "
                "and hurts where it carries meaning."
            )
            notes.append(
                f"rho_1 = {rho_1:.2f}: the first direction of the corpus' text features holds {rho_1:.0%} of their "
                f"energy.{meaning if self.projection.mode == 'drop_top' else ''}"
            )
            panels.append(Panel(title="Singular values of the corpus", images=[[self._spectrum()]]))
        if self.triples:
            panels.append(Panel(title="Mixtures that were chosen", images=[[self._ternary()]]))
        return Report(
            rows=[row],
            title="attack",
            formats={"captions": ".0f", "changed": ".0f", "no word to attack": ".0f", "largest change of a pixel": ".5f", "rho_1": ".3f"},
            notes=notes,
            panels=panels,
            curves=curves,
        )  # fmt: skip

    def _spectrum(self) -> Image:
        from matplotlib.figure import Figure

        assert self.projection is not None
        figure = Figure(figsize=(4.5, 2.8))
        axes = figure.add_subplot()
        values = self.projection.singular_values.cpu().numpy()
        axes.semilogy(np.arange(1, len(values) + 1), np.maximum(values, values[0] * 1e-12), ".-", markersize=3)
        axes.set(xlabel="direction", ylabel="singular value")
        return Image(caption=f"rho_1 = {float(self.projection.rho_1):.3f}", data=png(figure))

    def _ternary(self) -> Image:
        """Clean image at the top, current one on the left, previous one on the right."""
        from matplotlib.figure import Figure

        current, clean, previous = np.asarray(self.triples, dtype=float).T
        total = current + clean + previous
        figure = Figure(figsize=(3.6, 3.2))
        axes = figure.add_subplot()
        axes.plot([0, 1, 0.5, 0], [0, 0, 3**0.5 / 2, 0], "k-", linewidth=1)
        axes.plot((previous + clean / 2) / total, clean / total * 3**0.5 / 2, ".", markersize=3, alpha=0.4)
        for x, y, name in ((0, -0.07, "current"), (1, -0.07, "previous"), (0.5, 3**0.5 / 2 + 0.03, "clean")):
            axes.text(x, y, name, ha="center")
        axes.set_aspect("equal")
        axes.axis("off")
        mean = (current / total).mean(), (clean / total).mean(), (previous / total).mean()
        return Image(
            caption="mean weights: current {:.2f}, clean {:.2f}, previous {:.2f}".format(*mean), data=png(figure)
        )
