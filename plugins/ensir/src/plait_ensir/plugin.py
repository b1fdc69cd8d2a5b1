"""EnsIR as a method of plait: datasets in, dataset out; the algorithm is in :mod:`plait_ensir.gmm`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from plait import PlaitError, Report, hookimpl
from plait.fields import doc, in_range
from plait.report import Image, Panel, png
from plait_imaging.ensembles import Scenes
from plait_imaging.images import write_images

from plait_ensir import figures, pth
from plait_ensir.gmm import EMPTY, FAILED, FEW, FITTED, UNKNOWN, Estimator, Settings, Table

__plait_api__ = "0.1"

_SHARE_OF_EMPTY = 0.01  # of the test samples; more is worth a warning
_BUSIEST = 4


@contextmanager
def _told() -> Iterator[None]:
    """What the algorithm refuses is a mistake of the user's."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise PlaitError(str(error)) from error


def _choice(default: str, text: str) -> Any:
    return attrs.field(default=default, metadata=doc(text))


@attrs.frozen(kw_only=True)
class EnsIR:
    """Ensemble of restored images by range-wise Gaussian mixtures (Sun et al., NeurIPS 2024), as published."""

    bin_width: int = attrs.field(
        default=32,
        validator=in_range(1, 256),
        metadata=doc("width of a bin, in 8-bit levels; 256 / width bins a model"),
    )
    default_weight: tuple[float, ...] | None = attrs.field(
        default=None, validator=in_range(0), metadata=doc("one weight per model, sum 1: start of every cell")
    )
    min_samples: int = attrs.field(
        default=100, validator=in_range(2), metadata=doc("cells with fewer reference samples keep their start")
    )
    max_iterations: int = attrs.field(default=1001, validator=in_range(1), metadata=doc("most EM updates of a cell"))
    tolerance: float = attrs.field(
        default=1e-5, validator=in_range(0), metadata=doc("EM stops when the mean log-likelihood gains less")
    )
    epsilon: float = attrs.field(
        default=1e-6, validator=in_range(0, low_open=True), metadata=doc("floor of variances, in squared levels")
    )
    initial_weights: Literal["agreement", "uniform"] = _choice(
        "agreement", "start of a cell: softmax of 1 / distance from the average, or all alike"
    )
    variance_center: Literal["responsibility-mean", "frozen"] = _choice(
        "responsibility-mean",
        "the M-step's variance is around the weighted mean of the truth, or the model's frozen mean",
    )
    empty_cells: Literal["previous", "uniform"] = _choice(
        "previous", "weights of a cell without samples: those of the cell before it, or all alike"
    )
    channels: Literal["separate", "shared"] = _choice("separate", "one table each for R, G and B, or one for all three")
    clip_input: bool = attrs.field(
        default=True, metadata=doc("look values outside the 8-bit range up in the border bins instead of refusing them")
    )
    dtype: Literal["float64", "float32"] = _choice("float64", "precision of EM; tables are float32")
    table: Path | None = attrs.field(
        default=None, metadata=doc("a saved table (.safetensors, or .pth of the authors) to use without a reference")
    )

    def __attrs_post_init__(self) -> None:
        with _told():
            self.settings  # noqa: B018

    @property
    def settings(self) -> Settings:
        """The fields that the algorithm has."""
        fields = attrs.asdict(self, filter=lambda field, _: field.name != "table", recurse=False)
        return Settings(**fields)

    @hookimpl
    def load_model(self, data, run):
        """Estimate a table, to fuse several datasets with: ``data`` maps models to datasets, and ``target``."""
        return self._estimate(Scenes.of_reference(data), run)

    @hookimpl
    def ensemble(self, candidates, reference: Any | None, run):
        """The fused images. ``reference`` is as for every ensemble, or the table of a step ``load-model: ensir``."""
        scenes = Scenes.of_candidates(candidates)
        with _told():
            self.settings.check_models(len(scenes.models))
            table = self._table(reference, scenes.models, run).to(run.device)
            table.check(scenes.models, self.bin_width)
        used = torch.zeros_like(table.count)

        def fused() -> Iterator[torch.Tensor]:
            for images in run.track(scenes, "fusing"):
                images = [image.to(run.device) for image in images]
                used.add_(table.usage(images))
                yield table.apply(images).cpu()

        with _told():
            result = write_images(run, scenes.source, fused(), keep_float=True)
        self._report_coverage(table, used, run)
        return result

    def _table(self, reference: Any, models: tuple[str, ...], run: Any) -> Table:
        if self.table is not None:
            if reference is not None:
                raise PlaitError(f"table is {self.table} and there is a reference too; give one of them")
            return pth.load_pth(self.table, models) if self.table.suffix == ".pth" else Table.load(self.table)
        if isinstance(reference, Table):
            return reference
        return self._estimate(Scenes.of_reference(reference, models), run)

    def _estimate(self, scenes: Scenes, run: Any) -> Table:
        with _told():
            estimator = Estimator(scenes.models, self.settings)
            for *images, target in run.track(scenes, "reference"):
                estimator.update([image.to(run.device) for image in images], target.to(run.device))
            table = estimator.finish(lambda batches: run.track(batches, "EM"))
        if not (table.source == FITTED).any():
            run.warn(
                f"nothing was learned, the result is the starting weights: no cell has min_samples ({self.min_samples})"
                " reference samples that a mixture could be fitted to"
            )
        fitted = table.updates[table.source == FITTED].double()
        row = {
            "cells × channels by EM": int((table.source == FITTED).sum()),
            "too few samples": int((table.source == FEW).sum()),
            "EM failed": int((table.source == FAILED).sum()),
            "empty": int((table.source == EMPTY).sum()),
            "EM updates, mean": float(fitted.mean()) if len(fitted) else 0.0,
            "EM updates, most": int(fitted.max()) if len(fitted) else 0,
            "table, KiB": table.lut.numel() * 4 / 1024,
        }
        mixtures = [
            Image(
                caption=figures.mixture_caption(mixture, table), data=png(figures.draw_mixture(mixture, table.models))
            )
            for mixture in estimator.busiest(_BUSIEST)
        ]
        panels = [
            Panel(
                title="EnsIR: weights of the cells",
                images=[[Image(caption=figures.TABLE_CAPTION, data=png(figures.draw_table(table)))]],
            )
        ]
        if mixtures:
            panels.append(Panel(title="EnsIR: mixtures over the truth in the busiest cells", images=[mixtures]))
        run.add(
            Report(
                title="what was learned",
                rows=[row],
                formats={"EM updates, mean": ".1f", "table, KiB": ".0f"},
                panels=panels,
            )
        )
        return table

    def _report_coverage(self, table: Table, used: torch.Tensor, run: Any) -> None:
        total = max(1, int(used.sum()))
        share = {
            source: int(used[table.source == source].sum()) / total for source in (FITTED, FEW, FAILED, EMPTY, UNKNOWN)
        }
        row = {
            "by EM, %": 100 * share[FITTED],
            "start (too few samples), %": 100 * share[FEW],
            "start (EM failed), %": 100 * share[FAILED],
            "empty, %": 100 * share[EMPTY],
        }
        if share[UNKNOWN]:
            row = {"source not told by the file, %": 100 * share[UNKNOWN]}
        run.add(
            Report(
                title="where the weights of the fused samples come from",
                rows=[row],
                formats=dict.fromkeys(row, ".2f"),
            )
        )
        if share[EMPTY] > _SHARE_OF_EMPTY:
            run.warn(
                f"{share[EMPTY]:.1%} of the samples fall into cells that no reference sample fell into, where weights are"
                " arbitrary; use a larger bin_width or a reference more like the test images"
            )


@attrs.frozen(kw_only=True)
class CleanEnsIR(EnsIR):
    """EnsIR as the mathematics has it: even start, variances around the frozen means, averages in empty cells."""

    initial_weights: Literal["agreement", "uniform"] = _choice("uniform", "as for ensir")
    variance_center: Literal["responsibility-mean", "frozen"] = _choice("frozen", "as for ensir")
    empty_cells: Literal["previous", "uniform"] = _choice("uniform", "as for ensir")
