"""Networks sized by the data."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
from plait import hookimpl
from plait.fields import field, in_range
from plait_vision import DATA

from plait_federated.client_data import class_names, inputs_of, train_of
from plait_federated.models import ImageClassifier


@attrs.frozen(kw_only=True)
class FederatedModel:
    """A fresh image classifier without buffers; the data set its channels, size and classes."""

    takes = {"data": DATA}
    gives = "classifier"

    architecture: Literal["mlp", "cnn-small", "cnn", "lenet", "resnet18-gn", "resnet18-gn-small-stem"] = field(
        "lenet", "network; mlp and cnn-small are for digits, the others for photographs"
    )
    mean: tuple[float, ...] = field((0.0,), "subtracted from pixels in [0, 1]; one value or one a channel", in_range())
    std: tuple[float, ...] = field((1.0,), "divides the pixels; one value or one a channel", in_range(0, low_open=True))
    column: str | None = field(None, "column of the images; null finds image or pixel_values")

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return ("label", *filter(None, [self.column]))

    @hookimpl
    def load_model(self, data: Any, run: Any) -> ImageClassifier:
        train = train_of(data)
        shape = inputs_of(train.select([0]), self.column).shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(
                f"an input has shape {tuple(shape[1:])}; these networks take square images [channels, size, size]"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            return ImageClassifier(self.architecture, shape[1], shape[2], len(class_names(train)), self.mean, self.std)
