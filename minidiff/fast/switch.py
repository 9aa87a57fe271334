"""What every speed-up is: something that is put on the layers it applies to, and taken off again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn


class Switch(Protocol):
    """One speed-up. It keeps what it replaces, so that ``take_off`` gives a layer back as it was."""

    device: ClassVar[str | None] = None  # the kind that it is for; None: every one

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


class Around(ABC):
    """What stands in for a method of a layer, ``forward`` or another, and calls it: ``inner``, which may already be
    another of this kind."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.layer = layer
        self.inner = getattr(layer, name)
        self.before = layer.__dict__.get(name)
        layer.__dict__[name] = self

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is done in place of the method."""

    @classmethod
    def take_off(cls, layer: nn.Module, name: str = "forward") -> None:
        """Leave ``layer`` as it was without the one of this class, whatever was put around that since."""
        above, this = None, layer.__dict__[name]
        while not isinstance(this, cls):
            above, this = this, this.before
        if above is not None:
            above.before, above.inner = this.before, this.inner
        elif this.before is not None:
            layer.__dict__[name] = this.before
        else:
            del layer.__dict__[name]


class Instead(Switch):
    """A switch that gives each layer another ``forward``, which calls nothing of its own one."""

    forward: ClassVar[Callable[..., Tensor]]  # a staticmethod: it is bound to the layer, not to the switch

    def put_on(self, layer: nn.Module) -> None:
        layer.forward = MethodType(self.forward, layer)

    def take_off(self, layer: nn.Module) -> None:
        del layer.__dict__["forward"]


class Wrapping(Switch):
    """A switch that puts one ``around`` each layer's ``method``, and takes it away again."""

    around: ClassVar[type[Around]]
    method: ClassVar[str] = "forward"

    def put_on(self, layer: nn.Module) -> None:
        self.around(layer, self.method)

    def take_off(self, layer: nn.Module) -> None:
        self.around.take_off(layer, self.method)
