"""Suppresses content shift in diffusion features by off-the-shelf generation techniques (Meng et al., NeurIPS 2024).

:mod:`plait_content_shift.content_shift` is the method from first to last step, :mod:`~plait_content_shift.techniques` what may be
done to a pass, :mod:`~plait_content_shift.lora` adds low-rank parts, :mod:`~plait_content_shift.baselines` has the rivals.
"""

__version__ = "0.1.0"
__plait_api__ = "0.1"
