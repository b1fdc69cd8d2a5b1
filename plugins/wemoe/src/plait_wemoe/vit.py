"""A small vision transformer that saves itself, for toy tasks on which it trains in seconds."""

from __future__ import annotations

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class SmallViT(nn.Module, PyTorchModelHubMixin):
    """timm's pre-LN ViT on gray images, each standardised to (x − mean)/(std + 0.05).

    (N, 3, H, W) in [0, 1] → class token after the last norm, (N, embed_dim).
    """

    def __init__(
        self, image_size: int = 16, patch_size: int = 4, embed_dim: int = 48, depth: int = 4, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=1,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
        )
        # timm's values (std 0.02) suit wide models; at width 48 they would hardly move in a few hundred steps.
        for module in self.vit.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        gray = images.mean(dim=1, keepdim=True)
        mean, std = gray.mean(dim=(1, 2, 3), keepdim=True), gray.std(dim=(1, 2, 3), keepdim=True)
        return self.vit((gray - mean) / (std + 0.05))


def seeded_vit(seed: int, **sizes: int) -> SmallViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallViT(**sizes)
