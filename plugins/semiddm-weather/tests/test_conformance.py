"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_optimize = conformance("plait-semiddm-weather/semiddm-weather", hook="optimize")
test_load_model = conformance("plait-semiddm-weather/semiddm-weather", hook="load_model")
test_defend = conformance("plait-semiddm-weather/restore-first", hook="defend")
test_evaluate = conformance("plait-semiddm-weather/learned-quality", hook="evaluate")
test_restore = conformance("plait-semiddm-weather/semiddm-weather", hook="restore")
