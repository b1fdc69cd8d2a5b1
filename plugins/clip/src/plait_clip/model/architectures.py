"""Model configurations by name, and checkpoints that carry no configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.factory import get_model_config
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from open_clip.tokenizer import HFTokenizer
from plait.errors import nearest
from plait.weights import read_weights
from torch import Tensor

from plait_clip import toy_data
from plait_clip.model.image_input import ImageInput
from plait_clip.model.interface import ABOUT, ImageTextModel
from plait_clip.model.open_clip_model import OpenClipModel, build, image_input
from plait_clip.model.tokenizer import WordTokenizer

# name: (image size, patch size, dimensions of the embedding, mean and std of the grey image)
_TINY = {"tiny": (8, 2, 48, 0.3053, 0.3760), "tiny-28": (28, 7, 64, 0.2860, 0.3530)}
TINY = tuple(_TINY)

_WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


def tiny(name: str, words: Iterable[str] = (), *, context_length: int = 14) -> OpenClipModel:
    """A CLIP for the toy data, with fresh weights (drawn from torch's global generator).

    Args:
        name: ``tiny`` (8 × 8 digits) or ``tiny-28`` (28 × 28 Fashion-MNIST).
        words: texts whose words the tokenizer knows; default: the captions, prompts and synonyms of the toy data.
    """
    size, patch, width, mean, std = _TINY[name]
    tokenizer = WordTokenizer(list(words) or toy_data.vocabulary(), context_length)
    config = {
        "embed_dim": width,
        "vision_cfg": {"image_size": size, "layers": 2, "width": 64, "head_width": 32, "patch_size": patch},
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": tokenizer.vocab_size,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
    return OpenClipModel(build(config), config, tokenizer, ImageInput(size, [mean] * 3, [std] * 3))


def open_clip_architecture(name: str) -> dict[str, Any]:
    """The configuration of an open_clip architecture, by its name or from a JSON file.

    Raises:
        ValueError: no such name; the nearest ones are listed.
        FileNotFoundError: no such file.
    """
    if name.endswith(".json"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"architecture {name}: there is no such file")
        config = json.loads(path.read_text(encoding="utf-8"))
        return config.get("model_cfg", config)
    config = get_model_config(name.replace("/", "-"))
    if config is None:
        known = [*open_clip.list_models(), *TINY]
        raise ValueError(f"architecture {name!r} is unknown to open_clip{nearest(name, known)}")
    return config


def from_config(
    config: Mapping[str, Any],
    *,
    tokenizer_source: str = "",
    preprocess: Mapping[str, Any] | None = None,
) -> OpenClipModel:
    """A model with fresh weights (drawn from torch's global generator) from an open_clip configuration.

    Args:
        tokenizer_source: what ``open_clip.get_tokenizer`` takes; default: as the configuration says.
        preprocess: an open_clip ``preprocess_cfg``; default: OpenAI's mean and std, crop, bicubic.
    """
    model = build(config)
    text = config["text_cfg"]
    length = text.get("context_length", 77)
    if text.get("hf_tokenizer_name") and not tokenizer_source:
        tokenizer: Any = HFTokenizer(
            text["hf_tokenizer_name"],
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            **(text.get("tokenizer_kwargs") or {}),
        )
    else:
        tokenizer = open_clip.get_tokenizer(tokenizer_source, context_length=length)
    return OpenClipModel(model, config, tokenizer, image_input(preprocess or {}, model))


def from_tag(name: str, tag: str, image_size: int | None = None) -> OpenClipModel:
    """An architecture with one of open_clip's pretrained weights, downloaded once.

    Raises:
        ValueError: the architecture has no such weights; those it has are listed.
        ConnectionError: the weights are neither here nor to be had.
    """
    config = with_image_size(open_clip_architecture(name), image_size)
    found = get_pretrained_cfg(name.replace("/", "-"), tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))) or "none"
        raise ValueError(f"pretrained {tag!r} is not one of the weights of {name}; they are: {tags}")
    if found.get("quick_gelu"):  # what the weights were trained with, whatever the name of the architecture says
        config["quick_gelu"] = True
    path = _fetched(f"the weights {tag!r} of {name}", lambda: download_pretrained(found))
    model = from_config(
        config, tokenizer_source="" if config["text_cfg"].get("hf_tokenizer_name") else name, preprocess=found
    )
    load_weights(model, path)
    return model


def from_hub(repository: str) -> OpenClipModel:
    """An open_clip model of the Hugging Face hub, downloaded once.

    Raises:
        ConnectionError: it is neither here nor to be had.
    """
    what = f"the model {repository} of the hub"
    path = _fetched(what, lambda: download_pretrained_from_hf(repository, filename="open_clip_config.json"))
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    weights = _fetched(what, lambda: download_pretrained_from_hf(repository))
    model = from_config(
        content["model_cfg"], tokenizer_source=f"hf-hub:{repository}", preprocess=content.get("preprocess_cfg")
    )
    load_weights(model, weights)
    return model


def from_folder(folder: str | Path) -> ImageTextModel:
    """A folder that ``save_pretrained`` wrote, or one of open_clip's (``open_clip_config.json`` and weights).

    Raises:
        ValueError: the folder holds neither.
    """
    folder = Path(folder).expanduser()
    if (folder / ABOUT).is_file():
        return ImageTextModel.from_pretrained(folder)
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"{folder} holds neither {ABOUT} nor open_clip_config.json; it is not the folder of a model")
    content = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    weights = [path for name in _WEIGHT_NAMES if (path := folder / name).is_file()]
    if not weights:
        raise ValueError(f"{folder} holds no weights; one of {', '.join(_WEIGHT_NAMES)} is needed")
    model = from_config(
        content["model_cfg"], tokenizer_source=f"local-dir:{folder}", preprocess=content.get("preprocess_cfg")
    )
    load_weights(model, weights[0])
    return model


def with_image_size(config: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """The configuration for images of another size; None changes nothing."""
    sized = copy.deepcopy(dict(config))
    if image_size is not None:
        sized["vision_cfg"]["image_size"] = image_size
    return sized


def load_weights(model: OpenClipModel, path: str | Path) -> None:
    """Read a checkpoint of open_clip, OpenAI, CleanCLIP or big_vision (``.npz``) into the model.

    Position embeddings are interpolated to the model's image size and context length.

    Raises:
        ValueError: there is no such file, it is not a checkpoint, or it is one of another architecture.
    """
    inner = model.model
    if Path(path).suffix == ".npz":
        load_big_vision_weights(inner, str(path))
        return
    state = convert_state_dict(inner, _without_marks(read_weights(path)))
    if "positional_embedding" in state and not hasattr(inner, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and getattr(inner, name, None) is not None:
            state[name] = state[name].reshape(getattr(inner, name).shape)
    try:
        resize_pos_embed(state, inner)
        resize_text_pos_embed(state, inner)
        inner.load_state_dict(state)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path} does not fit the architecture: {reason}") from error


def from_checkpoint(path: str | Path) -> OpenClipModel:
    """A model from one of OpenAI's own files alone; see :func:`infer_config`.

    Others of these shapes may have another activation or other heads, which weights do not show.

    Raises:
        ValueError: the file is not OpenAI's, so that an architecture has to be given; says which have its shapes.
    """
    state = read_weights(path)
    if not set(_MARKS) & set(state):
        raise ValueError(_question(path, state))
    state = _without_marks(state)
    model = from_config(infer_config(state))
    try:
        model.model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {path} is not one of OpenAI's architectures; give its architecture too"
        ) from error
    return model


# Numbers that OpenAI's files hold beside the weights, and nobody else's.
_MARKS = ("input_resolution", "context_length", "vocab_size")


def _without_marks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in _MARKS}


def _question(path: str | Path, state: Mapping[str, Tensor]) -> str:
    """What to ask of the owner of a checkpoint that does not say what it is of."""
    asked = f"checkpoint {path} shows neither its activation nor its heads; give its architecture too"
    fitting = _of_these_shapes(infer_config(state))
    if not fitting:
        return f"{asked}, by name or as an open_clip JSON (OpenAI's and CleanCLIP's models have quick_gelu: true)"
    return f"{asked}: {' or '.join(fitting)} (OpenAI's and CleanCLIP's models are those with -quickgelu)"


def _of_these_shapes(config: Mapping[str, Any]) -> list[str]:
    """The architectures of open_clip whose weights have the shapes of a configuration."""

    def shapes(one: Mapping[str, Any]) -> Any:
        vision, text = one["vision_cfg"], one["text_cfg"]
        return (
            one["embed_dim"],
            *(vision.get(key) for key in ("layers", "width", "patch_size", "image_size", "timm_model_name")),
            *(text.get(key) for key in ("context_length", "vocab_size", "width", "layers", "hf_model_name")),
        )

    return [name for name in open_clip.list_models() if shapes(get_model_config(name)) == shapes(config)]


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The open_clip configuration of OpenAI's CLIP with these weights (ViT or ResNet, 64 wide heads, QuickGELU).

    Raises:
        ValueError: the weights are not named as OpenAI's CLIP names them.
    """
    needed = {"text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight", "logit_scale"}
    if needed - set(state) or not ({"visual.conv1.weight", "visual.layer1.0.conv1.weight"} & set(state)):
        raise ValueError("the checkpoint's weights are not named like OpenAI's CLIP; give its architecture too")
    if "visual.proj" in state:
        patch = state["visual.conv1.weight"].shape[-1]
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {
            "layers": sum(name.startswith("visual.") and name.endswith(".attn.in_proj_weight") for name in state),
            "width": state["visual.conv1.weight"].shape[0],
            "patch_size": patch,
            "image_size": patch * grid,
        }
    else:
        stages = [{name.split(".")[2] for name in state if name.startswith(f"visual.layer{i}.")} for i in (1, 2, 3, 4)]
        grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {
            "layers": [len(stage) for stage in stages],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "patch_size": None,
            "image_size": grid * 32,
        }
    width = state["ln_final.weight"].shape[0]
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": width,
            "heads": max(1, width // 64),
            "layers": len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}),
        },
    }


def _fetched(what: str, download: Callable[[], str]) -> str:
    try:
        return download()
    except Exception as error:  # the hub's client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(f"{what} cannot be downloaded ({reason}); give a local folder or checkpoint") from error
