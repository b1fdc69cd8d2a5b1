"""Where images come from: photographs in installed packages, folders, pairs of folders, Hugging Face datasets.

Every source gives a column ``image`` (RGB, 8 bit) and a string column ``name``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset
from plait import Run, hookimpl
from plait.fields import REQUIRED, field, in_range, path_or_name_field
from plait_vision import (
    SUFFIXES,
    Files,
    ImageRules,
    as_cell,
    by_stem,
    is_image_name,
    is_saved_dataset,
    read_saved,
    write_rows,
)

from plait_imaging.images import encode_png

# photograph → top and left of two tiles with something to see
PHOTOS = {
    "astronaut": ((40, 100), (240, 20)),
    "china": ((100, 60), (150, 330)),
    "rocket": ((40, 100), (150, 330)),
    "chelsea": ((40, 20), (20, 190)),
    "coffee": ((40, 100), (130, 330)),
    "flower": ((40, 100), (150, 330)),
    "motorcycle": ((60, 150), (200, 420)),
}


def photograph(name: str) -> np.ndarray:
    """One of :data:`PHOTOS`, uint8 ``[H, W, 3]``, from the package that ships it."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels: np.ndarray = load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        import skimage.data
        from skimage.io import imread

        # The left half of a stereo pair, which the package ships under a name of its own.
        pixels = imread(Path(skimage.data.__file__).parent / "motorcycle_left.png")[..., :3]
    else:
        import skimage.data

        pixels = getattr(skimage.data, name)()
    return pixels


def _default_splits() -> dict[str, tuple[str, ...]]:
    return {"reference": ("astronaut", "china", "rocket"), "test": ("chelsea", "coffee", "flower")}


@attrs.frozen(kw_only=True)
class Photos:
    """Tiles of six colour photographs that ship with scikit-image and scikit-learn, split by photograph.

    The defaults are the tiles of the small-scale check of EnsIR: two of 256 × 256 pixels from each photograph.
    """

    gives = "dataset"
    columns_made = ("image", "name", "photo")

    splits: dict[str, tuple[str, ...]] = field(
        attrs.Factory(_default_splits),
        "split → photographs: astronaut, china, rocket, chelsea, coffee, flower, motorcycle; each in one split only",
    )
    tile_size: int = field(256, "side of a tile, in pixels", in_range(1))
    tiles_per_photo: int = field(2, "tiles cut from a photograph", in_range(1))
    layout: Literal["chosen", "grid", "whole"] = field(
        "chosen",
        "chosen: two hand-picked places (they may overlap); grid: spread evenly, never overlapping; whole: the "
        "photographs as they are, whatever tile_size and tiles_per_photo say",
    )

    def __attrs_post_init__(self) -> None:
        seen: dict[str, str] = {}
        for split, photos in self.splits.items():
            for photo in photos:
                if photo not in PHOTOS:
                    raise ValueError(f"splits.{split} names {photo!r}; allowed is {', '.join(PHOTOS)}")
                if photo in seen:
                    raise ValueError(
                        f"photograph {photo!r} is in splits {seen[photo]} and {split}; put it in one, "
                        "or training and test data share a scene"
                    )
                seen[photo] = split
        if not seen:
            raise ValueError("splits names no photograph; write {test: [chelsea]} or leave it out")
        if self.layout == "chosen" and self.tiles_per_photo > 2:
            raise ValueError(f"tiles_per_photo is {self.tiles_per_photo}; layout chosen has 2, set layout: grid")

    @hookimpl
    def load_data(self, run: Run) -> Any:
        """One dataset a split with columns ``image``, ``name`` (``china_0``) and ``photo``."""
        features = Features({"image": Image(), "name": Value("string"), "photo": Value("string")})
        return {split: write_rows(run.folder, self._tiles(photos), features) for split, photos in self.splits.items()}

    def _tiles(self, photos: Iterable[str]) -> Iterator[dict[str, Any]]:
        for photo in photos:
            pixels = torch.from_numpy(photograph(photo).copy()).permute(2, 0, 1)
            height, width = pixels.shape[1:]
            if self.layout == "whole":
                yield {"image": {"bytes": encode_png(pixels), "path": None}, "name": photo, "photo": photo}
                continue
            corners = PHOTOS[photo] if self.layout == "chosen" else self._grid(photo, height, width)
            for number, (top, left) in enumerate(corners[: self.tiles_per_photo]):
                tile = pixels[:, top : top + self.tile_size, left : left + self.tile_size]
                if tile.shape[1:] != (self.tile_size, self.tile_size):
                    raise ValueError(
                        f"tile_size is {self.tile_size}, which does not fit at ({top}, {left}) of {photo} "
                        f"({height}×{width} pixels); 256 always fits, and layout: grid begins at the corner"
                    )
                yield {"image": {"bytes": encode_png(tile), "path": None}, "name": f"{photo}_{number}", "photo": photo}

    def _grid(self, photo: str, height: int, width: int) -> list[tuple[int, int]]:
        size = self.tile_size
        places = [(top, left) for top in range(0, height - size + 1, size) for left in range(0, width - size + 1, size)]
        if len(places) < self.tiles_per_photo:
            raise ValueError(
                f"{photo} ({height}×{width} pixels) holds {len(places)} tiles of {size} pixels; "
                f"tiles_per_photo is {self.tiles_per_photo}: lower it, or tile_size"
            )
        picked = np.linspace(0, len(places) - 1, self.tiles_per_photo).round().astype(int)
        return [places[i] for i in picked]


