"""What is minimised (sections 2.6 and 2.8). Images are float ``[B, 3, H, W]`` in [0, 1]; every loss is a mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_semiddm_weather.wavelets import SubBands

# ReLU1_2, 2_2, 3_3 of VGG16 and ReLU1_1, 2_1, 3_1, 4_1, 5_1 of VGG19, by their place among the features.
VGG16_LAYERS, VGG19_LAYERS = (3, 8, 15), (1, 6, 11, 20, 29)
CONTRAST_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)

Features = Callable[[Tensor], Sequence[Tensor]]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``softplus(−D(real)) + softplus(D(fake))``; 2 ln 2 where D knows nothing."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """``softplus(−D(fake))``, what the generator minimises."""
    return F.softplus(-fake).mean()


def r1_penalty(logits: Tensor, real: Tensor, gamma: float) -> Tensor:
    """``γ/2 · mean_i ‖∂D_i/∂x_i‖²`` on real states (Mescheder et al., ICML 2018)."""
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gamma / 2 * gradient.square().flatten(1).sum(dim=1).mean()


def reconstruction_loss(image: Tensor, target: Tensor, l1_fraction: float = 0.8) -> Tensor:
    """A mixture of L1 and squared error."""
    return l1_fraction * F.l1_loss(image, target) + (1 - l1_fraction) * F.mse_loss(image, target)


class PerceptualLoss(nn.Module):
    """The mean over layers of VGG16 of the squared difference of features."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self.features(image), self.features(target), strict=True)
        return torch.stack([F.mse_loss(ours, theirs.detach()) for ours, theirs in pairs]).mean()


class ContrastLoss(nn.Module):
    """``Σ_k w_k L1(φ_k(a), φ_k(p)) / (L1(φ_k(a), φ_k(n)) + 1e-7)``: towards the positive p, away from the negative n."""

    def __init__(self, features: Features, weights: Sequence[float]) -> None:
        super().__init__()
        self.features, self.weights = features, tuple(weights)

    def forward(self, image: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        with torch.no_grad():
            towards, away = self.features(positive), self.features(negative)
        terms = [
            weight * F.l1_loss(a, p) / (F.l1_loss(a, n) + 1e-7)
            for weight, a, p, n in zip(self.weights, self.features(image), towards, away, strict=True)
        ]
        return torch.stack(terms).sum()


def wavelet_contrast() -> ContrastLoss:
    """The same ratio on the sub-bands, which needs no pretrained network."""
    bands = SubBands()
    return ContrastLoss(lambda image: [bands(image)], (1.0,))


def perceptual_loss(weights: Path | str | None) -> PerceptualLoss:
    """On VGG16. Raises as :class:`VGGFeatures`."""
    return PerceptualLoss(VGGFeatures(16, weights, VGG16_LAYERS))


def vgg_contrast(weights: Path | str | None) -> ContrastLoss:
    """On VGG19. Raises as :class:`VGGFeatures`."""
    return ContrastLoss(VGGFeatures(19, weights, VGG19_LAYERS), CONTRAST_WEIGHTS)


class VGGFeatures(nn.Module):
    """Frozen features of VGG16 or VGG19 of images in [0, 1], without ImageNet's normalisation (as Semi-UIR).

    Args:
        depth: 16 or 19.
        weights: a file with torchvision's weights; the names ``features.*`` are taken.
        layers: the places whose outputs are returned.

    Raises:
        ValueError: there is no file, or it does not hold these weights.
    """

    def __init__(self, depth: int, weights: Path | str | None, layers: Sequence[int]) -> None:
        super().__init__()
        if weights is None:
            raise ValueError(
                f"the loss on VGG{depth} needs its weights, which are never downloaded: give vgg{depth} the file of "
                f"torchvision.models.vgg{depth}(weights='IMAGENET1K_V1').state_dict(), or set its weight to 0"
            )
        from torchvision.models.vgg import cfgs, make_layers

        self.layers = tuple(layers)
        with torch.random.fork_rng(devices=[]):
            self.network: Any = make_layers({16: cfgs["D"], 19: cfgs["E"]}[depth])[: max(layers) + 1]
        state = _read(Path(weights))
        own = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
        wanted = self.network.state_dict()
        if missing := [name for name in wanted if name not in own or own[name].shape != wanted[name].shape]:
            raise ValueError(
                f"{weights} does not hold VGG{depth}: features.{missing[0]} is missing or of another shape"
            )
        self.network.load_state_dict({name: own[name] for name in wanted})
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        found = []
        for place, layer in enumerate(self.network):
            # The convolutions' ReLUs work in place, so what is kept would change under them.
            image = F.relu(image) if isinstance(layer, nn.ReLU) else layer(image)
            if place in self.layers:
                found.append(image)
        return found


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} is not a file; give the weights of VGG as torchvision saves them")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state
