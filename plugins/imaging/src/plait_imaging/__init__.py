"""Image restoration for plait: sources, degradations, classical restorers, ensembles, metrics."""

__plait_api__ = "0.1"
