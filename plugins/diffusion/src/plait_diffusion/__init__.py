"""Diffusion models for plait: loading, training of small ones, feature sets and their evaluation.

For authors of extractors and of whatever takes features, stable:

* feature sets – :class:`FeatureSet`, :class:`Activation`, :class:`Origin`, :func:`write_features`, :class:`FeatureWriter`,
  :func:`append`, :func:`join`, :func:`save_features`, :func:`open_features`, :func:`image_tensors`;
* extraction in two halves, for what changes the pass of a denoiser – :class:`DenoiserCall`, :class:`Extractor`.
"""

from plait_diffusion.calls import DenoiserCall, Extractor
from plait_diffusion.feature_sets import (
    Activation,
    FeatureSet,
    FeatureWriter,
    Origin,
    append,
    image_tensors,
    join,
    open_features,
    save_features,
    write_features,
)

__all__ = [
    "Activation",
    "DenoiserCall",
    "Extractor",
    "FeatureSet",
    "FeatureWriter",
    "Origin",
    "append",
    "image_tensors",
    "join",
    "open_features",
    "save_features",
    "write_features",
]

__version__ = "0.1.0"
__plait_api__ = "0.1"
