"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_load_data_labelled_images = conformance("plait-vision/labelled-images", hook="load_data")

test_caption = conformance("plait-vision/caption", hook="transform")
test_concat = conformance("plait-vision/concat", hook="transform")
test_relabel = conformance("plait-vision/relabel", hook="transform")
test_resize = conformance("plait-vision/resize", hook="transform")
test_select = conformance("plait-vision/select", hook="transform")

test_load_model_timm = conformance("plait-vision/timm", hook="load_model")
test_load_model_torchvision = conformance("plait-vision/torchvision", hook="load_model")
test_load_model_transformers = conformance("plait-vision/transformers-classifier", hook="load_model")
test_classifier_training = conformance("plait-vision/classifier-training", hook="optimize")
test_accuracy = conformance("plait-vision/accuracy", hook="evaluate")
test_fgsm = conformance("plait-vision/fgsm", hook="attack")
test_pgd_logits = conformance("plait-vision/pgd-logits", hook="attack")
