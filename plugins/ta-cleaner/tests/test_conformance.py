"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_ta_cleaner = conformance("ta-cleaner")
test_ft_hard_negatives = conformance("ft-hard-negatives")
test_subcaptions = conformance("subcaptions")
