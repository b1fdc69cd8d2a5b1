"""Models that stay on disk: folders of safetensors are merged tensor by tensor into another one of the same layout.

Of every model one tensor at a time is in memory, so that models merge that would not fit into it, or only once. The
methods are those of :mod:`plait_wemoe.baselines.static` that need the weights alone, with the same results.
"""

from __future__ import annotations

import filecmp
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from plait_wemoe.baselines.static import Recipe
from plait_wemoe.heads import HEAD_NAMES
from plait_wemoe.states import Lazy, is_finite, merged_entries, weight_names

REFERENCE = "model-folder.json"
OWN = "model"  # where a result lies beside its reference
INDEX = ".safetensors.index.json"
# Files beside the weights that say nothing of a merged model, or hold the same weights in other formats.
NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".md",
)
# Names in the header of a safetensors file.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ModelFolder:
    """A model in a folder as ``save_pretrained`` writes it; nothing of its weights is read but what is asked for.

    Attributes:
        path: absolute.
        is_own: whether the folder belongs to this object, which then takes it along where it is saved; otherwise only
            path and digest are.

    Raises:
        ValueError: no safetensors there, or damaged ones.
    """

    def __init__(self, path: Path | str, is_own: bool = False) -> None:
        self.path, self.is_own = Path(path).expanduser().resolve(), is_own
        self.files = weight_files(self.path)

    @functools.cached_property
    def layout(self) -> dict[str, Tensor]:
        """Name → a tensor of its shape and type on the device ``meta``."""
        found = {}
        for file in dict.fromkeys(self.files.values()):
            with _opened(self.path / file) as content:
                for name in content.keys():  # noqa: SIM118 - it is no mapping
                    part = content.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{name} in {self.path / file} is of type {part.get_dtype()}; dequantise it")
                    found[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
        if missing := [name for name in self.files if name not in found]:
            raise ValueError(f"{self.path / self.files[missing[0]]} lacks {missing[0]}, which the index says is in it")
        return {name: found[name] for name in self.files}

    def state(self, device: torch.device | str = "cpu", of: str = "the model") -> Lazy:
        """The weights, each read when it is asked for.

        Args:
            of: what the model is called where a value of it is refused.
        """
        checked = set()

        def read(name: str) -> Tensor:
            # The file is mapped into memory, and goes with the last tensor of it.
            with _opened(self.path / self.files[name]) as content:
                value = content.get_tensor(name)
            if name not in checked and not is_finite(value):
                raise ValueError(f"{name} of {of} holds a value that is not finite")
            checked.add(name)
            return value.to(device)

        return Lazy(self.layout, read)

    @property
    def fingerprint(self) -> str:
        """Names, sizes and times of the files."""
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _plain_files(self.path)]
        return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether it holds the same files, wherever it lies."""
        if not isinstance(other, ModelFolder):
            return NotImplemented
        if self.path == other.path:
            return True
        names = [file.name for file in _plain_files(self.path)]
        if names != [file.name for file in _plain_files(other.path)]:
            return False
        return not any(filecmp.cmpfiles(self.path, other.path, names, shallow=False)[1:])

    def open(self) -> nn.Module:
        """The whole model in memory, of the class of transformers that its configuration names.

        Raises:
            ValueError: it names none.
        """
        import transformers

        names = _configuration(self.path).get("architectures") or []
        cls = getattr(transformers, names[0], None) if names else None
        if cls is None:
            raise ValueError(
                f"{self.path / 'config.json'} names no class of transformers; load the model by its own class"
            )
        return cls.from_pretrained(self.path, local_files_only=True).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Path and digest; of a folder of its own, its files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"path": str(self.path), "digest": self.fingerprint}
        if self.is_own:
            shutil.copytree(self.path, folder / OWN, copy_function=_link_or_copy)
            facts = {"path": OWN}
        (folder / REFERENCE).write_text(json.dumps(facts))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Raises ValueError where the folder is gone or has changed."""
        facts = json.loads((Path(folder) / REFERENCE).read_text())
        found = cls(Path(folder) / facts["path"], is_own=facts["path"] == OWN)
        if not found.is_own and found.fingerprint != facts["digest"]:
            raise ValueError(f"{found.path} has changed since it was loaded; load it again (plait run does)")
        return found


def opened(model: Any) -> Any:
    """A model in memory, for whoever needs more of it than its weights."""
    return model.open() if isinstance(model, ModelFolder) else model


