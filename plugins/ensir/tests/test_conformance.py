"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_load_model_ensir = conformance("plait-ensir/ensir", hook="load_model")
test_load_model_ensir_clean = conformance("plait-ensir/ensir-clean", hook="load_model")
test_ensemble_ensir = conformance("plait-ensir/ensir", hook="ensemble")
test_ensemble_ensir_clean = conformance("plait-ensir/ensir-clean", hook="ensemble")
