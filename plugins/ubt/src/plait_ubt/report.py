"""The pages of the report on what UBT found."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from plait.report import Image, Panel, Report, png

from plait_ubt.evidence import Evidence
from plait_ubt.ubt import score_gap

SHOWN = 64
COLUMNS = 8
MIN_SIDE = 64  # pixels; smaller images are enlarged to be seen


def verdict(evidence: Evidence) -> str:
    """Whether a shortcut was found, as the beginning of a sentence."""
    kappa, least = evidence.concentration, evidence.options.min_concentration
    if kappa >= least:
        return f"the suspicious captions share a word (concentration {kappa:.2f})"
    return f"no coherent shortcut found (concentration {kappa:.2f} is below {least:g})"


def report(evidence: Evidence, *, label_consistent: bool = False) -> Report:
    """Sizes, forget words, histograms and the most suspicious pairs.

    Args:
        label_consistent: the user says that poison may carry true captions.
    """
    found = verdict(evidence)
    notes = [
        f"{found[0].upper()}{found[1:]}.",
        "UBT was given the training pairs; defences that were given clean pairs work under another threat model.",
    ]
    if evidence.num_dropped:
        notes.append(f"{evidence.num_dropped} suspicious pairs hold no forget word and are not unlearned.")
    if label_consistent:
        notes.append("Recall is not guaranteed: poison with true captions is not weakly similar.")
    return Report(
        title="UBT",
        rows=[
            {
                "forget": ", ".join(evidence.forget_words) or evidence.options.token_selection,
                "concentration": evidence.concentration,
                "suspicious pairs": len(evidence.split.suspicious),
                "normal pairs": len(evidence.split.normal),
                "unlearned pairs": len(evidence.unlearn_rows) if evidence.coherent else 0,
                "score gap": score_gap(evidence.scores, evidence.options.n_top),
                "overfit epochs": len(evidence.gaps),
            }
        ],
        formats={"concentration": ".2f", "score gap": ".3f"},
        panels=[
            Panel(title="UBT: evidence", images=[[_similarities(evidence), _scores(evidence), _lifts(evidence)]]),
            Panel(title="UBT: most suspicious pairs", images=_contact_sheet(evidence)),
        ],
        notes=notes,
    )


def _similarities(evidence: Evidence) -> Image:
    rest = np.setdiff1d(np.arange(len(evidence.similarity)), evidence.split.suspicious)
    parts = {"suspicious": evidence.similarity[evidence.split.suspicious], "rest": evidence.similarity[rest]}
    return _histogram("similarity in the first split", parts)


def _scores(evidence: Evidence) -> Image:
    order = np.argsort(-evidence.scores, kind="stable")
    cut = len(evidence.top)
    parts = {"top": evidence.scores[order[:cut]], "other suspicious": evidence.scores[order[cut:]]}
    return _histogram("score of the suspicious pairs", parts)


def _histogram(caption: str, parts: Mapping[str, np.ndarray]) -> Image:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    everything = np.concatenate(list(parts.values()))
    bins = np.linspace(everything.min(), everything.max() + 0.01, 41).tolist()
    for name, values in parts.items():
        if len(values) == 0:
            continue
        axes.hist(values, bins=bins, alpha=0.6, label=f"{name} ({len(values)})", density=True)
    axes.set(xlabel="cosine", ylabel="density")
    axes.legend()
    return Image(caption=caption, data=png(figure))


def _lifts(evidence: Evidence) -> Image:
    from matplotlib.figure import Figure

    strongest = sorted(evidence.lifts.items(), key=lambda item: -item[1].top_share * item[1].lift)[:20][::-1]
    figure = Figure(figsize=(4, 0.8 + 0.2 * len(strongest)))
    axes = figure.subplots()
    colours = ["tab:red" if word in evidence.forget_words else "tab:blue" for word, _ in strongest]
    axes.barh([word for word, _ in strongest], [v.top_share * v.lift for _, v in strongest], color=colours)
    axes.axvline(evidence.options.min_concentration, color="grey", linestyle=":")
    axes.set(xlabel="share in the top captions × lift")
    return Image(caption="words of the top captions (red: forgotten)", data=png(figure))


def _contact_sheet(evidence: Evidence) -> list[list[Image]]:
    rows = evidence.top[:SHOWN].tolist()
    pictures = evidence.pairs.images(rows)
    factor = max(1, -(-MIN_SIDE // pictures.shape[-1]))
    pictures = pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    images = [
        Image(caption=_shortened(evidence.pairs.captions[row]), data=png(picture))
        for row, picture in zip(rows, pictures, strict=True)
    ]
    return [images[start : start + COLUMNS] for start in range(0, len(images), COLUMNS)]


def _shortened(caption: str, length: int = 80) -> str:
    return caption if len(caption) <= length else caption[: length - 1] + "…"
