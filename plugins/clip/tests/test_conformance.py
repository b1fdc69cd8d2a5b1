from plait.testing import conformance

test_class_folder = conformance("class-folder")
test_clip_contrastive = conformance("clip-contrastive")
test_digits = conformance("digits", hook="load-data")
test_fashion_mnist = conformance("fashion-mnist")
test_image_text = conformance("image-text")
test_linear_probe = conformance("linear-probe")
test_open_clip = conformance("open-clip")
test_retrieval = conformance("retrieval")
test_supervised_fine_tune = conformance("supervised-fine-tune")
test_transformers_clip = conformance("transformers-clip")
test_zero_shot = conformance("zero-shot")
