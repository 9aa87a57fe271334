"""Replacements for a method of a layer, set from outside and removed again.

Several threads may use one model. Therefore anything kept between calls is computed by one thread while the others wait
(``PREPARING``), and published when complete; nothing that belongs to a single call is stored where another could see
it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

from torch import nn

from minidiff.errors import ConfigError

PREPARING = threading.RLock()  # held while something is derived from a weight, which is done once
CHANGED = (
    "this model is changed for speed or memory (fast.optimize, approximate, tiled, offload, or low_memory=True), and "
    "can't be copied or pickled so; fast.restore it, or load it whole, or copy its state_dict"
)


class Replacement(ABC):
    """Replacement for a method of a layer, ``forward`` or another, that can call the original as ``inner``.

    ``inner`` may itself be a replacement.
    """

    outermost: ClassVar[bool] = False  # later replacements go inside this one

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.layer = layer
        self.before: Any = layer.__dict__.get(name)
        self.inner = getattr(layer, name)
        above = self.before
        if isinstance(above, Replacement) and above.outermost:
            self.inner, self.before = above.inner, above.before
            above.inner = self
            above.before = self
        else:
            layer.__dict__[name] = self

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute in place of the method."""

    def forget(self) -> None:
        """Discard anything derived from the weight, which is about to change."""
        forget = getattr(self.before, "forget", None)
        if forget is not None:
            forget()

    def undo(self) -> None:  # noqa: B027  (does nothing unless a class has something to undo)
        """Undo all other changes to the layer. Calling it twice is harmless."""

    @classmethod
    def take_off(cls, layer: nn.Module, name: str = "forward") -> None:
        """Remove the replacement of this class from ``layer``, keeping those that were added later, if there is one."""
        above, this = None, layer.__dict__.get(name)
        while this is not None and not isinstance(this, cls):
            above, this = this, getattr(this, "before", None)
        if this is None:
            return
        this.undo()
        if above is not None:
            above.inner = this.inner
            above.before = this.before  # last, so that a repeated removal still finds it
        elif this.before is not None:
            layer.__dict__[name] = this.before
        else:
            del layer.__dict__[name]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError(CHANGED)
