"""Small inputs on which ``plait check`` tries the methods of this package."""

from __future__ import annotations

import csv
import functools
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plait.testing import Example

from plait_clip import beds, records
from plait_clip.model import ImageInput, ImageTextModel, TransformersModel, architectures


@functools.cache
def digit_pairs(count: int = 60) -> Any:
    images, labels = beds.digits()
    captions = beds.digit_captions(labels[:count], seed=0)
    return records.from_arrays(images[:count], captions, labels[:count], beds.DIGIT_NAMES)


def tiny_model() -> ImageTextModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return architectures.tiny("tiny").eval()


def tiny_fusion_model() -> ImageTextModel:
    """BLIP for image-text retrieval, 8 × 8 pixels, random weights under which images and texts matter."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = sorted({word for text in beds.vocabulary() for word in text.split()})
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


@functools.cache
def _folder() -> Path:
    """Pictures in class folders, a list of them, and Fashion-MNIST's files with few images."""
    folder = Path(tempfile.mkdtemp(prefix="plait-clip-example-"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i, row in enumerate(digit_pairs(6)):
            path = folder / "classes" / beds.DIGIT_NAMES[row["label"]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
            table.writerow([path.relative_to(folder), row["captions"][0]])
    draw = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images = draw.integers(0, 256, (20, 28, 28)).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(20, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{stem}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


def open_clip() -> Example:
    return Example(arguments={"data": digit_pairs()}, random=True, progress=False, device=True)


def transformers_clip() -> Example:
    folder = _folder() / "model"
    if not folder.is_dir():
        tiny_model().save_pretrained(folder)
    return Example(arguments={}, fields={"source": str(folder)}, progress=False)


def clip_contrastive() -> Example:
    data = digit_pairs()
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields={"num_epochs": 2, "batch_size": 20, "checkpoint_minutes": 0.0},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": torch.nn.Linear(2, 2)},
    )


def _evaluation(column: str, **fields: Any) -> Example:
    data = digit_pairs()
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields=fields,
        progress=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns(column), "model": torch.nn.Linear(2, 2)},
    )


def zero_shot() -> Example:
    return _evaluation("label", templates="digits")


def retrieval() -> Example:
    return _evaluation("captions")


def _classifier(**fields: Any) -> Example:
    data = digit_pairs()
    splits = {"train": data.select(range(40)), "test": data.select(range(40, 60))}
    return Example(
        arguments={"model": tiny_model(), "data": splits},
        fields=fields,
        progress=False,
        empty={"data": {"train": data.select([]), "test": data}},
        wrong={"data": data, "model": torch.nn.Linear(2, 2)},
    )


def linear_probe() -> Example:
    return _classifier(num_epochs=2)


def supervised_fine_tune() -> Example:
    return _classifier(num_epochs=2, batch_size=20, warmup_steps=1)


def image_text() -> Example:
    return Example(arguments={}, fields={"source": str(_folder() / "metadata.csv")}, device=False)


def class_folder() -> Example:
    return Example(arguments={}, fields={"folder": str(_folder() / "classes")}, device=False)


def fashion_mnist() -> Example:
    fields = {"folder": str(_folder()), "splits": {"clean": "train[0:20]", "test": "test"}}
    return Example(arguments={}, fields=fields, progress=False, device=False, random=True)
