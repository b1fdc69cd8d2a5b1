"""The promises of a method, for all of this package."""

from plait.testing import conformance

test_digits_graph = conformance("digits-graph")
test_csbm_graph = conformance("csbm-graph")
test_pyg_graph = conformance("pyg-graph", hook="load_data")
test_graph_file = conformance("graph-file")
test_node_split = conformance("node-split")
test_class_split = conformance("class-split")
test_gnn = conformance("gnn")
test_gpn = conformance("gpn")
test_meta_gcn = conformance("meta-gcn")
test_tent = conformance("tent", hook="load_model")
test_graph_adam = conformance("graph-adam")
test_graph_sgd = conformance("graph-sgd")
test_node_accuracy = conformance("node-accuracy")
test_episode_accuracy = conformance("episode-accuracy")
