"""Feature sets: rows of a dataset with named activations, each at its own side, in files that are read when they are needed.

One thing for all extractors. An extractor calls :func:`write_features`, whatever takes features works on a
:class:`FeatureSet`. On disk a set is a folder::

    features.json     activations (names, shapes, dtypes) and where they come from
    shards.jsonl      one line a shard: file, first and last row, SHA-256
    *.safetensors     activation → tensor of the rows of the shard
    rows/             the rows

Shards hold about 64 MiB, and nothing reads or holds more than a shard and a batch, so that sets may be larger than memory.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs
import datasets
import numpy as np
import torch
import torch.nn.functional as F
from plait import codecs
from plait.errors import nearest
from plait.fingerprints import fingerprint
from plait_vision import decode
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "features.json"
SHARDS = "shards.jsonl"
SHARD_BYTES = 64 << 20
FORMAT = 1
Mode = Literal["bilinear", "nearest", "area"]


def _plain(value: Any) -> Any:
    """JSON-like values as JSON gives them back, so that what is read equals what was written."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"an origin holds {value!r}, which is not JSON ({error}); give texts and numbers") from error


@attrs.frozen(kw_only=True)
class Origin:
    """Who made features, and how. Rows of two origins are never mixed.

    Attributes:
        model: name on a hub, folder or class.
        digest: of the model's weights; empty where it is not known.
        dtype: of the computation.
        timestep: nominal timestep of a diffusion model.
        scheduler: its configuration.
        prompt: the text for all images; None: none, or one an image.
        seed: of the noise.
        more: whatever else tells two extractions apart.
    """

    model: str
    digest: str = ""
    revision: str | None = None
    dtype: str = "float32"
    timestep: float | None = None
    scheduler: Mapping[str, Any] | None = attrs.field(default=None, converter=_plain)
    prompt: str | None = None
    seed: int | None = None
    more: Mapping[str, Any] = attrs.field(factory=dict, converter=_plain)


@attrs.frozen
class Activation:
    """One named tensor of every row: ``[channels, height, width]``, or ``[channels]`` where it is pooled (sides 0)."""

    name: str
    channels: int
    height: int
    width: int
    dtype: str
    origin: Origin

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return (self.channels, self.height, self.width) if self.height else (self.channels,)

    @property
    def side(self) -> tuple[int, int]:
        """Height and width; (0, 0) of a pooled activation."""
        return self.height, self.width


