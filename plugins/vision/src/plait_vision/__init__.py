"""What every kit needs that handles images: one decoder, one reader of folders and archives, one of tables.

For authors of methods and kits, stable:

* images – :func:`decode`, :func:`size`, :func:`as_cell`, :func:`encode_png`, :func:`is_image_name`, :func:`check_rules`;
* fields of a source, what to do with images that are not plain 8-bit RGB – :class:`ImageRules`, :data:`Transparency`;
* files – :class:`Files` (folder, zip or tar), :func:`class_folders`, :func:`labels_from_table`, :func:`by_stem`,
  :class:`Sample`, :func:`tar_samples`, :func:`tar_shards`, :func:`composed`, :data:`SUFFIXES`;
* tables – :func:`read_table`;
* datasets – :func:`is_saved_dataset`, :func:`read_saved`, :func:`with_class_labels`;
* datasets on disk in bounded memory – :func:`write_rows`, :func:`write_tables`.

What they refuse is a ``ValueError``: one sentence that names the file. Weights are read by :func:`plait.weights.read_weights`.
"""

from plait_vision.columns import is_saved_dataset, read_saved, with_class_labels
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
from plait_vision.rules import ImageRules
from plait_vision.tables import read_table
from plait_vision.writing import write_rows, write_tables

__all__ = [
    "SUFFIXES",
    "Files",
    "ImageRules",
    "Sample",
    "Transparency",
    "as_cell",
    "by_stem",
    "check_rules",
    "class_folders",
    "composed",
    "decode",
    "encode_png",
    "is_image_name",
    "is_saved_dataset",
    "labels_from_table",
    "read_saved",
    "read_table",
    "size",
    "tar_samples",
    "tar_shards",
    "with_class_labels",
    "write_rows",
    "write_tables",
]

__plait_api__ = "0.1"
