"""Merging of fine-tuned models: WEMoE, E-WEMoE and the baselines they are measured against.

:func:`plait_wemoe.wemoe.wemoe` is the method from first to last step, :func:`plait_wemoe.wemoe.e_wemoe` its efficient form.
It is plain PyTorch: :mod:`~plait_wemoe.upscaling` finds what is routed, :mod:`~plait_wemoe.mixture` is the merged model,
:mod:`~plait_wemoe.ensembling` computes its layers, :mod:`~plait_wemoe.adaptation` trains its routers.
:mod:`plait_wemoe.baselines` holds the baselines, one function each.
"""

__version__ = "0.1.0"
__plait_api__ = "0.1"
