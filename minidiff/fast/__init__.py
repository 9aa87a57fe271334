"""Speed, put on from outside: the same model, the same results, sooner.

    from minidiff import fast

    fast.optimize(sd)      # in place; twice does no harm
    sd.generate(...)
    fast.restore(sd)       # the plain model again, bit for bit

``models/`` stays as plain as it reads. What is faster stands here, one idea a file, and replaces the ``forward`` of
single layers: :mod:`packed` (weights laid out for the processor), :mod:`remember` (keys and values of the prompt),
:mod:`inplace` (memory used again). All of it is exact: the same bits, or, for packed weights, the same sums in another
order. Nothing can be trained, moved or given adapters while it is on; restore it first, change it, and optimize again.

What is on only by name: :mod:`attention` (the faster kernel of two, by trying) and :mod:`compiled` (minutes at first;
it goes alone). :mod:`probe` finds out which dtype this processor is fast in.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minidiff.config import check
from minidiff.fast.attention import BlockAttention
from minidiff.fast.compiled import CompiledUNet
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
OPT_IN: Mapping[str, Switch] = {
    "attention": BlockAttention(),
    "compile": CompiledUNet(),
}
KNOWN: Mapping[str, Switch] = {**SWITCHES, **OPT_IN}
ALONE = "compile"  # it reads the plain forwards
PLACES = ("unet", "vae")  # the text encoder runs once a picture


def optimize(pipe: Pipeline, switches: tuple[str, ...] = tuple(SWITCHES)) -> dict[str, int]:
    """Put ``switches`` on every layer that they apply to, in place; how many layers each is on now.

    Those that ``pipe`` has on already stay. Raises :class:`ConfigError` for a name that is no switch, for "compile"
    beside another one, and where that finds no C++ compiler.
    """
    for name in switches:
        check(name in KNOWN, f"{name!r} is no switch of fast.optimize; there are {', '.join(KNOWN)}")
    wanted = {*pipe.__dict__.get("_fast", {}), *switches}
    others = ", ".join(sorted(wanted - {ALONE}))
    check(
        ALONE not in wanted or not others, f"{ALONE!r} goes alone, not with {others}; fast.restore takes switches off"
    )
    on: dict[str, list[nn.Module]] = pipe.__dict__.setdefault("_fast", {})
    parts = [pipe.parts[name] for name in PLACES if name in pipe.parts]
    for name in switches:
        if name not in on:
            on[name] = put_on(KNOWN[name], parts)
    return {name: len(layers) for name, layers in on.items()}


def restore(pipe: Pipeline) -> None:
    """Take every switch off again: ``pipe`` is as :func:`optimize` found it. Without one, nothing happens."""
    for name, layers in pipe.__dict__.pop("_fast", {}).items():
        for layer in layers:
            KNOWN[name].take_off(layer)
