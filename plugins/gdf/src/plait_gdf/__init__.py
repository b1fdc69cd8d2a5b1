"""Generic diffusion features: which activations of a diffusion backbone to use (Meng et al., NeurIPS 2024)."""

__version__ = "0.1.0"
__plait_api__ = "0.1"
