"""The promises of a method, for all of this package."""

from plait.testing import conformance

test_fgsam = conformance("fgsam")
test_fgsam_plus = conformance("fgsam-plus")
test_graph_sam = conformance("graph-sam")
test_graph_asam = conformance("graph-asam")
test_graph_looksam = conformance("graph-looksam")
test_graph_esam = conformance("graph-esam")
test_graph_ae_sam = conformance("graph-ae-sam")
test_graph_mix = conformance("graph-mix")
test_peer_mlp = conformance("peer-mlp")
test_graph_sharpness = conformance("graph-sharpness")
