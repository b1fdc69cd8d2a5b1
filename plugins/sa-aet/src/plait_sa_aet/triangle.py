"""The evolution triangle: random weights of the current, the clean and the previous image.

A law draws ``(a, b, c)``, weights of the **current** iterate, the **clean** image and the **previous** iterate, sum 1.
The released code of SA-AET and DRA draws whole percents ``(n1, n2, n3)`` one after the other, ``n1`` first, so even
DRA's law favours the current iterate.

=============  ==========================================  =======================================================
law            region                                      facts
=============  ==========================================  =======================================================
sub            current < previous < clean (SA-AET)         784 triples; mean (0.1197, 0.5991, 0.2812);
                                                           n1 ≤ 32, n2 ≥ 35, n3 ≤ 49; 11 proposals per draw
full           the whole triangle (DRA)                    4,851 triples; mean (0.4933, 0.2533, 0.2533)
uniform        the whole triangle, Dirichlet(1, 1, 1)      mean (1/3, 1/3, 1/3); not the released law
uniform_sub    SA-AET's piece, sorted Dirichlet(1, 1, 1)   mean (1/9, 11/18, 5/18); not the released law
=============  ==========================================  =======================================================

``sub`` is one of the six pieces that the medians cut, the one at the clean corner and the clean–previous edge.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Triple = tuple[float, float, float]
Law = Callable[[Random], Triple]


def propose(random: Random) -> tuple[int, int, int]:
    """Percents of current, clean, previous: sum 100, the first two at least 1, the last at least 0."""
    n1 = random.randint(1, 100)
    if 100 - n1 > 1:
        n2 = random.randint(1, 100 - n1)
    else:
        n1, n2 = 98, 1
    return n1, n2, 100 - n1 - n2


def full(random: Random) -> Triple:
    """DRA: percents of at least 1 each."""
    while True:
        n1, n2, n3 = propose(random)
        if n3 >= 1:
            return n1 / 100, n2 / 100, n3 / 100


def sub(random: Random) -> Triple:
    """SA-AET: current < previous < clean."""
    while True:
        n1, n2, n3 = propose(random)
        if n1 < n3 < n2:
            return n1 / 100, n2 / 100, n3 / 100


def uniform(random: Random) -> Triple:
    """Dirichlet(1, 1, 1): the gaps that two uniform points leave on [0, 1]."""
    low, high = sorted((random.random(), random.random()))
    return low, high - low, 1 - high


def uniform_sub(random: Random) -> Triple:
    """Uniform on SA-AET's piece: Dirichlet(1, 1, 1), smallest to current, middle to previous, largest to clean."""
    current, previous, clean = sorted(uniform(random))
    return current, clean, previous


LAWS: dict[str, Law] = {"sub": sub, "full": full, "uniform": uniform, "uniform_sub": uniform_sub}
TRIANGLES = (*LAWS, "none")  # none: no mixtures, the gradient is taken at the current iterate (SGA)
