"""The tables and pictures of how attacks transfer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from plait.report import Image, Panel, Report, png
from plait_clip import recall

from plait_sa_aet.transfer import Gallery, Retrieval, Transferred, top_captions

GAIN = 10  # of the difference in the pictures
OTHERS = "others (mean)"
RESAMPLING = "resampling alone"
ALL = "all"

Row = dict[str, Any]


def rates_row(one: Transferred) -> Row:
    """One attack under one model, for :func:`success`."""
    return _identity(one.source, one.target) | dict(one.rates) | {RESAMPLING: one.resampling}


def recall_row(target: str, before: Retrieval, top: Sequence[int]) -> Row:
    """Recall of one model on the clean pairs."""
    ranks = {"TR": before.text_ranks, "IR": before.image_ranks}
    return _identity("", target) | {f"{task} R@{k}": recall(ranks[task], k) for task in ranks for k in top}


def clean_recall(rows: Sequence[Row]) -> Report:
    """The table of what the models find without an attack."""
    return Report(title="clean recall", rows=rows, formats={name: ".3f" for name in rows[0] if "R@" in name})


def success(
    table: list[Row],
    sources: Iterable[str],
    panels: list[Panel],
    *,
    reader: Literal["attacker", "defender"] = "attacker",
) -> tuple[Report, str]:
    """The table of success rates, with the means over other targets, and a warning on resampling, or "" where it is none.

    Args:
        reader: to a defender low rates are better, and the sources say how images were made, not which model was attacked:
            there are no settings, and no means over other targets.
    """
    place = {source: i for i, source in enumerate(sources)}
    table = sorted(table, key=lambda row: place[row.get("source", "")])  # targets keep their order
    rates = [name for name in table[0] if "ASR" in name]
    notes = [
        "ASR@k: of the queries answered within the first k without the attack, the share (%) that is not with it; "
        "all images and all captions of the gallery are adversarial. TR: image → caption, IR: caption → image. "
        "ASR is the mean of TR and IR ASR@1."
    ]
    if reader == "attacker":
        notes[0] += " White-box: the target is the model that was attacked."
    else:
        table = [{name: value for name, value in row.items() if name != "setting"} for row in table]
    warning = ""
    worst = max(table, key=lambda row: row[RESAMPLING])
    if worst[RESAMPLING] > 0:
        pair = " → ".join(worst[name] for name in ("source", "target") if name in worst) or "this attack"
        warning = (
            f"the attacked images have another size than the target's: resizing clean images in the same way already "
            f"gives {pair} an ASR of {worst[RESAMPLING]:.2f}; see the column {RESAMPLING!r}"
        )
        notes.append(
            f"{RESAMPLING}: the ASR of clean images that were only brought to the size of the attacked ones; so much "
            "of ASR is not the attack's doing."
        )
    else:
        table = [{name: value for name, value in row.items() if name != RESAMPLING} for row in table]
    report = Report(
        rows=[*table, *_means(table, rates)],
        better=dict.fromkeys(rates, "higher" if reader == "attacker" else "lower"),
        formats=dict.fromkeys([*rates, RESAMPLING], ".2f"),
        panels=panels,
        notes=notes,
    )
    return report, warning


def pictures(
    one: Transferred, clean: Gallery, attacked: Gallery, count: int, *, candidates: int, precision: str
) -> Panel:
    """Images whose captions are not found any more come first: clean, adversarial, difference."""
    fooled = (one.before.text_ranks == 0) & (one.after.text_ranks > 0)
    rows = fooled.int().argsort(descending=True, stable=True)[:count].tolist()
    find = partial(top_captions, one.model, rows=rows, candidates=candidates, precision=precision)
    images = []
    for row, first, now in zip(rows, find(clean, one.before), find(attacked, one.after), strict=True):
        changed = attacked.image(row)
        unchanged = clean.image_like(row, changed, one.through)
        amplified = (0.5 + GAIN * (changed - unchanged)).clamp(0, 1)
        images.append(
            [
                Image(caption=f"clean; retrieved first: {first}", data=png(unchanged)),
                Image(caption=f"adversarial; retrieved first: {now}", data=png(changed)),
                Image(caption=f"{GAIN} × difference; {_changed_caption(clean, attacked, row)}", data=png(amplified)),
            ]
        )
    return Panel(title=" → ".join(filter(None, (one.source, one.target))) or "attack", images=images)


def _identity(source: str, target: str) -> Row:
    """The text columns of a row; what has no name is left out."""
    named = {name: value for name, value in (("source", source), ("target", target)) if value}
    if len(named) == 2:
        named["setting"] = "white-box" if source == target else "transfer"
    return named


def _means(table: Sequence[Row], rates: Sequence[str]) -> list[Row]:
    """Rows for the mean of every source over the other targets, and of all sources, where there are several."""
    moved = [row for row in table if row.get("setting") == "transfer"]

    def mean(source: str, rows: Sequence[Row]) -> list[Row]:
        numbers = {name: fmean(row[name] for row in rows) for name in rates if len(rows) > 1}
        return [{"source": source, "target": OTHERS, "setting": "transfer"} | numbers] if numbers else []

    sources = list(dict.fromkeys(row["source"] for row in moved))
    own = [row for source in sources for row in mean(source, [row for row in moved if row["source"] == source])]
    return own + mean(ALL, moved if len(sources) > 1 else [])


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
