"""What of a dataset goes into a model: its images, its tokens, or its texts by the model's tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from plait_wemoe.images import ImageColumn, ShuffledBatches
from plait_wemoe.preprocessing import Preprocessing, preprocessing_of
from plait_wemoe.texts import TOKEN_COLUMNS, TokenColumn

__all__ = ["Column", "Reading", "ShuffledBatches", "column_of", "reading_of", "tokenizer_of"]

Column = ImageColumn | TokenColumn
# Tokenizers without a limit of their own state a number beyond any text.
NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Reading:
    """How a model wants its data.

    Attributes:
        image_size: side that images are brought to; ``None`` takes them as they are.
        preprocessing: of a library, in place of that.
        tokenizer: of transformers, for columns of texts.
        max_length: tokens that the model takes at most.
        pad_id: token that the model takes for padding; ``None``: that of the tokenizer, else 0.
        vocabulary: see :class:`TokenColumn`.
        accepts: names of token columns that the model has arguments for.
        warn: called with how many texts are cut.
    """

    image_size: int | None = None
    preprocessing: Preprocessing | None = None
    tokenizer: Any = None
    max_length: int | None = None
    pad_id: int | None = None
    vocabulary: int | None = None
    accepts: tuple[str, ...] = TOKEN_COLUMNS
    warn: Callable[[str], None] = lambda sentence: None


def reading_of(
    model: nn.Module,
    image_size: int | None,
    tokenizer: Any = None,
    preprocessing: Preprocessing | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Reading:
    """What a model says of itself, by its configuration and the arguments of its ``forward``."""
    config = getattr(model, "config", None)
    limits = [
        limit
        for limit in (getattr(tokenizer, "model_max_length", None), _positions(config))
        if isinstance(limit, int) and limit < NO_LIMIT
    ]
    arguments = inspect.signature(model.forward).parameters
    anything = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    return Reading(
        image_size=image_size,
        preprocessing=preprocessing if preprocessing or image_size else preprocessing_of(model),
        tokenizer=tokenizer,
        max_length=min(limits, default=None),
        pad_id=getattr(config, "pad_token_id", None),
        vocabulary=getattr(config, "vocab_size", None),
        accepts=tuple(name for name in TOKEN_COLUMNS if anything or name in arguments),
        warn=warn,
    )


def _positions(config: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "model_type", "") not in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        return positions
    return positions - 2  # these count positions from the padding token's number on


def tokenizer_of(folder: Path | None) -> Any:
    """The tokenizer of transformers in a local folder.

    Raises:
        ValueError: it holds no tokenizer, or one without a vocabulary.
    """
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can read ({error})") from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer in {folder} has no vocabulary; save it there with save_pretrained")
    return tokenizer


def column_of(dataset: Any, reading: Reading) -> Column:
    """The inputs in a dataset; every other column, labels first of all, is dropped at once.

    Raises:
        ValueError: no column for it, no tokenizer for texts, no row.
    """
    names = dataset.column_names
    if "image" in names:
        return ImageColumn(dataset, reading.image_size, reading.preprocessing)
    if "input_ids" in names:
        kept = [name for name in TOKEN_COLUMNS if name in names and name in reading.accepts]
        columns = dataset.with_format(None).select_columns(kept)[:]
        return TokenColumn(columns, reading.pad_id or 0, reading.vocabulary)
    if "text" in names:
        if reading.tokenizer is None:
            raise ValueError("the data holds texts; set tokenizer to a folder with the model's tokenizer")
        texts = dataset.with_format(None)["text"][:]
        column, cut = TokenColumn.of_texts(
            texts, reading.tokenizer, reading.max_length, reading.vocabulary, reading.pad_id
        )
        if cut:
            reading.warn(f"{cut} of {len(texts)} texts are longer than {reading.max_length} tokens and are cut")
        return column
    raise ValueError(f"the data has no column 'image', 'input_ids' or 'text'; its columns are {', '.join(names)}")
