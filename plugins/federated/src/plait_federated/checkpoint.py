"""The state of a training after a round, in one or several files, and finding the last complete one.

``folder/round-000012/part-0-of-3.safetensors`` holds some rows of every table; a round is complete once
all its parts are there. Files appear under their final name only when they are whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1
PART = re.compile(r"part-(\d+)-of-(\d+)\.safetensors")


def save_part(
    folder: Path,
    round_index: int,
    state: dict[str, Tensor],
    history: list[dict[str, Any]],
    identity: str,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Write one part of the state after ``round_index`` rounds, and drop this part of all but the round before."""
    target = folder / f"round-{round_index:06d}" / f"part-{part}-of-{num_parts}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"version": str(VERSION), "identity": identity, "history": json.dumps(history)}
    partial = target.with_suffix(".partial")
    save_file({name: table.detach().cpu().contiguous() for name, table in state.items()}, partial, metadata)
    os.replace(partial, target)
    for old in sorted(folder.glob("round-*"))[:-2]:
        (old / target.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other parts are still in it
            old.rmdir()


def load_latest(folder: Path, identity: str) -> tuple[int, dict[str, Tensor], list[dict[str, Any]]] | None:
    """Rounds done, state and history of the last complete round; ``None`` where there is none.

    Raises:
        ValueError: the checkpoint belongs to another configuration.
    """
    for candidate in sorted(folder.glob("round-*"), reverse=True):
        parts = _complete(candidate)
        if parts is None:
            continue
        tables: list[dict[str, Tensor]] = []
        for path in parts:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                if metadata["version"] != str(VERSION) or metadata["identity"] != identity:
                    raise ValueError(
                        f"the checkpoint in {folder} is of another training; empty the folder or take another"
                    )
                tables.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                if path is parts[0]:
                    history = json.loads(metadata["history"])
        state = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
        return int(candidate.name.removeprefix("round-")), state, history
    return None


def _complete(folder: Path) -> list[Path] | None:
    found = {path: PART.fullmatch(path.name) for path in folder.iterdir()}
    matches = {(int(match[1]), int(match[2])): path for path, match in found.items() if match}
    for total in {total for _, total in matches}:
        if all((part, total) in matches for part in range(total)):
            return [matches[part, total] for part in range(total)]
    return None
