"""Speed, put on from outside: the same model, the same results, sooner.

    from minidiff import fast

    fast.optimize(sd)      # in place; twice does no harm
    sd.generate(...)
    fast.restore(sd)       # the plain model again, bit for bit

``models/`` stays as plain as it reads. What is faster stands here, one idea a file, and replaces the ``forward`` of
single layers: :mod:`packed` (weights laid out for the processor), :mod:`winograd` (convolutions with fewer products),
:mod:`feedforward` (some tokens at a time), :mod:`remember` (keys and values of the prompt), :mod:`inplace` (memory used
again). All of it is exact: the same bits, or the same sums in another order, no farther from the true value. Nothing
can be trained, moved or given adapters while it is on; restore it first, change it, and optimize again.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minidiff.config import check
from minidiff.fast.feedforward import FeedForwardInBlocks
from minidiff.fast.inplace import InPlaceBlocks
from minidiff.fast.packed import PackedConvolutions
from minidiff.fast.remember import PromptMemory
from minidiff.fast.switch import Switch, put_on
from minidiff.fast.winograd import WinogradConvolutions
from minidiff.runner import Pipeline

# In this order they are put on, and backwards taken off: Winograd's leaves small pictures to the packed convolution.
SWITCHES: Mapping[str, Switch] = {
    "packed": PackedConvolutions(),
    "winograd": WinogradConvolutions(),
    "blocks": FeedForwardInBlocks(),
    "inplace": InPlaceBlocks(),
    "memory": PromptMemory(),
}
PLACES = ("unet", "vae")  # the text encoder runs once a picture


def optimize(pipe: Pipeline, switches: tuple[str, ...] = tuple(SWITCHES)) -> dict[str, int]:
    """Put ``switches`` on every layer that they apply to, in place; how many layers each is on now.

    Those that ``pipe`` has on already stay. Raises :class:`ConfigError` for a name that is no switch.
    """
    for name in switches:
        check(name in SWITCHES, f"{name!r} is no switch of fast.optimize; there are {', '.join(SWITCHES)}")
    on: dict[str, list[nn.Module]] = pipe.__dict__.get("_fast", {})
    if not on.keys() >= set(switches):
        wanted = on.keys() | set(switches)
        restore(pipe)
        parts = [pipe.parts[name] for name in PLACES if name in pipe.parts]
        on = {name: put_on(switch, parts) for name, switch in SWITCHES.items() if name in wanted}
        pipe.__dict__["_fast"] = on
    return {name: len(layers) for name, layers in on.items()}


def restore(pipe: Pipeline) -> None:
    """Take every switch off again: ``pipe`` is as :func:`optimize` found it. Without one, nothing happens."""
    for name, layers in reversed(pipe.__dict__.pop("_fast", {}).items()):
        for layer in layers:
            SWITCHES[name].take_off(layer)
