"""``restore: torch-model``: any image-to-image network, tiled over images of any size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from datasets import Dataset
from plait import Run, hookimpl
from plait.fields import code_field, field, in_range
from plait.importing import makes, named_object
from plait.weights import is_torchscript, read_weights

from plait_imaging.images import DATA, FLOAT_COLUMN, map_images, names, over_splits, to_float
from plait_imaging.tiling import run_tiled


@attrs.frozen(kw_only=True)
class TorchModel:
    """Restores images with a network: a TorchScript file, weights for an importable class, or a step's model.

    The network maps float ``[N, 3, H, W]`` in [0, 1] to the same, or to a multiple of that size.
    """

    takes = {"data": DATA}
    columns_needed = ("image",)

    file: Path | None = field(
        None, "TorchScript file; or weights (.safetensors, .pth, .pt, .ckpt, .bin), and architecture says of what"
    )
    architecture: str | None = code_field(None, "class of the network: package.module:Class or ./file.py:Class")
    arguments: dict[str, Any] = field(attrs.Factory(dict), "what the class is called with")
    entry: str | None = field(
        None, "which weights of a checkpoint, e.g. params; default: the only ones, averaged before plain ones"
    )
    tile: int = field(512, "side of a tile, in pixels; 0: each image at once", in_range(0))
    overlap: int = field(64, "pixels shared by neighbouring tiles, four times the model's reach", in_range(0))
    multiple_of: int = field(1, "sides that the model accepts; tiles are padded to it", in_range(1))
    scale: int = field(1, "the output is this many times larger", in_range(1))
    batch_size: int = field(1, "tiles run at once", in_range(1))
    dtype: Literal["float32", "bfloat16", "float16"] = field("float32", "of weights and activations")
    keep_float: bool = field(False, "also store unrounded images, which psnr-ssim with rounding: false then scores")

    def __attrs_post_init__(self) -> None:
        if self.tile and self.overlap >= self.tile:
            raise ValueError(f"overlap is {self.overlap} and tile {self.tile}; overlap must be smaller")
        if self.tile and 2 * self.overlap > self.tile:
            raise ValueError(f"overlap is {self.overlap}; at most half of tile {self.tile} may be shared")
        if self.file is not None and self.file.suffix == ".safetensors" and self.architecture is None:
            raise ValueError(
                f"file {self.file} holds weights only; say of what with architecture: package.module:Class"
            )
        if self.architecture is not None and self.file is None:
            raise ValueError("architecture needs its weights: file: ….safetensors, .pth or .ckpt")
        if self.arguments and self.architecture is None:
            raise ValueError("arguments are for architecture, which is not given; leave them out")
        if self.entry is not None and self.architecture is None:
            raise ValueError("entry is for the weights of architecture, which is not given; leave it out")

    @property
    def columns_made(self) -> tuple[str, ...]:
        """The unrounded images where they are kept."""
        return (FLOAT_COLUMN,) if self.keep_float else ()

    @hookimpl
    def restore(self, model: torch.nn.Module | None, data: Any, run: Run) -> Any:
        """The data with every image restored."""
        network = self._network(model).to(run.device, getattr(torch, self.dtype)).eval()

        def restored(dataset: Dataset, split: str) -> Dataset:
            labels = names(dataset)

            def one(image: torch.Tensor, row: int) -> torch.Tensor:
                return self._one(network, image, labels[row], run.device)

            return map_images(run, dataset, one, f"images {split}".strip(), keep_float=self.keep_float)

        return over_splits(data, restored)

    def _network(self, model: Any) -> torch.nn.Module:
        if (model is None) == (self.file is None):
            both = "both given" if model is not None else "both missing"
            raise ValueError(f"the network comes either from field file or from a step (from: {{model: …}}); {both}")
        if model is not None:
            if not isinstance(model, torch.nn.Module):
                raise ValueError(f"model is a {type(model).__name__}; expected a torch.nn.Module from image to image")
            return copy.deepcopy(model)  # the step's own is not moved or cast
        assert self.file is not None
        if self.architecture is None:
            return _load_torchscript(self.file)
        network = _build(self.architecture, self.arguments)
        state = read_weights(self.file, entry=self.entry, expected=network.state_dict())
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"file {self.file} does not fit {self.architecture}: {_reason(error)}") from error
        return network

    def _one(self, network: torch.nn.Module, image: torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
        try:
            with torch.inference_mode():
                result = run_tiled(
                    network,
                    to_float(image).to(device, getattr(torch, self.dtype)),
                    tile=self.tile,
                    overlap=self.overlap,
                    scale=self.scale,
                    multiple_of=self.multiple_of,
                    batch_size=self.batch_size,
                )
        except torch.OutOfMemoryError as error:
            raise ValueError(f"image {name}: out of memory with tile {self.tile}; lower tile or batch_size") from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"image {name}: the model cannot restore it: {_reason(error)}") from error
        return result


def _load_torchscript(file: Path) -> torch.nn.Module:
    if not is_torchscript(file):
        read_weights(file)  # says what else it may be
        raise ValueError(f"file {file} holds weights only; say of what with architecture: package.module:Class")
    try:
        result: torch.nn.Module = torch.jit.load(file, map_location="cpu")
        return result
    except RuntimeError as error:
        raise ValueError(f"file {file} is not a whole TorchScript file: {_reason(error)}") from error


def _build(architecture: str, arguments: dict[str, Any]) -> torch.nn.Module:
    make = named_object(
        architecture, makes(torch.nn.Module), "a class of torch.nn.Module, or a function that returns one"
    )
    try:
        network = make(**arguments)
    except Exception as error:
        raise ValueError(f"architecture {architecture} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"architecture {architecture} gives a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _reason(error: Exception) -> str:
    """The last line says what went wrong in messages with a TorchScript traceback, the first elsewhere."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Traceback" in lines[0] or "TorchScript" in str(error) else " ".join(lines[:3])
