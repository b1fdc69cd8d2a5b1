"""Image restoration for plait: sources, degradations, classical restorers, ensembles, metrics.

For authors of methods that take or return images, stable:

* columns of images as tensors, in bounded memory – :func:`read_batches`, :func:`read_floats`, :func:`write_images`,
  :func:`map_images`, :func:`over_splits`, :func:`to_float`, :func:`to_uint8`, :func:`encode_png`, :data:`FLOAT_COLUMN`,
  :data:`SAMPLE_PREFIX`;
* do datasets show the same scenes – :func:`check_same_scenes`, :func:`names`, :func:`sizes`;
* for ensembles, several models' restorations side by side – :class:`Scenes`;
* a network over images of any size – :func:`run_tiled`;
* weather on photographs – :mod:`plait_imaging.weather`.

Algorithms without plait, NumPy, SciPy and PyTorch only: :mod:`plait_imaging.degradations`, :mod:`plait_imaging.weather`,
:mod:`plait_imaging.filters`, :mod:`plait_imaging.networks`, :mod:`plait_imaging.training`, :mod:`plait_imaging.tiling`,
:mod:`plait_imaging.metrics`. The methods of the catalogue are in the other modules.
"""

from plait_imaging.images import (
    FLOAT_COLUMN,
    SAMPLE_PREFIX,
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

__all__ = [
    "FLOAT_COLUMN",
    "SAMPLE_PREFIX",
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