class _Source(Protocol):
    """Where the values of a set come from."""

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows in this order, on the CPU."""

    def fingerprint(self) -> str: ...


@attrs.frozen(eq=False)
class FeatureSet:
    """Rows and their activations. Nothing is read before :meth:`read` or :meth:`batches`; views are computed then.

    Attributes:
        rows: the dataset that the features are of, row by row.
        activations: in the order of execution, which is the order of the channels of :meth:`concat`.
    """

    rows: datasets.Dataset
    activations: tuple[Activation, ...]
    _source: _Source

    @classmethod
    def of_tensors(cls, rows: datasets.Dataset, tensors: Mapping[str, Tensor], origin: Origin) -> FeatureSet:
        """A set in memory.

        Args:
            tensors: name → [N, C, H, W] or [N, C], of as many rows.

        Raises:
            ValueError: tensors of another shape or with another number of rows.
        """
        activations = _described(tensors, len(rows), origin)
        kept = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return cls(rows, activations, _Tensors(kept))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the activations, in order."""
        return tuple(activation.name for activation in self.activations)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The different origins, in order."""
        found: list[Origin] = []
        for activation in self.activations:
            if activation.origin not in found:
                found.append(activation.origin)
        return tuple(found)

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FeatureSet):
            return NotImplemented
        from plait.testing.compare import differences

        if self.activations != other.activations or any(differences(self.rows, other.rows)):
            return False
        pairs = zip(self.batches(64), other.batches(64), strict=True)
        return all(torch.equal(one[name], two[name]) for one, two in pairs for name in self.names)

    def __getitem__(self, name: str) -> Activation:
        for activation in self.activations:
            if activation.name == name:
                return activation
        raise ValueError(f"there is no activation {name!r}{nearest(name, self.names)}; there are {_some(self.names)}")

    def fingerprint(self) -> str:
        """Equal for equal features of equal rows."""
        described = [attrs.asdict(activation) for activation in self.activations]
        return fingerprint(described, self.rows, self._source.fingerprint())

    def difference(self, other: FeatureSet, *, seeds: bool = True) -> str:
        """Why rows of another set cannot stand beside these, in a few words: names, shapes, dtypes, origins; else nothing.

        Args:
            seeds: whether noise of another seed is a difference.
        """
        if not seeds:
            plain = [
                tuple(attrs.evolve(a, origin=attrs.evolve(a.origin, seed=None)) for a in one.activations)
                for one in (self, other)
            ]
            return _of_activations(*plain)
        return _of_activations(self.activations, other.activations)

    def read(self, names: Sequence[str] | None = None, rows: slice | Sequence[int] | None = None) -> dict[str, Tensor]:
        """The values of some rows: name → [n, C, H, W] or [n, C], on the CPU.

        Raises:
            ValueError: there is no such activation.
            IndexError: there is no such row.
        """
        wanted = self.names if names is None else tuple(self[name].name for name in names)
        numbers = _numbers(rows, len(self))
        values = self._source.read(wanted, numbers)
        return {name: values[name] for name in wanted}

    def batches(self, batch_size: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """All rows in order, ``batch_size`` at a time, the last batch perhaps shorter."""
        for start in range(0, len(self), batch_size):
            yield self.read(names, range(start, min(start + batch_size, len(self))))

    def select(self, rows: slice | Sequence[int]) -> FeatureSet:
        """Some of the rows, in the order given."""
        numbers = _numbers(rows, len(self))
        return FeatureSet(self.rows.select(numbers), self.activations, _Selected(self._source, tuple(numbers)))

    def only(self, *names: str) -> FeatureSet:
        """Some of the activations, in the order given."""
        return FeatureSet(self.rows, tuple(self[name] for name in names), self._source)

    def at(self, side: int | tuple[int, int], mode: Mode = "bilinear") -> FeatureSet:
        """Every activation at one side, in float32; corners of the outer cells are aligned (``align_corners=False``).

        Raises:
            ValueError: an activation is pooled and has no side.
        """
        height, width = (side, side) if isinstance(side, int) else side
        _refuse_pooled(self.activations, "at")
        if min(height, width) < 1:
            raise ValueError(f"side is {side}; at least 1 is needed")
        at = tuple(attrs.evolve(a, height=height, width=width, dtype="float32") for a in self.activations)
        return FeatureSet(self.rows, at, _Resized(self._source, (height, width), mode))

    def concat(self, name: str = "concat") -> FeatureSet:
        """All activations as one, channel after channel in their order.

        Raises:
            ValueError: they are not at one side; the origins differ in more than can stand in one.
        """
        sides = {activation.side for activation in self.activations}
        if len(sides) != 1:
            listed = ", ".join(f"{a.name} at {a.height}×{a.width}" for a in self.activations[:4])
            raise ValueError(f"activations are at different sides ({listed}); bring them to one with at(side) first")
        dtype = str(_promoted(self.activations)).removeprefix("torch.")
        channels = sum(activation.channels for activation in self.activations)
        one = Activation(name, channels, *sides.pop(), dtype, _joint_origin(self.origins))
        return FeatureSet(self.rows, (one,), _Concatenated(self._source, self.names, name))

    def pooled(self) -> FeatureSet:
        """The mean of every activation over its positions, in float32; what is pooled already stays."""
        pooled = tuple(attrs.evolve(a, height=0, width=0, dtype="float32") for a in self.activations)
        return FeatureSet(self.rows, pooled, _Pooled(self._source))


def append(*sets: FeatureSet) -> FeatureSet:
    """Rows after rows.

    Raises:
        ValueError: the sets differ in an activation's name, shape, dtype or origin; says in what.
    """
    if not sets:
        raise ValueError("append was given no feature set")
    for number, other in enumerate(sets[1:], start=2):
        if difference := sets[0].difference(other):
            raise ValueError(f"feature sets 1 and {number} cannot be mixed: {difference}")
    rows = datasets.concatenate_datasets([one.rows for one in sets])
    starts = np.cumsum([0, *(len(one) for one in sets)]).tolist()
    return FeatureSet(rows, sets[0].activations, _Appended(tuple(one._source for one in sets), tuple(starts)))


def join(sets: Mapping[str, FeatureSet]) -> FeatureSet:
    """Activations of the same rows beside each other, named ``<key>/<activation>``; origins may differ.

    Raises:
        ValueError: the sets are not of the same rows.
    """
    if not sets:
        raise ValueError("join was given no feature set")
    first_key, first = next(iter(sets.items()))
    for key, other in sets.items():
        if not _same_rows(first.rows, other.rows):
            raise ValueError(
                f"feature sets {first_key!r} and {key!r} are not of the same rows; extract both from one dataset"
            )
    activations = tuple(
        attrs.evolve(activation, name=f"{key}/{activation.name}")
        for key, one in sets.items()
        for activation in one.activations
    )
    return FeatureSet(first.rows, activations, _Joined({key: one._source for key, one in sets.items()}))


def write_features(
    run: Any,
    method: Any,
    data: datasets.Dataset,
    origin: Origin,
    compute: Callable[[int, datasets.Dataset], Mapping[str, Tensor]],
    *,
    batch_size: int,
    dtype: torch.dtype | None = None,
    inputs: Any = (),
    description: str = "features",
    shard_bytes: int = SHARD_BYTES,
) -> FeatureSet:
    """Compute features of a dataset batch by batch into files below ``run.folder``; goes on where a killed run stopped.

    Args:
        run: the step's :class:`plait.Run`.
        method: whose fields the files belong to.
        data: the rows; they are kept as they are.
        compute: (number of the first row, rows of the batch) → name → [b, C, H, W] or [b, C], on any device, the same names
            and shapes every time. It must depend on the rows alone, not on how they are batched.
        dtype: of the files; default: as computed.
        inputs: what else the features are computed from (the model), as in :meth:`plait.Run.loop`.
        shard_bytes: values that are held before they are written.

    Raises:
        ValueError: there are no rows; batches of different names or shapes; values that ``dtype`` cannot hold.
        FloatingPointError: an activation is NaN or infinite.
    """
    if not isinstance(data, datasets.Dataset) or not len(data):
        raise ValueError("the data has no rows to extract features of; give a dataset with images")
    made_of = fingerprint(
        type(method).__module__, method, run.seed, run.step, description, attrs.asdict(origin), data, inputs, str(dtype)
    )
    writer = FeatureWriter(run.folder / f"features-{made_of[:16]}", data, origin, dtype=dtype, shard_bytes=shard_bytes)
    run.progress(description, writer.done, len(data))
    for start in range(writer.done, len(data), batch_size):
        stop = min(start + batch_size, len(data))
        writer.add(compute(start, data.select(range(start, stop))))
        run.progress(description, stop, len(data))
    return writer.finish()


class FeatureWriter:
    """Writes a set batch by batch, in bounded memory; a folder that was begun before is gone on with.

    Attributes:
        done: rows that are there already; the next :meth:`add` begins with this one.

    Raises:
        ValueError: the folder holds features of another origin.
    """

    def __init__(
        self,
        folder: Path,
        rows: datasets.Dataset,
        origin: Origin,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder, self._rows, self._origin, self._dtype, self._shard_bytes = (
            folder,
            rows,
            origin,
            dtype,
            shard_bytes,
        )
        self._activations: tuple[Activation, ...] = ()
        self._held: dict[str, list[Tensor]] = {}
        self._held_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).is_file():
            self._activations = _read_index(folder)[0]
            begun = self._activations[0].origin
            if begun != origin:
                raise ValueError(
                    f"{folder} was begun with other features: {_of_origins(begun, origin)}; name another folder"
                )
        self._shards = _read_shards(folder)
        self.done = self._shards[-1].stop if self._shards else 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """The activations of the next rows.

        Raises:
            ValueError: other names, shapes or types than before; more rows than there are; values beyond the dtype.
            FloatingPointError: NaN or infinite values.
        """
        count = len(next(iter(tensors.values()))) if tensors else 0
        stored = {name: self._storable(name, tensor) for name, tensor in tensors.items()}
        activations = _described(stored, count, self._origin)
        if not self._activations:
            self._activations = activations
            _write_index(self._folder, activations, {"rows": len(self._rows), "kind": "shards"})
        elif difference := _of_activations(self._activations, activations):
            raise ValueError(f"rows from {self.done} on differ from those before: {difference}")
        if self.done + count > len(self._rows):
            raise ValueError(f"features of {self.done + count} rows were given; the data has {len(self._rows)}")
        for name, tensor in stored.items():
            self._held.setdefault(name, []).append(tensor)
            self._held_bytes += tensor.numel() * tensor.element_size()
        self.done += count
        if self._held_bytes >= self._shard_bytes:
            self._flush()

    def finish(self) -> FeatureSet:
        """The whole set.

        Raises:
            ValueError: rows are missing.
        """
        self._flush()
        if self.done != len(self._rows) or not self._activations:
            raise ValueError(f"features of {self.done} rows were written; the data has {len(self._rows)}")
        return FeatureSet(self._rows, self._activations, _Shards(self._folder, tuple(self._shards)))

    def _storable(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            raise ValueError(f"activation {name!r} is of type {tensor.dtype}; floating-point numbers are stored")
        if not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(
                f"activation {name!r} has NaN or infinite values in rows {self.done} to {self.done + len(tensor) - 1}; compute in"
                " float32 or bfloat16, the image encoder (VAE) too"
            )
        cast = tensor if self._dtype is None else tensor.to(self._dtype)
        if cast is not tensor and not bool(torch.isfinite(cast).all()):
            raise ValueError(
                f"activation {name!r} has values up to {float(tensor.abs().max()):.4g}, which {self._dtype} cannot hold; store"
                " features as bfloat16 or float32"
            )
        return cast.cpu()

    def _flush(self) -> None:
        if not self._held:
            return
        # One at a time, so that no more than one activation is in memory twice.
        tensors = {name: torch.cat(self._held.pop(name)).contiguous() for name in list(self._held)}
        self._held_bytes = 0
        stop = self.done
        start = stop - len(next(iter(tensors.values())))
        file = self._folder / f"{start:08d}-{stop:08d}.safetensors"
        unfinished = file.with_suffix(".new")
        save_file(tensors, unfinished)
        with unfinished.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            os.fsync(content.fileno())
        unfinished.chmod(0o444)  # it may be linked to from elsewhere
        os.replace(unfinished, file)
        shard = _Shard(file.name, start, stop, digest)
        with (self._folder / SHARDS).open("a", encoding="utf-8") as log:
            log.write(json.dumps(attrs.asdict(shard)) + "\n")
        self._shards.append(shard)


def save_features(features: FeatureSet, folder: Path) -> None:
    """Write a set into a folder. Shards that are on disk already are linked to, not copied, where the file system can."""
    folder.mkdir(parents=True, exist_ok=True)
    codecs.save(features.rows, folder / "rows")
    _save_values(features, folder)


def open_features(folder: Path) -> FeatureSet:
    """A set that :func:`save_features` wrote; nothing of its values is read yet.

    Raises:
        ValueError: it is not one, or not whole.
    """
    rows = codecs.load(folder / "rows")
    activations, source = _open_values(folder, len(rows))
    return FeatureSet(rows, activations, source)


def image_tensors(
    batch: datasets.Dataset,
    size: int | tuple[int, int] | None = None,
    *,
    column: str = "image",
    resample: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
) -> Tensor:
    """The images of some rows, float32 [N, 3, H, W] in [0, 1], each resized as a whole, without cropping.

    Args:
        size: side, or (height, width); None: as they are.

    Raises:
        ValueError: there is no such column; an image that cannot be decoded; without ``size``, images of several sizes.
    """
    if column not in batch.column_names or not isinstance(batch.features[column], datasets.Image):
        raise ValueError(
            f"the data has no images in a column {column!r} but {', '.join(batch.column_names)}; name it so"
        )
    from PIL import Image

    cells = batch.with_format(None).select_columns(column).cast_column(column, datasets.Image(decode=False))[:][column]
    pictures = [decode(cell, f"row {number}") for number, cell in enumerate(cells)]
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        how = Image.Resampling[resample.upper()]
        pictures = [one if one.size == (width, height) else one.resize((width, height), how) for one in pictures]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(
            f"images have different sizes ({sizes[0]} and {sizes[1]}, width and height); give a size for all"
        )
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)


def mask_tensors(rows: datasets.Dataset, column: str, side: int) -> Tensor:
    """Masks of some rows, int64 [N, side, side], resized to the nearest pixel.

    Raises:
        ValueError: there is no such column; a mask is in colour.
    """
    if column not in rows.column_names:
        raise ValueError(f"the features' rows have no column {column!r} with masks but {', '.join(rows.column_names)}")
    from PIL import Image

    masks = []
    for number, mask in enumerate(rows.with_format(None).select_columns(column)[:][column]):
        levels = np.asarray(mask)
        if levels.ndim != 2 or levels.dtype.kind not in "iub":
            raise ValueError(
                f"mask of row {number} has shape {list(levels.shape)} and type {levels.dtype}; a picture of one channel whose"
                " levels are class numbers is needed"
            )
        picture = Image.fromarray(levels.astype(np.int32))
        masks.append(np.asarray(picture.resize((side, side), Image.Resampling.NEAREST)))
    return torch.from_numpy(np.stack(masks).astype(np.int64))


# --- where values come from ---------------------------------------------------------------------------------------------


@attrs.frozen
class _Shard:
    file: str
    start: int
    stop: int
    sha256: str


@attrs.frozen
class _Shards:
    """Files of one folder."""

    folder: Path
    shards: tuple[_Shard, ...]

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        starts = [shard.start for shard in self.shards]
        wanted: dict[int, list[int]] = {}  # shard → positions in the result
        for position, row in enumerate(rows):
            wanted.setdefault(bisect.bisect_right(starts, row) - 1, []).append(position)
        out: dict[str, Tensor] = {}
        for number, positions in wanted.items():
            shard = self.shards[number]
            local = [rows[position] - shard.start for position in positions]
            with safe_open(self.folder / shard.file, "pt") as file:
                for name in names:
                    part = _rows_of(file.get_slice(name), local)
                    if len(wanted) == 1:
                        out[name] = part
                    else:
                        out.setdefault(name, part.new_empty((len(rows), *part.shape[1:])))[positions] = part
        return out

    def fingerprint(self) -> str:
        return fingerprint([shard.sha256 for shard in self.shards])


def _rows_of(tensor: Any, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor on disk, consecutive ones in one reading."""
    parts, begin = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            parts.append(tensor[rows[begin] : rows[end - 1] + 1])
            begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@attrs.frozen
