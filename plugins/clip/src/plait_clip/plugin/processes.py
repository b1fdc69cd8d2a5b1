"""Training in several processes of one machine, each with its share of every batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from plait.context import Run
from plait.loops import Loop

from plait_clip.model import CallableModel, ImageTextModel
from plait_clip.pair_batches import PairLoader
from plait_clip.training import DivergedError, train_contrastively


def train_in_processes(method: Any, model: ImageTextModel, data: Any, run: Any, loop: Loop) -> None:
    """Train ``model`` in place as ``method`` says, in ``method.num_processes`` processes.

    Raises:
        ValueError: there are fewer GPUs than processes.
        RuntimeError: a process failed.
        DivergedError: a loss was not finite; the model holds its last good weights.
    """
    device = run.device.type
    if device == "cuda" and torch.cuda.device_count() < method.num_processes:
        raise ValueError(f"num_processes is {method.num_processes}, but there are {torch.cuda.device_count()} GPUs")
    folder = loop.folder / "processes"
    model.save_pretrained(folder / "start")
    context = torch.multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    job = (method, data, folder, frozen, run.seed, run.step, device, _free_port(), messages)
    workers = torch.multiprocessing.spawn(_work, job, nprocs=method.num_processes, join=False)
    diverged: DivergedError | None = None

    def drain() -> None:
        nonlocal diverged
        while not messages.empty():
            kind, *content = messages.get()
            if kind == "step":
                loop.done(*content)
            elif kind == "warning":
                run.warn(content[0])
            else:
                diverged = DivergedError(*content)

    try:
        while not workers.join(timeout=0.2):
            drain()
    except Exception as error:
        drain()
        last = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"a training process failed: {last}") from error
    drain()
    model.load_state_dict(torch.load(folder / "result.pt", map_location=run.device, weights_only=True))
    if diverged is not None:
        raise diverged


def _work(
    rank: int,
    method: Any,
    data: Any,
    folder: Path,
    frozen: Collection[str],
    seed: int,
    step: str,
    device: str,
    port: int,
    messages: Any,
) -> None:
    """What one process does."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(method.num_processes),
    }
    from accelerate import Accelerator, DistributedDataParallelKwargs

    model = ImageTextModel.from_pretrained(folder / "start")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    both_towers_only = model.kind == "contrastive" and not isinstance(model, CallableModel)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=not both_towers_only)]
    accelerator = Accelerator(cpu=device != "cuda", kwargs_handlers=handlers)
    model = model.to(accelerator.device)
    main = accelerator.is_main_process
    run = Run(
        seed=seed,
        step=step,
        on_warning=lambda text: messages.put(("warning", text)) if main else None,
    )
    share = int(method.held_gigabytes * 2**30 / method.num_processes)
    pairs = PairLoader(data, model, held_bytes=share, workers=method.workers)
    try:
        train_contrastively(
            model,
            pairs,
            method.options(),
            generator=run.generator,
            seed=run.derived_seed("model"),
            checkpoint=Loop(run, "training", folder.parent, None),
            on_step=lambda step, values: messages.put(("step", step, values)) if main else None,
            warn=run.warn,
            accelerator=accelerator,
        )
    except DivergedError as error:
        if main:
            messages.put(("diverged", error.step, error.loss, error.restored_step))
    if main:
        torch.save(model.state_dict(), folder / "result.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
