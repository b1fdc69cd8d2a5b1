"""Speed of SA-AET's image attack: images per second and passes through the encoder, against a plain loop.

    python benchmarks/sa_aet.py [--num-images 4 --num-steps 10 --num-samples 5 --num-texts 2000 --device cpu]

The encoder is a small vision transformer with random weights (width 192, 4 layers, 96 × 96 pixels, D = 512); texts are
random features that share a direction. The plain loop is written for this comparison and does what is usually done: the
singular value decomposition of the corpus in every loss, one mixture and one view at a time, parameters that require
gradients, a backward pass for candidates too, captions gathered in a Python loop. Both take the same random numbers and
have to agree in 99.9 % of the pixels. Ends with status 1 where SA-AET is less than 5 times as fast as the loop.

Second, plain sign steps (no mixtures, no rescaled views) against PGD of torchattacks at an equal objective and an equal
number of steps, to see that the machinery costs nothing. That needs ``pip install --no-deps torchattacks``.

Ratios compare what ran in this one process, in processor time on one thread (on a GPU: wall time, in full single
precision); of short runs the fastest of three.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from plait_sa_aet.randomness import PerImage
from plait_sa_aet.sa_aet import caption_targets, evolve_images, semantic_projection, sub
from plait_sa_aet.source import Source
from plait_sa_aet.views import ScaledViews
from torch import Tensor, nn

EPSILON, STEP_SIZE = 8 / 255, 2 / 255
SCALES = (0.5, 0.75, 1.25, 1.5)
LEAST_RATIO, LEAST_EQUAL = 5.0, 0.999


class SmallViT(nn.Module):
    """96 × 96 pixels in patches of 16, width 192, 4 layers, D = 512."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 16, 16)
        self.positions = nn.Parameter(torch.randn(36, 192) * 0.1)
        layer = nn.TransformerEncoderLayer(192, 3, 768, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(192, 512)

    def encode_image(self, images: Tensor) -> Tensor:
        x = self.patches((images - 0.45) / 0.25).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(x).mean(dim=1))


class PlainLoop:
    """The attack as a loop over mixtures and views; counts its passes of single images."""

    def __init__(self, model: nn.Module, corpus: Tensor, texts: Tensor, txt2img: list[int]) -> None:
        self.model, self.corpus, self.texts, self.txt2img = model, corpus, texts, txt2img
        self.num_forwards = self.num_backwards = 0

    def loss(self, images: Tensor) -> Tensor:
        U = torch.linalg.svd(self.corpus.T, full_matrices=False)[0]
        P = U[:, 1:] @ U[:, 1:].T
        matched = torch.zeros(len(images), len(self.texts))
        for caption, image in enumerate(self.txt2img):
            matched[image, caption] = 1
        features = F.normalize(self.model.encode_image(images), dim=-1)
        self.num_forwards += len(images)
        return -((features @ P) @ (self.texts @ P).T * matched).sum(dim=-1).mean()

    def gradient(self, loss: Tensor, images: Tensor, num_views: int = 1) -> Tensor:
        self.model.zero_grad()
        loss.backward()
        self.num_backwards += num_views * len(images)
        assert images.grad is not None
        return images.grad

    def __call__(self, v: Tensor, rng: PerImage, num_steps: int, num_samples: int) -> Tensor:
        def clip(x: Tensor) -> Tensor:
            return torch.min(torch.max(x, v - EPSILON), v + EPSILON).clamp(0, 1)

        x, h = (v + rng.init(v.shape, -EPSILON, EPSILON)).clamp(0, 1), None
        for _ in range(num_steps):
            z = x
            if h is not None:
                mixtures, values = [], []
                for a, b, c in [rng.triple(sub, 1)[0].tolist() for _ in range(num_samples)]:
                    m = (a * x + b * v + c * h).requires_grad_()
                    y = clip(x + STEP_SIZE * self.gradient(self.loss(m), m).sign()).requires_grad_()
                    value = self.loss(y)
                    self.gradient(value, y)
                    mixtures.append(m.detach())
                    values.append(value.item())
                z = mixtures[values.index(max(values))]
            z = z.clone().requires_grad_()
            total = self.loss(z)
            for scale in SCALES:
                noisy = z + rng.noise(z.shape, 0.05)
                side = int(scale * z.shape[-1])
                small = F.interpolate(noisy, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
                total = total + self.loss(F.interpolate(small, z.shape[2:], mode="bicubic", align_corners=False))
            x, h = clip(x + STEP_SIZE * self.gradient(total, z, 1 + len(SCALES)).sign()), x
        return x


class AsClassifier(nn.Module):
    """Logits whose cross-entropy for class 0 rises as images leave their targets, so sign steps are the same."""

    def __init__(self, model: SmallViT, targets: Tensor) -> None:
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, images: Tensor) -> Tensor:
        similarity = (F.normalize(self.model.encode_image(images), dim=-1) * self.targets).sum(dim=-1)
        return torch.stack([similarity, torch.zeros_like(similarity)], dim=1)


