import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from plait_clip import ProcessorInput, TransformersModel, tiny_fusion_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors


@pytest.fixture(scope="session")
def blip():
    return tiny_fusion_model()


@pytest.fixture(scope="session")
def photographs():
    """Four photographs of 40 x 30 pixels, rich in detail."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(4)]
    captions = [[f"a photo of {word}"] for word in ("one", "two", "three", "four")]
    data = datasets.Dataset.from_dict({"image": images, "captions": captions})
    return data.cast_column("image", datasets.Image())


@pytest.fixture(scope="session")
def photo_clip():
    """A CLIP of transformers whose processor resizes to 12 and crops to 10 pixels, as open_clip's transform does not."""
    words = ["[PAD]", "[UNK]", "a", "photo", "image", "of", "one", "two", "three", "four", "[CLS]", "[SEP]"]
    ids = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, ids[word]) for word in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[SEP]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": ids["[CLS]"], "eos_token_id": ids["[SEP]"], "pad_token_id": ids["[SEP]"]}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(ids), "max_position_embeddings": 12},
        vision_config={**sizes, "image_size": 10, "patch_size": 5},
        projection_dim=8,
    )
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 12}, crop_size={"height": 10, "width": 10}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = transformers.CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in clip.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.4)
    return TransformersModel(clip, tokenizer, ProcessorInput(processor))
