"""Prompt templates and class names by name."""

from __future__ import annotations

from collections.abc import Sequence

DIGITS = (
    "a photo of the number {}",
    "a picture of the number {}",
    "this is the number {}",
    "the number {}",
    "a small image of the number {}",
    "a picture showing the number {}",
    "the digit {}",
    "someone wrote the number {}",
)

FASHION = (
    "a photo of a {}",
    "a picture of a {}",
    "this is a {}",
    "a {}",
    "a small image of a {}",
    "a picture showing a {}",
    "someone is selling a {}",
)

TEMPLATE_SETS = ("openai-imagenet", "openai-simple", "photo", "digits", "fashion-mnist")
CLASS_NAME_SETS = ("imagenet",)


def templates(source: str | Sequence[str]) -> tuple[str, ...]:
    """Templates with one ``{}`` for the class name.

    Args:
        source: a name of :data:`TEMPLATE_SETS` (``openai-imagenet``: the 80 of open_clip's
            ``OPENAI_IMAGENET_TEMPLATES``; ``openai-simple``: its 7 best), or the templates themselves.

    Raises:
        ValueError: an unknown name, no template, or one without ``{}``.
    """
    if isinstance(source, str):
        if source.startswith("openai-"):
            from open_clip import zero_shot_metadata

            sets = {
                "openai-imagenet": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
                "openai-simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
            }
            if source in sets:
                # open_clip keeps functions; called with "{}" they give the text of the template.
                return tuple(template("{}") for template in sets[source])
        small = {"photo": ("a photo of a {}.",), "digits": DIGITS, "fashion-mnist": FASHION}
        if source in small:
            return small[source]
        if "{}" not in source:
            raise ValueError(f"templates {source!r} is unknown; known are {', '.join(TEMPLATE_SETS)}, or give a list")
        return (source,)
    found = tuple(source)
    bad = [text for text in found if "{}" not in text]
    if not found or bad:
        raise ValueError(
            f"template {bad[0]!r} lacks {{}} for the class name" if bad else "templates is empty; give one"
        )
    return found


def class_names(source: str | Sequence[str]) -> tuple[str, ...]:
    """Names of classes in the order of their labels.

    Args:
        source: ``imagenet`` (open_clip's 1,000 ``IMAGENET_CLASSNAMES``) or the names themselves.

    Raises:
        ValueError: an unknown name, or a duplicate name.
    """
    if isinstance(source, str):
        if source != "imagenet":
            raise ValueError(
                f"class names {source!r} are unknown; known are {', '.join(CLASS_NAME_SETS)}, or give a list"
            )
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    return tuple(source)


def fill(template: str, name: str) -> str:
    """The template with its ``{}`` replaced; other braces stay as they are."""
    return template.replace("{}", name)
