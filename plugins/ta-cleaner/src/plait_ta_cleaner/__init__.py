"""TA-Cleaner: CleanCLIP with factual and counterfactual sub-captions."""

__version__ = "0.1.0"
__plait_api__ = "0.1"
