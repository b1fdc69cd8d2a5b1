"""Another name of :mod:`plait_clip.image_text_datasets`, until nothing imports it."""

import sys

from plait_clip import image_text_datasets

sys.modules[__name__] = image_text_datasets
