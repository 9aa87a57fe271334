"""Several processes as one: `torchrun` starts the same command on each, and they meet after every backward pass.

With replicas (DistributedDataParallel, Li et al. 2020) every process has the whole model and takes its share of each
batch; then the gradients are averaged. Because an example's noise belongs to its number, the shares together are just
the batch that a single process would have seen.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.training.ranks import Alone
from minidiff.training.task import Task


def started_by_torchrun() -> bool:
    """Return True if this process is one of several, or was started as if it were."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def is_main() -> bool:
    """Return True if this process writes files and prints; known before it has joined the others."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def local_device(device: torch.device) -> torch.device:
    """The device of this process where all were told ``device``: each takes a GPU of its own."""
    if device.type != "cuda" or not started_by_torchrun():
        return device
    place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    check(place < there, f"process {place} has no GPU of its own: there are {there}; start fewer processes")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


class Replicas(Alone):
    """A replica of the model in every process. Joins the others when made."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def wrap(self, task: nn.Module) -> nn.Module:
        """``task``, with gradients averaged during its backward pass."""
        from torch.nn.parallel import DistributedDataParallel

        assert isinstance(task, Task)
        # A text encoder has weights that no loss reaches where its last layer is not read, or its projection is there
        # for other families: their gradients must not be waited for.
        config = task.pipe.config
        text = config.text_encoder if "text_encoder" in task.settings.parts else None
        unused = text is not None and (config.text_layer != "last" or text.projection is not None)
        return DistributedDataParallel(task, find_unused_parameters=unused)

    def quiet(self, task: nn.Module, last: bool) -> AbstractContextManager[None]:
        """All parts of a batch but the last are added up at home: one exchange a step, however many parts."""
        from torch.nn.parallel import DistributedDataParallel

        assert isinstance(task, DistributedDataParallel)
        return nullcontext() if last else task.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """A scalar, averaged over the processes."""
        import torch.distributed as dist

        value = value / self.count  # gloo adds, but does not average
        dist.all_reduce(value)
        return value

    def any(self, value: bool) -> bool:
        """Return True if it is so in any process: what all of them must do together, all must know."""
        import torch.distributed as dist

        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        told = torch.tensor(float(value), device=where)
        dist.all_reduce(told)
        return bool(told > 0)

    def wait(self) -> None:
        """Return when every process has come this far."""
        import torch.distributed as dist

        dist.barrier()

    def leave(self) -> None:
        """Part from the others, at the end."""
        import torch.distributed as dist

        dist.destroy_process_group()
