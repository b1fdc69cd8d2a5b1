import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from plait_clip import ImageInput, OpenClipModel, WordTokenizer, architectures, toy_data

COLOURS = {"dark": 40, "grey": 120, "bright": 220}
NOUNS = ["bag", "boot", "coat", "dress"]


@pytest.fixture(scope="session")
def make_model():
    def make(seed=0):
        tokenizer = WordTokenizer(toy_data.vocabulary(), 14)
        config = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
            "text_cfg": {
                "context_length": 14,
                "vocab_size": tokenizer.vocab_size,
                "width": 32,
                "heads": 2,
                "layers": 1,
            },
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = architectures.from_config(config).model
        return OpenClipModel(model, config, tokenizer, ImageInput(8, [0.5] * 3, [0.5] * 3)).eval()

    return make


@pytest.fixture(scope="session")
def pairs():
    """64 noisy squares: brightness and the corner of a mark tell the caption's adjective and noun."""
    draw = np.random.default_rng(0)
    images, captions = [], []
    for i in range(64):
        colour, noun = list(COLOURS)[i % 3], i % 4
        pixels = np.full((8, 8, 3), COLOURS[colour], np.uint8) + draw.integers(0, 20, (8, 8, 3)).astype(np.uint8)
        pixels[4 * (noun // 2) : 4 * (noun // 2) + 2, 4 * (noun % 2) : 4 * (noun % 2) + 2] = [255, 0, 0]
        images.append(Image.fromarray(pixels))
        captions.append([f"a photo of a {colour} {NOUNS[noun]}"])
    features = datasets.Features({"image": datasets.Image(), "captions": [datasets.Value("string")]})
    table = datasets.Dataset.from_dict({"image": images, "captions": captions}, features=features)
    return table.add_column("is_backdoor", [i % 5 == 0 for i in range(64)])


@pytest.fixture(scope="session")
def toy_synonyms():
    return lambda word: toy_data.SYNONYMS.get(word, ())
