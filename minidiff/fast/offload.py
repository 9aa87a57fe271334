"""Offloading, for cards with less memory than the model: parts stay on the host, and are copied while in use.

    sd = minidiff.load("sdxl.safetensors", device="cpu", dtype=torch.float16)
    fast.offload(sd, "cuda")
    sd.generate(...)

Weights wait in pinned memory, from which a card copies them while the host continues. Nothing is copied back: the host
keeps the weights, and the card's copy of a part is dropped after use. The steps of a run copy nothing, since the UNet
is copied before the first and stays until the last. The bits are those of a model that is on the card completely.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.models.undo import surely
from minidiff.pipeline.model import Model
from minidiff.storage.low_memory import LowMemory


class Offloaded(LowMemory):
    """Parts that came from the host, and return to it at the end."""


def offload(pipe: Model, device: torch.device | str = "cuda") -> None:
    """Let the parts of ``pipe`` take turns on ``device`` until ``fast.restore``. Calling it twice is harmless.

    Put switches on afterwards. Raises :class:`ConfigError` if any are already on, or if the parts already take turns in
    another way.
    """
    device = torch.device(device)
    if isinstance(pipe.low_memory, Offloaded) and pipe.low_memory.device == device:
        return
    check(pipe.low_memory is None, f"the parts of this model take turns on {pipe.device} already")
    check(not pipe.__dict__.get("_fast"), "switches of fast.optimize are on; fast.restore(sd), then offload first")
    if pipe.device.type != "cpu":
        pipe.to("cpu")
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, part in pipe.parts.items():
        for path, weight in part.named_parameters():
            weight.data = waiting(weight.data)
            weights[f"{name}.{path}"] = coming(weight, device)
    pipe.low_memory = Offloaded(pipe.parts, weights, device)
    try:
        pipe.low_memory.install()
    except BaseException:
        surely(lambda: bring_back(pipe))
        raise


def waiting(weight: Tensor) -> Tensor:
    """Return ``weight`` in pinned memory if there is a card."""
    return weight.pin_memory() if torch.cuda.is_available() else weight


def coming(weight: nn.Parameter, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that copies ``weight`` to ``device`` without waiting for the copy."""
    return lambda: weight.data.to(device, non_blocking=True)


def bring_back(pipe: Model) -> None:
    """Return all parts to the host, with their previous parameters."""
    if isinstance(pipe.low_memory, Offloaded):
        pipe.low_memory.remove()
        pipe.low_memory = None
