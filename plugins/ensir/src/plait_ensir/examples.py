"""What ``plait check`` tries the method on."""

from __future__ import annotations

from datasets import Dataset
from plait.demo.pictures import digits
from plait.testing import Example
from plait_imaging import read_batches
from torch import Tensor

from plait_ensir.gmm import Table


def table() -> Example:
    """A reference of two models, the digits and their negatives, and the truth."""
    truth = digits()
    negatives = [picture.point(lambda level: 255 - level) for picture in truth["image"]]
    negative = Dataset.from_dict({**truth.to_dict(), "image": negatives}, features=truth.features)
    known = {"one": truth, "two": negative, "target": truth}
    return Example(
        arguments={"data": known},
        empty={"data": {name: data.select([]) for name, data in known.items()}},
        wrong={"data": {"one": truth, "two": negative.select(range(3)), "target": truth}},
        device=False,
        outputs=_fused,
    )


def _fused(table: Table) -> list[Tensor]:
    images = [image for _, batch in read_batches(digits()) for image in batch]
    return [table.apply([image, 255 - image]) for image in images]
