"""Models that know their own configuration: ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.importing import import_code


class ModuleCodec:
    """``torch.nn.Module`` (open_clip, transformers, diffusers, PyTorchModelHubMixin, …): config + safetensors.

    Restores the class, the dtype of the parameters as saved, ``requires_grad`` flags and train/eval mode.
    """

    name = "module"

    def handles(self, value: Any) -> bool:
        return callable(getattr(value, "save_pretrained", None)) and callable(
            getattr(type(value), "from_pretrained", None)
        )

    def save(self, value: Any, folder: Path) -> None:
        value.save_pretrained(folder / "model")
        module = sys.modules[type(value).__module__]
        facts: dict[str, Any] = {
            "class": f"{type(value).__module__}:{type(value).__qualname__}",
            "file": getattr(module, "__plait_file__", None),
        }
        if hasattr(value, "training"):
            facts["training"] = [name for name, part in value.named_modules() if part.training]
            facts["frozen"] = [name for name, parameter in value.named_parameters() if not parameter.requires_grad]
            facts["dtypes"] = {
                name: str(tensor.dtype).removeprefix("torch.") for name, tensor in value.state_dict().items()
            }
        (folder / "module.json").write_text(json.dumps(facts))

    def load(self, folder: Path) -> Any:
        facts = json.loads((folder / "module.json").read_text())
        with contextlib.redirect_stdout(io.StringIO()):  # PyTorchModelHubMixin prints where it loads from
            model = _class(facts).from_pretrained(folder / "model")
        if "training" in facts:
            training, frozen = set(facts["training"]), set(facts["frozen"])
            for name, part in model.named_modules():
                part.training = name in training
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            _restore_dtypes(model, facts["dtypes"])
        return model


def _class(facts: dict[str, Any]) -> Any:
    module_name, _, qualname = facts["class"].partition(":")
    try:
        module = import_code(facts["file"] or module_name)
        return functools.reduce(getattr, qualname.split("."), module)
    except Exception as error:  # whatever the user's module raises
        raise PlaitError(
            f"the model's class {facts['class']} cannot be found again ({error}); define it at the top of an importable module"
        ) from error


def _restore_dtypes(model: Any, dtypes: dict[str, str]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = dtypes.get(name)
        if wanted is not None and str(tensor.dtype).removeprefix("torch.") != wanted:
            import_torch = importlib.import_module("torch")
            tensor.data = tensor.data.to(getattr(import_torch, wanted))
