"""Draws the gallery's pictures from the figures on record: ``python figures/pictures.py``.

A picture carries the digest of its record, by which a test sees whether it was drawn from what the page shows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from plait.recording import Figure, read_record

RECORDS = Path(__file__).parent
DOCS = RECORDS.parent / "docs"
RED, GREY, BLUE = "#c1121f", "#6c757d", "#2a6f97"


def digest(record: Path) -> str:
    """What a picture says of its record."""
    return hashlib.sha256(record.read_bytes()).hexdigest()


def of(figures: Iterable[Figure], table: str, metric: str, prefix: str = "") -> dict[str, Figure]:
    """Row → figure, of a metric in a table, rows without the prefix that they are chosen by."""
    return {
        figure.row.removeprefix(prefix): figure
        for figure in figures
        if (figure.table, figure.metric) == (table, metric) and figure.row.startswith(prefix)
    }


def bars(axes: Axes, figures: dict[str, Figure], title: str, colour: str | list[str]) -> None:
    """Means with their spread and every seed's value, first row at the top."""
    names = list(figures)
    means = [figure.mean for figure in figures.values()]
    spreads = [figure.std or 0.0 for figure in figures.values()]
    axes.barh(names, means, xerr=spreads, color=colour, height=0.62, error_kw={"elinewidth": 1, "ecolor": "#333333"})
    for place, figure in enumerate(figures.values()):
        axes.plot(figure.values, [place] * len(figure.values), "k.", markersize=3)
    axes.set(title=title, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))


def poisoned_client(figures: list[Figure]) -> Canvas:
    """Attack success beside clean accuracy, method by method."""
    canvas = Canvas(figsize=(8, 3.1), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    success = of(figures, "asr", "accuracy")
    accelerated = {"DFedCata", "DFedCata in parallel", "OledFL"}
    bars(left, success, "takes a triggered digit for a seven", [RED if n in accelerated else GREY for n in success])
    bars(right, of(figures, "accuracy", "accuracy"), "accuracy on clean digits", BLUE)
    return canvas


def backdoor_direction(figures: list[Figure]) -> Canvas:
    """Attack success along both task vectors, and of merged and cleaned models."""
    canvas = Canvas(figsize=(8.6, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2, width_ratios=(1.1, 1))
    for expert, colour in (("poisoned", RED), ("honest", GREY)):
        for metric, style, what in (("ASR@1", "o-", "attack success"), ("CA@1", ":", "clean accuracy")):
            line = {float(step): figure for step, figure in of(figures, "along", metric, f"{expert}, ").items()}
            means = [figure.mean for figure in line.values()]
            left.errorbar(
                list(line),
                means,
                yerr=[figure.std or 0.0 for figure in line.values()],
                fmt=style,
                color=colour,
                markersize=4,
                capsize=2,
                label=f"{expert}: {what}",
            )
    left.axvline(0, color="#cccccc", zorder=0)
    left.set(title="base + λ (expert − base)", xlabel="λ", ylim=(-0.03, 1.03))
    left.legend(fontsize=7, loc="center left")
    success = of(figures, "audit", "ASR@1")
    shown = {name: figure for name, figure in success.items() if name not in ("base", "honest")}
    bars(right, shown, "attack success", [BLUE if "," in name else RED for name in shown])
    right.tick_params(axis="y", labelsize=8)
    return canvas


def erased_or_moved(figures: list[Figure]) -> Canvas:
    """Each model by its backdoor and by what the victim's adversarial examples do to it."""
    canvas = Canvas(figsize=(7.2, 4), layout="constrained")
    axes = canvas.subplots()
    success, carried = of(figures, "backdoor", "ASR@1"), of(figures, "carried", "CA@1", "pgd, ")
    for name, figure in success.items():
        other = carried[name]
        colour = {"victim": RED, "never-poisoned": BLUE}.get(name, "#333333")
        axes.errorbar(
            figure.mean,
            other.mean,
            xerr=figure.std,
            yerr=other.std,
            fmt="o",
            color=colour,
            elinewidth=0.7,
            capsize=2,
        )
        axes.annotate(
            name, (figure.mean, other.mean), xytext=(7, 7), textcoords="offset points", color=colour, fontsize=9
        )
    axes.set(
        xlim=(-0.05, 1.1),
        ylim=(-0.05, 1.05),
        xlabel="attack success of the backdoor",
        ylabel="accuracy under the victim's adversarial examples",
    )
    axes.text(0.02, -0.02, "erased, not moved", color="#6c757d", fontsize=8)
    axes.text(0.02, 1.0, "moved away", color="#6c757d", fontsize=8)
    return canvas


def weather_recognition(figures: list[Figure]) -> Canvas:
    """From every weather an arrow to what a restorer makes of it, by PSNR and by accuracy."""
    canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
    axes = canvas.subplots()
    accuracy, psnr = of(figures, "recognition", "accuracy"), of(figures, "quality", "PSNR")
    for weather, colour in (("rain", BLUE), ("snow", GREY), ("noise", RED)):
        start = (psnr[weather].mean, accuracy[weather].mean)
        axes.plot(*start, "o", color=colour, label=weather)
        for restorer in ("median", "grey-opening", "total-variation"):
            name = f"{restorer}-{weather}"
            end = (psnr[name].mean, accuracy[name].mean)
            axes.plot(*end, ".", color=colour, markersize=4)
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour})
            axes.annotate(restorer, end, (3, -8), textcoords="offset points", color=colour, fontsize=8)
    axes.axhline(accuracy["clean"].mean, color="#cccccc", zorder=0)
    axes.text(0.01, accuracy["clean"].mean - 0.016, "clean images", transform=axes.get_yaxis_transform(), fontsize=8)
    axes.set(xlabel="PSNR, dB", ylabel="accuracy of a network that learned on clean images")
    axes.margins(0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(0.02, 0.88))
    return canvas


PICTURES: dict[str, Callable[[list[Figure]], Canvas]] = {
    "gallery-poisoned-client": poisoned_client,
    "gallery-backdoor-direction": backdoor_direction,
    "gallery-erased-or-moved": erased_or_moved,
    "gallery-weather-recognition": weather_recognition,
}


def main() -> None:
    """Draw those that have a record, to ``docs/``."""
    for name, draw in PICTURES.items():
        record = RECORDS / f"{name}.csv"
        if record.is_file():
            figures = [figure for figure in read_record(record).figures if math.isfinite(figure.mean)]
            draw(figures).savefig(DOCS / f"{name}.png", dpi=110, metadata={"Record": digest(record)})


if __name__ == "__main__":
    main()
