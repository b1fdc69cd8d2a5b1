"""FGSAM and FGSAM+: sharpness-aware training of graph networks at the price of ordinary training.

Luo et al., "Fast Graph Sharpness-Aware Minimization for Enhancing and Accelerating Few-Shot Node
Classification", NeurIPS 2024. Without plait: ``from plait_fgsam.fgsam import FGSAM, FGSAMPlus, fgsam``
and ``from plait_fgsam.peer import peer_mlp``; the baselines are in ``plait_fgsam.baselines``.
"""

__plait_api__ = "0.1"