@attrs.frozen(kw_only=True)
class _FileRules(ImageRules):
    """What to do with files that are not plain 8-bit RGB."""

    greyscale: Literal["repeat", "refuse"] = field(
        "repeat", "greyscale images: repeat the channel as R, G and B, or refuse them"
    )
    other_files: Literal["refuse", "skip"] = field(
        "refuse", "files without an image's suffix: refuse the folder, or skip them (hidden files always are)"
    )

    def encoded(self, files: Files, name: str) -> tuple[dict[str, Any], tuple[int, int]]:
        """The cell of an image column, and height and width. The file's own bytes are kept if they are RGB."""
        cell, picture = as_cell(
            files.read(name),
            files.label(name),
            greyscale=self.greyscale,
            sixteen_bit=self.sixteen_bit,
            transparency=self.transparency,
        )
        return cell, (picture.height, picture.width)


@attrs.frozen(kw_only=True)
class ImageFolder(_FileRules):
    """A folder of images; ``name`` is a file's path inside it without the suffix."""

    gives = "dataset"
    columns_made = ("image", "name")

    folder: Path = field(REQUIRED, "the folder, or a zip or tar")
    recursive: bool = field(False, "also take the images in its subfolders")

    @hookimpl
    def load_data(self, run: Run) -> Any:
        """One dataset with columns ``image`` and ``name``, sorted by name."""
        features = Features({"image": Image(), "name": Value("string")})
        with Files(self.folder) as files:
            found = _images(files, self.recursive, self.other_files)

            def rows() -> Iterator[dict[str, Any]]:
                for name, file in run.track(found.items(), "images", total=len(found)):
                    yield {"image": self.encoded(files, file)[0], "name": name}

            return write_rows(run.folder, rows(), features)


@attrs.frozen(kw_only=True)
class ImagePairs(_FileRules):
    """Two folders, degraded images and their targets, matched by file stem."""

    gives = "dataset"
    columns_made = ("image", "target", "name")

    inputs: Path = field(REQUIRED, "folder, zip or tar of degraded images")
    targets: Path = field(REQUIRED, "folder, zip or tar of clean images")
    input_suffix: str = field("", "end of the inputs' stems that targets lack, e.g. x4")
    scale: int = field(1, "targets are this many times as high and wide as inputs", in_range(1))
    recursive: bool = field(False, "also take the images in subfolders")

    @hookimpl
    def load_data(self, run: Run) -> Any:
        """One dataset with columns ``image``, ``target`` and ``name`` (the target's), sorted by name."""
        features = Features({"image": Image(), "target": Image(), "name": Value("string")})
        with Files(self.inputs) as degraded, Files(self.targets) as clean:
            found = _images(degraded, self.recursive, self.other_files)
            inputs = {self._stem(name): file for name, file in found.items()}
            targets = _images(clean, self.recursive, self.other_files)
            for have, lack, where in ((inputs, targets, self.targets), (targets, inputs, self.inputs)):
                missing = sorted(have.keys() - lack.keys())
                if missing:
                    raise ValueError(
                        f"{where} has no counterpart of {len(missing)} images: {', '.join(missing[:3])}"
                        f"{' …' if len(missing) > 3 else ''}; add them, or remove their partners"
                    )

            def rows() -> Iterator[dict[str, Any]]:
                for name in run.track(sorted(inputs), "pairs"):
                    image, size = self.encoded(degraded, inputs[name])
                    target, target_size = self.encoded(clean, targets[name])
                    if target_size != (size[0] * self.scale, size[1] * self.scale):
                        raise ValueError(
                            f"pair {name}: the input is {size[0]}×{size[1]} pixels and the target "
                            f"{target_size[0]}×{target_size[1]}; with scale {self.scale} it must be "
                            f"{size[0] * self.scale}×{size[1] * self.scale}"
                        )
                    yield {"image": image, "target": target, "name": name}

            return write_rows(run.folder, rows(), features)

    def _stem(self, name: str) -> str:
        if not name.endswith(self.input_suffix):
            raise ValueError(f"{name} in {self.inputs} does not end in input_suffix {self.input_suffix!r}; rename it")
        return name.removesuffix(self.input_suffix)


