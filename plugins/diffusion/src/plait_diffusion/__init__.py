"""Diffusion models for plait: loading, training of small ones, feature sets and their evaluation."""

__version__ = "0.1.0"
__plait_api__ = "0.1"
