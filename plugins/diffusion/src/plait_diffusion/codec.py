"""Feature sets as results of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class FeatureCodec:
    """A :class:`~plait_diffusion.feature_sets.FeatureSet`: safetensors shards with an index, opened without reading them."""

    name = "features"

    def handles(self, value: Any) -> bool:
        return type(value).__module__ == "plait_diffusion.feature_sets" and type(value).__name__ == "FeatureSet"

    def save(self, value: Any, folder: Path) -> None:
        from plait_diffusion.feature_sets import save_features

        save_features(value, folder)

    def load(self, folder: Path) -> Any:
        from plait_diffusion.feature_sets import open_features

        return open_features(folder)
