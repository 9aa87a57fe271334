"""Speed-ups that are applied from outside: the same model and the same results in less time.

    from minidiff import fast

    fast.optimize(sd)      # in place; calling it twice is harmless
    sd.generate(...)
    fast.restore(sd)       # the plain model again, bit for bit

``models/`` contains only the plain implementation. The faster ones are here and replace methods of single layers. The
switch "many_keys" is the class ``ManyKeys`` in ``many_keys.py``, and so for all: :mod:`packed` (weights in the
processor's layout), :mod:`blocks` (feed-forwards on some tokens at a time), :mod:`inplace` (reuse of memory),
:mod:`memory` (keys and values of the prompt), :mod:`shared_start` (what both halves of a guided batch have in common),
:mod:`groups` (large pictures a few at a time), and if the processor gains by it :mod:`winograd` (convolutions with
fewer products), :mod:`linear` (products by another library), :mod:`tokens` (pictures in the layout of transformers) and
:mod:`many_keys` (attention by another kernel). Whether it gains is tried once a machine (:mod:`trial`). All of them are
exact: the same bits, or the same sums in another order, no farther from the true value or, in float32, within a few
roundings of the plain layer's result (tests/tolerances.py).

Some switches must be requested by name (``OPTIONAL``): "attention" ("many_keys", tried at once), :mod:`compile` (takes
minutes at first, and cannot be combined), those that trade time for memory (:mod:`halves`, :mod:`vae_slices`), and
those for CUDA (:mod:`channels_last`, :mod:`graphs`), which have no effect elsewhere. :func:`offload` is for cards with
less memory than the model needs. Methods that change the result are never on by default: :mod:`deep` and :mod:`merge`
(put on by :mod:`approximations`), and :mod:`vae_tiles`.

The other files are parts of switches: :mod:`switch` (base classes), :mod:`blockwise` and :mod:`logistic` (attention
kernels), :mod:`onednn` (products by that library), :mod:`probe` and :mod:`trial` (measure what is fast on this
processor) and :mod:`machine` (keeps the results).

A model with active switches cannot be trained, moved, copied, pickled or given adapters: restore it first, change it,
and optimize it again. Several threads may use it, and get the same bits as one after the other. Switches must be put on
and taken off by one thread while the others are idle. No process-wide setting is changed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minidiff.config import check
from minidiff.console.spelling import near
from minidiff.fast.approximations import approximate as approximate
from minidiff.fast.approximations import exact
from minidiff.fast.blocks import Blocks
from minidiff.fast.channels_last import ChannelsLast
from minidiff.fast.compile import Compile
from minidiff.fast.graphs import Graphs
from minidiff.fast.groups import Groups
from minidiff.fast.halves import Halves
from minidiff.fast.inplace import Inplace
from minidiff.fast.linear import Linear
from minidiff.fast.many_keys import RANGES, ManyKeys
from minidiff.fast.memory import Memory
from minidiff.fast.offload import bring_back
from minidiff.fast.offload import offload as offload
from minidiff.fast.packed import Packed
from minidiff.fast.shared_start import SharedStart
from minidiff.fast.switch import Switch, put_on
from minidiff.fast.tokens import Tokens
from minidiff.fast.trial import choices
from minidiff.fast.vae_slices import VaeSlices
from minidiff.fast.vae_tiles import tiled as tiled
from minidiff.fast.vae_tiles import whole
from minidiff.fast.winograd import Winograd
from minidiff.models.undo import surely
from minidiff.pipeline.model import Model

# Switches are put on in this order and taken off in reverse: Winograd leaves small pictures to the packed convolution.
SWITCHES: Mapping[str, Switch] = {
    "packed": Packed(),
    "winograd": Winograd(),
    "blocks": Blocks(),
    "inplace": Inplace(),
    "linear": Linear(),
    "memory": Memory(),
    "tokens": Tokens(),
    "many_keys": ManyKeys(),
    "shared_start": SharedStart(),
    "groups": Groups(),
}
# Only on request. The gain of those for CUDA has not been measured.
OPTIONAL: Mapping[str, Switch] = {
    "attention": ManyKeys(),
    "compile": Compile(),
    "channels_last": ChannelsLast(),
    "graphs": Graphs(),
    "halves": Halves(),
    "vae_slices": VaeSlices(),
}
ALL = {**SWITCHES, **OPTIONAL}
ALONE = ("compile", "graphs")  # the compiler reads the plain forwards
TF32 = (
    "'tf32' is a setting of the whole process, which minidiff leaves alone; "
    'torch.set_float32_matmul_precision("high") at the start of a program turns it on'
)
PLACES = ("unet", "vae", "control")  # the text encoder runs once a picture


def optimize(pipe: Model, switches: tuple[str, ...] = tuple(SWITCHES), *, trial: bool = False) -> dict[str, int]:
    """Put ``switches`` on all layers that they apply to, in place, and return the number of layers of each.

    ``pipe``: a pipeline, or a control beside one (:class:`minidiff.ControlModel`).

    Active switches of ``pipe`` stay on; switches for another device have no effect. What the processor gains by is read
    from the user's cache, or follows a rule if it was never tried there; ``trial`` tries it, for at most 3 seconds, and
    keeps the result for every later process. If interrupted, it leaves the plain model.

    Raises :class:`ConfigError` for an unknown name, for "compile" or "graphs" together with another switch, and for
    "compile" without a C++ compiler.
    """
    for name in switches:
        check(name != "tf32", TF32)
        check(name in ALL, f"{name!r} is not a switch of fast.optimize; those are {', '.join(ALL)}{near(name, ALL)}")
    on: dict[str, list[nn.Module]] = pipe.__dict__.get("_fast", {})
    if trial or not on.keys() >= set(switches):
        wanted = on.keys() | set(switches)
        for name in sorted(wanted & set(ALONE)):
            others = ", ".join(other for other in ALL if other in wanted and other != name)
            check(not others, f"{name!r} cannot be combined with {others}; fast.restore takes them off")
        _take_off(pipe)
        parts = [pipe.parts[name] for name in PLACES if name in pipe.parts]
        try:
            on = pipe.__dict__["_fast"] = {}
            chosen = [_choices(pipe, part, trial or "attention" in wanted) for part in parts]
            for name in (name for name in ALL if name in wanted):
                on[name] = []
                for part, choice in zip(parts, chosen, strict=True):
                    switch = ALL[name].fit(choice)
                    if switch is not None and switch.device in (None, pipe.device.type):
                        put_on(switch, [part], on[name])
            pipe.fast = tuple(name for name, layers in on.items() if layers)
            pipe.kernels = {name: way for name, way in chosen[0].items() if "many_keys" in pipe.fast and name in RANGES}
        except BaseException:
            surely(lambda: _take_off(pipe))
            raise
    return {name: len(layers) for name, layers in on.items()}


def restore(pipe: Model) -> None:
    """Take off all switches and approximations, and undo offloading and tiling: ``pipe`` is the plain model again.

    Without any of them, nothing happens. An interruption is raised after everything is done.
    """
    surely(lambda: _restore(pipe))


def _restore(pipe: Model) -> None:
    exact(pipe)
    whole(pipe)
    _take_off(pipe)
    bring_back(pipe)


def _choices(pipe: Model, part: nn.Module, measure: bool) -> dict[str, str]:
    """Return the fastest ways for the dtype of ``part``; empty on another device than the CPU."""
    return choices(next(part.parameters()).dtype, measure) if pipe.device.type == "cpu" else {}


def _take_off(pipe: Model) -> None:
    pipe.fast, pipe.kernels = (), {}
    for name, layers in reversed(pipe.__dict__.get("_fast", {}).items()):
        for layer in layers:
            ALL[name].take_off(layer)
    pipe.__dict__.pop("_fast", None)
