"""Speed, put on from outside: the same model, the same results, sooner.

    from minidiff import fast

    fast.optimize(sd)      # in place; calling it twice is harmless
    sd.generate(...)
    fast.restore(sd)       # the plain model again, bit for bit

``models/`` stays as plain as it reads. What is faster stands here, one idea a file, and replaces the ``forward`` of
single layers: :mod:`packed` (weights laid out for the processor), :mod:`winograd` (convolutions with fewer products),
:mod:`feedforward` (some tokens at a time), :mod:`remember` (keys and values of the prompt), :mod:`inplace` (memory used
again), and where the processor gains by it :mod:`linear` (products by another library), :mod:`tokens` (pictures laid
out as transformers read them) and the attention kernel (:mod:`attention`, in blocks of queries). All of it is exact:
the same bits, or the same sums in another order, no farther from the true value or, in float32, within a few roundings
of the plain layer's result (tests/tolerances.py).

Some switches are on only if they are named (``OPTIONAL``): "attention" (the faster kernel of two, by trying),
:mod:`compiled` (minutes at first; it goes alone), those that save memory for time (:mod:`smaller`), and those for CUDA
cards (:mod:`channels_last`, :mod:`graphs`), which do nothing elsewhere. :func:`offload` is for cards that
are smaller than the model. What changes the result (:mod:`approximations`, :mod:`tiles`) is never on by itself.
:mod:`probe` finds out which dtype this processor is fast in.

Nothing can be trained, moved, copied, pickled or given adapters while any of it is on; restore it first, change it, and
optimize again. Several threads may use a model with switches on, and get the bits that they would get one after the
other; putting on and taking off is for one of them, while the others rest. No setting of the process is touched.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minidiff.config import check
from minidiff.fast.approximations import approximate as approximate
from minidiff.fast.approximations import exact
from minidiff.fast.attention import BlockAttention, ManyKeys
from minidiff.fast.channels_last import ChannelsLast
from minidiff.fast.compiled import CompiledUNet
from minidiff.fast.feedforward import FeedForwardInBlocks
from minidiff.fast.graphs import CudaGraphs
from minidiff.fast.inplace import InPlaceBlocks
from minidiff.fast.linear import LinearByOneDNN
from minidiff.fast.offload import bring_back
from minidiff.fast.offload import offload as offload
from minidiff.fast.packed import PackedConvolutions
from minidiff.fast.remember import PromptMemory
from minidiff.fast.smaller import GuidanceHalves, VaeSlices
from minidiff.fast.switch import Switch, put_on
from minidiff.fast.tiles import tiled as tiled
from minidiff.fast.tiles import whole
from minidiff.fast.tokens import TokensInPlace
from minidiff.fast.winograd import WinogradConvolutions
from minidiff.runner import Pipeline
from minidiff.spelling import near
from minidiff.undo import surely

# In this order they are put on, and backwards taken off: Winograd's leaves small pictures to the packed convolution.
SWITCHES: Mapping[str, Switch] = {
    "packed": PackedConvolutions(),
    "winograd": WinogradConvolutions(),
    "blocks": FeedForwardInBlocks(),
    "inplace": InPlaceBlocks(),
    "linear": LinearByOneDNN(),
    "memory": PromptMemory(),
    "tokens": TokensInPlace(),
    "many_keys": ManyKeys(),
}
# On only where they are named. Which of those for cards pay has not been measured on one.
OPTIONAL: Mapping[str, Switch] = {
    "attention": BlockAttention(),
    "compile": CompiledUNet(),
    "channels_last": ChannelsLast(),
    "graphs": CudaGraphs(),
    "halves": GuidanceHalves(),
    "vae_slices": VaeSlices(),
}
ALL = {**SWITCHES, **OPTIONAL}
ALONE = ("compile", "graphs")  # they read the plain forwards
TF32 = (
    "'tf32' is a setting of the whole process, which minidiff leaves alone; "
    'torch.set_float32_matmul_precision("high") at the start of a program turns it on'
)
PLACES = ("unet", "vae")  # the text encoder runs once a picture


def optimize(pipe: Pipeline, switches: tuple[str, ...] = tuple(SWITCHES)) -> dict[str, int]:
    """Put ``switches`` on every layer that they apply to, in place; how many layers each is on now.

    Those that ``pipe`` has on already stay; those for another device than it is on do nothing. Interrupted, it leaves
    the plain model. Raises :class:`ConfigError` for a name that is no switch, for "compile" or "graphs" beside another
    one, and where no C++ compiler is found for the former.
    """
    for name in switches:
        check(name != "tf32", TF32)
        check(name in ALL, f"{name!r} is no switch of fast.optimize; there are {', '.join(ALL)}{near(name, ALL)}")
    on: dict[str, list[nn.Module]] = pipe.__dict__.get("_fast", {})
    if not on.keys() >= set(switches):
        wanted = on.keys() | set(switches)
        for name in sorted(wanted & set(ALONE)):
            others = ", ".join(other for other in ALL if other in wanted and other != name)
            check(not others, f"{name!r} goes alone, not with {others}; fast.restore takes switches off")
        _take_off(pipe)
        parts = [pipe.parts[name] for name in PLACES if name in pipe.parts]
        try:
            on = pipe.__dict__["_fast"] = {}
            for name, switch in ALL.items():
                if name in wanted:
                    on[name] = []
                    put_on(switch, parts if switch.device in (None, pipe.device.type) else [], on[name])
            pipe.fast = tuple(name for name, layers in on.items() if layers)
        except BaseException:
            surely(lambda: _take_off(pipe))
            raise
    return {name: len(layers) for name, layers in on.items()}


def restore(pipe: Pipeline) -> None:
    """Take every switch off again, and every approximation, and what is offloaded or tiled back: ``pipe`` is as
    :func:`optimize` found it. Without any of it, nothing happens. An interruption is raised when all is done."""
    surely(lambda: _restore(pipe))


def _restore(pipe: Pipeline) -> None:
    exact(pipe)
    whole(pipe)
    _take_off(pipe)
    bring_back(pipe)


def _take_off(pipe: Pipeline) -> None:
    pipe.fast = ()
    for name, layers in reversed(pipe.__dict__.get("_fast", {}).items()):
        for layer in layers:
            ALL[name].take_off(layer)
    pipe.__dict__.pop("_fast", None)
