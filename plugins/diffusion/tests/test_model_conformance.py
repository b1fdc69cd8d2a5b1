"""Every promise of loading and training."""

from plait.testing import conformance

test_load_model = conformance("diffusion", hook="load_model")
test_load_data = conformance("warped-digits")
test_optimize = conformance("diffusion", hook="optimize")
