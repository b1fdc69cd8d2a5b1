"""One client's model as a flat vector: trainable parameters in definition order, then floating buffers.

Tables hold one client a row, ``[n, num_parameters + num_buffers]`` in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layout:
    """Where each trainable tensor and each floating buffer of a model lies in the vector.

    Only parameters with ``requires_grad`` take part, so an adapter (LoRA) is all that a LoRA model sends.
    Buffers that are not part of the state dict are constants and do not take part either.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = set(model.state_dict())
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point() and name in kept}
        if not parameters:
            raise ValueError("the model has no trainable parameter; set requires_grad on what is to be trained")
        self.shapes = {name: tensor.shape for name, tensor in [*parameters.items(), *buffers.items()]}
        self.buffer_names = tuple(buffers)
        self.parameter_names = tuple(parameters)
        self.num_parameters = sum(p.numel() for p in parameters.values())
        self.num_buffers = sum(b.numel() for b in buffers.values())

    def vector(self, model: nn.Module) -> Tensor:
        """The model's values, ``[num_parameters + num_buffers]``, float32."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self.shapes])

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Views of ``[..., num_parameters (+ num_buffers)]`` as named tensors ``[..., *shape]``."""
        parts, begin = {}, 0
        for name, shape in self.shapes.items():
            if begin == vectors.shape[-1]:
                break
            parts[name] = vectors[..., begin : begin + shape.numel()].view(*vectors.shape[:-1], *shape)
            begin += shape.numel()
        return parts

    @torch.no_grad()
    def load(self, model: nn.Module, vector: Tensor) -> None:
        """Write a vector ``[num_parameters + num_buffers]`` into a model.

        Raises:
            ValueError: a finite value is too large for the model's own type.
        """
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in self.split(vector).items():
            target = tensors[name].copy_(value)
            if target.dtype == torch.float16 and (target.isinf() & value.isfinite().to(target.device)).any():
                raise ValueError(
                    f"{name} overflows float16, the type of the model; give the model in float32 or bfloat16"
                )
