"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_load_data_labelled_images = conformance("plait-vision/labelled-images", hook="load_data")

test_caption = conformance("plait-vision/caption", hook="transform")
test_concat = conformance("plait-vision/concat", hook="transform")
test_relabel = conformance("plait-vision/relabel", hook="transform")
test_resize = conformance("plait-vision/resize", hook="transform")
test_select = conformance("plait-vision/select", hook="transform")
