"""Names of the variants of SA-AET, as fields and functions take them."""

from __future__ import annotations

from typing import Literal

ProjectionMode = Literal["drop_top", "span", "top_k", "none"]
Triangle = Literal["sub", "full", "uniform", "uniform_sub", "none"]
