"""Runs benchmarks and puts what they print on record: ``python figures/benchmarks.py [NAME …]``.

Of a line such as ``apply  0.0240  3.2  697.1`` the record has a row ``apply # # #`` and the metrics 1, 2 and 3. Times
are those of the machine that the record names; a benchmark prints ratios of what ran in one process beside them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from plait.hardware import hardware
from plait.recording import Figure, Record, to_text
from plait.versions import LIBRARIES

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).with_suffix("")
COMMANDS = {
    "content-shift": "benchmarks/content_shift.py",
    "diffusion": "benchmarks/diffusion.py",
    "ensir": "benchmarks/ensir.py",
    "federated": "benchmarks/federated.py",
    "fgsam": "benchmarks/fgsam.py --nodes 1000 10000",
    "fgsam-large": "benchmarks/fgsam.py --nodes 100000 --rounds 3",
    "sa-aet": "benchmarks/sa_aet.py",
    "semiddm": "benchmarks/semiddm.py --side 96",
    "wemoe": "benchmarks/wemoe.py",
}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?![\w.])")


def main() -> None:
    """Command line; the status is 1 where a benchmark missed its own bars, and what it printed is on record all the same."""
    missed = False
    for name in sys.argv[1:] or COMMANDS:
        print(f"== {name}: python {COMMANDS[name]}", flush=True)
        done = subprocess.run(
            [sys.executable, *COMMANDS[name].split()], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout, flush=True)
        missed |= done.returncode != 0
        (RECORDS / f"{name}.csv").write_text(
            to_text(Record(facts(COMMANDS[name]), figures(name, done.stdout))), encoding="utf-8"
        )
    sys.exit(missed)


def facts(command: str) -> dict[str, str]:
    """What a record of a benchmark comes from."""
    versions = {}
    for library in ("plait", *LIBRARIES):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "command": f"python {command}",
        "date": f"{date.today():%Y-%m-%d}",
        "versions": ", ".join(f"{library} {number}" for library, number in versions.items()),
        "hardware": hardware(),
    }


def figures(name: str, output: str) -> list[Figure]:
    """The numbers of every line that has some."""
    found, seen = [], Counter[str]()
    for line in output.splitlines():
        if numbers := NUMBER.findall(line):
            row = " ".join(NUMBER.sub("#", line).split())
            seen[row] += 1
            row = row if seen[row] == 1 else f"{row} ({seen[row]})"
            for place, text in enumerate(numbers, 1):
                value = float(text.replace(",", ""))
                found.append(Figure(name, row, str(place), text, value, None, ("",), (value,)))
    return found


if __name__ == "__main__":
    main()
