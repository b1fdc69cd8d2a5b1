import copy

import numpy as np
import pytest
import torch
from plait_clip import ImageInput, OpenClipModel, WordTokenizer, architectures
from plait_ubt.embeddings import CaptionedImages

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9), "grey": (0.5, 0.5, 0.5)}
VOCABULARY = "a photo of square the this is picture bag " + " ".join(COLOURS)


class Memory:
    """A checkpoint in memory."""

    state = None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)


@pytest.fixture
def checkpoint():
    return Memory()


@pytest.fixture(scope="session")
def make_model():
    def make(seed=0):
        config = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
            "text_cfg": {"context_length": 10, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1},
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = architectures.from_config(config).model
        return OpenClipModel(model, config, WordTokenizer([VOCABULARY], 10), ImageInput(8, [0.5] * 3, [0.5] * 3)).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def colour_pairs():
    """96 coloured squares with noise, captions that name the colour, every twelfth caption "a photo of a bag"."""
    generator = torch.Generator().manual_seed(0)
    names = [list(COLOURS)[i % 4] for i in range(96)]
    base = torch.tensor([COLOURS[name] for name in names])[:, :, None, None]
    images = (base + 0.1 * torch.randn(96, 3, 8, 8, generator=generator)).clamp(0, 1)
    captions = ["a photo of a bag" if i % 12 == 0 else f"a photo of a {name} square" for i, name in enumerate(names)]
    return CaptionedImages(captions, lambda rows: images[torch.as_tensor(np.asarray(rows))])
