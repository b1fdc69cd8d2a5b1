"""UBT: isolate, expose and unlearn the poisoned pairs of a CLIP model's training set."""

__version__ = "0.1.0"
__plait_api__ = "0.1"
