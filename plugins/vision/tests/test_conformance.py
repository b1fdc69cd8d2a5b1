"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_load_data_labelled_images = conformance("plait-vision/labelled-images", hook="load_data")