def merge_folders(
    recipe: Recipe,
    base: ModelFolder | Path | str,
    experts: Mapping[str, ModelFolder | Path | str],
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    strict: bool = False,
    warn: Callable[[str], None] = lambda sentence: None,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> ModelFolder:
    """Merge folders of safetensors into a new one, a tensor at a time.

    Names, shapes, types, shards and index are the base's, and so are all files beside its weights (configuration, tokenizer).
    Heads of classifiers stay the base's, for they differ from task to task.

    Args:
        recipe: e.g. :func:`~plait_wemoe.baselines.static.trimming` for TIES.
        out: a folder that is not there yet, or empty; it appears when the merge is complete.
        strict: refuse an expert that equals the base, not only warn.
        track: goes through the names of the tensors that are written.

    Raises:
        ValueError: folders that do not fit each other, a value that is not finite, ``out`` holds something.
    """
    if not experts:
        raise ValueError("there is no expert to merge; give at least one fine-tuned model")
    base = _folder(base)
    tuned = {name: _folder(expert) for name, expert in experts.items()}
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a folder that is not, or an empty one")
    heads = head_entries(base)
    for name, expert in tuned.items():
        check_layouts(base, expert, f"expert {name!r}", heads)
    if heads:
        warn(f"heads are not merged: {', '.join(heads[:3])} stay the base's")
    origin = base.state(device, "the base")
    states = {name: expert.state(device, f"expert {name!r}") for name, expert in tuned.items()}
    merged = [name for name in base.layout if name not in heads]
    for name, state in states.items():
        if all(torch.equal(state[entry], origin[entry]) for entry in merged):
            if strict:
                raise ValueError(f"expert {name!r} equals the base bit by bit; fine-tune it, or set strict to false")
            warn(f"expert {name!r} equals the base bit by bit; it adds nothing")

    # Of files nothing is known to be a buffer but by its name.
    names = weight_names({name: base.layout[name] for name in merged})
    weights = recipe.weights(origin, states, names)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        progress = iter(track(list(base.layout)))
        for file in dict.fromkeys(base.files.values()):
            # Large types first, so that every tensor of the file is aligned.
            inside = [name for name, place in base.files.items() if place == file]
            inside = sorted(inside, key=lambda name: (-base.layout[name].itemsize, name))

            def tensors(inside: list[str] = inside) -> Iterator[Tensor]:
                kept = {name: origin.layout[name] for name in inside if name in heads}
                for name in inside:
                    if name in kept:
                        yield origin[name]
                    else:
                        yield from (v for _, v in merged_entries(origin.only([name]), states, weights, recipe.method))
                    next(progress, None)

            with _opened(base.path / file) as content:
                metadata = content.metadata() or {"format": "pt"}
            write_safetensors(part / file, {name: base.layout[name] for name in inside}, tensors(), metadata)
        next(progress, None)
        for other in _plain_files(base.path):
            if not other.name.startswith(".") and not other.name.endswith(NOT_COPIED):
                shutil.copy2(other, part / other.name)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return ModelFolder(out)


def check_layouts(base: ModelFolder, expert: ModelFolder, called: str, heads: Iterable[str] = ()) -> None:
    """Refuse a folder whose tensors have other names, shapes or types than the base's; heads aside.

    Raises:
        ValueError: the first difference, in one sentence.
    """
    places = tuple({f"{_place(name)}." for name in (*heads, *head_entries(expert))})
    here, there = (
        {name: like for name, like in folder.layout.items() if not name.startswith(places or ("\0",))}
        for folder in (base, expert)
    )
    if here.keys() != there.keys():
        missing, surplus = sorted(here.keys() - there.keys())[:3], sorted(there.keys() - here.keys())[:3]
        raise ValueError(
            f"{called} ({expert.path}) is of another architecture than the base: missing {missing}, surplus {surplus}"
        )
    for name, like in here.items():
        if there[name].shape != like.shape:
            raise ValueError(f"{name} is {tuple(there[name].shape)} in {called}, {tuple(like.shape)} in the base")
        if there[name].dtype != like.dtype:
            raise ValueError(
                f"{name} is {there[name].dtype} in {called}, {like.dtype} in the base; convert one of them first"
            )


def head_entries(folder: ModelFolder) -> list[str]:
    """The entries of the head of a classifier: of transformers, all that stands beside the pre-trained body."""
    known = {name for names in HEAD_NAMES for name in names}
    tops = {_place(name) for name in folder.layout}
    architecture = str((_configuration(folder.path).get("architectures") or [""])[0])
    if architecture and not architecture.endswith("Classification"):
        return []
    if architecture and tops & known:
        sizes = {top: sum(v.numel() for n, v in folder.layout.items() if _place(n) == top) for top in tops - known}
        known = tops - {max(sizes, key=lambda top: sizes[top])} if sizes else tops
    return [name for name in folder.layout if _place(name) in known]


def _place(name: str) -> str:
    return name.partition(".")[0]


def weight_files(folder: Path) -> dict[str, str]:
    """Name of a tensor → name of its file in the folder.

    Raises:
        ValueError: no safetensors, several sets of them, an index that names what is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one as save_pretrained writes it")
    indexes = sorted(file.name for file in folder.glob(f"*{INDEX}"))
    single = sorted(file.name for file in folder.glob("*.safetensors"))
    if "model.safetensors" in single and not indexes:
        single = ["model.safetensors"]
    if len(indexes) == 1:
        try:
            places = dict(json.loads((folder / indexes[0]).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / indexes[0]} is not an index of shards: it has no weight_map") from error
        for file in sorted(set(map(str, places.values()))):
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{folder / indexes[0]} names {file!r}, which is not a file beside it; add it")
        return places
    if indexes or len(single) > 1:
        raise ValueError(f"{folder} holds {', '.join(indexes or single)}; leave one set of weights there")
    if not single:
        raise ValueError(f"{folder} holds no safetensors; save the model with save_pretrained")
    with _opened(folder / single[0]) as content:
        return dict.fromkeys(content.keys(), single[0])


def write_safetensors(
    file: Path, layout: Mapping[str, Tensor], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file tensor by tensor, which the library can only do with all of them in memory.

    Args:
        layout: name → shape and type, in the order of ``tensors``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, like in layout.items():
        start, end = end, end + like.numel() * like.itemsize
        header[name] = {"dtype": NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for like, value in zip(layout.values(), tensors, strict=True):
            if (value.shape, value.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"a tensor of {file.name} is {tuple(value.shape)}, {value.dtype}; {like} was announced"
                )
            if value.numel():
                target.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _folder(folder: ModelFolder | Path | str) -> ModelFolder:
    return folder if isinstance(folder, ModelFolder) else ModelFolder(folder)


def _configuration(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error
    return found if isinstance(found, dict) else {}


def _plain_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file()]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy it again") from error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
