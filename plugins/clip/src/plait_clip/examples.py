"""Another place of these names, until nothing imports them from here."""

from plait_clip.toy_models import digit_pairs, tiny_fusion_model, tiny_model  # noqa: F401
