"""Speed, put on from outside: the same model, the same results, sooner.

    from minidiff import fast

    fast.optimize(sd)      # in place; twice does no harm
    sd.generate(...)
    fast.restore(sd)       # the plain model again, bit for bit

``models/`` stays as plain as it reads. What is faster stands here, one idea a file, and replaces the ``forward`` of
single layers: :mod:`packed` (weights laid out for the processor), :mod:`remember` (keys and values of the prompt),
:mod:`inplace` (memory used again). All of it is exact: the same bits, or, for packed weights, the same sums in another
order. Nothing can be trained, moved or given adapters while it is on; restore it first, change it, and optimize again.
What changes the result (:mod:`approximations`) is never on by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minidiff.config import check
from minidiff.fast.approximations import approximate as approximate
from minidiff.fast.approximations import exact
from minidiff.fast.inplace import InPlaceBlocks
from minidiff.fast.packed import PackedConvolutions
from minidiff.fast.remember import PromptMemory
from minidiff.fast.switch import Switch, put_on
from minidiff.runner import Pipeline

SWITCHES: Mapping[str, Switch] = {
    "inplace": InPlaceBlocks(),
    "memory": PromptMemory(),
    "packed": PackedConvolutions(),
}
PLACES = ("unet", "vae")  # the text encoder runs once a picture


def optimize(pipe: Pipeline, switches: tuple[str, ...] = tuple(SWITCHES)) -> dict[str, int]:
    """Put ``switches`` on every layer that they apply to, in place; how many layers each is on now.

    Those that ``pipe`` has on already stay. Raises :class:`ConfigError` for a name that is no switch.
    """
    for name in switches:
        check(name in SWITCHES, f"{name!r} is no switch of fast.optimize; there are {', '.join(SWITCHES)}")
    on: dict[str, list[nn.Module]] = pipe.__dict__.setdefault("_fast", {})
    parts = [pipe.parts[name] for name in PLACES if name in pipe.parts]
    for name in switches:
        if name not in on:
            on[name] = put_on(SWITCHES[name], parts)
    return {name: len(layers) for name, layers in on.items()}


def restore(pipe: Pipeline) -> None:
    """Take every switch off again, and every approximation: ``pipe`` is as :func:`optimize` found it. Without any,
    nothing happens."""
    exact(pipe)
    for name, layers in pipe.__dict__.pop("_fast", {}).items():
        for layer in layers:
            SWITCHES[name].take_off(layer)
