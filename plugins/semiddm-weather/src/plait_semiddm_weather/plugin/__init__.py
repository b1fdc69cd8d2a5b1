"""The methods: ``optimize``, ``load-model``, ``restore``."""

from plait_semiddm_weather.plugin.restoring import LoadWeatherRestorer, RestoreWeather
from plait_semiddm_weather.plugin.training import TrainWeatherRestorer

__all__ = ["LoadWeatherRestorer", "RestoreWeather", "TrainWeatherRestorer"]
