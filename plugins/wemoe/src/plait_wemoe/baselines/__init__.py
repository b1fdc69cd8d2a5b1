"""The merges that WEMoE is measured against.

:mod:`~plait_wemoe.baselines.static` merges once: simple average, task arithmetic, TIES, DARE, Fisher, RegMean.
:mod:`~plait_wemoe.baselines.adaptive` trains coefficients or masks on unlabelled inputs: AdaMerging, Concrete masks.
"""
