"""EnsIR as a method of plait: datasets in, dataset out; the algorithm is in :mod:`plait_ensir.ensir`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import attrs
from datasets import Dataset
from plait import Report, Run, hookimpl
from plait.fields import field, in_range
from plait.report import Image, Panel, png
from plait_imaging import Scenes, write_images
from torch import Tensor

from plait_ensir import figures, pth
from plait_ensir.ensir import Estimator, ensir, learn
from plait_ensir.gmm import EMPTY, FAILED, FEW, FITTED, UNKNOWN, Settings, Table

_SHARE_OF_EMPTY = 0.01  # of the test samples; more is worth a warning
_BUSIEST = 4
_NOT_OF_THE_ALGORITHM = ("table", "keep_float")


@attrs.frozen(kw_only=True)
class EnsIR:
    """Ensemble of restored images by range-wise Gaussian mixtures (Sun et al., NeurIPS 2024), as published."""

    takes = {"candidates": "dataset", "data": "dataset"}  # the reference may also be a table, which is a model

    bin_width: int = field(32, "width of a bin, in 8-bit levels; 256 / width bins a model", in_range(1, 256))
    default_weight: tuple[float, ...] | None = field(
        None, "one weight per model, sum 1: start of every cell", in_range(0)
    )
    min_samples: int = field(100, "cells with fewer reference samples keep their start", in_range(2))
    max_iterations: int = field(1001, "most EM updates of a cell", in_range(1))
    tolerance: float = field(1e-5, "EM stops when the mean log-likelihood gains less", in_range(0))
    epsilon: float = field(1e-6, "floor of variances, in squared levels", in_range(0, low_open=True))
    initial_weights: Literal["agreement", "uniform"] = field(
        "agreement", "start of a cell: softmax of 1 / distance from the average, or all alike"
    )
    variance_center: Literal["responsibility-mean", "frozen"] = field(
        "responsibility-mean",
        "the M-step's variance is around the weighted mean of the truth, or the model's frozen mean",
    )
    empty_cells: Literal["previous", "uniform"] = field(
        "previous", "weights of a cell without samples: those of the cell before it, or all alike"
    )
    channels: Literal["separate", "shared"] = field("separate", "one table each for R, G and B, or one for all three")
    clip_input: bool = field(True, "look values outside the 8-bit range up in the border bins instead of refusing them")
    dtype: Literal["float64", "float32"] = field("float64", "precision of EM; tables are float32")
    table: Path | None = field(None, "a saved table (.safetensors, or .pth of the authors) to use without a reference")

    keep_float: bool = field(False, "also store unrounded images, which psnr-ssim with rounding: false then scores")

    def __attrs_post_init__(self) -> None:
        self.settings  # noqa: B018 - it refuses what single fields cannot show

    @property
    def settings(self) -> Settings:
        """The fields that the algorithm has."""
        fields = attrs.asdict(self, filter=lambda field, _: field.name not in _NOT_OF_THE_ALGORITHM, recurse=False)
        return Settings(**fields)

    @hookimpl
    def load_model(self, data: Any, run: Run) -> Table:
        """Learn a table, to fuse several datasets with: ``data`` maps models to datasets, and ``target``."""
        scenes = Scenes.of_reference(data)
        return learn(
            scenes,
            scenes.models,
            self.settings,
            device=run.device,
            track=run.track,
            on_learned=functools.partial(_report_learned, run),
        )

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any | None, run: Run) -> Dataset:
        """The fused images. ``reference`` is as for every ensemble, or the table of a step ``load-model: ensir``."""
        scenes = Scenes.of_candidates(candidates)
        coverage = _Coverage()
        fused = ensir(
            scenes,
            self._known(reference, scenes.models),
            scenes.models,
            self.settings,
            device=run.device,
            track=run.track,
            on_learned=functools.partial(_report_learned, run),
            on_fusing=coverage.add,
        )
        result = write_images(run, scenes.source, fused, keep_float=self.keep_float)
        coverage.report(run)
        return result

    def _known(self, reference: Any, models: tuple[str, ...]) -> Scenes | Table:
        if self.table is not None:
            if reference is not None:
                raise ValueError(f"table is {self.table} and there is a reference too; give one of them")
            path = Path(self.table)
            return pth.load_pth(path, models) if path.suffix == ".pth" else Table.load(path)
        return reference if isinstance(reference, Table) else Scenes.of_reference(reference, models)


def _report_learned(run: Run, estimator: Estimator, table: Table) -> None:
    if not (table.source == FITTED).any():
        run.warn(
            f"nothing was learned, the result is the starting weights: no cell has min_samples ({table.settings.min_samples})"
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
        Image(caption=figures.mixture_caption(mixture, table), data=png(figures.draw_mixture(mixture, table.models)))
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


class _Coverage:
    """Where the weights of the fused samples come from."""

    def __init__(self) -> None:
        self._used: Tensor | None = None

    def add(self, table: Table, images: list[Tensor]) -> None:
        """Count the samples of one more candidate."""
        used = table.usage(images)
        self._table, self._used = table, used if self._used is None else self._used + used

    def report(self, run: Run) -> None:
        """Add a table to the report, and warn where nothing was learned of too many samples."""
        assert self._used is not None  # scenes without images are refused
        table, used = self._table, self._used
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
            row = {"source not in the file, %": 100 * share[UNKNOWN]}
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

    initial_weights: Literal["agreement", "uniform"] = field("uniform", "as for ensir")
    variance_center: Literal["responsibility-mean", "frozen"] = field("frozen", "as for ensir")
    empty_cells: Literal["previous", "uniform"] = field("uniform", "as for ensir")
