"""Low-memory mode: the parts of a model take turns in memory, each only while it is in use.

A picture is made in three turns: text encoder, UNet, VAE. None of them needs the weights of another, so memory must
hold only the largest of them. An unused part keeps its modules, and each weight is replaced by a single NaN expanded to
the weight's shape. It takes no memory, carries device and dtype, and makes accidental use visible.

The caller defines the source of the weights: they are read from the mapped file (``load(..., low_memory=True)``), or
copied from the host to a small card (:mod:`minidiff.fast.offload`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.errors import ConfigError
from minidiff.models.replacement import Replacement

Weights = Mapping[str, Callable[[], Tensor]]


class Slot:
    """Place of one weight in its layer, and a function that loads it."""

    def __init__(self, layer: nn.Module, name: str, fetch: Callable[[], Tensor], device: torch.device) -> None:
        self.layer, self.name, self.fetch = layer, name, fetch
        self.original = layer.get_parameter(name)
        self.rest = torch.full((), float("nan"), dtype=self.original.dtype, device=device).expand(self.original.shape)
        self.here = False

    def put(self, value: Tensor) -> None:
        """Set the weight. Only the layer holds it, so its memory is free as soon as a switch puts another (packed)."""
        self.here = True
        setattr(self.layer, self.name, nn.Parameter(value, requires_grad=False))
        self.here = value is not self.rest


class LoadFirst(Replacement):
    """Method of a part (``forward``, ``state_dict``) that loads the part's weights and keeps them until it returns."""

    outermost = True

    def __init__(self, layer: nn.Module, name: str, low_memory: LowMemory, group: str) -> None:
        self.low_memory, self.group = low_memory, group
        super().__init__(layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.low_memory.working:
            self.low_memory.load(self.group)
            return self.inner(*args, **kwargs)


class LowMemory:
    """Parts of a model that take turns on ``device``: calling a part loads its weights and frees those of the others.

    ``weights`` loads each by its name, "part.parameter", on ``device``, and may be called repeatedly; shapes and dtypes
    are those of the current parameters of ``parts``. The text encoders of SDXL are one group. Only one thread works at
    a time, since there is memory for one part.
    """

    def __init__(self, parts: Mapping[str, nn.Module], weights: Weights, device: torch.device) -> None:
        self.device = device
        self.now: str | None = None
        self.working = threading.RLock()
        self.slots: dict[str, list[Slot]] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.methods: list[tuple[nn.Module, str, str]] = []
        for name, part in parts.items():
            group = name.removesuffix("_2")
            self.slots.setdefault(group, []).extend(
                Slot(
                    part.get_submodule(path.rpartition(".")[0]),
                    path.rpartition(".")[2],
                    weights[f"{name}.{path}"],
                    device,
                )
                for path, _ in part.named_parameters()
            )
            for layer in part.modules():  # one or two tables that follow from the config: they stay
                self.buffers += [(layer, key, buffer) for key, buffer in layer.named_buffers(recurse=False)]
            # A VAE is not called itself, but its encoder, its decoder and the convolutions beside them are.
            self.methods += [(entrance, "forward", group) for entrance in (part, *part.children())]
            self.methods.append((part, "state_dict", group))

    def install(self) -> None:
        """Free the weights of every part. If an error is raised, :meth:`remove` undoes it."""
        for layer, key, buffer in self.buffers:
            setattr(layer, key, buffer.to(self.device))
        for layer, method, group in self.methods:
            LoadFirst(layer, method, self, group)
        for slot in self._all():
            slot.put(slot.rest)

    def load(self, group: str) -> None:
        """Load the parts of ``group``, and free those of another."""
        if group == self.now:
            return
        self.free()
        for slot in self.slots[group]:
            slot.put(slot.fetch())
        self.now = group

    def free(self) -> None:
        """Free the weights in memory, as soon as no thread works with them."""
        with self.working:
            self.now = None
            for slot in self._all():
                if slot.here:
                    slot.put(slot.rest)
                    # A replacement of a layer's forward (minidiff.fast) may have derived something from its weight.
                    forget = getattr(slot.layer.__dict__.get("forward"), "forget", None)
                    if forget is not None:
                        forget()

    def remove(self) -> None:
        """Restore the parameters of every part. Calling it twice is harmless."""
        for layer, method, _ in self.methods:
            LoadFirst.take_off(layer, method)
        for slot in self._all():
            setattr(slot.layer, slot.name, slot.original)
        for layer, key, buffer in self.buffers:
            setattr(layer, key, buffer)

    def _all(self) -> list[Slot]:
        return [slot for slots in self.slots.values() for slot in slots]


def check_present(weight: Tensor, what: str) -> None:
    """Raise :class:`ConfigError` if ``weight`` belongs to a part that is not in memory, as ``what`` requires."""
    if weight.layout == torch.strided and weight.numel() > 1 and not any(weight.stride()):
        raise ConfigError(
            f"{what} needs the whole model in memory, and its parts take turns there; load it without low_memory, or "
            "call fast.restore first"
        )
