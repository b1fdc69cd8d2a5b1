"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_aggregate_dfedcata = conformance("plait-dfedcata/dfedcata", hook="aggregate")
test_aggregate_oledfl = conformance("plait-dfedcata/oledfl", hook="aggregate")
