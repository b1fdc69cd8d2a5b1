"""Small inputs on which ``plait check`` tries the method."""

from __future__ import annotations

from plait.demo.pictures import digits
from plait.testing import Example
from plait.testing.examples import classifier


def pgd() -> Example:
    data = digits()
    return Example(
        arguments={"model": classifier(), "data": data},
        fields={"name": "PGD", "arguments": {"steps": 2}},
        random=True,
        keeps_rows=True,
        budget=8 / 255,
        empty={"data": data.select([])},
        wrong={"model": object(), "data": data.remove_columns("image")},
    )
