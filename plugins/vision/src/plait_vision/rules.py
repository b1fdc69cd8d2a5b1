"""The fields of a source of images that say what it does with images that are not plain 8-bit RGB."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from plait.errors import ConfigurationError
from plait.fields import field

from plait_vision.images import Transparency, check_rules


def _is_a_rule(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    try:
        check_rules(value)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


@attrs.frozen(kw_only=True)
class ImageRules:
    """To derive a source's class from; the fields are arguments of :func:`plait_vision.images.decode`."""

    sixteen_bit: Literal["refuse", "scale"] = field(
        "refuse", "16-bit images: refuse them, or scale 0–65535 to 0–255 (colour by the high byte)"
    )
    transparency: Transparency = field(
        "refuse",
        "images with transparent pixels: refuse, drop the alpha channel, or the colour [R, G, B] behind them",
        _is_a_rule,
    )
