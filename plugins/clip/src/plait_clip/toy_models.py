"""Tiny image-text models, and digits with captions for them: for examples, conformance checks and tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import datasets
import torch
from torch import Tensor

from plait_clip import image_text_datasets, toy_data
from plait_clip.model import ImageInput, ImageTextModel, TransformersModel


@functools.cache
def digit_pairs(count: int = 60) -> datasets.Dataset:
    """The first handwritten digits of 8 × 8 pixels, with a caption and a label each."""
    images, labels = toy_data.digits()
    captions = toy_data.digit_captions(labels[:count], seed=0)
    return image_text_datasets.from_arrays(images[:count], captions, labels[:count], toy_data.DIGIT_NAMES)


def tiny_model() -> ImageTextModel:
    """A CLIP for :func:`digit_pairs` with random weights, always the same."""
    from plait_clip.model import architectures

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return architectures.tiny("tiny").eval()


def toy_embeddings(model: ImageTextModel, texts: Sequence[str] = ("the number one", "seven")) -> list[Tensor]:
    """What a model makes of four grey images and some texts, to compare models by."""
    size = model.image_size
    images = torch.linspace(0, 1, 4 * 3 * size * size, device=model.device).reshape(4, 3, size, size)
    with torch.no_grad():
        return [model.encode_image(images), model.encode_text(texts)]


def tiny_fusion_model() -> ImageTextModel:
    """BLIP for image-text retrieval, 8 × 8 pixels, random weights under which images and texts matter."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = sorted({word for text in toy_data.vocabulary() for word in text.split()})
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *known, "[CLS]", "[SEP]"])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, ids[word]) for word in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(ids), "max_position_embeddings": 16, "encoder_hidden_size": 16, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**sizes, **text, "bos_token_id": ids["[CLS]"], "sep_token_id": ids["[SEP]"]},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        image_text_hidden_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blip = transformers.BlipForImageTextRetrieval(config).eval()
        with torch.no_grad():
            for name, parameter in blip.named_parameters():
                if parameter.ndim >= 2:  # fresh weights see hardly any difference between images
                    parameter.normal_(std=2.0 if "crossattention" in name else 0.4)
    return TransformersModel(blip, tokenizer, ImageInput(8, [0.3] * 3, [0.4] * 3))
