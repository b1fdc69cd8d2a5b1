"""``defend: restore-first``: a model that restores what it is shown, which an adaptive attacker can attack whole."""

from __future__ import annotations

import copy
from typing import Any, Literal

import attrs
from plait import Run, hookimpl
from plait.fields import field, in_range
from plait_clip import image_text_model

from plait_semiddm_weather.model import WeatherRestorer
from plait_semiddm_weather.purified import RestoringModel


@attrs.frozen(kw_only=True)
class RestoreFirst:
    """An image-text model that restores every image first; differentiable, so that an attack can know of it."""

    takes = {"model": "image-text-model", "reference": "restorer"}

    num_samples: int = field(1, "restorations whose embeddings are averaged", in_range(1))
    first_seed: int = field(0, "of their noise; another number is another draw", in_range(0))
    weights: Literal["teacher", "student"] = field("teacher", "which network restores")

    @hookimpl
    def defend(self, model: Any, reference: Any, run: Run) -> RestoringModel:
        """The two as one model; ``reference`` is the restorer."""
        if not isinstance(reference, WeatherRestorer):
            raise ValueError(f"reference is a {type(reference).__name__}; give a restorer of semiddm-weather")
        inner, restorer = (copy.deepcopy(one).to(run.device) for one in (image_text_model(model), reference))
        return RestoringModel(inner, restorer.eval(), self.num_samples, self.first_seed, self.weights).eval()
