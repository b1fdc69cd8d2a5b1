"""Image-text models for plait: models, data, contrastive training, evaluation, backdoors."""

__version__ = "0.1.0"
