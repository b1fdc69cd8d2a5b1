"""SA-AET: transferable attacks on image-text models (Jia et al., TPAMI 2025)."""

__plait_api__ = "0.1"
