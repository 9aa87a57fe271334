"""Interface of the training loop to its processes, for a single one; distributed.py implements it for several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Alone:
    """One process does everything."""

    rank = 0
    count = 1

    @property
    def main(self) -> bool:
        """True if this process writes files and prints."""
        return self.rank == 0

    def wrap(self, task: nn.Module) -> nn.Module:
        """Return the module to call in place of ``task``, so that gradients are equal in all processes."""
        return task

    def quiet(self, task: nn.Module, last: bool) -> AbstractContextManager[None]:
        """A context for one part of a batch: gradients need to be exchanged after the ``last`` one only."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """A scalar, averaged over the processes."""
        return value

    def any(self, value: bool) -> bool:
        """Return True if it is so in any process: what all of them must do together, all must know."""
        return value

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process has a slice, put together in all of them."""
        return tensor

    def wait(self) -> None:
        """Return when every process has come this far."""

    def leave(self) -> None:
        """Part from the others, at the end."""
