"""Offloading, for cards with less memory than the model: parts stay on the host, and are copied while in use.

    sd = minidiff.load("sdxl.safetensors", device="cpu", dtype=torch.float16)
    fast.offload(sd, "cuda")
    sd.generate(...)

Weights wait in pinned memory, from where a card copies them by itself while the host goes on. Nothing is copied back:
the host has the weights all the time, and a part that has worked is dropped. The steps of a run copy nothing, since the
UNet comes before the first and stays to the last. The same bits as a model that is on the card whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.models.undo import surely
from minidiff.pipeline.base import Pipeline
from minidiff.storage.low_memory import Turns


class Offloaded(Turns):
    """Parts that came from the host, and go back to it in the end."""


def offload(pipe: Pipeline, device: torch.device | str = "cuda") -> None:
    """Let the parts of ``pipe`` take turns on ``device`` until ``fast.restore``. Calling it twice is harmless.

    Switches are put on after it. Raises :class:`ConfigError` if some are on already, or if the parts take turns in
    another way.
    """
    device = torch.device(device)
    if isinstance(pipe.turns, Offloaded) and pipe.turns.device == device:
        return
    check(pipe.turns is None, f"the parts of this model take turns on {pipe.device} already")
    check(not pipe.__dict__.get("_fast"), "switches of fast.optimize are on; fast.restore(sd), then offload first")
    if pipe.device.type != "cpu":
        pipe.to("cpu")
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, part in pipe.parts.items():
        for path, weight in part.named_parameters():
            weight.data = waiting(weight.data)
            weights[f"{name}.{path}"] = coming(weight, device)
    pipe.turns = Offloaded(pipe.parts, weights, device)
    try:
        pipe.turns.begin()
    except BaseException:
        surely(lambda: bring_back(pipe))
        raise


def waiting(weight: Tensor) -> Tensor:
    """``weight`` in memory that a card can copy from by itself, where there is a card."""
    return weight.pin_memory() if torch.cuda.is_available() else weight


def coming(weight: nn.Parameter, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that copies ``weight`` to ``device`` without waiting for the copy."""
    return lambda: weight.data.to(device, non_blocking=True)


def bring_back(pipe: Pipeline) -> None:
    """All parts on the host, with the parameters that they had."""
    if isinstance(pipe.turns, Offloaded):
        pipe.turns.end()
        pipe.turns = None
