"""Backdoors in image-text models: poisoned data, defences, and how both are measured.

What there is for authors of defences:

* Inputs: :func:`model_and_pairs` (the usual beginning: a copy of the model and checked pairs), or one by one
  :func:`part_of` with :data:`CLEAN` or :data:`SUSPICIOUS`, :func:`trainable_copy`, :func:`sound_copy`;
  :func:`flags_of` reads the column :data:`IS_BACKDOOR`, for measuring only.
* Fields: :class:`FineTuningFields` for a method that fine-tunes, :class:`CleanClipFields` for one that extends
  CleanCLIP, :func:`synonyms_of` for a field of synonyms (default :data:`WORDNET`).
* Training: :class:`FineTuning` (its settings), :func:`fine_tune`, :func:`steps_of_epoch`, :func:`seed_of`; for in-modal
  terms :func:`view_batches` (:class:`ViewBatch`), :func:`encode_views` (:class:`Embeddings`), :func:`clean_clip_loss`,
  :func:`self_supervised_loss`; the whole of CleanCLIP: :func:`clean_clip`; :func:`released_groups`: the parameter
  groups of its authors' code.
* Words: :func:`open_synonyms`, :data:`Synonyms`, :func:`open_wordnet` (:class:`WordNet`), :data:`STOP_WORDS`.

And for authors of attacks: :mod:`triggers` and :mod:`poison`.
"""

from plait_vision import IS_BACKDOOR, flags_of

from plait_clip.backdoor import poison, triggers
from plait_clip.backdoor.clean_clip import (
    Embeddings,
    FineTuning,
    ViewBatch,
    clean_clip,
    clean_clip_loss,
    encode_views,
    fine_tune,
    released_groups,
    seed_of,
    steps_of_epoch,
    view_batches,
)
from plait_clip.backdoor.defence import (
    CLEAN,
    SUSPICIOUS,
    WORDNET,
    CleanClipFields,
    FineTuningFields,
    model_and_pairs,
    part_of,
    sound_copy,
    synonyms_of,
    trainable_copy,
)
from plait_clip.backdoor.eda import STOP_WORDS, Synonyms
from plait_clip.backdoor.losses import self_supervised_loss
from plait_clip.backdoor.synonyms import open_synonyms
from plait_clip.backdoor.wordnet import WordNet, open_wordnet

__all__ = [
    "CLEAN",
    "IS_BACKDOOR",
    "STOP_WORDS",
    "SUSPICIOUS",
    "WORDNET",
    "CleanClipFields",
    "Embeddings",
    "FineTuning",
    "FineTuningFields",
    "Synonyms",
    "ViewBatch",
    "WordNet",
    "clean_clip",
    "clean_clip_loss",
    "encode_views",
    "fine_tune",
    "flags_of",
    "model_and_pairs",
    "open_synonyms",
    "open_wordnet",
    "part_of",
    "poison",
    "released_groups",
    "seed_of",
    "self_supervised_loss",
    "sound_copy",
    "steps_of_epoch",
    "synonyms_of",
    "trainable_copy",
    "triggers",
    "view_batches",
]
