"""Another name of :mod:`plait_clip.image_text_rows`, until nothing imports it."""

import sys

from plait_clip import image_text_rows

sys.modules[__name__] = image_text_rows
