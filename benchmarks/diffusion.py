"""Cost of diffusion features: the recommended set against a full pass that keeps all activations.

    python benchmarks/diffusion.py [--width 4 --size 256 --batch 1] [--full-size --shape sdxl --device cuda]

Random models of the shape of SD 1.5 or SDXL, 1/width as wide and at a smaller image by default, so that a core has done in a
minute; --full-size takes the model's own width and image. Ratios compare what ran in this one process, on the processor's time
where it is a CPU. Peak memory is that of a process of its own for each variant. Multiplications are counted on the meta
device, at the model's own width and image, whatever was timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from plait_diffusion import Backbone, capture, official_ids, resolve
from plait_diffusion.backbone import quiet_diffusers
from plait_diffusion.families import empty_condition
from plait_gdf.gdf import PRESETS, Extraction, gdf, layers_of
from torch.utils.flop_counter import FlopCounterMode

SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        "channels": (320, 640, 1280, 1280),
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "size": 512,
    },
    "sdxl": {
        "channels": (320, 640, 1280),
        "unet": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "size": 1024,
    },
}


def make_unet(shape: str, width: int) -> Any:
    facts = SHAPES[shape]
    channels = tuple(count // width for count in facts["channels"])
    return diffusers.UNet2DConditionModel(
        block_out_channels=channels, norm_num_groups=max(1, 32 // width), **facts["unet"]
    )


def make_vae(width: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=tuple(count // width for count in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=max(1, 32 // width),
    )


def make_backbone(shape: str, width: int, device: str, dtype: torch.dtype) -> Backbone:
    """A random latent model: U-Net, scheduler and VAE; its condition is of zeros."""
    torch.manual_seed(0)
    with torch.device(device), quiet_diffusers():
        unet = make_unet(shape, width).to(dtype)
        vae = make_vae(width).to(dtype)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return Backbone({"unet": unet, "vae": vae, "scheduler": scheduler}, name=shape)


def seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    """Time of the fastest of several runs, of the processor or of the GPU."""
    times = []
    for _ in range(repeats + 1):
        if device == "cpu":
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        else:
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one also warms up


def extractions(backbone: Backbone, shape: str, size: int) -> dict[str, Extraction]:
    every = layers_of("all", backbone.denoiser)
    return {
        "all activations": Extraction(layers=every, image_size=size, early_exit=False),
        "recommended": Extraction(layers=PRESETS[shape], image_size=size, early_exit=False),
        "recommended, early exit": Extraction(layers=PRESETS[shape], image_size=size),
    }


def peak(options: argparse.Namespace, variant: str) -> float:
    """GiB that a pass of one variant adds to a process that has the model, in a process of its own."""
    arguments = [sys.executable, __file__, "--memory-of", variant, *sys.argv[1:]]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory_of(options: argparse.Namespace) -> None:
    """Print how many GiB a pass of one variant adds to what the process holds before it."""
    backbone, images, size = prepared(options)
    extraction = extractions(backbone, options.shape, size)[options.memory_of]
    latents = torch.zeros(len(images), 4, size // 8, size // 8, device=options.device, dtype=backbone.dtype)
    call = extraction.prepare(backbone, images, rows=range(len(images)), seed=0, latents=latents)
    if options.device == "cpu":
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        kept = extraction.capture(backbone, call)
        added = resident("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        kept = extraction.capture(backbone, call)
        added = (torch.cuda.max_memory_allocated() - allocated) / 2**30
    assert kept
    print(added)


def resident(field: str) -> float:
    """Memory of this process, GiB, as Linux tells it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def prepared(options: argparse.Namespace) -> tuple[Backbone, torch.Tensor, int]:
    width = 1 if options.full_size else options.width
    size = SHAPES[options.shape]["size"] if options.full_size else options.size
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    backbone = make_backbone(options.shape, width, options.device, dtype)
    images = torch.rand(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return backbone, images, size


def counted(shape: str, layers: tuple[str, ...] | None) -> float:
    """GMAC of a pass over one image at full size, up to the last of ``layers`` or to the end."""
    with torch.device("meta"):
        unet = make_unet(shape, 1).eval()
        sample = torch.empty(1, 4, SHAPES[shape]["size"] // 8, SHAPES[shape]["size"] // 8)
        condition = empty_condition(unet, SHAPES[shape]["size"], "meta", torch.float32)
    taps = resolve(unet, layers) if layers else [official_ids(unet)["unet-out"]]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        capture(unet, taps, sample, 50.0, condition)
    return counter.get_total_flops() / 2e9


def counted_encoder(shape: str) -> float:
    """GMAC of the VAE's encoder for one image at full size."""
    size = SHAPES[shape]["size"]
    with torch.device("meta"):
        vae, image = make_vae(1).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(image)
    return counter.get_total_flops() / 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--buckets", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.memory_of:
        memory_of(options)
        return
    backbone, images, size = prepared(options)
    variants = extractions(backbone, options.shape, size)
    rows = range(len(images))
    print(
        f"{options.shape}, {size}², batch {len(images)}, {str(backbone.dtype).removeprefix('torch.')}, {options.device}"
    )

    call = variants["all activations"].prepare(backbone, images, rows=rows, seed=0)
    took = {
        name: seconds(lambda one=one: one.capture(backbone, call), options.repeats, options.device)
        for name, one in variants.items()
    }
    memory = {name: peak(options, name) for name in variants}
    base = "all activations"
    print(
        f"\n{'pass of the denoiser':28}{'time':>8}{'memory':>9}   (ratios to all {len(variants[base].layers)} activations)"
    )
    for name in variants:
        print(f"{name:28}{took[name] / took[base]:8.2f}{memory[name] / memory[base]:9.2f}")
    print(f"{'':28}{'':8}{memory[base]:8.2f} GiB for all activations")

    fast = variants["recommended, early exit"]
    with tempfile.TemporaryDirectory() as folder:
        cached = Extraction(layers=fast.layers, image_size=size, cache=folder)
        gdf(backbone, images, extraction=cached)
        whole = seconds(lambda: gdf(backbone, images, extraction=fast), options.repeats, options.device)
        again = seconds(lambda: gdf(backbone, images, extraction=cached), options.repeats, options.device)
    print(f"\nfrom pixels to features: cached VAE moments take {again / whole:.2f} of the time of encoding anew")

    several = images.repeat(options.buckets, 1, 1, 1)
    calls = [fast.prepare(backbone, images, rows=rows, seed=seed) for seed in range(options.buckets)]
    stacked = fast.prepare(backbone, several, rows=range(len(several)), seed=0)
    one_by_one = seconds(lambda: [fast.capture(backbone, call) for call in calls], options.repeats, options.device)
    at_once = seconds(lambda: fast.capture(backbone, stacked), options.repeats, options.device)
    print(f"{options.buckets} buckets in one batch take {at_once / one_by_one:.2f} of the time of one by one")

    print("\nmultiplications for one image at full size, GMAC")
    for shape in SHAPES:
        total, recommended = counted(shape, None), counted(shape, PRESETS[shape])
        print(
            f"{shape:6} whole pass {total:7.0f}   up to the last recommended {recommended:7.0f}   {recommended / total:.2f}"
        )


if __name__ == "__main__":
    main()
