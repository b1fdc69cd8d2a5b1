"""How many images two sets share: clean pairs that were in the poisoned set would make cleaning easier than it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import datasets
from plait_clip import undecoded


def shared_images(clean: datasets.Dataset, suspicious: datasets.Dataset) -> int:
    """How many image files of ``clean`` are in ``suspicious`` too, byte by byte."""
    seen = set(_digests(suspicious))
    return sum(digest in seen for digest in _digests(clean))


def _digests(data: datasets.Dataset) -> Iterator[bytes]:
    for row in undecoded(data).select_columns("image"):
        image = row["image"]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        yield hashlib.blake2b(content, digest_size=16).digest()
