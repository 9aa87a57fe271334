"""What every speed-up is: something that is put on the layers it applies to, and taken off again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn


class Switch(Protocol):
    """One speed-up. It keeps what it replaces, so that ``take_off`` gives a layer back as it was."""

    def applies(self, layer: nn.Module) -> bool:
        """Whether ``layer``, not optimized yet, is one that this switch is for."""

    def put_on(self, layer: nn.Module) -> None:
        """Make ``layer`` fast, in place."""

    def take_off(self, layer: nn.Module) -> None:
        """Undo :meth:`put_on`, bit for bit."""


def put_on(switch: Switch, parts: Iterable[nn.Module]) -> list[nn.Module]:
    """Put ``switch`` on every layer of ``parts`` that it applies to; which they were."""
    layers = [layer for part in parts for layer in part.modules() if switch.applies(layer)]
    for layer in layers:
        switch.put_on(layer)
    return layers
