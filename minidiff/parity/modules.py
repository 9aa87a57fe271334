"""Comparison of any two modules through a mapping of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.parity.engine import find
from minidiff.parity.names import checked, with_blocks
from minidiff.parity.report import OUTPUT, Report
from minidiff.parity.taps import Probe, Tap, in_float64, swap_first

ModuleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


def compare(
    module_a: nn.Module,
    module_b: nn.Module,
    inputs: ModuleInputs,
    names: Mapping[str, str] | None = None,
    *,
    inputs_b: ModuleInputs | None = None,
    tolerance: float = 0.0,
    judge: bool = True,
) -> Report:
    """Run both modules on the same ``inputs`` and find the first difference.

    ``inputs``: one tensor, a sequence of positional arguments, or a mapping of keyword arguments; ``inputs_b`` the
    same for ``module_b``, if it is called in another way. ``names``: module's name in ``module_a`` -> its name in
    ``module_b``; leaves are enough, blocks are paired by the leaves they contain. None: the names that both have.
    ``tolerance``: largest allowed |a - b| of a stage relative to its largest |a|; 0 requires equal values. ``judge``:
    if they differ, run both again in float64, to distinguish rounding from another function.

    Both run in their current mode (eval or train), without gradients, from the same state of the global generator, and
    are unchanged afterwards. While ``judge`` has them in float64, no other thread should use them. Raises
    :class:`ConfigError` for a name that is in neither.
    """
    pairs = with_blocks(module_a, module_b, checked(module_a, module_b, names))
    a = Alone(module_a, inputs, {x: x for x in pairs}, type(module_a).__name__)
    b_inputs = inputs if inputs_b is None else inputs_b
    b = Alone(module_b, b_inputs, {y: x for x, y in pairs.items()}, type(module_b).__name__)
    rows, only_a, only_b = find(a, b, tolerance, judge=judge)
    return Report(a.title, b.title, rows, tolerance, only_a, only_b)


@dataclass
class Alone:
    """A module and its inputs as a side."""

    module: nn.Module
    inputs: ModuleInputs
    names: Mapping[str, str]
    title: str
    dtype: torch.dtype | None = None

    @torch.no_grad()
    def run(self, tap: Tap) -> None:
        """Call the module once."""
        probe = Probe(tap)
        args, kwargs = _arguments(_copied(self.inputs, _widest(self.module)))
        with torch.random.fork_rng(), probe.watch(self.module, self.names):
            out = self.module(*args, **kwargs)
        swap_first(out, lambda x: probe.show(OUTPUT, x))

    def wide(self) -> AbstractContextManager[None]:
        """Return a context in which the module and its inputs are in float64."""
        return in_float64([self.module])


def _widest(module: nn.Module) -> bool:
    """Return True if a module is currently in float64."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return weight is not None and weight.dtype == torch.float64


def _arguments(inputs: ModuleInputs) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return ((inputs,) if isinstance(inputs, Tensor) else inputs), {}


def _copied(value: Any, wide: bool) -> Any:
    """Return ``value`` with all tensors copied (a module may write to its inputs), as float64 if ``wide``."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64 if wide and value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(entry, wide) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [_copied(entry, wide) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value
