"""``attack: torchattacks``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from plait import hookimpl
from plait.fields import REQUIRED, field, in_range
from plait_vision import (
    CLASSIFIERS,
    DATA,
    ClassifierFields,
    ImageRows,
    check_labels,
    class_names_of,
    class_number,
    evaluating,
    loss_gradient,
    over_splits,
    to_eight_bits,
    with_attacked_images,
)
from torch import Tensor

from plait_torchattacks import library


@attrs.frozen(kw_only=True)
class Torchattacks(ClassifierFields):
    """Any attack of the torchattacks library on a classifier's logits (Kim, arXiv 2010.01950)."""

    takes = {"model": CLASSIFIERS, "data": DATA}
    columns_needed = ("image", "label")
    depends_on_libraries = ("torchattacks",)

    name: str = field(REQUIRED, "class of torchattacks: PGD, AutoAttack, CW, Square, …")
    arguments: dict[str, Any] = field(
        attrs.Factory(dict), "arguments of the class, e.g. {eps: 8/255, steps: 10}; n_classes and seed are filled in"
    )
    target: str | int | None = field(None, "class name or number to lead to; default: away from the label")
    batch_size: int = field(64, "images attacked at a time", in_range(1))

    def __attrs_post_init__(self) -> None:
        library.check_name(self.name)
        epsilon, norm = library.budget(self.name, self._arguments)
        if epsilon is not None and norm == "linf" and epsilon * 255 < 1 - 1e-6:
            raise ValueError(f"eps is {epsilon:.5f}, below one 8-bit level (1/255), so that no pixel could change")

    @property
    def _arguments(self) -> dict[str, Any]:
        return library.checked_arguments(self.name, self.arguments)

    @hookimpl
    def attack(self, model: Any, data: Any, run: Any) -> Any:
        """The data with ``image`` replaced, 8-bit PNG; ``eps`` holds after rounding."""
        return over_splits(data, lambda part, split: self._attacked(model, part, split, run))

    def _attacked(self, model: Any, data: Any, split: str, run: Any) -> Any:
        images = ImageRows(data)
        classifier, classes = self.classifier_and_labels(model, data, run.device)
        first = images.stacked([0]).to(run.device)
        seed = run.derived_seed(f"attack {split}".strip())
        with evaluating(classifier):
            if self.name not in library.WITHOUT_GRADIENT:
                loss_gradient(classifier, first, classes[:1].to(run.device))  # refuses a model without
            with torch.no_grad():
                count = classifier(first).shape[1]
            check_labels(classes, count)
            if count < (needed := library.classes_needed(self.name, self._arguments)):
                raise ValueError(
                    f"{self.name} needs {needed} classes, and the model tells {count} apart; take PGD or Square"
                )
            attack = library.make(self.name, classifier, self._arguments, num_classes=count, seed=seed)
            if self.target is not None:
                names = classifier.class_names or self.class_names or class_names_of(data)
                library.lead_to(attack, class_number(self.target, names, count), self.name)
            epsilon, norm = library.budget(self.name, self._arguments)

            def one_batch(rows: Sequence[int], levels: Tensor) -> Tensor:
                pixels = (levels.float() / 255).to(run.device)
                mine = classes[list(rows)].to(run.device)
                changed = library.attacked(attack, self.name, pixels, mine, (seed + 1_000_003 * rows[0]) % 2**63)
                return to_eight_bits(changed.cpu(), levels, epsilon, norm)

            return with_attacked_images(
                data, one_batch, method=self, run=run, inputs=(model, data), batch_size=self.batch_size, split=split
            )
