"""Diffusion models for plait: loading, training of small ones, feature sets and their evaluation.

For authors of extractors and of whatever takes features, stable:

* models – :class:`Backbone` (:func:`load_backbone`, :func:`backbone_in`), :class:`NoiseLevel`, :class:`Moments`; the small one:
  :func:`small_backbone`, :func:`small_controlnet`, :class:`ClassTokens`, :func:`gradient_magnitude`, :func:`warped_digits`; :func:`train`;
* activations – :class:`Tap`, :func:`official_ids`, :func:`resolve`, :func:`capture`, :func:`shapes`;
* feature sets – :class:`FeatureSet`, :class:`Activation`, :class:`Origin`, :func:`write_features`, :class:`FeatureWriter`,
  :func:`append`, :func:`join`, :func:`save_features`, :func:`open_features`, :func:`image_tensors`,
  :func:`mask_tensors`;
* :func:`linear_probe`, the measure of the small pipelines;
* extraction in two halves, for what changes the pass of a denoiser – :class:`DenoiserCall`, :class:`Extractor`; how Flux
  sees an image: :func:`flux_tokens`, :func:`flux_places`.
"""

from plait_diffusion.backbone import Backbone, backbone_in
from plait_diffusion.calls import DenoiserCall, Extractor
from plait_diffusion.class_tokens import ClassTokens
from plait_diffusion.digits import warped_digits
from plait_diffusion.families import expanded, flux_places, flux_tokens
from plait_diffusion.feature_sets import (
    Activation,
    FeatureSet,
    FeatureWriter,
    Origin,
    append,
    image_tensors,
    join,
    mask_tensors,
    open_features,
    save_features,
    write_features,
)
from plait_diffusion.loading import load_backbone
from plait_diffusion.noise import NoiseLevel, TimestepRule
from plait_diffusion.probe import probe as linear_probe
from plait_diffusion.small import gradient_magnitude, small_backbone, small_controlnet
from plait_diffusion.taps import Tap, capture, official_ids, resolve, shapes
from plait_diffusion.training import train
from plait_diffusion.vae import Moments

__all__ = [
    "Activation",
    "Backbone",
    "ClassTokens",
    "DenoiserCall",
    "Extractor",
    "FeatureSet",
    "FeatureWriter",
    "Moments",
    "NoiseLevel",
    "Origin",
    "Tap",
    "TimestepRule",
    "append",
    "backbone_in",
    "capture",
    "expanded",
    "flux_places",
    "flux_tokens",
    "gradient_magnitude",
    "image_tensors",
    "join",
    "linear_probe",
    "load_backbone",
    "mask_tensors",
    "official_ids",
    "open_features",
    "resolve",
    "save_features",
    "shapes",
    "small_backbone",
    "small_controlnet",
    "train",
    "warped_digits",
    "write_features",
]

__version__ = "0.1.0"
__plait_api__ = "0.1"
