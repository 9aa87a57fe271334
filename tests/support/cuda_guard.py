"""A guard that finds, without a GPU, what a CUDA device would refuse or wait for.

Torch's ``FakeTensorMode`` runs a program on tensors without data that claim to live on a card, and raises where a host
tensor of rank 1 or more meets one of them. In places it is laxer than a card, and it says nothing about waiting.
:class:`CudaGuard` goes on top of it, or on top of a real card, and looks at every operator that reaches the dispatcher:

* floating tensors of different dtypes, rank above 0: matrix products and convolutions refuse them, sums silently widen;
* a value asked for on the host (``.item()``, ``bool()``, an index of unknown length): the host waits for the card;
* a copy between host and card, while ``loop`` is set: the host waits again;
* a 0-dim host tensor anywhere but in plain arithmetic, the one place where a card takes it (as a kernel argument);
* a host table indexed on the card, or the other way round;
* random numbers drawn on one device by a generator of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = "cuda"
NO_CARD = "no CUDA card in this machine; where there is one, `pytest -m cuda` runs this test on it"
ON_A_CARD = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CARD)]


def fake_card() -> FakeTensorMode:
    """A card made of nothing. Torch 2.6, the oldest that minidiff runs on, can't do that and asks for a real one."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip("FakeTensorMode of torch 2.6 asks for a real card; newer releases run this test without one")
    return FakeTensorMode(allow_non_fake_inputs=True)


COPIES = {"_to_copy", "copy", "copy_", "_copy_from", "_copy_from_and_resize"}
# Their result's shape or type depends on data, which has to be fetched before the host can go on.
WAITS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# Where a card takes a 0-dim host tensor: as a number that is passed along with the kernel.
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "add_", "sub_", "mul_", "div_"}


class GuardError(AssertionError):
    """An operator that would fail on a card, or make the host wait for it."""


class CudaGuard(TorchDispatchMode):
    """Raises :class:`GuardError` at the first offence; copies between devices only while ``loop`` is True.

    ``copies`` names every copy between devices that was let through, ``calls`` counts the operators seen.
    """

    def __init__(self, loop: bool = True) -> None:
        super().__init__()
        self.loop = loop
        self.copies: list[str] = []
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self.calls += 1
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in COPIES:
            self._check_copy(name, args, kwargs)
        else:
            check_waits(name, args, tensors)
            check_devices(name, tensors)
            check_dtypes(name, tensors)
            check_generator(name, kwargs, tensors)
        return func(*args, **kwargs)

    def _check_copy(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if name.startswith("_to_copy"):
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        else:
            source, target = args[1].device, args[0].device
        if source.type != target.type:
            said = f"{name} of a tensor of shape {tuple(args[0].shape)} from {source.type} to {target.type}"
            if self.loop:
                raise GuardError(f"copy inside the loop: {said}")
            self.copies.append(said)


def check_waits(name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """No operator that needs the data before the host can go on. ``.item()`` is refused for host tensors too: it turns
    a float32 coefficient into a Python float, which rounds elsewhere."""
    on_card = any(t.device.type == CARD for t in tensors)
    if name == "_local_scalar_dense" or (name in WAITS and on_card):
        raise GuardError(f"the host waits: {name} of {describe(tensors)}")
    by_mask = any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1:2]))
    if name in ("index", "index_put", "index_put_") and on_card and by_mask:
        raise GuardError(f"the host waits: {name} by a mask, {describe(tensors)}")


def check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """One device, but for 0-dim host tensors in plain arithmetic."""
    host = [t for t in tensors if t.device.type != CARD]
    if len(host) in (0, len(tensors)):
        return
    into_host = name.endswith("_") and tensors[0].device.type != CARD
    if name not in ARITHMETIC or into_host or any(t.ndim > 0 for t in host):
        raise GuardError(f"mixed devices: {name} of {describe(tensors)}")


def check_dtypes(name: str, tensors: Sequence[Tensor]) -> None:
    """One floating dtype among tensors of rank above 0: every cast is written down."""
    dtypes = {t.dtype for t in tensors if t.ndim > 0 and t.is_floating_point()}
    if len(dtypes) > 1:
        raise GuardError(f"mixed dtypes: {name} of {describe(tensors)}")


def check_generator(name: str, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """A generator draws on its own device only; a fake card does not mind."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
    if generator.device.type != device.type:
        raise GuardError(f"wrong generator: {name} on {device.type} with a generator of {generator.device.type}")


def describe(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{t.device.type} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
