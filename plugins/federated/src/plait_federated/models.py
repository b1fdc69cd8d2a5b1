"""The networks of the comparison: small ones for digits, LeNet, and ResNet-18 with GroupNorm.

None has buffers, so a model is its parameters. Builders return the layers below the last linear one, and its width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Body = tuple[nn.Module, int]


def mlp(channels: int, size: int) -> Body:
    """One hidden layer of 32; 2410 parameters on 8×8 grey images and 10 classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 32), nn.ReLU()), 32


def cnn_small(channels: int, size: int) -> Body:
    """Two 3×3 convolutions (8, 16); 1898 parameters on 8×8 grey images and 10 classes."""
    layers = [*_convolution(channels, 8, padding=1), *_convolution(8, 16, padding=1), nn.Flatten()]
    return nn.Sequential(*layers), 16 * (size // 4) ** 2


def cnn(channels: int, size: int) -> Body:
    """Three 3×3 convolutions (16, 32, 56); 26 034 parameters on 28×28 grey images and 10 classes."""
    widths = (channels, 16, 32, 56)
    layers = [layer for i in range(3) for layer in _convolution(widths[i], widths[i + 1], padding=1)]
    return nn.Sequential(*layers, nn.Flatten()), 56 * (size // 8) ** 2


def lenet(channels: int, size: int) -> Body:
    """Two 5×5×64 convolutions, layers of 384 and 192; 797 962 parameters on CIFAR-10."""
    reduced = ((size - 4) // 2 - 4) // 2
    layers = [*_convolution(channels, 64, kernel=5), *_convolution(64, 64, kernel=5), nn.Flatten()]
    layers += [nn.Linear(64 * reduced**2, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU()]
    return nn.Sequential(*layers), 192


def resnet18_gn(channels: int, size: int) -> Body:
    """ResNet-18 with GroupNorm of two groups and the 7×7 stem; 11 227 812 parameters for 100 classes."""
    # It takes as long to import as torch, and processes of peers with other models do without.
    from torchvision.models import resnet18

    network = resnet18(norm_layer=lambda width: nn.GroupNorm(2, width))
    if channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    network.fc = nn.Identity()
    return network, 512


def resnet18_gn_small_stem(channels: int, size: int) -> Body:
    """The same with a 3×3 stem and no max-pool, for images of 32 or 64 pixels; 11 271 432 parameters for 200 classes."""
    network, width = resnet18_gn(channels, size)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network, width


ARCHITECTURES: dict[str, tuple[Callable[[int, int], Body], int]] = {
    # name → (builder, smallest image side)
    "mlp": (mlp, 1),
    "cnn-small": (cnn_small, 4),
    "cnn": (cnn, 8),
    "lenet": (lenet, 16),
    "resnet18-gn": (resnet18_gn, 32),
    "resnet18-gn-small-stem": (resnet18_gn_small_stem, 16),
}


class ImageClassifier(nn.Module):
    """Images in [0, 1], ``[b, channels, size, size]`` → logits ``[b, num_classes]``.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        num_classes: 0 leaves the linear ``head`` away; the model then gives features.
        mean, std: of a channel, subtracted and divided by; one value for all channels or one each.

    Raises:
        ValueError: unknown architecture, images too small for it, or another number of means than of channels.
    """

    def __init__(
        self,
        architecture: str,
        channels: int,
        size: int,
        num_classes: int,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture!r} is unknown; known are {', '.join(ARCHITECTURES)}")
        build, smallest = ARCHITECTURES[architecture]
        if size < smallest:
            raise ValueError(f"images of {size} pixels are too small for {architecture}, which needs {smallest}")
        if not {len(mean), len(std)} <= {1, channels}:
            raise ValueError(f"mean and std need 1 value, or {channels}, one a channel")
        self.architecture, self.channels, self.size = architecture, channels, size
        self.mean, self.std = tuple(mean), tuple(std)
        self.body, width = build(channels, size)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        logits: Tensor = self.head(self.body((images - mean) / std))
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("architecture", "channels", "size", "mean", "std")
        # A head that somebody took off stays off.
        config = {name: getattr(self, name) for name in names} | {"num_classes": getattr(self.head, "out_features", 0)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what :meth:`save_pretrained` wrote, in evaluation mode."""
        model = cls(**json.loads((Path(folder) / "config.json").read_text()))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval()


def _convolution(channels: int, width: int, kernel: int = 3, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
