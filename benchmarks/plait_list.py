"""How long `plait list` takes with 15 plugins, as a ratio to importing pluggy, yaml and attrs.

Both commands alternate in one run, so that a busy machine slows both. Below 4 is the aim.

    python benchmarks/plait_list.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plait.catalogue import offers
from plait.hookspecs import HOOKS


def add_plugins(folder: Path, number: int) -> None:
    """Write distributions that offer one method each; their modules do not exist, since nothing may import them."""
    for i in range(number):
        info = folder / f"plait_extra{i}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plait-extra{i}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[plait.attack]\nextra{i} = plait_extra{i}.plugin:Extra\n")


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of one command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    installed = {offer.package for hook in HOOKS for offer in offers(hook)}
    with tempfile.TemporaryDirectory() as folder:
        add_plugins(Path(folder), max(0, 15 - len(installed)))
        environment = {**os.environ, "PYTHONPATH": folder}
        listing = [sys.executable, "-m", "plait.cli", "list"]
        imports = [sys.executable, "-c", "import pluggy, yaml, attrs"]
        seconds(listing, environment)
        pairs = [(seconds(listing, environment), seconds(imports, environment)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"plait list, 15 plugins: {statistics.median(a for a, _ in pairs):.3f} s, {ratio:.2f} × the imports (median of {rounds})"
    )


if __name__ == "__main__":
    main()
