"""Preprocessing is the library's own, to the pixel, and travels with the model."""

import datasets
import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from plait_clip.backdoor.clean_clip import view_batches
from plait_clip.model import ImageInput, ImageTextModel, OpenClipModel, ProcessorInput, architectures
from plait_clip.pair_batches import PairLoader, image_batches

SIZES = [(500, 375), (640, 480), (640, 427), (427, 640)]
# As transformers has them: some versions have one implementation on tensors and one on PIL images.
PROCESSORS = [
    getattr(transformers, name)
    for name in (
        "CLIPImageProcessor",
        "CLIPImageProcessorPil",
        "CLIPImageProcessorFast",
        "SiglipImageProcessor",
        "BlipImageProcessor",
    )
    if hasattr(transformers, name)
]


def photograph(width: int, height: int) -> Image.Image:
    """A picture with edges and smooth parts."""
    coarse = np.random.default_rng(width * height).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)).copy()
    fine[::7] = 255 - fine[::7]
    return Image.fromarray(fine)


def as_model_sees(image_input: ImageInput, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(image_input.from_pil(image).copy())
    return image_input(pixels[None].float() / 255)[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("resize", "mode"), [("crop", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_open_clip(size, resize, mode, interpolation):
    image = photograph(*size)
    theirs = open_clip.image_transform(224, is_train=False, resize_mode=mode, interpolation=interpolation)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    ours = ImageInput(224, mean, std, resize=resize, interpolation=interpolation)
    torch.testing.assert_close(as_model_sees(ours, image), theirs(image), rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda cls: cls.__name__)
def test_transformers(size, processor):
    image, processor = photograph(*size), processor()
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    # Not a level apart: 1/255 divided by the standard deviation is 0.015.
    torch.testing.assert_close(as_model_sees(ProcessorInput(processor), image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("make", [lambda: ImageInput(224, [0.5] * 3, [0.5] * 3), *PROCESSORS])
def test_floats_take_the_same_way(size, make):
    made = make()
    ours = made if isinstance(made, ImageInput) else ProcessorInput(made)
    image = photograph(*size)
    floats = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None].float() / 255
    expected = torch.from_numpy(ours.from_pil(image).copy()).float() / 255
    assert (ours.to_size(floats)[0] - expected).abs().max() <= 1.5 / 255


def test_an_image_of_the_models_size_passes_unchanged():
    image = photograph(32, 32)
    wide_cut = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    for ours in (ImageInput(32, [0.5] * 3, [0.5] * 3), ProcessorInput(wide_cut)):
        assert np.array_equal(ours.from_pil(image), np.asarray(image).transpose(2, 0, 1))


def test_a_crop_smaller_than_the_resized_image():
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    image = photograph(640, 427)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(as_model_sees(ProcessorInput(processor), image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_center_crop": False}, "different sizes"),
        ({"do_resize": False}, "different sizes"),
        ({"crop_size": {"height": 20, "width": 30}}, "20 × 30"),
    ],
)
def test_processors_that_make_no_squares_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ProcessorInput(transformers.CLIPImageProcessor(**fields))


@pytest.fixture(scope="module")
def photographs() -> datasets.Dataset:
    images = [photograph(*size) for size in [(50, 37), (64, 48), (64, 43)]]
    return datasets.Dataset.from_dict({"image": images, "captions": [["a"], ["b"], ["c"]]})


def _model() -> ImageTextModel:
    torch.manual_seed(0)
    model = architectures.tiny("tiny-28", ["a b c"])
    return model.eval()


def test_every_reader_prepares_images_so(photographs):
    """Evaluation, held and streamed training pairs, and the views of defences."""
    model = _model()
    expected = torch.stack([torch.from_numpy(model.image_input.from_pil(i).copy()) for i in photographs["image"]])
    assert torch.equal(torch.cat(list(image_batches(photographs, model.image_input, batch_size=2))), expected)
    for held in (1 << 30, 0):
        pairs = PairLoader(photographs, model, held_bytes=held)
        assert torch.equal(pairs.read([0, 1, 2], [0.0] * 3).images, expected)
    (batch,) = view_batches(photographs, model, batch_size=3, seed=0, epoch=0)
    assert torch.equal(batch.images, expected[batch.rows])


def test_open_clips_preprocessing_is_saved_with_the_model(tmp_path):
    model = _model()
    squashing = ImageInput(28, [0.1] * 3, [0.2] * 3, resize="squash", interpolation="bilinear")
    OpenClipModel(model.model, model.config, model.tokenizer, squashing).save_pretrained(tmp_path)
    again = ImageTextModel.from_pretrained(tmp_path)
    assert again.image_input.config() == squashing.config()
    _, theirs = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    image = photograph(50, 37)
    torch.testing.assert_close(as_model_sees(again.image_input, image), theirs(image), rtol=0, atol=0)
