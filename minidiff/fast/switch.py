"""Base classes of the speed-ups: a switch is put on the layers that it applies to, and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from minidiff.models.replacement import Replacement

OFF, ON = "off", "on"  # ways of a trial of a switch


class Switch(Protocol):
    """Base class of the speed-ups. A switch keeps what it replaces, so that ``take_off`` can restore a layer."""

    device: ClassVar[str | None] = None  # type of device that it is for; None: all
    tried: ClassVar[str | None] = None  # name of the trial that decides whether the processor gains by it

    def fit(self, choice: Mapping[str, str]) -> Switch | None:
        """Return the switch for a processor on which ``choice`` is the fastest; None if it does not gain there."""
        return None if choice.get(self.tried or "") == OFF else self

    def applies(self, layer: nn.Module) -> bool:
        """Return True if ``layer``, not optimized yet, is one that this switch is for."""

    def put_on(self, layer: nn.Module) -> None:
        """Make ``layer`` fast, in place."""

    def take_off(self, layer: nn.Module) -> None:
        """Undo :meth:`put_on`, bit for bit, even if it was interrupted. Calling it twice is harmless."""


def put_on(switch: Switch, parts: Iterable[nn.Module], layers: list[nn.Module] | None = None) -> list[nn.Module]:
    """Put ``switch`` on every layer of ``parts`` that it applies to, and return these layers.

    They are added to ``layers`` before anything is changed.
    """
    layers = [] if layers is None else layers
    found = [layer for part in parts for layer in part.modules() if switch.applies(layer)]
    layers += found
    for layer in found:
        switch.put_on(layer)
    return layers


class ForwardFunction(Replacement):
    """Replacement of a layer's ``forward`` by another function of the layer."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        super().__init__(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(self.layer, *args, **kwargs)


class ForwardSwitch(Switch):
    """Base class of switches that give each layer another ``forward``: a function, which does not call the original."""

    forward: ClassVar[Callable[..., Tensor]]  # a staticmethod: it is bound to the layer, not to the switch

    def put_on(self, layer: nn.Module) -> None:
        ForwardFunction(layer, self.forward)

    def take_off(self, layer: nn.Module) -> None:
        ForwardFunction.take_off(layer)


class MethodSwitch(Switch):
    """Base class of switches that put a ``replacement`` on each layer's ``method``, which can call the original."""

    replacement: ClassVar[type[Replacement]]
    method: ClassVar[str] = "forward"

    def put_on(self, layer: nn.Module) -> None:
        self.replacement(layer, self.method)

    def take_off(self, layer: nn.Module) -> None:
        self.replacement.take_off(layer, self.method)
