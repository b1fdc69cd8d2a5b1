"""Image restoration for plait: sources, degradations, classical restorers, ensembles, metrics.

For authors of methods that take or return images, stable:

* columns of images as tensors, in bounded memory – :func:`read_batches`, :class:`ImageColumn` (row by row),
  :func:`read_floats`, :func:`write_images`, :func:`map_images`, :func:`over_splits`, :func:`to_float`, :func:`to_uint8`,
  :func:`encode_png`, :data:`FLOAT_COLUMN`, :data:`SAMPLE_PREFIX`;
* do datasets show the same scenes – :func:`check_same_scenes`, :func:`names`, :func:`sizes`;
* for ensembles, several models' restorations side by side – :class:`Scenes`;
* a network over images of any size – :func:`run_tiled`;
* weather on photographs – :mod:`plait_imaging.weather`.

Algorithms without plait, NumPy, SciPy and PyTorch only: :mod:`plait_imaging.degradations`, :mod:`plait_imaging.weather`,
:mod:`plait_imaging.filters`, :mod:`plait_imaging.networks`, :mod:`plait_imaging.training`, :mod:`plait_imaging.tiling`,
:mod:`plait_imaging.metrics`. The methods of the catalogue are in the other modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait_imaging.images import (
        FLOAT_COLUMN,
        SAMPLE_PREFIX,
        ImageColumn,
        check_same_scenes,
        encode_png,
        map_images,
        names,
        over_splits,
        read_batches,
        read_floats,
        sizes,
        to_float,
        to_uint8,
        write_images,
    )
    from plait_imaging.scenes import Scenes
    from plait_imaging.tiling import run_tiled

# Whoever takes an algorithm alone does without datasets, and without torch where the algorithm has none.
_LATE = {
    "FLOAT_COLUMN": "images",
    "ImageColumn": "images",
    "SAMPLE_PREFIX": "images",
    "Scenes": "scenes",
    "check_same_scenes": "images",
    "encode_png": "images",
    "map_images": "images",
    "names": "images",
    "over_splits": "images",
    "read_batches": "images",
    "read_floats": "images",
    "run_tiled": "tiling",
    "sizes": "images",
    "to_float": "images",
    "to_uint8": "images",
    "write_images": "images",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)


__all__ = [
    "FLOAT_COLUMN",
    "SAMPLE_PREFIX",
    "ImageColumn",
    "Scenes",
    "check_same_scenes",
    "encode_png",
    "map_images",
    "names",
    "over_splits",
    "read_batches",
    "read_floats",
    "run_tiled",
    "sizes",
    "to_float",
    "to_uint8",
    "write_images",
]

__plait_api__ = "0.1"
