"""``optimize: amalgamation-gate`` and ``extract-feature: amalgamation``: several combinations' features as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import datasets
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from plait import Report, Run, hookimpl
from plait.fields import field, in_range
from plait.report import Image, Panel, png
from plait_diffusion import FeatureSet, Origin, join, mask_tensors, write_features
from torch import Tensor, nn

from plait_content_shift.baselines import mean
from plait_content_shift.content_shift import Gate, Granularity, diversity, fit_gate, sparsity

GATE = "amalgamation-gate"


class SavedGate(nn.Module, PyTorchModelHubMixin):
    """A gate with what it is for: names of buckets and channels, in safetensors and JSON."""

    def __init__(
        self,
        buckets: Sequence[str],
        activations: Sequence[str],
        channels: int,
        side: int,
        num_assigners: int = 1,
        granularity: Granularity = "channel",
        hidden: int = 128,
        dropout: float = 0.5,
        head: Literal["conv", "none"] = "none",
        attention_channels: int = 0,
    ) -> None:
        super().__init__()
        self.buckets, self.activations, self.side = list(buckets), list(activations), side
        self.gate = Gate(
            channels,
            attention_channels=attention_channels,
            num_assigners=num_assigners,
            granularity=granularity,
            hidden=hidden,
            dropout=dropout,
            head=head,
            spatial=side > 0,
        )

    def check(self, buckets: Mapping[str, FeatureSet]) -> None:
        """Whether these are the buckets that the gate was trained on.

        Raises:
            ValueError: their names, order or activations are others.
        """
        if list(buckets) != self.buckets:
            raise ValueError(
                f"the gate was trained on buckets {', '.join(self.buckets)}; the data has {', '.join(buckets)}"
            )
        names = list(next(iter(buckets.values())).names)
        if names != self.activations:
            raise ValueError(
                f"the gate was trained on activations {', '.join(self.activations)}; the data has {', '.join(names)}"
            )


@attrs.frozen(kw_only=True)
class AmalgamationGate:
    """Trains the gate that weighs buckets of features, with a readout of classes (the paper's §5.3).

    ``data`` maps names to feature sets of the same rows, one a combination of techniques. ``attention``, where there is such a
    name, is put behind the fused feature, ungated.
    """

    takes = {"data": "feature-set"}
    gives = GATE

    target: Literal["classes", "pixels"] = field(
        "classes", "what the readout names: the class of an image, or of every pixel"
    )
    label_column: str = field("label", "column with the classes")
    mask_column: str = field("mask", "column with masks of class numbers, for pixels")
    num_assigners: int = field(1, "whose fused features stand beside each other", in_range(1, 4))
    granularity: Literal["channel", "scalar"] = field(
        "channel", "a weight a channel (the code) or a bucket (the paper)"
    )
    hidden: int = field(128, "channels inside an assigner", in_range(1))
    dropout: float = field(0.5, "inside an assigner", in_range(0, 1, high_open=True))
    head: Literal["conv", "none"] = field("conv", "3×3 convolution of the fused feature, or as it is")
    pooled: bool = field(False, "gate features averaged over positions; else maps")
    side: int | None = field(None, "that activations are brought to before gating; the largest", in_range(1))
    sparsity: float | Literal["walk"] = field(0.0, "γ1 of eq. 5; walk: the released code's search")
    diversity: float = field(0.0, "γ2 of eq. 5", in_range(0))
    num_steps: int = field(500, "optimizer steps", in_range(1))
    batch_size: int = field(32, "rows a step", in_range(2))
    learning_rate: float = field(5e-4, "of AdamW", in_range(0, low_open=True))
    weight_decay: float = field(0.01, "of AdamW", in_range(0))
    num_rows: int | None = field(None, "labelled rows, drawn at random; all", in_range(2))

    def __attrs_post_init__(self) -> None:
        if self.target == "pixels" and self.pooled:
            raise ValueError("target is pixels and pooled is true; pixels need maps")
        if not isinstance(self.sparsity, str) and self.sparsity < 0:
            raise ValueError(f"sparsity is {self.sparsity}; 0 or more is needed")

    @hookimpl
    def optimize(self, data: Any, run: Run) -> SavedGate:
        sets, attention = _buckets(data)
        sets = {name: _together(one, self.pooled, self.side) for name, one in sets.items()}
        attention = None if attention is None else _together(attention, self.pooled, self.side)
        first = next(iter(sets.values()))
        shape = first.activations[0]
        rows = self._rows(len(first), run)
        loss_of, num_outputs = self._task(first.rows, rows, shape.height, run.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.derived_seed("gate"))
            gate = SavedGate(
                list(sets),
                list(_buckets(data)[0][next(iter(sets))].names),
                shape.channels,
                shape.height,
                num_assigners=self.num_assigners,
                granularity=self.granularity,
                hidden=self.hidden,
                dropout=self.dropout,
                head=self.head,
                attention_channels=0 if attention is None else attention.activations[0].channels,
            ).to(run.device)
            readout = _Readout(gate.gate.out_channels, num_outputs, self.target == "pixels").to(run.device)

        def read(numbers: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
            chosen = [rows[number] for number in numbers]
            extra = None if attention is None else _values(attention, chosen).to(run.device)
            return [_values(one, chosen).to(run.device) for one in sets.values()], extra

        inputs = (list(sets.values()), attention)
        with run.loop(self, "train gate", inputs=inputs) as loop:
            fit_gate(
                gate.gate,
                readout,
                loss_of,
                read,
                len(rows),
                num_steps=self.num_steps,
                batch_size=min(self.batch_size, len(rows)),
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                sparsity_weight=self.sparsity,
                diversity_weight=self.diversity,
                seed=run.derived_seed("steps") % 2**31,
                checkpoint=loop,
                track=loop.track,
                log=loop.log,
            )
        run.add(_weights_report(gate, read, len(rows)))
        return gate.cpu().eval()

    def _rows(self, total: int, run: Run) -> list[int]:
        if self.num_rows is not None and self.num_rows > total:
            raise ValueError(f"num_rows is {self.num_rows}; the data has {total}")
        if total < 2:
            raise ValueError(f"the data has {total} rows; at least 2 are needed to train a gate")
        return torch.randperm(total, generator=run.generator("rows"))[: self.num_rows].tolist()

    def _task(
        self, data: datasets.Dataset, rows: Sequence[int], side: int, device: torch.device
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
        column = self.label_column if self.target == "classes" else self.mask_column
        if column not in data.column_names:
            raise ValueError(f"the features' rows have no column {column!r} but {', '.join(data.column_names)}")
        if self.target == "pixels":
            truth = mask_tensors(data.select(rows), column, side).to(device)
        else:
            truth = torch.tensor(data.with_format(None)[column])[list(rows)].to(device)
        known = truth[truth != _IGNORED] if self.target == "pixels" else truth

        def loss(outputs: Tensor, numbers: Tensor) -> Tensor:
            return F.cross_entropy(outputs, truth[numbers.to(device)], ignore_index=_IGNORED)

        return loss, int(known.max()) + 1


@attrs.frozen(kw_only=True)
class Amalgamation:
    """One feature set of several: gated by a trained gate (GATE), their mean, or beside each other.

    Without a model the mean of plain combinations with noise of their own is averaging over noise, the equal-cost rival.
    """

    takes = {"model": GATE, "data": "feature-set"}
    gives = "feature-set"

    fusion: Literal["gate", "mean", "concat"] = field(
        "gate", "gate needs the step's model from optimize: amalgamation-gate"
    )
    batch_size: int = field(16, "rows at a time", in_range(1))
    dtype: Literal["float16", "float32"] = field("float32", "in which features are stored")

    @hookimpl
    def extract_feature(self, model: Any | None, data: Any, run: Run) -> FeatureSet | dict[str, FeatureSet]:
        """
        Args:
            model: a trained gate.
            data: name → feature set of the same rows; or name → split → feature set, for one result a split.
        """
        if isinstance(data, Mapping) and data and all(isinstance(one, Mapping) for one in data.values()):
            return {split: self._fused(model, sets, run) for split, sets in _by_split(data).items()}
        return self._fused(model, data, run)

    def _fused(self, model: Any | None, data: Any, run: Run) -> FeatureSet:
        gate = model if isinstance(model, SavedGate) else None
        if (self.fusion == "gate") != (gate is not None) or (gate is None and model is not None):
            what = "none" if model is None else f"a {type(model).__name__}"
            raise ValueError(
                f"fusion is {self.fusion} and the model is {what}; gate, and only gate, takes a trained gate"
            )
        sets, attention = _buckets(data)
        if self.fusion == "concat":
            return join(data)
        if gate is None:
            return self._mean(sets, attention, run)
        gate.check(sets)
        gate = copy.deepcopy(gate).to(run.device).eval()
        sets = {name: _together(one, not gate.side, gate.side or None) for name, one in sets.items()}
        extra = None if attention is None else _together(attention, not gate.side, gate.side or None)

        @torch.no_grad()
        def compute(start: int, batch: datasets.Dataset) -> dict[str, Tensor]:
            rows = range(start, start + len(batch))
            behind = None if extra is None else _values(extra, rows).to(run.device)
            return {"fused": gate.gate([_values(one, rows).to(run.device) for one in sets.values()], behind)}

        return self._written(sets, compute, gate.state_dict(), run)

    def _mean(self, sets: Mapping[str, FeatureSet], attention: FeatureSet | None, run: Run) -> FeatureSet:
        if attention is not None:
            raise ValueError("attention features are not averaged; use fusion: gate or concat, or leave them out")

        def compute(start: int, batch: datasets.Dataset) -> dict[str, Tensor]:
            values = [one.read(rows=range(start, start + len(batch))) for one in sets.values()]
            return {name: mean([value[name].float() for value in values]) for name in values[0]}

        return self._written(sets, compute, None, run)

    def _written(self, sets: Mapping[str, FeatureSet], compute: Any, inputs: Any, run: Run) -> FeatureSet:
        first = next(iter(sets.values()))
        origin = Origin(
            model=f"{self.fusion} of {', '.join(sets)}",
            timestep=first.origins[0].timestep,
            more={"of": [attrs.asdict(one) for features in sets.values() for one in features.origins]},
        )
        return write_features(
            run,
            self,
            first.rows,
            origin,
            compute,
            batch_size=self.batch_size,
            dtype=getattr(torch, self.dtype),
            inputs=(list(sets.values()), inputs),
            description="fused features",
        )


_IGNORED = 255
ATTENTION = "attention"


class _Readout(nn.Module):
    """What is read off the fused feature while the gate learns: classes of images, or of pixels."""

    def __init__(self, channels: int, num_classes: int, pixels: bool) -> None:
        super().__init__()
        self.norm: nn.Module = (
            nn.BatchNorm2d(channels, affine=False) if pixels else nn.BatchNorm1d(channels, affine=False)
        )
        self.layer: nn.Module = nn.Conv2d(channels, num_classes, 1) if pixels else nn.Linear(channels, num_classes)
        self._pixels = pixels

    def forward(self, features: Tensor) -> Tensor:
        if not self._pixels and features.ndim == 4:
            features = features.mean((2, 3))
        return self.layer(self.norm(features))


def _buckets(data: Any) -> tuple[dict[str, FeatureSet], FeatureSet | None]:
    """Feature sets by name, all alike, and the attention feature.

    Raises:
        ValueError: other things; sets of different rows, names or shapes.
    """
    if not isinstance(data, Mapping) or not all(isinstance(one, FeatureSet) for one in data.values()):
        raise ValueError("amalgamation takes several feature sets by name: data: {plain: step, control: step}")
    attention = data.get(ATTENTION)
    sets = {name: one for name, one in data.items() if name != ATTENTION}
    if not sets:
        raise ValueError("there are no buckets; name at least one feature set")
    join(data)  # refuses sets of different rows
    name, first = next(iter(sets.items()))
    if not len(first):
        raise ValueError("the buckets have no rows")
    for other, one in sets.items():
        shapes = [[(a.name, a.shape) for a in features.activations] for features in (first, one)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"buckets {name!r} and {other!r} have activations {shapes[0]} and {shapes[1]}; extract them with one extractor, as"
                " channels are never resized"
            )
    return sets, attention


def _by_split(data: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    splits = {name: set(one) for name, one in data.items()}
    first = next(iter(data.values()))
    if any(names != set(first) for names in splits.values()):
        listed = "; ".join(f"{name}: {', '.join(sorted(names))}" for name, names in splits.items())
        raise ValueError(f"the buckets have different splits ({listed}); extract them from the same data")
    return {split: {name: one[split] for name, one in data.items()} for split in first}


def _together(features: FeatureSet, pooled: bool, side: int | None) -> FeatureSet:
    """All activations as one, at the largest side by their nearest cells, or averaged over positions."""
    if pooled or not features.activations[0].height:
        return features.pooled().concat()
    return features.at(side or max(activation.height for activation in features.activations), "nearest").concat()


def _values(features: FeatureSet, rows: Sequence[int]) -> Tensor:
    return features.read(rows=rows)["concat"]


@torch.no_grad()
def _weights_report(
    gate: SavedGate, read: Callable[[Sequence[int]], tuple[list[Tensor], Tensor | None]], total: int
) -> Report:
    """How the gate weighs: a row a bucket, and a histogram."""
    parts = [
        gate.gate.weights(read(range(first, min(first + 64, total)))[0]).cpu()
        for first in range(0, min(total, 512), 64)
    ]
    weights = torch.cat(parts, 2)
    ordered = weights.sort(dim=1, descending=True).values
    rows: list[dict[str, str | float]] = [
        {
            "bucket": name,
            "mean weight": float(weights[:, number].mean()),
            "largest, % of channels": 100 * float((weights.argmax(1) == number).double().mean()),
        }
        for number, name in enumerate(gate.buckets)
    ]
    apart = float(diversity(weights)) / max(1, len(weights) * (len(weights) - 1) / 2)
    notes = [
        f"the largest weight is {float(ordered[:, 0].mean()):.3f} in the mean (even weights: {1 / len(gate.buckets):.3f}), the two"
        f" largest {float(ordered[:, :2].sum(1).mean()):.3f}; length over buckets {float(sparsity(weights)):.3f}"
        + (f"; assigners are {apart:.3f} apart" if len(weights) > 1 else "")
    ]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.5))
    axis = figure.subplots()
    for number, name in enumerate(gate.buckets):
        axis.hist(weights[:, number].flatten().numpy(), bins=40, range=(0, 1), histtype="step", label=name)
    axis.set_xlabel("weight")
    axis.set_ylabel("channels × images")
    axis.legend(fontsize="small")
    return Report(
        title="weights of the buckets",
        rows=rows,
        formats={"mean weight": ".3f", "largest, % of channels": ".1f"},
        notes=notes,
        panels=[Panel(title="weights of the buckets", images=[[Image(caption="histogram", data=png(figure))]])],
    )
