"""Weights in files: one reader for every kit.

:func:`read_weights` gives a model's weights by name, :func:`read_checkpoint` all that is in a file. They take what people
have: ``.safetensors`` (one file, or shards with their index), ``.pth``, ``.pt``, ``.ckpt`` and ``.bin`` of ``torch.save``,
TorchScript archives, and folders that hold one of them. The content of a file says what it is, not its suffix. No pickle is
read that could run code, and no network of a TorchScript archive is called.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from plait.errors import MissingDependency
from plait.optional import require

State = dict[str, Any]  # of torch.Tensor; the core names torch nowhere

# Entries of a checkpoint that hold a model, averaged weights before the plain ones they belong to: the averaged ones
# are those that their authors evaluate.
ENTRIES = (
    "params_ema",
    "params",
    "state_dict_ema",
    "state_dict",
    "model_state_dict_ema",
    "model_state_dict",
    "model_ema",
    "model",
)
_PREFIXES = ("module.", "model.")
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)$")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_IN_FOLDERS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_OTHER_KINDS = {
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\x89HDF": "is an HDF5 file, as Keras writes them; convert it to .safetensors",
    b"\x93NUMPY": "is a NumPy array; convert it to .safetensors",
    b"GGUF": "is a GGUF file of quantised weights; give the original .safetensors",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"Rar!": "is a RAR archive; unpack it first",
}


_NEITHER = "is not a file of weights: it is neither safetensors nor written by torch.save"


def read_weights(path: Path | str, *, entry: str | None = None, expected: Collection[str] | None = None) -> State:
    """The weights in a file or folder, by name, on the CPU.

    A checkpoint may hold them in an entry (``state_dict``, ``model_state_dict``, ``model``, ``params``, …). Where there
    are plain and averaged ones (``params`` and ``params_ema``), the averaged ones are taken; where entries of other
    names compete, ``entry`` has to say which. The names' prefixes ``module.`` (DataParallel, averaged models),
    ``_orig_mod.`` (``torch.compile``) and ``model.`` (Lightning) are taken off where every name has them.

    Args:
        path: a file; the ``.index.json`` of shards, or one of its shards; or a folder with weights of a usual name.
        entry: which entry of a checkpoint to take, e.g. ``params``.
        expected: the names that the weights should have (``model.state_dict()``). A prefix stays where they have
            it too, and entries beside the prefixed ones (a loss with weights of its own) are left out.

    Raises:
        ValueError: there is no such file; it is not a file of weights (a Git LFS pointer, a web page, an archive, an
            optimizer's state), is damaged, would have to run code, or several entries compete.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a .safetensors, .pth, .pt, .ckpt or .bin file")
    state = _state(_read(path), path, entry)
    if expected is not None:  # older files lack these counters, and modules do without
        expected = [name for name in expected if not name.endswith("num_batches_tracked")]
    return _without_prefixes(state, path, expected)


def read_checkpoint(path: Path | str) -> Any:
    """Everything that ``torch.save`` put into a file, on the CPU: for what is not a model's weights, such as an optimizer.

    Raises:
        ValueError: as :func:`read_weights`, for the file itself.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a file of torch.save")
    return _read_one(path)


def is_torchscript(path: Path | str) -> bool:
    """Whether a file is a TorchScript archive, which holds a network's code beside its weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _in_folder(folder: Path) -> Path:
    for name in (*_INDEXES, *_IN_FOLDERS):
        if (folder / name).is_file():
            return folder / name
    others = [
        *sorted(folder.glob("*.index.json")),
        *sorted(file for file in folder.glob("*.safetensors") if not _SHARD.match(file.name)),
    ]
    if len(others) == 1:
        return others[0]
    if others:
        raise ValueError(f"{folder} holds {', '.join(file.name for file in others)}; give one of these files")
    raise ValueError(f"{folder} holds no weights: none of {', '.join((*_INDEXES, *_IN_FOLDERS))}")


def _read(path: Path) -> Any:
    """What is in a file: tensors by name, or whatever ``torch.save`` wrote."""
    shard = _SHARD.match(path.name)
    if shard and int(shard["total"]) > 1:
        index = path.with_name(f"{shard['stem']}{shard['suffix']}.index.json")
        if not index.is_file():
            number, total = int(shard["number"]), int(shard["total"])
            raise ValueError(f"{path} is part {number} of {total} and {index.name} is not beside it; add all of them")
        return _read_shards(index)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return _read_one(path)


def _read_shards(index: Path) -> State:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        strange = [name for name in files if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: it has no weight_map") from error
    if strange:
        raise ValueError(f"{index} names {strange[0]!r}, which is not a file beside it")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} files that are not beside it: {', '.join(missing[:3])}; add them"
        )
    state: State = {}
    for name in files:
        part = _read_one(index.parent / name)
        lacking = [key for key, place in places.items() if place == name and key not in part]
        if lacking:
            raise ValueError(f"{index.parent / name} lacks {lacking[0]}, which {index.name} says is in it")
        state |= {key: part[key] for key, place in places.items() if place == name}
    return state


