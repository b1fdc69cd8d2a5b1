"""Another name of :mod:`plait_clip.pair_batches`, until nothing imports it."""

import sys

from plait_clip import pair_batches

sys.modules[__name__] = pair_batches
