"""``evaluate``: clip-backdoor and backdoor-detection."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import datasets
import numpy as np
import torch
from plait import Report, hookimpl
from plait.fields import field, in_range, method_field
from plait.report import Curve, Panel
from plait_vision import IS_BACKDOOR, flags_of
from plait_vision.files import composed
from plait_vision.rows import DATA
from torch import Tensor

from plait_clip import prompts
from plait_clip import zero_shot as zs
from plait_clip.backdoor import metrics
from plait_clip.backdoor.pictures import comparison, contact_sheet
from plait_clip.backdoor.plugin.attacks import Backdoor, from_manifest
from plait_clip.model import on_device
from plait_clip.plugin.evaluation import ZeroShotFields, of_each

TEST, POISONED = "test", "poisoned"
FORMAT = ".3f"


@attrs.frozen(kw_only=True)
class ClipBackdoor(ZeroShotFields):
    """Clean accuracy (CA@m) and attack success rate (ASR@m) of a backdoored or cleaned image-text model.

    ``data`` is the clean test set, or a mapping with the parts ``test`` and ``poisoned``: without the field
    ``trigger`` it is that which poisoned the latter. ``model`` is one or several by name. ``reference``, if given, is the
    model before the defence (or that of each, by the same names): the pictures then show its predictions too.
    """

    takes = {"model": "image-text-model", "data": DATA, "reference": "image-text-model"}
    columns_needed = ("image",)

    trigger: Any = method_field(
        "attack", "the backdoor attack whose trigger test images get; default: that of the part poisoned of data", None
    )
    templates: tuple[str, ...] | str = field(
        "openai-imagenet",
        "prompts with {} for the class: openai-imagenet, openai-simple, photo, digits, fashion-mnist, or a list",
    )
    top: tuple[int, ...] = field((1, 3, 5, 10), "ranks m; below 20 classes only those up to 3", in_range(1))
    asr_exclude_target: bool = field(
        True, "leave out test images of the target class from ASR and TA; false: as the authors' code"
    )
    trigger_seed: int = field(0, "of triggers that are drawn anew for every image", in_range(0))
    num_shown: int = field(6, "images in the pictures", in_range(0, 64))

    def __attrs_post_init__(self) -> None:
        if self.trigger is not None and not isinstance(self.trigger, Backdoor):
            raise ValueError(
                f"trigger is {type(self.trigger).__name__}, which puts no trigger on test images; name a backdoor attack"
            )

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any | None, run: Any) -> Report:
        if not isinstance(reference, Mapping):
            return of_each(model, None, lambda one, _: self._measured(one, data, reference, run))
        if not isinstance(model, Mapping) or (alone := [name for name in model if name not in reference]):
            missing = (
                f"lacks {', '.join(map(str, alone))}" if isinstance(model, Mapping) else "has names, and model has none"
            )
            raise ValueError(f"reference {missing}; give one model, or that before the defence for each of model")
        pairs = {name: (one, reference[name]) for name, one in model.items()}
        return of_each(pairs, None, lambda pair, _: self._measured(pair[0], data, pair[1], run))

    def _measured(self, model: Any, data: Any, reference: Any | None, run: Any) -> Report:
        test, attack = self._parts(data)
        labels, names = self.labels_and_names(test)
        model = on_device(model, run.device)
        clean = self._classify(model, names, test, "")
        ranks = metrics.ranks_for(len(names), self.top)
        if attack is None:
            shares = {f"CA@{m}": zs.accuracy(clean, labels, m) for m in ranks}
            note = "ASR is not measurable: no trigger was given."
            return Report(
                rows=[shares],
                better=dict.fromkeys(shares, "higher"),
                formats=dict.fromkeys(shares, FORMAT),
                notes=[note],
            )
        target = self._target(attack, names)
        triggered = self._classify(model, names, test, attack.prompt_prefix, attack, run)
        found = metrics.backdoor_metrics(clean, triggered, labels, target, ranks, self.asr_exclude_target)
        panels = self._panels(model, reference, test, labels, names, target, attack, run)
        row: dict[str, float | None] = {
            **{f"CA@{m}": value for m, value in found.clean.items()},
            **{f"ASR@{m}": value for m, value in found.success.items()},
            "TA": found.triggered,
            "target CA": found.target_clean,
        }
        return Report(
            rows=[row],
            better={name: "lower" if name.startswith("ASR") else "higher" for name in row},
            formats=dict.fromkeys(row, FORMAT),
            panels=panels,
        )

    def _parts(self, data: Any) -> tuple[datasets.Dataset, Backdoor | None]:
        poisoned = None
        if isinstance(data, Mapping):
            if TEST not in data:
                raise ValueError(
                    f"clip-backdoor needs clean test data; give data as {{test: step}}, it has {', '.join(data)}"
                )
            data, poisoned = data[TEST], data.get(POISONED)
        if self.trigger is None and poisoned is not None:
            return data, from_manifest(poisoned)
        return data, self.trigger

    def _target(self, attack: Backdoor, names: Sequence[str]) -> int:
        target = attack.target
        if isinstance(target, str):
            spelt = [composed(name) for name in names]
            if composed(target) not in spelt:
                raise ValueError(
                    f"target {target!r} of the attack is not a class of the test data ({', '.join(names[:20])})"
                )
            return spelt.index(composed(target))
        if not 0 <= target < len(names):
            raise ValueError(f"target {target} of the attack is not a label of the test data (0 to {len(names) - 1})")
        return target

    def _trigger(self, attack: Backdoor) -> Any:
        return functools.partial(attack.trigger, seed=self.trigger_seed)

    def _classify(
        self,
        model: Any,
        names: Sequence[str],
        data: datasets.Dataset,
        prefix: str,
        attack: Backdoor | None = None,
        run: Any | None = None,
    ) -> Tensor:
        """The nearest classes of clean images, or of triggered ones; ``run`` warns of images that no trigger changes."""
        templates = [prefix + template for template in prompts.templates(self.templates)]
        head = zs.zero_shot_head(model, names, templates, precision=self.precision)
        top = max(*self.top, 3)
        if attack is None:
            return zs.classify(model, head, data, top=top, batch_size=self.batch_size, precision=self.precision)
        found, unchanged = metrics.classify_triggered(
            model, head, data, self._trigger(attack), attack.image_input(model),
            top=top, batch_size=self.batch_size, precision=self.precision,
        )  # fmt: skip
        if run is not None and unchanged == len(data):
            raise ValueError(
                f"the trigger of {attack.name} changes no pixel that the model sees, so there is no ASR to measure; make "
                "it larger or stronger"
            )
        if run is not None and unchanged:
            run.warn(f"the model sees nothing of the trigger in {unchanged} of {len(data)} test images")
        return found

    def _panels(
        self,
        model: Any,
        reference: Any | None,
        test: datasets.Dataset,
        labels: Tensor,
        names: Sequence[str],
        target: int,
        attack: Backdoor,
        run: Any,
    ) -> list[Panel]:
        rows = torch.nonzero(labels != target).flatten()[: self.num_shown].tolist()
        if not rows:
            return []
        # The same rows of a larger table would get other triggers: their numbers are part of the seed.
        shown = test.select(range(rows[-1] + 1))
        models = {"after": model} if reference is None else {"before": on_device(reference, run.device), "after": model}
        predictions = {
            when: (
                self._classify(one, names, shown, "")[rows, :3],
                self._classify(one, names, shown, attack.prompt_prefix, attack)[rows, :3],
            )
            for when, one in models.items()
        }
        clean = metrics.images_of(test, rows, attack.image_input(model))
        changed = [
            attack.trigger(image[None], [row], seed=self.trigger_seed)[0]
            for image, row in zip(clean, rows, strict=True)
        ]

        def caption(kind: int, i: int) -> str:
            tops = {when: ", ".join(names[k] for k in tops[kind][i].tolist()) for when, tops in predictions.items()}
            return "; ".join(f"{when}: {top}" for when, top in tops.items()) if reference is not None else tops["after"]

        return [
            comparison(
                f"{attack.name}: test images and their three nearest classes",
                clean,
                changed,
                [f"clean {names[labels[row]]} → {caption(0, i)}" for i, row in enumerate(rows)],
                [f"triggered → {caption(1, i)}" for i in range(len(rows))],
            )
        ]


@attrs.frozen(kw_only=True)
class BackdoorDetection:
    """How well suspicion scores find poisoned pairs: precision and recall of the top k, AUROC, average precision."""

    takes = {"data": DATA}

    score: str = field("suspicion", "column of the scores, higher is more suspicious; null ranks last")
    flags: str = field(IS_BACKDOOR, "boolean column with the truth")
    top: tuple[int, ...] = field(
        (16, 64, 256), "k of precision@k and recall@k; those above the rows fall out", in_range(1)
    )
    num_shown: int = field(64, "most suspicious pairs in the picture", in_range(0, 256))

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return self.score, self.flags

    @hookimpl
    def evaluate(self, data: Any, run: Any) -> Report:
        """Of a data set or of several by name."""
        return of_each(None, data, lambda _, part: self._measured(part))

    def _measured(self, data: Any) -> Report:
        if not isinstance(data, datasets.Dataset):
            raise ValueError(f"data is a {type(data).__name__}; backdoor-detection needs a dataset with the scores")
        if not len(data):
            raise ValueError("the data have no rows; give the pairs with their scores")
        scores, flags = metrics.scores_of(data, self.score), flags_of(data, self.flags)
        ks = [k for k in self.top if k <= len(scores)]
        found = metrics.detection_metrics(scores, flags, ks)
        row = {
            **{f"precision@{k}": value for k, value in found.precision.items()},
            **{f"recall@{k}": value for k, value in found.recall.items()},
            "AUROC": found.auroc,
            "average precision": found.average_precision,
        }
        notes = [f"{int(flags.sum())} of {len(flags)} pairs are poisoned."]
        if found.auroc is None:
            notes.append("AUROC and average precision need both poisoned and clean pairs.")
        every = np.unique(np.geomspace(1, len(scores), num=60).astype(int)).tolist()
        curve = metrics.detection_metrics(scores, flags, every).precision
        return Report(
            rows=[row],
            better=dict.fromkeys(row, "higher"),
            formats=dict.fromkeys(row, FORMAT),
            notes=notes,
            curves=[
                Curve(
                    name="precision of the top k",
                    x=list(curve),
                    y=list(curve.values()),
                    x_label="k",
                    y_label="precision",
                )
            ],
            panels=contact_sheet(data, scores, flags, self.num_shown),
        )
