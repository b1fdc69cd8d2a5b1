"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_load_data_digits_8x8 = conformance("plait-federated/digits-8x8", hook="load_data")
test_transform_federated_partition = conformance("plait-federated/federated-partition", hook="transform")
test_load_model_federated_model = conformance("plait-federated/federated-model", hook="load_model")
test_aggregate_d_psgd = conformance("plait-federated/d-psgd", hook="aggregate")
test_aggregate_dfedavg = conformance("plait-federated/dfedavg", hook="aggregate")
test_aggregate_dfedavgm = conformance("plait-federated/dfedavgm", hook="aggregate")
test_aggregate_dfedsam = conformance("plait-federated/dfedsam", hook="aggregate")
test_aggregate_dfedprox = conformance("plait-federated/dfedprox", hook="aggregate")
test_aggregate_fedavg = conformance("plait-federated/fedavg", hook="aggregate")
test_aggregate_fedprox = conformance("plait-federated/fedprox", hook="aggregate")
test_aggregate_fedsam = conformance("plait-federated/fedsam", hook="aggregate")
test_aggregate_scaffold = conformance("plait-federated/scaffold", hook="aggregate")
test_evaluate_federated_rounds = conformance("plait-federated/federated-rounds", hook="evaluate")
test_evaluate_federated_accuracy = conformance("plait-federated/federated-accuracy", hook="evaluate")
test_evaluate_federated_graph = conformance("plait-federated/federated-graph", hook="evaluate")
