"""Interface of a run to its processes, for a single one; distributed.py implements it for several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Alone:
    """Single process that does everything."""

    rank = 0
    count = 1

    @property
    def main(self) -> bool:
        """True if this process writes files and prints."""
        return self.rank == 0

    def wrap(self, task: nn.Module) -> nn.Module:
        """Return the module to call in place of ``task`` so that gradients are equal in all processes."""
        return task

    def quiet(self, task: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return a context for one part of a batch: gradients need to be exchanged only after the ``last`` one."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """Average a scalar over the processes."""
        return value

    def any(self, value: bool) -> bool:
        """Return True if ``value`` is true in any process, so that all take the same decision."""
        return value

    def same(self, value: T) -> T:
        """Return the first process's ``value``, in all of them."""
        return value

    def gathered(self, value: T) -> list[T]:
        """Return the ``value`` of every process, in all of them."""
        return [value]

    def whole(self, tensor: Tensor) -> Tensor:
        """Assemble a tensor of which each process has a slice, in all of them."""
        return tensor

    def wait(self) -> None:
        """Wait until every process has called this."""

    def leave(self) -> None:
        """Leave the process group at the end."""
