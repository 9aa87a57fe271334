"""A model on a device: its parts by name with their config, and what has been done to them from outside."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minidiff.config import ControlConfig, ModelConfig, check
from minidiff.pipeline import assembly
from minidiff.precision import apply_policy
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy, lazy
from minidiff.storage.identity import identify
from minidiff.storage.low_memory import LowMemory

Own = TypeVar("Own", bound="Model")  # typing.Self needs Python 3.11


class Parts(dict[str, nn.Module]):
    """A model's parts by name, and the adapters that bend them: (file, strength, hash) each, for the recipe."""

    adapters: tuple[tuple[str, float, str], ...] = ()


class Model(ABC):
    """Base class of all that is loaded: pipelines, and the controls beside them."""

    config: ModelConfig | ControlConfig

    def __init__(self, config: Any, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        """Initialize from ``parts`` by name, as :func:`checkpoint.build` returns them; ``hash``: that of their file."""
        for part in parts.values():
            part.requires_grad_(False)  # training enables it where needed
        self.config = config
        self.parts = Parts(parts)
        self.hash = hash
        self.name = ""  # of the file or folder that it came from, for recipes and messages
        self.source = ""  # identity of the checkpoint that the weights came from, as long as they are unchanged
        self.fast: tuple[str, ...] = ()  # active speed-ups (minidiff.fast), for the recipe
        self.kernels: dict[str, str] = {}  # what "many_keys" chose on this processor
        self.approximations: dict[str, Any] = {}  # active approximations, which change the result
        self.mapped = False  # the weights lie in the file that they came from
        self.low_memory: LowMemory | None = None  # set if the parts take turns in memory
        apply_policy(config, parts)

    @classmethod
    def load(
        cls: type[Own],
        path: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        low_memory: bool = False,
        copy: bool = False,
    ) -> Own:
        """Open a minidiff file as :func:`minidiff.load` does. Raises :class:`CheckpointError`, also for a model of
        another kind: with text, without, or a control."""
        return assembly.open_file(path, cls._own, device, dtype, low_memory, copy)

    @classmethod
    @abstractmethod
    def _own(cls: type[Own], config: ModelConfig | ControlConfig, source: str) -> type[Own]:
        """Return this class for a config of its kind. Raises :class:`CheckpointError` for another."""

    @property
    def _weight(self) -> Tensor:
        """A weight that has the model's device and dtype."""
        return next(p for part in self.parts.values() for p in part.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the model, for a pipeline that of its UNet."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model computes, for a pipeline that of its UNet."""
        return self._weight.dtype

    @property
    def identity(self) -> str:
        """Identity of the model in recipes (``identity.py``): that of its checkpoint, or that of the weights in memory
        if they came from no checkpoint or have been trained since."""
        return self.source or identify(self.config, self._tensors())

    def _tensors(self) -> dict[str, Lazy]:
        return {f"{n}.{k}": lazy(t) for n, part in self.parts.items() for k, t in part.state_dict().items()}

    def to(self: Own, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Own:
        """Move and convert every part in place. Modules that overflow in float16 stay in float32 (``precision.py``).

        Raises :class:`ConfigError` if the parts take turns in memory (``low_memory``).
        """
        check(
            self.low_memory is None,
            f"the parts of this model take turns on {self.device}, in {self.dtype}: that is final",
        )
        for part in self.parts.values():
            part.to(device=device, dtype=dtype)
        apply_policy(self.config, self.parts)
        self.mapped = False
        return self

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the model to one minidiff file and return its content hash. Raises :class:`CheckpointError`."""
        self.hash = checkpoint.write_checkpoint(path, self.config, self._tensors())
        return self.hash

    def _sizes(self) -> str:
        """Return the parts with their numbers of parameters, dtype and device, for ``repr``."""
        sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()}
        parts = ", ".join(f"{name} {count / 1e6:.4g} M" for name, count in sizes.items())
        return f"parts (parameters): {parts}; {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def _done(self) -> list[str]:
        """Return what has been done to the parts from outside, for ``repr``."""
        lines = ["low memory: the parts take turns"] if self.low_memory is not None else []
        lines += [f"fast: {', '.join(self.fast)}"] if self.fast else []
        if self.approximations:
            lines.append(f"approximate: {', '.join(f'{k}={v}' for k, v in self.approximations.items())}")
        return lines