def _read_one(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise ValueError(f"{path} is empty; copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'")
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<head)", head, re.IGNORECASE):
        raise ValueError(f"{path} is a web page, not weights; download it again from the file's own link")
    for start, sentence in _OTHER_KINDS.items():
        if head.startswith(start):
            raise ValueError(f"{path} {sentence}")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path, head)


def _read_safetensors(path: Path) -> State:
    SafetensorError = require("safetensors").SafetensorError
    try:
        state: State = require("safetensors.torch").load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    return state


def _read_torch(path: Path, head: bytes) -> Any:
    torch = require("torch")
    archive = zipfile.is_zipfile(path)
    if archive and not is_torchscript(path):
        with zipfile.ZipFile(path) as content:
            names = content.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            kind = (
                "a NumPy archive; convert it" if all(n.endswith(".npy") for n in names) else "a zip archive; unpack it"
            )
            raise ValueError(f"{path} is not a file of torch.save but {kind} first")
    if not archive and not head.startswith(b"\x80"):
        raise ValueError(f"{path} {_NEITHER}")
    try:
        if archive and is_torchscript(path):
            return torch.jit.load(path, map_location="cpu").state_dict()
        with torch.serialization.safe_globals(list(_harmless())):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_unpickling_problem(path, str(error))) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as weights ({reason}); it is damaged or cut off, copy it again"
        ) from error


def _harmless() -> Iterator[Any]:
    """Types in many checkpoints that hold values only: the options of the training, NumPy's numbers."""
    yield argparse.Namespace
    with contextlib.suppress(MissingDependency):
        numpy = require("numpy")
        yield numpy.dtype
        for code in "?" + numpy.typecodes["AllInteger"] + numpy.typecodes["AllFloat"]:
            yield type(numpy.dtype(code))
        scalar = numpy.float64(0).__reduce__()[0]
        yield scalar
        yield scalar, "numpy.core.multiarray.scalar"
        yield scalar, "numpy._core.multiarray.scalar"


def _unpickling_problem(path: Path, text: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|unrecognized (?:function|class) (.+)", text)
    if found is None:
        return f"{path} {_NEITHER}"
    return (
        f"{path} holds more than weights, and reading it could run code ({found[1] or found[2]}); where it was made, save "
        "the model's state_dict() alone, as .safetensors or by torch.save"
    )


def _state(content: Any, path: Path, entry: str | None) -> State:
    """The one mapping name → tensor in what a file holds."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name; save a model's state_dict()")
    if entry is not None:
        if not isinstance(content.get(entry), Mapping):
            raise ValueError(f"{path} has no entry {entry!r} with weights; it has {_listed(content)}")
        return _state(content[entry], path, None)
    if _is_optimizer(content):
        raise ValueError(f"{path} holds the state of an optimizer, not weights; give the model's file")
    candidates = {str(name): found for name, value in content.items() if (found := _nested(value)) is not None}
    known = [name for name in ENTRIES if name in candidates]
    plain = list(dict.fromkeys(name.removesuffix("_ema") for name in known or candidates))
    if len(plain) == 1:
        averaged = f"{plain[0]}_ema"
        return candidates[averaged if averaged in candidates else plain[0]]
    if plain:
        raise ValueError(f"{path} holds several models: {', '.join(known or candidates)}; say which entry to take")
    tensors = _tensors(content)
    if not tensors:
        what = "the state of an optimizer" if any(_is_optimizer(value) for value in content.values()) else "no weights"
        raise ValueError(f"{path} holds {what}; its entries are {_listed(content)}")
    return tensors


def _nested(value: Any) -> State | None:
    """The weights in an entry of a checkpoint, where it is a model's: tensors by name, perhaps one entry deeper."""
    if not isinstance(value, Mapping) or not value or _is_optimizer(value):
        return None
    inner = [found for name in ENTRIES if (found := _nested(value.get(name))) is not None]
    if inner:
        return inner[0]
    tensors = _tensors(value)
    return tensors if 2 * len(tensors) > len(value) else None


def _tensors(content: Mapping[Any, Any]) -> State:
    Tensor = require("torch").Tensor
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)


def _listed(content: Mapping[Any, Any]) -> str:
    names = [str(name) for name in content]
    return (", ".join(names[:8]) + (" …" if len(names) > 8 else "")) or "none"


def _without_prefixes(state: State, path: Path, expected: Collection[str] | None) -> State:
    state = _renamed(state, {name: _COMPILED.sub(r"\1", name) for name in state}, path)
    while True:
        if expected is not None and set(expected) <= set(state):
            return state
        own = [name for name in state if name != "n_averaged"]  # of torch.optim.swa_utils.AveragedModel
        for prefix in _PREFIXES:
            inside = [name for name in own if name.startswith(prefix)]
            wanted = expected is not None and {prefix + name for name in expected} <= set(inside)
            if inside and (wanted or inside == own):
                state = _renamed(state, {name: name.removeprefix(prefix) for name in inside}, path)
                break
        else:
            return state


def _renamed(state: State, names: Mapping[str, str], path: Path) -> State:
    """The tensors that ``names`` has, under their new names."""
    if len(set(names.values())) < len(names):
        twice = next(new for new in names.values() if list(names.values()).count(new) > 1)
        raise ValueError(f"{path} has a duplicate {twice}, with a prefix and without; save the model once")
    return {new: state[old] for old, new in names.items()}
