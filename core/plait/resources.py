"""What a step asks for (``resources: {gpu: 1, cpu: 4, memory: 8GiB}``), and what a machine has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import attrs

from plait.errors import nearest
from plait.optional import require

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
MEMORY_OF_A_JOB = 2 * 2**30  # what --jobs auto allows for, where steps do not say


@attrs.frozen(kw_only=True)
class Resources:
    """Number of GPUs and of CPU cores, and memory in bytes; what is 0 is not asked for."""

    gpu: int = 0
    cpu: float = 0
    memory: int = 0

    def plus(self, other: Resources) -> Resources:
        """Both together."""
        return Resources(gpu=self.gpu + other.gpu, cpu=self.cpu + other.cpu, memory=self.memory + other.memory)

    def at_most(self, other: Resources) -> Resources:
        """No more of anything than there is of it in ``other``."""
        return Resources(
            gpu=min(self.gpu, other.gpu), cpu=min(self.cpu, other.cpu), memory=min(self.memory, other.memory)
        )

    def fits_in(self, other: Resources) -> bool:
        """Whether ``other`` has enough of everything."""
        return self.gpu <= other.gpu and self.cpu <= other.cpu and self.memory <= other.memory


NOTHING = Resources()


def parse_resources(given: Any) -> Resources:
    """What a pipeline says.

    Raises:
        ValueError: an unknown resource, or an amount that is none.
    """
    if given is None:
        return NOTHING
    if not isinstance(given, Mapping):
        raise ValueError(f"resources is {given!r}; it is a mapping such as {{gpu: 1, cpu: 4, memory: 8GiB}}")
    known = ("gpu", "cpu", "memory")
    for name in given:
        if name not in known:
            raise ValueError(
                f"there is no resource {name!r}{nearest(name, known) or '; there are gpu, cpu and memory'}"
            )
    gpu, cpu = given.get("gpu", 0), given.get("cpu", 0)
    if not isinstance(gpu, int) or isinstance(gpu, bool) or gpu < 0:
        raise ValueError(f"gpu is {gpu!r}; allowed is a whole number from 0")
    if not isinstance(cpu, (int, float)) or isinstance(cpu, bool) or not 0 <= cpu < 1e6:
        raise ValueError(f"cpu is {cpu!r}; allowed is a number of cores from 0")
    return Resources(gpu=gpu, cpu=float(cpu), memory=_bytes(given.get("memory", 0)))


def _bytes(given: Any) -> int:
    found = MEMORY.fullmatch(str(given).strip())
    if isinstance(given, bool) or found is None or found[2].upper() not in UNITS:
        raise ValueError(f"memory is {given!r}; write a number of bytes, or one with a unit, such as 8GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def machine() -> Resources:
    """What this machine lets its processes use."""
    return Resources(gpu=_gpus(), cpu=cores(), memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sensible_jobs(num_tasks: int) -> int:
    """How many processes make sense here: a core and :data:`MEMORY_OF_A_JOB` of free memory each, no more than tasks."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(cores(), free // MEMORY_OF_A_JOB, num_tasks))


def _gpus() -> int:
    try:
        return int(require("torch").cuda.device_count())
    except ImportError:
        return 0
