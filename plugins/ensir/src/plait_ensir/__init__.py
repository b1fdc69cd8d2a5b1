"""EnsIR: an ensemble of restored images by Gaussian mixtures for ranges of brightness.

Sun et al., "EnsIR: An Ensemble Algorithm for Image Restoration via Gaussian Mixture Models", NeurIPS 2024. Without plait:
``from plait_ensir.ensir import Estimator, ensir`` and ``from plait_ensir.gmm import Settings, Table``; the authors' files are
read and written by ``plait_ensir.pth``.
"""

__plait_api__ = "0.1"
