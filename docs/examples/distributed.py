"""Training on several processes inside one step: one on each GPU that the step has, or two on the CPU.

The file is both the method and the program that ``torchrun`` starts several times.
"""

import subprocess
import sys
from pathlib import Path

import attrs
import torch
import torch.distributed as dist
from huggingface_hub import PyTorchModelHubMixin
from plait import hookimpl
from plait.fields import field, in_range
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Line(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)


@attrs.frozen(kw_only=True)
class FitLine:
    """y = a x + b by gradient descent."""

    num_steps: int = field(300, "gradient steps", in_range(1))

    @hookimpl
    def optimize(self, data, run):
        x, y = (torch.tensor(data[name]).float().unsqueeze(1) for name in ("x", "y"))
        task = {"x": x, "y": y, "seed": run.derived_seed(), "num_steps": self.num_steps}
        torch.save(task, run.folder / "task.pt")
        processes = torch.cuda.device_count() or 2
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run([*torchrun, __file__, str(run.folder)], check=True)
        model = Line()
        model.load_state_dict(torch.load(run.folder / "model.pt", weights_only=True))
        return model


def train(folder: Path) -> None:
    """What every process does; the first one writes the result."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    task = torch.load(folder / "task.pt", weights_only=True)
    torch.manual_seed(task["seed"])
    model = DistributedDataParallel(Line().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = task["x"][rank::world_size].to(device), task["y"][rank::world_size].to(device)
    for _ in range(task["num_steps"]):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()  # the gradients are averaged over the processes
        optimizer.step()
    if rank == 0:
        torch.save(model.module.state_dict(), folder / "model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
