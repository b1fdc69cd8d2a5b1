"""Another name of :mod:`plait_clip.toy_data`, until nothing imports it."""

import sys

from plait_clip import toy_data

sys.modules[__name__] = toy_data
