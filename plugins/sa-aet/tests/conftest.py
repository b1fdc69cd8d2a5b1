import pytest
import torch
import transformers
from plait_clip import beds
from plait_clip.model import ImageInput, TransformersModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors


@pytest.fixture(scope="session")
def blip():
    """A fusion model: BLIP for image-text retrieval, 8 × 8 pixels, random weights."""
    known = sorted({word for text in beds.vocabulary() for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", *known, "[CLS]", "[SEP]"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(w, ids[w]) for w in ("[CLS]", "[SEP]")]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "encoder_hidden_size": 16}
    ends = {"pad_token_id": 0, "bos_token_id": ids["[CLS]"], "sep_token_id": ids["[SEP]"]}
    config = transformers.BlipConfig(
        text_config={**sizes, **text, **ends},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        image_text_hidden_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner_model = transformers.BlipForImageTextRetrieval(config).eval()
        for weights in inner_model.parameters():
            if weights.ndim > 1:  # BLIP's own start is so small that images hardly matter
                weights.data.normal_(std=0.25)
    return TransformersModel(inner_model, tokenizer, ImageInput(8, [0.3] * 3, [0.4] * 3))
