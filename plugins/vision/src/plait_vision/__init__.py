"""What every kit needs that handles images: one decoder, one reader of folders and archives, one of tables.

For authors, stable:

* :mod:`plait_vision.images` – ``decode``, ``size``, ``as_cell``, ``encode_png``, ``is_image_name``, ``ImageError``;
* :mod:`plait_vision.files` – ``Files`` (folder, zip or tar), ``class_folders``, ``labels_from_table``, ``by_stem``,
  ``tar_samples``, ``composed``;
* :mod:`plait_vision.tables` – ``read_table``;
* :mod:`plait_vision.columns` – ``read_saved``, ``with_class_labels``.

Weights are read by :func:`plait.weights.read_weights`.
"""

__plait_api__ = "0.1"
