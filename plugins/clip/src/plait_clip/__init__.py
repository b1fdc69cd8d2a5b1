"""Image-text models for plait: models, data, contrastive training, evaluation; backdoors in :mod:`plait_clip.backdoor`.

What there is for authors of methods; all of it works in plain Python, without a pipeline.

Models
    :class:`ImageTextModel` is the interface that methods are written against; :func:`image_text_model` refuses anything
    else, :func:`on_device` moves without touching the input. :class:`OpenClipModel`, :class:`TransformersModel` and
    :class:`CallableModel` implement it, with :class:`ImageInput` or :class:`ProcessorInput` for the images and
    :class:`WordTokenizer` (:func:`split_words`) for texts. :mod:`architectures` builds them by name.

Data (Hugging Face datasets with the columns ``image`` and ``captions``)
    :class:`PairLoader` gives :class:`PairBatch` after :class:`PairBatch`; :func:`image_batches`, :func:`open_image`,
    :func:`undecoded` and :func:`pixels_from_pil` read images; :func:`check_captions` is what every method begins with,
    :func:`first_captions`, :func:`captions_of` and :func:`caption_column` read captions. :func:`pairs_from_arrays`,
    :func:`flattened` and :func:`png_bytes` make datasets; :mod:`image_text_datasets` reads them.

Training
    :func:`train`, :func:`adamw`, :func:`warmup_cosine`, :func:`contrastive_loss`, :func:`check_weights`; a method that
    trains a copy (thawed by :func:`plait.freezing.thawed`) hands it back by :func:`as_given`;
    :class:`Checkpoint` is where a loop resumes from; :class:`DivergedError`. Losses: :func:`clip_loss`,
    :func:`sigmoid_loss`, :func:`cosines`.

Evaluation
    :func:`zero_shot_head`, :func:`image_features`, :func:`text_features`, :func:`evaluating`; retrieval:
    :func:`retrieval_ranks`, :func:`ranks_by_model`, :func:`evaluate_retrieval`, :func:`recall`. :mod:`prompts` has the
    templates and class names.

Tests and examples
    :mod:`toy_data` (digits and Fashion-MNIST with captions), :func:`digit_pairs`, :func:`tiny_model`,
    :func:`tiny_fusion_model`, :func:`toy_embeddings`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait_clip import image_text_datasets, prompts, toy_data
    from plait_clip.image_text_datasets import flattened, png_bytes
    from plait_clip.image_text_datasets import from_arrays as pairs_from_arrays
    from plait_clip.losses import clip_loss, cosines, sigmoid_loss
    from plait_clip.model import (
        CallableModel,
        ImageInput,
        ImageTextModel,
        OpenClipModel,
        ProcessorInput,
        TransformersModel,
        WordTokenizer,
        architectures,
        image_text_model,
        on_device,
    )
    from plait_clip.model.tokenizer import words as split_words
    from plait_clip.pair_batches import (
        PairBatch,
        PairLoader,
        caption_column,
        check_captions,
        first_captions,
        image_batches,
        open_image,
        pixels_from_pil,
        undecoded,
    )
    from plait_clip.retrieval import (
        captions_of,
        evaluate_retrieval,
        ranks_by_model,
        recall,
        retrieval_ranks,
        text_features,
    )
    from plait_clip.toy_models import digit_pairs, tiny_fusion_model, tiny_model, toy_embeddings
    from plait_clip.training import (
        Checkpoint,
        DivergedError,
        adamw,
        as_given,
        check_weights,
        contrastive_loss,
        train,
        warmup_cosine,
    )
    from plait_clip.zero_shot import evaluating, image_features, zero_shot_head

# Reading a pipeline imports the methods' fields alone: torch, datasets and open_clip wait until something is computed.
_PLACES = {
    "CallableModel": "model:CallableModel",
    "Checkpoint": "training:Checkpoint",
    "DivergedError": "training:DivergedError",
    "ImageInput": "model:ImageInput",
    "ImageTextModel": "model:ImageTextModel",
    "OpenClipModel": "model:OpenClipModel",
    "PairBatch": "pair_batches:PairBatch",
    "PairLoader": "pair_batches:PairLoader",
    "ProcessorInput": "model:ProcessorInput",
    "TransformersModel": "model:TransformersModel",
    "WordTokenizer": "model:WordTokenizer",
    "adamw": "training:adamw",
    "architectures": "model.architectures",
    "as_given": "training:as_given",
    "caption_column": "pair_batches:caption_column",
    "captions_of": "retrieval:captions_of",
    "check_captions": "pair_batches:check_captions",
    "check_weights": "training:check_weights",
    "clip_loss": "losses:clip_loss",
    "contrastive_loss": "training:contrastive_loss",
    "cosines": "losses:cosines",
    "digit_pairs": "toy_models:digit_pairs",
    "evaluate_retrieval": "retrieval:evaluate_retrieval",
    "evaluating": "zero_shot:evaluating",
    "first_captions": "pair_batches:first_captions",
    "flattened": "image_text_datasets:flattened",
    "image_batches": "pair_batches:image_batches",
    "image_features": "zero_shot:image_features",
    "image_text_datasets": "image_text_datasets",
    "image_text_model": "model:image_text_model",
    "on_device": "model:on_device",
    "open_image": "pair_batches:open_image",
    "pairs_from_arrays": "image_text_datasets:from_arrays",
    "pixels_from_pil": "pair_batches:pixels_from_pil",
    "png_bytes": "image_text_datasets:png_bytes",
    "prompts": "prompts",
    "ranks_by_model": "retrieval:ranks_by_model",
    "recall": "retrieval:recall",
    "retrieval_ranks": "retrieval:retrieval_ranks",
    "sigmoid_loss": "losses:sigmoid_loss",
    "split_words": "model.tokenizer:words",
    "text_features": "retrieval:text_features",
    "tiny_fusion_model": "toy_models:tiny_fusion_model",
    "tiny_model": "toy_models:tiny_model",
    "toy_data": "toy_data",
    "toy_embeddings": "toy_models:toy_embeddings",
    "train": "training:train",
    "undecoded": "pair_batches:undecoded",
    "warmup_cosine": "training:warmup_cosine",
    "zero_shot_head": "zero_shot:zero_shot_head",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = import_module(f"{__name__}.{module}")
    globals()[name] = getattr(found, attribute) if attribute else found
    return globals()[name]


__version__ = "0.1.0"
__plait_api__ = "0.1"

__all__ = [
    "CallableModel",
    "Checkpoint",
    "DivergedError",
    "ImageInput",
    "ImageTextModel",
    "OpenClipModel",
    "PairBatch",
    "PairLoader",
    "ProcessorInput",
    "TransformersModel",
    "WordTokenizer",
    "adamw",
    "architectures",
    "as_given",
    "caption_column",
    "captions_of",
    "check_captions",
    "check_weights",
    "clip_loss",
    "contrastive_loss",
    "cosines",
    "digit_pairs",
    "evaluate_retrieval",
    "evaluating",
    "first_captions",
    "flattened",
    "image_batches",
    "image_features",
    "image_text_datasets",
    "image_text_model",
    "on_device",
    "open_image",
    "pairs_from_arrays",
    "pixels_from_pil",
    "png_bytes",
    "prompts",
    "ranks_by_model",
    "recall",
    "retrieval_ranks",
    "sigmoid_loss",
    "split_words",
    "text_features",
    "tiny_fusion_model",
    "tiny_model",
    "toy_data",
    "toy_embeddings",
    "train",
    "undecoded",
    "warmup_cosine",
    "zero_shot_head",
]
