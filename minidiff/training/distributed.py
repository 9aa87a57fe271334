"""Training on several processes: `torchrun` starts the same command in each, and they exchange gradients.

With replicas (DistributedDataParallel, Li et al. 2020) every process has the whole model and takes its share of each
batch; then the gradients are averaged. Because an example's noise depends on its number, the shares together are the
batch that a single process would have seen.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.training.ranks import Alone
from minidiff.training.task import Task

T = TypeVar("T")


def started_by_torchrun() -> bool:
    """Return True if torchrun started this process, alone or as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def is_main() -> bool:
    """Return True if this process writes files and prints; works before it has joined the others."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process if all are to use ``device``: each takes a GPU of its own."""
    if device.type != "cuda" or not started_by_torchrun():
        return device
    place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    check(place < there, f"process {place} has no GPU of its own: there are {there}; start fewer processes")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


class Replicas(Alone):
    """Replicas of the model, one in every process. Joins the process group when created.

    ``patience``: longest time that one waits for another; None is torch's own.
    """

    def __init__(self, device: torch.device, patience: timedelta | None = None) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def wrap(self, task: nn.Module) -> nn.Module:
        """Wrap ``task`` so that gradients are averaged during its backward pass."""
        from torch.nn.parallel import DistributedDataParallel

        assert isinstance(task, Task)
        # A text encoder has weights that no loss reaches, if its last layer or its projection is not read: do not wait
        # for their gradients.
        config = task.pipe.config
        text = config.text_encoder if "text_encoder" in task.settings.parts else None
        unused = text is not None and (config.text_layer != "last" or text.projection is not None)
        return DistributedDataParallel(task, find_unused_parameters=unused)

    def quiet(self, task: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Add up gradients locally for all parts of a batch but the last: one exchange per step."""
        from torch.nn.parallel import DistributedDataParallel

        assert isinstance(task, DistributedDataParallel)
        return nullcontext() if last else task.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """Average a scalar over the processes."""
        import torch.distributed as dist

        value = value / self.count  # gloo adds, but does not average
        dist.all_reduce(value)
        return value

    def any(self, value: bool) -> bool:
        """Return True if ``value`` is true in any process, so that all take the same decision."""
        import torch.distributed as dist

        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        told = torch.tensor(float(value), device=where)
        dist.all_reduce(told)
        return bool(told > 0)

    def same(self, value: T) -> T:
        """Return the first process's ``value``, in all of them."""
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told)
        return told[0]

    def gathered(self, value: T) -> list[T]:
        """Return the ``value`` of every process, in all of them."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until every process has called this."""
        import torch.distributed as dist

        dist.barrier()

    def leave(self) -> None:
        """Leave the process group at the end."""
        import torch.distributed as dist

        dist.destroy_process_group()
