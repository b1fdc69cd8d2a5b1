"""SemiDDM-Weather: all-in-one weather removal by a wavelet diffusion GAN, semi-supervised.

Without plait: :func:`plait_semiddm_weather.semiddm_weather.semiddm_weather` is the method from first to last step,
:class:`plait_semiddm_weather.model.WeatherRestorer` what it gives. :mod:`plait_semiddm_weather.bank` is the screening of
pseudo-labels alone, for other semi-supervised methods; :mod:`~plait_semiddm_weather.scorers` scores without a reference.
"""

__version__ = "0.1.0"
__plait_api__ = "0.1"