def timed(function: Callable[[], Tensor], repeats: int = 3) -> tuple[Tensor, float]:
    """What it returns, and the time of the fastest of its runs."""
    times = []
    for _ in range(repeats):
        start = clock()
        found = function()
        times.append(clock() - start)
    return found, min(times)


def clock() -> float:
    """Wall time after pending work where tensors are made on a GPU; else processor time, which other processes do not raise."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def share_equal(a: Tensor, b: Tensor, tolerance: float = 0.0) -> float:
    return ((a - b).abs() <= tolerance).float().mean().item()


def compare_with_the_loop(
    model: SmallViT, v: Tensor, corpus: Tensor, texts: Tensor, txt2img: list[int], num_steps: int, num_samples: int
) -> bool:
    ids, loop = range(len(v)), PlainLoop(model, corpus, texts, txt2img)
    passes = Source(model)

    def ours(source: Source) -> Tensor:
        targets = caption_targets(texts, txt2img, len(v), semantic_projection(corpus))
        options = {"epsilon": EPSILON, "step_size": STEP_SIZE, "num_steps": num_steps, "num_samples": num_samples}
        return evolve_images(source, v, targets, PerImage(0, ids, device=v.device), **options).images

    ours(passes)
    found, duration = timed(lambda: ours(Source(model)))
    expected, slow = timed(lambda: loop(v, PerImage(0, ids, device=v.device), num_steps, num_samples), repeats=1)
    equal = share_equal(found, expected)
    print(f"{'':28}{'images / s':>12}{'forwards / image':>18}{'backwards / image':>19}{'loop / this':>13}")
    for label, seconds, counts in [("SA-AET, plain loop", slow, loop), ("SA-AET, this plugin", duration, passes)]:
        print(
            f"{label:28}{len(v) / seconds:>12.3f}{counts.num_forwards / len(v):>18.0f}"
            f"{counts.num_backwards / len(v):>19.0f}{slow / seconds:>13.1f}"
        )
    print(f"equal pixels: {equal:.3%}")
    return slow / duration >= LEAST_RATIO and equal >= LEAST_EQUAL


def compare_with_torchattacks(model: SmallViT, v: Tensor, texts: Tensor, txt2img: list[int], num_steps: int) -> bool:
    try:
        from torchattacks import PGD
    except ImportError:
        print("PGD is not compared: torchattacks is missing; pip install --no-deps torchattacks")
        return True
    targets = caption_targets(texts, txt2img, len(v), None)
    theirs = PGD(AsClassifier(model, targets), EPSILON, STEP_SIZE, num_steps, random_start=False)
    labels = torch.zeros(len(v), dtype=torch.long)
    ours = partial(
        evolve_images, triangle="none", views=ScaledViews(()), random_start=False, epsilon=EPSILON, num_steps=num_steps
    )
    expected, slow = timed(lambda: theirs(v, labels), repeats=7)
    found, duration = timed(
        lambda: ours(Source(model), v, targets, PerImage(0, range(len(v)), device=v.device)).images, repeats=7
    )
    equal = share_equal(found, expected, tolerance=1e-6)
    print(f"{'':28}{'images / s':>12}{'torchattacks / this':>21}")
    print(f"{'PGD, torchattacks':28}{len(v) / slow:>12.3f}{1:>21.2f}")
    print(f"{'PGD, this plugin':28}{len(v) / duration:>12.3f}{slow / duration:>21.2f}")
    print(f"equal pixels: {equal:.3%}")
    return equal >= LEAST_EQUAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=5)
    parser.add_argument("--num-texts", type=int, default=2000, help="texts in the corpus of the projection")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SmallViT().eval()
    images = torch.rand(arguments.num_images, 3, 96, 96)
    features = F.normalize(torch.randn(arguments.num_texts + 5 * arguments.num_images, 512) + 1.5, dim=-1)
    corpus, texts = features.split([arguments.num_texts, 5 * arguments.num_images])
    txt2img = [caption // 5 for caption in range(len(texts))]

    fast = compare_with_the_loop(model, images, corpus, texts, txt2img, arguments.num_steps, arguments.num_samples)
    print()
    agrees = compare_with_torchattacks(model, images, texts, txt2img, arguments.num_steps)
    if not fast or not agrees:
        sys.exit(f"less than {LEAST_RATIO} × the plain loop, or results that differ")


if __name__ == "__main__":
    main()
