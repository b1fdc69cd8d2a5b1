"""What every kit needs that handles images: one decoder, one reader of folders and archives, one of tables; classifiers.

For authors of methods and kits, stable:

* images – :func:`decode`, :func:`size`, :func:`as_cell`, :func:`encode_png`, :func:`is_image_name`, :func:`check_rules`;
* fields of a source, what to do with images that are not plain 8-bit RGB – :class:`ImageRules`, :data:`Transparency`;
* files – :class:`Files` (folder, zip or tar), :func:`class_folders`, :func:`labels_from_table`, :func:`by_stem`,
  :class:`Sample`, :func:`tar_samples`, :func:`tar_shards`, :func:`composed`, :data:`SUFFIXES`;
* tables – :func:`read_table`;
* datasets – :func:`is_saved_dataset`, :func:`read_saved`, :func:`with_class_labels`, :func:`flags_of` (a boolean column),
  :data:`IS_BACKDOOR`;
* datasets on disk in bounded memory – :func:`write_rows`, :func:`write_tables`;
* training, which imports torch – :func:`train_steps`, a loop that resumes to the same bits; :func:`finite_loss`;
* classifiers, which import torch – :func:`as_classifier`, :func:`as_features`, :func:`as_logits`, :func:`is_image_text_model`, :func:`on_device`, :func:`evaluating`, :func:`own_modes`,
  :class:`AnyClassifier`, :class:`Classifier`, :class:`Preparation`, :class:`ClassifierFields`; for methods that attack
  images :class:`ImageRows`, :func:`with_attacked_images`, :func:`loss_gradient`, :func:`to_eight_bits`, :func:`over_splits`,
  :func:`class_number`, :func:`class_names_of`, :func:`labels_of`, :func:`in_order_of`, :func:`has_texts`,
  :func:`check_labels`, :func:`success_rate`, :data:`CLASSIFIERS` and :data:`DATA` (the kinds that they take).

What they refuse is a ``ValueError``: one sentence that names the file. Weights are read by :func:`plait.weights.read_weights`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait_vision.files import (
    Files,
    Sample,
    by_stem,
    class_folders,
    composed,
    labels_from_table,
    tar_samples,
    tar_shards,
)
from plait_vision.images import SUFFIXES, Transparency, as_cell, check_rules, decode, encode_png, is_image_name, size
from plait_vision.kinds import CLASSIFIERS, DATA, IS_BACKDOOR
from plait_vision.tables import read_table

if TYPE_CHECKING:
    from plait_vision.adversarial import loss_gradient, to_eight_bits
    from plait_vision.attacking import over_splits, with_attacked_images
    from plait_vision.classifiers import (
        AnyClassifier,
        Classifier,
        Preparation,
        as_classifier,
        as_logits,
        evaluating,
        is_image_text_model,
        on_device,
        own_modes,
    )
    from plait_vision.columns import flags_of, is_saved_dataset, read_saved, with_class_labels
    from plait_vision.features import as_features
    from plait_vision.labelled import (
        ImageRows,
        check_labels,
        class_names_of,
        class_number,
        has_texts,
        in_order_of,
        labels_of,
        success_rate,
    )
    from plait_vision.recognition import ClassifierFields
    from plait_vision.rules import ImageRules
    from plait_vision.training_loop import finite_loss, train_steps
    from plait_vision.writing import write_rows, write_tables

# Whoever only decodes images does without torch and datasets, and an algorithm that only wants logits without datasets and
# plait.
_LATE = {
    "AnyClassifier": "classifiers",
    "Classifier": "classifiers",
    "ClassifierFields": "recognition",
    "ImageRows": "labelled",
    "ImageRules": "rules",
    "Preparation": "classifiers",
    "as_classifier": "classifiers",
    "as_features": "features",
    "as_logits": "classifiers",
    "check_labels": "labelled",
    "class_names_of": "labelled",
    "class_number": "labelled",
    "evaluating": "classifiers",
    "flags_of": "columns",
    "has_texts": "labelled",
    "in_order_of": "labelled",
    "is_image_text_model": "classifiers",
    "is_saved_dataset": "columns",
    "labels_of": "labelled",
    "loss_gradient": "adversarial",
    "on_device": "classifiers",
    "own_modes": "classifiers",
    "over_splits": "attacking",
    "read_saved": "columns",
    "success_rate": "labelled",
    "to_eight_bits": "adversarial",
    "finite_loss": "training_loop",
    "train_steps": "training_loop",
    "with_attacked_images": "attacking",
    "with_class_labels": "columns",
    "write_rows": "writing",
    "write_tables": "writing",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)


__all__ = [
    "CLASSIFIERS",
    "DATA",
    "IS_BACKDOOR",
    "SUFFIXES",
    "AnyClassifier",
    "Classifier",
    "ClassifierFields",
    "Files",
    "ImageRows",
    "ImageRules",
    "Preparation",
    "Sample",
    "Transparency",
    "as_cell",
    "as_classifier",
    "as_features",
    "as_logits",
    "by_stem",
    "check_labels",
    "check_rules",
    "class_folders",
    "class_names_of",
    "class_number",
    "composed",
    "decode",
    "encode_png",
    "evaluating",
    "finite_loss",
    "flags_of",
    "has_texts",
    "in_order_of",
    "is_image_name",
    "is_image_text_model",
    "is_saved_dataset",
    "labels_from_table",
    "labels_of",
    "loss_gradient",
    "on_device",
    "over_splits",
    "own_modes",
    "read_saved",
    "read_table",
    "size",
    "success_rate",
    "tar_samples",
    "tar_shards",
    "to_eight_bits",
    "train_steps",
    "with_attacked_images",
    "with_class_labels",
    "write_rows",
    "write_tables",
]

__plait_api__ = "0.1"
