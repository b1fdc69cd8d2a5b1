"""Networks of torchvision, timm and transformers as classifiers that can be stored: how they are built, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import plait
from plait.errors import nearest
from plait.optional import require
from torch import nn

from plait_vision.classifiers import Classifier, Preparation, preparation_of, preparation_of_processor

IMAGENET: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
Stem = Literal["imagenet", "small"]


def torchvision_classifier(
    architecture: str,
    num_classes: int,
    preparation: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    stem: Stem = "imagenet",
    class_names: Sequence[str] | None = None,
) -> Classifier:
    """A fresh network of ``torchvision.models``; arguments are plain, so that ``plait.build_module`` can note them."""
    models = require("torchvision.models")
    network = models.get_model(architecture, weights=None, num_classes=num_classes, **(arguments or {}))
    if stem == "small":
        if not isinstance(network, models.ResNet):
            raise ValueError(f"stem small is of ResNets; {architecture} has none to replace")
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return Classifier(network, Preparation(**preparation), class_names)


def timm_classifier(
    architecture: str,
    num_classes: int,
    preparation: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> Classifier:
    """A fresh network of timm; arguments are plain, so that ``plait.build_module`` can note them."""
    network = require("timm").create_model(architecture, pretrained=False, num_classes=num_classes, **(arguments or {}))
    return Classifier(network, Preparation(**preparation), class_names)


def transformers_classifier(
    config: Mapping[str, Any], preparation: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> Classifier:
    """A fresh image classifier of transformers, by its configuration as a mapping."""
    transformers = require("transformers")
    made = transformers.AutoConfig.for_model(**config)
    return Classifier(
        transformers.AutoModelForImageClassification.from_config(made), Preparation(**preparation), class_names
    )


def check_torchvision(architecture: str) -> None:
    """Raise ValueError where torchvision has no such classifier."""
    models = require("torchvision.models")
    known = models.list_models(module=models)
    if architecture not in known:
        raise ValueError(
            f"architecture is {architecture!r}{nearest(architecture, known)}; torchvision has {', '.join(known)}"
        )


def check_timm(architecture: str) -> None:
    """Raise ValueError where timm has no such network."""
    timm = require("timm")
    if not timm.is_model(architecture.split(".")[0]):
        raise ValueError(
            f"architecture is {architecture!r}{nearest(architecture, timm.list_models())}; timm.list_models() lists them"
        )


def torchvision_preparation(architecture: str, pretrained: bool) -> dict[str, Any]:
    """What torchvision does to images for its own weights; a fresh network takes them in their size."""
    models = require("torchvision.models")
    facts: dict[str, Any] = {"size": None, **IMAGENET}
    if pretrained:
        made = models.get_model_weights(architecture).DEFAULT.transforms()
        facts |= {
            "size": int(made.crop_size[0]),
            "shorter": int(made.resize_size[0]),
            "mean": list(made.mean),
            "std": list(made.std),
            "interpolation": "bicubic" if made.interpolation.value == "bicubic" else "bilinear",
        }
    return facts


def timm_preparation(architecture: str, arguments: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """What timm does to images for its own weights; a fresh network whose size is not fixed takes them in their size."""
    torch = require("torch")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = require("timm").create_model(architecture, pretrained=False, **arguments)
    found = preparation_of(network) or Preparation(None, **IMAGENET)
    facts = described(found)
    fixed = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return facts if pretrained or fixed else facts | {"size": None, "shorter": None}


def described(preparation: Preparation) -> dict[str, Any]:
    """The arguments that make an equal :class:`Preparation`, plain."""
    return {
        "size": list(preparation.size) if preparation.size else None,
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "resize": preparation.resize,
        "shorter": preparation.shorter,
        "interpolation": preparation.interpolation,
    }


def outputs_of(weights: Mapping[str, Any]) -> int:
    """How many classes weights are for, by their last layer."""
    return len(list(weights.values())[-1])


def load_weights(network: nn.Module, weights: Mapping[str, Any], source: Path, num_classes: int) -> list[str]:
    """Put weights into a network; a head for another number of classes stays fresh.

    Returns:
        The names of what stayed fresh.

    Raises:
        ValueError: the weights are of another network.
    """
    own = network.state_dict()
    weights = {
        name: value for name, value in weights.items() if name in own or not name.endswith("num_batches_tracked")
    }
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own]
    if missing or extra:
        lacks = f"they lack {missing[0]}" if missing else f"they have {extra[0]} besides"
        raise ValueError(f"the weights in {source} are not of this network: {lacks}")
    other = [name for name, value in weights.items() if value.shape != own[name].shape]
    if wrong := [name for name in other if own[name].shape[0] != num_classes]:
        have, want = tuple(weights[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise ValueError(f"the weights in {source} are not of this network: {wrong[0]} is {have}, and {want} is needed")
    network.load_state_dict({**own, **{name: value for name, value in weights.items() if name not in other}})
    return other


def read_transformers(folder: Path) -> Classifier:
    """An image classifier of transformers from a local folder, with its image processor and the names of its classes.

    Raises:
        ValueError: the folder holds no image classifier, one whose weights are not all there, or no image processor.
    """
    transformers, torch = require("transformers"), require("torch")
    try:
        with torch.random.fork_rng(devices=[]):  # it draws fresh weights before it reads the saved ones
            network, found = transformers.AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} holds no image classifier that transformers can read ({reason})") from error
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {', '.join(lacking[:3])}: the weights of a model that is no trained classifier"
        )
    preparation = described(preparation_of_processor(folder))
    config = {
        key: value for key, value in network.config.to_diff_dict().items() if key not in ("architectures", "dtype")
    }
    names: list[str] | None = [str(network.config.id2label[number]) for number in range(network.config.num_labels)]
    if names == [f"LABEL_{number}" for number in range(network.config.num_labels)]:
        names = None  # what transformers writes where nobody gave names
    config["model_type"] = network.config.model_type
    with torch.random.fork_rng(devices=[]):
        classifier: Classifier = plait.build_module(
            transformers_classifier, config=_plain(config), preparation=preparation, class_names=names
        )
    classifier.network.load_state_dict(network.state_dict())
    return classifier.eval()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
