"""Content shift: what techniques cost. Counted: multiplications of one image's features under a Stable-Diffusion-1.5-shaped model
at 512². Timed: draws of noise stacked in one pass against one by one, taking turns in one process.

    python benchmarks/content_shift.py                  # counting on the meta device, timing of the small model; a minute
    python benchmarks/content_shift.py --device cuda    # timing of a random SD-1.5-shaped model at 512² in half precision

Exits with 1 if stacking is slower than one by one by more than a tenth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from plait.configuration import configure
from plait.methods import find
from plait_content_shift import examples
from plait_content_shift.content_shift import extract
from plait_content_shift.techniques import Bucket
from torch.utils.flop_counter import FlopCounterMode

SD15 = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}  # diffusers' defaults are its other sizes
BAR = 1.1


def multiplications(call: Callable[[], object]) -> float:
    """In units of 10⁹."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def counted() -> dict[str, float]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
        control = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        latent, text, time_ = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768), torch.tensor(51)
        image = torch.empty(1, 3, 512, 512)
    return {
        "U-Net": multiplications(lambda: unet(latent, time_, text)),
        "ControlNet": multiplications(lambda: control(latent, time_, text, controlnet_cond=image)),
        "VAE encoder": multiplications(lambda: vae.encode(image)),
    }


def table(cost: dict[str, float]) -> None:
    unet, control, vae = cost["U-Net"], cost["ControlNet"], cost["VAE encoder"]
    rows = {
        "plain": unet + vae,
        "4 draws of noise": 4 * unet + vae,
        "ControlNet, one pass": unet + control + vae,
        "ControlNet, denoised from 60 to 50": 12 * (unet + control) + vae,
    }
    print("parts, 10⁹ multiplications: " + ", ".join(f"{name} {value:.0f}" for name, value in cost.items()))
    for name, value in rows.items():
        print(f"{name:<36} {value:>7.0f}   × {value / rows['plain']:.1f}")


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def stacked_against_one_by_one(device: str, draws: int, turns: int) -> float:
    layers = {"layers": ["up-level0-upsampler-out", "up-level1-upsampler-out", "up-level2-repeat1-res-out"]}
    extractor: Any = configure(find("extract_feature", "gdf"), layers)
    backbone, images = examples.model(), torch.rand(2, 3, 16, 16)
    if device == "cuda":
        backbone = _large(device)
        images = torch.rand(1, 3, 512, 512, device=device)
    options: dict[str, Any] = {"rows": range(len(images)), "timestep": 50}

    def together() -> None:
        extract(extractor, backbone, images, Bucket(), seeds=list(range(draws)), **options)

    def apart() -> None:
        for seed in range(draws):
            extract(extractor, backbone, images, Bucket(), seeds=[seed], **options)

    together()
    apart()
    return statistics.median(seconds(apart, device) / seconds(together, device) for _ in range(turns))


def _large(device: str) -> Any:
    from diffusers import DDIMScheduler
    from plait_diffusion import Backbone

    with torch.device(device):
        torch.manual_seed(0)
        parts = {"unet": UNet2DConditionModel(**SD15).half()}
        parts["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).half()  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return Backbone({**parts, "scheduler": scheduler})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    table(counted())
    ratio = stacked_against_one_by_one(arguments.device, arguments.draws, arguments.turns)
    print(
        f"{arguments.draws} draws one by one take {ratio:.2f} times as long as stacked in one pass ({arguments.device})"
    )
    return int(ratio < 1 / BAR)


if __name__ == "__main__":
    sys.exit(main())
