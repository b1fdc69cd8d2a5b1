"""Merging of fine-tuned models: WEMoE, E-WEMoE and the baselines they are measured against.

Algorithm modules (plain PyTorch): :mod:`~plait_wemoe.upscaling` is the method, in the order of the papers;
:mod:`~plait_wemoe.ensembling` computes its merged layers; :mod:`~plait_wemoe.adaptation` trains its routers;
:mod:`~plait_wemoe.static` and :mod:`~plait_wemoe.adaptive` hold the baselines, one function each.
"""

__version__ = "0.1.0"
