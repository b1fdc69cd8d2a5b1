"""What every kit needs that handles images: one decoder, one reader of folders and archives, one of tables.

For authors, stable:

* :mod:`plait_vision.images` – ``decode``, ``size``, ``as_cell``, ``encode_png``, ``is_image_name``, ``check_rules``, ``ImageError``;
* :mod:`plait_vision.files` – ``Files`` (folder, zip or tar), ``class_folders``, ``labels_from_table``, ``by_stem``,
  ``tar_samples``, ``tar_shards``, ``composed``;
* :mod:`plait_vision.tables` – ``read_table``;
* :mod:`plait_vision.columns` – ``read_saved``, ``with_class_labels``;
* :mod:`plait_vision.writing` – ``write_rows``, ``write_tables``: datasets on disk in bounded memory.

Weights are read by :func:`plait.weights.read_weights`.
"""

__plait_api__ = "0.1"