class _Tensors:
    tensors: Mapping[str, Tensor]

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        numbers = torch.as_tensor(rows, dtype=torch.long)
        return {name: self.tensors[name][numbers] for name in names}

    def fingerprint(self) -> str:
        return fingerprint(self.tensors)


@attrs.frozen
class _Selected:
    source: _Source
    rows: tuple[int, ...]

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        return self.source.read(names, [self.rows[row] for row in rows])

    def fingerprint(self) -> str:
        return fingerprint("selected", self.rows, self.source.fingerprint())


@attrs.frozen
class _Resized:
    source: _Source
    size: tuple[int, int]
    mode: Mode

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        return {name: self._resized(value.float()) for name, value in self.source.read(names, rows).items()}

    def _resized(self, value: Tensor) -> Tensor:
        if value.shape[-2:] == self.size:
            return value
        if self.mode == "area":
            return F.adaptive_avg_pool2d(value, self.size)
        corners = False if self.mode == "bilinear" else None
        return F.interpolate(value, self.size, mode=self.mode, align_corners=corners)

    def fingerprint(self) -> str:
        return fingerprint("resized", self.size, self.mode, self.source.fingerprint())


@attrs.frozen
class _Concatenated:
    source: _Source
    parts: tuple[str, ...]
    name: str

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        values = self.source.read(self.parts, rows)
        return {self.name: torch.cat([values[part] for part in self.parts], dim=1)}

    def fingerprint(self) -> str:
        return fingerprint("concatenated", self.parts, self.source.fingerprint())


