"""Graph networks for node classification, and what all models of this kit share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from plait.fingerprints import fingerprint
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

Architecture = Literal["gcn", "sage", "gat", "gatv2", "gin", "graphconv", "transformer", "sgc"]
M = TypeVar("M", bound=nn.Module)
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


class SavedModule(nn.Module):
    """A module that saves itself: ``config.json``, ``model.safetensors`` and the training's ``history.jsonl``.

    A subclass hands its constructor's arguments to ``super().__init__``.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.history: list[dict[str, float]] = []

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides what it computes: kind, constructor's arguments and weights."""
        return fingerprint(type(self).__qualname__, self.config, self.state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in self.history))
        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        folder = Path(folder)
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        load_model(model, str(folder / "model.safetensors"))
        return model


def _gin(width_in: int, width_out: int) -> nn.Module:
    inner = nn.Sequential(nn.Linear(width_in, width_out), nn.ReLU(), nn.Linear(width_out, width_out))
    layer: nn.Module = pyg.GINConv(inner)
    return layer


class GNN(SavedModule):
    """``num_layers`` layers of one kind, dropout before and ReLU after each but the last.

    Args:
        architecture: ``gcn``, ``sage``, ``gat``, ``gatv2``, ``gin``, ``graphconv``, ``transformer`` or ``sgc``
            (one linear layer after ``num_layers`` propagations).
        heads: of the attention layers; hidden layers have ``hidden_channels`` features a head, the last layer
            averages its heads.
    """

    def __init__(
        self,
        *,
        architecture: Architecture,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 32,
        num_layers: int = 2,
        dropout: float = 0.5,
        heads: int = 1,
    ) -> None:
        super().__init__(
            architecture=architecture,
            in_channels=in_channels,
            num_classes=num_classes,
            hidden_channels=hidden_channels,
            num_layers=num_layers,
            dropout=dropout,
            heads=heads,
        )
        self.dropout = dropout
        if architecture == "sgc":
            self.layers = nn.ModuleList([pyg.SGConv(in_channels, num_classes, K=num_layers)])
            return
        attention = {"gat": pyg.GATConv, "gatv2": pyg.GATv2Conv, "transformer": pyg.TransformerConv}
        plain = {"gcn": pyg.GCNConv, "sage": pyg.SAGEConv, "graphconv": pyg.GraphConv, "gin": _gin}
        widths = [in_channels] + [hidden_channels * (heads if architecture in attention else 1)] * (num_layers - 1)
        self.layers = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == num_layers - 1
            out = num_classes if last else hidden_channels
            if architecture in attention:
                self.layers.append(attention[architecture](width, out, heads=heads, concat=not last))
            else:
                self.layers.append(plain[architecture](width, out))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits [n, num_classes] from features [n, d] and edges [2, e]."""
        for i, layer in enumerate(self.layers):
            x = F.relu(x) if i else x
            x = layer(F.dropout(x, self.dropout, self.training), edge_index)
        return x


def check_is_module(model: Any) -> None:
    """Raise ``ValueError`` for what is not a model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module on graphs as model, got a {type(model).__name__}")


def seeded(seed: int, make: Callable[[], M]) -> M:
    """``make()`` with its random initial weights drawn from ``seed``; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
