"""The method keeps the promises of its hook."""

from plait.testing import conformance

test_torchattacks = conformance("plait-torchattacks/torchattacks", hook="attack")
