"""Networks sized by the data."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
from plait import PlaitError, hookimpl
from plait.fields import doc, in_range

from plait_federated.models import Classifier
from plait_federated.plugin.tables import class_names, inputs_of, train_of, user_errors

__plait_api__ = "0.1"


@attrs.frozen(kw_only=True)
class FederatedModel:
    """A fresh image classifier without buffers; the data set its channels, size and classes."""

    architecture: Literal["mlp", "cnn-small", "cnn", "lenet", "resnet18-gn", "resnet18-gn-small-stem"] = attrs.field(
        default="lenet", metadata=doc("network; mlp and cnn-small are for digits, the others for photographs")
    )
    mean: tuple[float, ...] = attrs.field(
        default=(0.0,),
        validator=in_range(),
        metadata=doc("subtracted from pixels in [0, 1]; one value or one a channel"),
    )
    std: tuple[float, ...] = attrs.field(
        default=(1.0,),
        validator=in_range(0, low_open=True),
        metadata=doc("divides the pixels; one value or one a channel"),
    )
    column: str | None = attrs.field(
        default=None, metadata=doc("column of the images; null finds image or pixel_values")
    )

    @hookimpl
    def load_model(self, data, run) -> Any:
        train = train_of(data)
        shape = inputs_of(train.select(range(min(1, len(train)))), self.column).shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise PlaitError(
                f"an input has shape {tuple(shape[1:])}; these networks take square images [channels, size, size]"
            )
        with user_errors(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            return Classifier(self.architecture, shape[1], shape[2], len(class_names(train)), self.mean, self.std)
