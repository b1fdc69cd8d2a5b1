"""Reading the table of whole-word token embeddings out of an image-text model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from plait_clip import (
    CallableModel,
    ImageTextModel,
    OpenClipModel,
    TransformersModel,
    WordTokenizer,
    split_words,
)
from torch import Tensor, nn

from plait_sa_aet.word_candidates import TokenEmbedding

_END_OF_WORD = "</w>"
_NEEDED = (
    "candidates from token embeddings need a model with a text embedding table and a tokenizer that has tokens for whole "
    "words: CLIP's byte-pair tokenizer (tokens like dog</w>) or the kit's WordTokenizer"
)


def token_embedding_candidates(model: ImageTextModel) -> TokenEmbedding:
    """Candidates from the model's own token embeddings.

    Raises:
        ValueError: the model has no such table, or no tokens for whole words.
    """
    from open_clip.tokenizer import SimpleTokenizer

    embedding = _embedding(model)
    if embedding is None:
        raise ValueError(f"{type(model).__name__} shows no text embedding table; {_NEEDED}")
    tokenizer = model.tokenizer
    vectors = embedding.weight.detach().float().cpu()
    if isinstance(tokenizer, WordTokenizer):
        ids = {word: i for i, word in enumerate(tokenizer.words, start=1)}  # id 0 is the padding

        def tokenize(word: str) -> list[int]:
            return [ids[part] for part in split_words(word) if part in ids]

        return _candidates(ids, vectors, tokenize)
    if isinstance(tokenizer, SimpleTokenizer):
        return _candidates(_whole_words(tokenizer.encoder), vectors, tokenizer.encode)
    if hasattr(tokenizer, "get_vocab") and (ids := _whole_words(tokenizer.get_vocab())):
        return _candidates(ids, vectors, lambda word: tokenizer(word, add_special_tokens=False)["input_ids"])
    raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}; {_NEEDED}")


def _embedding(model: ImageTextModel) -> nn.Embedding | None:
    if isinstance(model, OpenClipModel):
        tower = getattr(model.model, "text", model.model)  # CustomTextCLIP has a text tower of its own
        return getattr(tower, "token_embedding", None)
    if isinstance(model, TransformersModel):
        embeddings = getattr(getattr(model.model, "text_model", None), "embeddings", None)
        return getattr(embeddings, "token_embedding", None)
    if isinstance(model, CallableModel):
        tables = {name: module for name, module in model.module.named_modules() if isinstance(module, nn.Embedding)}
        named = [table for name, table in tables.items() if name.split(".")[-1] == "token_embedding"]
        found = named or list(tables.values())
        return found[0] if len(found) == 1 else None
    return None


def _whole_words(vocabulary: Mapping[str, int]) -> dict[str, int]:
    # Byte-pair tokens write the ASCII letters as themselves, and TokenEmbedding keeps no others.
    return {
        token.removesuffix(_END_OF_WORD): number for token, number in vocabulary.items() if token.endswith(_END_OF_WORD)
    }


def _candidates(ids: Mapping[str, int], vectors: Tensor, tokenize: Callable[[str], list[int]]) -> TokenEmbedding:
    if max(ids.values()) >= len(vectors):
        raise ValueError(f"the tokenizer has ids up to {max(ids.values())}, the embedding table {len(vectors)} rows")
    ordered = sorted(ids, key=ids.__getitem__)
    return TokenEmbedding(ordered, vectors[[ids[word] for word in ordered]], lambda word: vectors[tokenize(word)])
