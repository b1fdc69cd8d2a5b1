"""A small input on which ``plait check`` tries the methods."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from plait.testing import Example


def labelled_images() -> Example:
    """Four PNG files in two class folders."""
    folder = Path(tempfile.mkdtemp(prefix="plait-example-"))
    generator = np.random.default_rng(0)
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return Example(arguments={}, fields={"source": str(folder)}, device=False)