@attrs.frozen
class _Pooled:
    source: _Source

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        values = self.source.read(names, rows)
        return {
            name: value.float().flatten(2).mean(2) if value.ndim == 4 else value.float()
            for name, value in values.items()
        }

    def fingerprint(self) -> str:
        return fingerprint("pooled", self.source.fingerprint())


@attrs.frozen
class _Joined:
    sources: Mapping[str, _Source]

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, source in self.sources.items():
            own = [name.removeprefix(f"{key}/") for name in names if self._key_of(name) == key]
            values = source.read(own, rows) if own else {}
            out |= {f"{key}/{name}": value for name, value in values.items()}
        return out

    def _key_of(self, name: str) -> str:
        # Keys of sets that were joined twice hold a slash themselves: the longest that fits.
        return max((key for key in self.sources if name.startswith(f"{key}/")), key=len)

    def fingerprint(self) -> str:
        return fingerprint({key: source.fingerprint() for key, source in self.sources.items()})


@attrs.frozen
class _Appended:
    sources: tuple[_Source, ...]
    starts: tuple[int, ...]

    def read(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        wanted: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            wanted.setdefault(bisect.bisect_right(self.starts, row) - 1, []).append(position)
        out: dict[str, Tensor] = {}
        for number, positions in wanted.items():
            local = [rows[position] - self.starts[number] for position in positions]
            for name, part in self.sources[number].read(names, local).items():
                out.setdefault(name, part.new_empty((len(rows), *part.shape[1:])))[positions] = part
        return out

    def fingerprint(self) -> str:
        return fingerprint("appended", [source.fingerprint() for source in self.sources])


# --- on disk ------------------------------------------------------------------------------------------------------------


def _save_values(features: FeatureSet, folder: Path) -> None:
    source = features._source
    if isinstance(source, _Shards) and source.shards[-1].stop == len(features):
        _write_index(folder, features.activations, {"rows": len(features), "kind": "shards"})
        for shard in source.shards:
            _link(source.folder / shard.file, folder / shard.file)
        lines = [json.dumps(attrs.asdict(shard)) + "\n" for shard in source.shards]
        (folder / SHARDS).write_text("".join(lines), encoding="utf-8")
    elif isinstance(source, _Joined) and len(source.sources) > 1:
        # Apart, so that what is on disk already is linked to.
        _write_index(
            folder, features.activations, {"rows": len(features), "kind": "joined", "keys": list(source.sources)}
        )
        for number, (key, part) in enumerate(source.sources.items()):
            own = tuple(
                attrs.evolve(activation, name=activation.name.removeprefix(f"{key}/"))
                for activation in features.activations
                if source._key_of(activation.name) == key
            )
            if own:
                inside = folder / f"{number:02d}"
                inside.mkdir()
                _save_values(FeatureSet(features.rows, own, part), inside)
    else:
        _stream(features, folder)


def _stream(features: FeatureSet, folder: Path) -> None:
    """Read, and write as shards: views, and sets in memory."""
    row_bytes = sum(int(np.prod(a.shape)) * _dtype(a).itemsize for a in features.activations)
    batch_size = max(1, min(64, SHARD_BYTES // (2 * row_bytes)))
    writer = FeatureWriter(folder, features.rows, features.activations[0].origin)
    for batch in features.batches(batch_size):
        writer.add(batch)
    writer.finish()
    _write_index(folder, features.activations, {"rows": len(features), "kind": "shards"})


def _open_values(folder: Path, rows: int) -> tuple[tuple[Activation, ...], _Source]:
    activations, facts = _read_index(folder)
    if facts["kind"] == "joined":
        parts = {key: folder / f"{number:02d}" for number, key in enumerate(facts["keys"])}
        return activations, _Joined({key: _open_values(p, rows)[1] for key, p in parts.items() if p.is_dir()})
    shards = _read_shards(folder)
    have = shards[-1].stop if shards else 0
    if have != facts["rows"] or have != rows:
        raise ValueError(
            f"{folder} holds features of {have} of {rows} rows; it was not written to its end, write it again"
        )
    return activations, _Shards(folder, tuple(shards))


def _write_index(folder: Path, activations: Sequence[Activation], facts: Mapping[str, Any]) -> None:
    origins: list[Origin] = []
    entries = []
    for activation in activations:
        if activation.origin not in origins:
            origins.append(activation.origin)
        entry = attrs.asdict(activation, recurse=False)
        entries.append({**entry, "origin": origins.index(activation.origin)})
    index = {"format": FORMAT, **facts, "activations": entries, "origins": [attrs.asdict(origin) for origin in origins]}
    unfinished = folder / f"{INDEX}.new"
    unfinished.write_text(json.dumps(index, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / INDEX)


def _read_index(folder: Path) -> tuple[tuple[Activation, ...], dict[str, Any]]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, and this version reads {FORMAT}")
        origins = [Origin(**origin) for origin in index["origins"]]
        entries = [{**entry, "origin": origins[entry["origin"]]} for entry in index["activations"]]
        return tuple(Activation(**entry) for entry in entries), index
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder} is not a feature set: its {INDEX} cannot be read ({error})") from error


def _read_shards(folder: Path) -> list[_Shard]:
    """The shards from row 0 on, as far as they are whole."""
    shards: list[_Shard] = []
    try:
        lines = (folder / SHARDS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            shard = _Shard(**json.loads(line))
        except (ValueError, TypeError):  # it was being written when the process was killed
            continue
        if shard.start == (shards[-1].stop if shards else 0) and (folder / shard.file).is_file():
            shards.append(shard)
    return shards


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


# --- what differs -------------------------------------------------------------------------------------------------------


def _described(tensors: Mapping[str, Tensor], rows: int, origin: Origin) -> tuple[Activation, ...]:
    if not tensors:
        raise ValueError("there is no activation; give at least one")
    found = []
    for name, tensor in tensors.items():
        if tensor.ndim not in (2, 4) or len(tensor) != rows:
            raise ValueError(
                f"activation {name!r} has shape {list(tensor.shape)}; [{rows}, C, H, W] or [{rows}, C] is needed"
            )
        height, width = tensor.shape[2:] if tensor.ndim == 4 else (0, 0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(Activation(name, tensor.shape[1], height, width, dtype, origin))
    return tuple(found)


def _of_activations(one: Sequence[Activation], other: Sequence[Activation]) -> str:
    names, others = [a.name for a in one], [a.name for a in other]
    if names != others:
        missing, more = [n for n in names if n not in others], [n for n in others if n not in names]
        what = [f"{_some(missing)} is missing"] * bool(missing) + [f"{_some(more)} is new"] * bool(more)
        return f"{' and '.join(what) or 'the order of the activations is another'}"
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return f"activation {a.name!r} has shape {list(a.shape)} in one and {list(b.shape)} in the other"
        if a.dtype != b.dtype:
            return f"activation {a.name!r} is {a.dtype} in one and {b.dtype} in the other"
        if a.origin != b.origin:
            return _of_origins(a.origin, b.origin)
    return ""


def _of_origins(one: Origin, other: Origin) -> str:
    a, b = attrs.asdict(one), attrs.asdict(other)
    for name in a:
        x, y = a[name], b[name]
        if x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            key = next(key for key in (*x, *y) if x.get(key) != y.get(key))
            name, x, y = f"{key} of {name}" if name == "scheduler" else key, x.get(key), y.get(key)
        return f"{name} is {x!r} in one and {y!r} in the other"
    return ""


def _joint_origin(origins: Sequence[Origin]) -> Origin:
    if len(origins) == 1:
        return origins[0]
    return Origin(model=" + ".join(origin.model for origin in origins), more={"of": [attrs.asdict(o) for o in origins]})


def _same_rows(one: datasets.Dataset, other: datasets.Dataset) -> bool:
    """Whether two datasets have the same rows, by all columns that are cheap to compare."""
    if one is other or one._fingerprint == other._fingerprint:
        return True
    if len(one) != len(other):
        return False
    plain = [name for name, kind in one.features.items() if isinstance(kind, (datasets.Value, datasets.ClassLabel))]
    if any(name not in other.column_names for name in plain):
        return False
    a, b = (data.with_format("arrow").select_columns(plain)[:] if plain else None for data in (one, other))
    return a is None or a.equals(b)


def _refuse_pooled(activations: Sequence[Activation], what: str) -> None:
    flat = [activation.name for activation in activations if not activation.height]
    if flat:
        raise ValueError(f"activation {flat[0]!r} is pooled and has no side; {what} needs maps [C, H, W]")


def _numbers(rows: slice | Sequence[int] | None, total: int) -> list[int]:
    if rows is None or isinstance(rows, slice):
        return list(range(total)[rows or slice(None)])
    numbers = [int(row) for row in rows]
    outside = [row for row in numbers if not -total <= row < total]
    if outside:
        raise IndexError(f"row {outside[0]} was asked for; there are {total}")
    return [row % total for row in numbers]


def _dtype(activation: Activation) -> torch.dtype:
    return getattr(torch, activation.dtype)


def _promoted(activations: Sequence[Activation]) -> torch.dtype:
    dtype = _dtype(activations[0])
    for activation in activations[1:]:
        dtype = torch.promote_types(dtype, _dtype(activation))
    return dtype


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