@attrs.frozen(kw_only=True)
class HFDataset:
    """A dataset of the Hugging Face hub, or of a local folder."""

    gives = "dataset"

    path: str = path_or_name_field(REQUIRED, "name on the hub, or a folder (save_to_disk, parquet, image folder …)")
    config: str | None = field(None, "configuration of the dataset, where it has several")
    split: str | None = field(None, "one split, as train or train[:100]; without it, all splits by their names")
    revision: str | None = field(None, "branch, tag or commit on the hub")
    columns: dict[str, str] = field(
        attrs.Factory(dict), "our column → theirs, e.g. {image: lq, target: gt, name: file}"
    )

    @hookimpl
    def load_data(self, run: Run) -> Any:
        """The dataset, or split → dataset, with ``image`` and ``name`` beside its own columns."""
        loaded = self._load(run)
        if isinstance(loaded, Dataset):
            return self._conform(loaded, self.split or "data")
        return {split: self._conform(dataset, split) for split, dataset in loaded.items()}

    def _load(self, run: Run) -> Dataset | DatasetDict:
        folder = Path(self.path)
        if is_saved_dataset(folder):
            parts = read_saved(folder)
            return self._pick(parts[""] if list(parts) == [""] else DatasetDict(parts))
        try:
            # What comes from the hub is kept in the usual cache; a local folder leaves nothing there.
            cache = str(run.folder) if folder.exists() else None
            return load_dataset(self.path, self.config, split=self.split, revision=self.revision, cache_dir=cache)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"path {self.path!r} could not be loaded as a dataset: {reason}") from error

    def _pick(self, loaded: Dataset | DatasetDict) -> Dataset | DatasetDict:
        if self.split is None:
            return loaded
        if isinstance(loaded, Dataset):
            raise ValueError(f"split is {self.split!r}, but {self.path} is one dataset without splits; leave split out")
        if self.split not in loaded:
            raise ValueError(f"split is {self.split!r}; {self.path} has {', '.join(loaded)}")
        return loaded[self.split]

    def _conform(self, dataset: Dataset, label: str) -> Dataset:
        for ours, theirs in self.columns.items():
            if theirs not in dataset.column_names:
                raise ValueError(f"columns.{ours} is {theirs!r}; {label} has {', '.join(dataset.column_names)}")
        taken = set(self.columns) - set(self.columns.values())
        dataset = dataset.remove_columns([name for name in dataset.column_names if name in taken])
        dataset = dataset.rename_columns({theirs: ours for ours, theirs in self.columns.items() if ours != theirs})
        if "image" not in dataset.column_names:
            raise ValueError(
                f"{label} of {self.path} has no column 'image' but {', '.join(dataset.column_names)}; "
                "say which one it is: columns: {image: …}"
            )
        for column in ("image", "target"):
            if column in dataset.column_names and not isinstance(dataset.features[column], Image):
                dataset = _as_images(dataset, column, label)
        if "name" in dataset.column_names:
            return dataset.cast_column("name", Value("string"))
        return dataset.add_column("name", _names_from_paths(dataset))


def _as_images(dataset: Dataset, column: str, label: str) -> Dataset:
    try:
        return dataset.cast_column(column, Image())
    except (pa.ArrowException, TypeError, ValueError) as error:
        kind = dataset.features[column]
        raise ValueError(f"column {column!r} of {label} is {kind}, not images; name another under columns") from error


def _names_from_paths(dataset: Dataset) -> list[str]:
    """Stems of the files the images came from, else row numbers."""
    table = dataset.select_columns(["image"]).with_format("arrow")
    stems: list[str] = []
    for start in range(0, len(dataset), 64):
        paths = table[start : start + 64]["image"].combine_chunks().field("path").to_pylist()
        stems += [Path(path).stem if path else "" for path in paths]
    if "" in stems or len(set(stems)) < len(stems):
        return [str(row) for row in range(len(dataset))]
    return stems


def _images(files: Files, recursive: bool, other_files: str) -> dict[str, str]:
    """Name without suffix → name of every image, sorted."""
    found = [name for name in files.names if recursive or "/" not in name]
    others = [name for name in found if not is_image_name(name)]
    if others and other_files == "refuse":
        raise ValueError(f"{files.label(others[0])} is not an image by its suffix; remove it or set other_files: skip")
    if len(others) == len(found):
        raise ValueError(f"{files.path} holds no image ({', '.join(SUFFIXES)}); check the path, or set recursive: true")
    return by_stem([name for name in found if is_image_name(name)], files.path)
