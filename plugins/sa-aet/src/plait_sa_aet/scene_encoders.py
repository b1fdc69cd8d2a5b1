"""Three small dual encoders of different kinds for the scenes: a CNN, a vision transformer, a depthwise convnet.

Their features share a common direction, as CLIP's do and those of small models trained from scratch do not: each tower
ends in ``normalize(normalize(f) + cone · b)`` with a fixed random unit vector b, of the tower or of the whole encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from plait_clip import CallableModel, ImageInput, WordTokenizer
from torch import Tensor, nn

from plait_sa_aet.scenes import SIDE, vocabulary

WIDTH = 64
TEXT_WIDTH = 48
CONTEXT_LENGTH = 16
LOG_SCALE = 2.5


class Cone(nn.Module):
    """Moves unit features towards a fixed direction: ``normalize(normalize(f) + cone · b)``."""

    def __init__(self, cone: float) -> None:
        super().__init__()
        self.register_buffer("direction", F.normalize(torch.randn(WIDTH), dim=0))
        self.register_buffer("cone", torch.tensor(float(cone)))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(F.normalize(features, dim=-1) + self.cone * self.direction, dim=-1)


class SmallCnn(nn.Sequential):
    """Three convolutions with batch normalisation, halved twice."""

    def __init__(self) -> None:
        def block(inside: int, outside: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

        super().__init__(
            *block(3, 16, 1),
            *block(16, 32, 2),
            *block(32, 48, 2),
            nn.Flatten(),
            nn.Linear(48 * (SIDE // 4) ** 2, WIDTH),
        )


class SmallVit(nn.Module):
    """Two transformer layers on patches of 4 × 4 and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.class_token = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // 4) ** 2 + 1, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(pixels), 1, -1), patches], dim=1)
        return self.head(self.layers(tokens + self.positions)[:, 0])


class DepthwiseBlock(nn.Module):
    """Depthwise 5 × 5, then two pointwise layers, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.mix = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(self.depthwise(x)))


class SmallConvNet(nn.Sequential):
    """Three depthwise blocks on patches of 3 × 3."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 48, 3, 3),
            *(DepthwiseBlock(48) for _ in range(3)),
            nn.GroupNorm(1, 48),
            nn.Flatten(),
            nn.Linear(48 * (SIDE // 3) ** 2, WIDTH),
        )


class TextTower(nn.Module):
    """One transformer layer on word embeddings, read at the end of the text."""

    def __init__(self, vocab_size: int, end: int) -> None:
        super().__init__()
        self.end = end
        self.token_embedding = nn.Embedding(vocab_size, TEXT_WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT_LENGTH, TEXT_WIDTH))
        self.layer = nn.TransformerEncoderLayer(
            TEXT_WIDTH, 4, 2 * TEXT_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.head = nn.Linear(TEXT_WIDTH, WIDTH)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        x = self.layer(x, src_key_padding_mask=tokens == 0)
        at_end = x[torch.arange(len(x), device=x.device), (tokens == self.end).int().argmax(dim=1)]
        return self.head(self.norm(at_end))


class DualEncoder(nn.Module):
    """An image tower and the text tower, a cone behind each."""

    def __init__(self, image: nn.Module, tokenizer: WordTokenizer, cone: float, *, one_direction: bool) -> None:
        super().__init__()
        self.image = image
        self.text = TextTower(tokenizer.vocab_size, tokenizer.eot_id)
        self.image_cone, self.text_cone = Cone(cone), Cone(cone)
        if one_direction:
            self.text_cone.direction.copy_(self.image_cone.direction)
        # Two cones shrink what a cosine can tell by 1 + cone².
        self.logit_scale = nn.Parameter(torch.tensor(LOG_SCALE + math.log1p(cone**2)))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.image_cone(self.image(pixels))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.text_cone(self.text(tokens))


def scene_encoder(
    tower: Callable[[], nn.Module], factory: str, cone: float, *, one_direction: bool = False
) -> CallableModel:
    """A fresh dual encoder; weights and directions are drawn from torch's global generator.

    Args:
        cone: weight of the direction that all features of a tower share; 0: none.
        one_direction: both towers share one, instead of a direction each.
    """
    tokenizer = WordTokenizer(vocabulary(), CONTEXT_LENGTH)
    return CallableModel(
        DualEncoder(tower(), tokenizer, cone, one_direction=one_direction),
        DualEncoder.encode_image,
        DualEncoder.encode_tokens,
        tokenizer,
        ImageInput(SIDE, [0.35] * 3, [0.25] * 3),
        context_length=CONTEXT_LENGTH,
        image_prefixes=("module.image.", "module.image_cone."),
        factory=f"{__name__}:{factory}",
    )


def cnn(cone: float = 2.0, *, one_direction: bool = False) -> CallableModel:
    return scene_encoder(SmallCnn, "cnn", cone, one_direction=one_direction)


def vit(cone: float = 2.0, *, one_direction: bool = False) -> CallableModel:
    return scene_encoder(SmallVit, "vit", cone, one_direction=one_direction)


def convnet(cone: float = 2.0, *, one_direction: bool = False) -> CallableModel:
    return scene_encoder(SmallConvNet, "convnet", cone, one_direction=one_direction)


ARCHITECTURES = {"cnn": cnn, "vit": vit, "convnet": convnet}
