"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_defend = conformance("ubt", hook="defend")
test_extract_feature = conformance("ubt", hook="extract_feature")
