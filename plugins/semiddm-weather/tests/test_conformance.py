"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_optimize = conformance("plait-semiddm-weather/semiddm-weather", hook="optimize")
test_load_model = conformance("plait-semiddm-weather/semiddm-weather", hook="load_model")
test_restore = conformance("plait-semiddm-weather/semiddm-weather", hook="restore")
