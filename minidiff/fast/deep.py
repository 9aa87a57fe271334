"""DeepCache: deep features of the UNet are computed every few steps and reused in between (Ma, Fang & Wang 2023).

The coarse features of a picture hardly change from one step to the next, but are most of the work. Therefore one call
in ``every`` runs the whole UNet and keeps the input of the last layer of the way up. The calls in between run only that
layer, on the kept features and on the first convolution of the new sample, the one skip that reaches it (the paper's
first branch, ``cache_branch_id=0`` in its code). This is an approximation: the picture changes.

The cache belongs to one run (:class:`~minidiff.pipeline.denoise.Work`). A call uses it only if it is later than the
last call of that run and has the same prompt and size; any other call starts anew. Calls outside of a run, in a custom
loop, count as one run per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.fast.switch import Switch
from minidiff.models.replacement import Replacement
from minidiff.models.undo import forward_pre_hook
from minidiff.models.unet import Residuals, UNet, UpLevel
from minidiff.pipeline.denoise import work


class Deep(Switch):
    """Switch of UNets that run whole at one call in ``every``; 1 is every call, with the plain model's bits."""

    def __init__(self, every: int) -> None:
        self.every = every

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, UNet)
        CachedUNet(layer, self.every)

    def take_off(self, layer: nn.Module) -> None:
        CachedUNet.take_off(layer)


class Kept:
    """Cache of one run: its last call, the number of calls since the whole UNet ran, and the features of that call."""

    last: Call | None = None
    age = 0
    deep: Tensor


class CachedUNet(Replacement):
    """Replacement for the ``forward`` of one UNet.

    With gradients enabled, or with a ControlNet's residuals or a T2I-Adapter's features, it is the plain one: a graph
    ends with its step, and residuals and features reach every depth in every step.
    """

    def __init__(self, unet: UNet, every: int) -> None:
        self.unet = unet
        self.every = every
        level = unet.up[-1]
        assert isinstance(level, UpLevel)
        self.level = level  # the highest resolution on the way up
        self.here = threading.local()  # state of this thread: its cache outside of a run, and what a call has seen
        self.handles: list[RemovableHandle] = []
        super().__init__(unet)
        forward_pre_hook(level.res[-1], self.record_input, self.handles)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
        residuals: Residuals | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        kept = self.kept()
        if torch.is_grad_enabled() or residuals is not None or features is not None:
            kept.last = None
            return self.inner(x, t, context, added, guidance, residuals, features)  # type: ignore[no-any-return]
        call = Call((x.shape, x.dtype, x.device), (context, guidance, *(added or ())), t)
        goes_on = kept.last is not None and call.follows(kept.last)
        kept.age = (kept.age + 1) % self.every if goes_on else 0
        kept.last = None  # if this call fails, there is nothing to reuse
        if kept.age == 0:
            out, kept.deep = self.whole(x, t, context, added, guidance)
        else:
            out = self.shallow(kept.deep, x, t, context, added, guidance)
        kept.last = call
        return out

    def kept(self) -> Kept:
        """Return the cache of the run that this thread computes."""
        run = work()
        mine: dict[Any, Any] = self.here.__dict__ if run is None else run.kept
        found: Kept = mine.setdefault(self, Kept()) if run is not None else mine.setdefault("kept", Kept())
        return found

    def record_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the input of the last ResBlock if :meth:`whole` asks for it."""
        seen: list[Tensor] | None = getattr(self.here, "seen", None)
        if seen is not None:
            seen.append(args[0])

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()

    def whole(self, *given: Any) -> tuple[Tensor, Tensor]:
        """Run the plain UNet; return its output and the input of its last ResBlock from the level below."""
        seen: list[Tensor] = []
        self.here.seen = seen
        try:
            out: Tensor = self.inner(*given)
        finally:
            self.here.seen = None
        skip = self.unet.config.levels[0].channels
        return out, seen[0][:, :-skip].clone()

    def shallow(
        self,
        deep: Tensor,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None,
        added: tuple[Tensor, Tensor] | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """Run the first convolution and the last layer of the way up, with the cached features ``deep`` in between."""
        unet = self.unet
        temb = unet.embed_time(x, t, added, guidance)
        h = self.level.res[-1](torch.cat([deep, unet.conv_in(x)], dim=1), temb)
        for attn in list(self.level.attn)[-1:]:
            h = attn(h, context)
        out: Tensor = unet.conv_out(F.silu(unet.norm_out(h)))
        return out


class Call(NamedTuple):
    """One call of a UNet: the kind of its sample, its conditions, and its time."""

    kind: tuple[torch.Size, torch.dtype, torch.device]
    told: tuple[Tensor | None, ...]
    t: Tensor | float

    def follows(self, last: Call) -> bool:
        """Return True if this call may be a later one of the same run as ``last``, with the same prompt tensor."""
        same = self.kind == last.kind and len(self.told) == len(last.told)
        return same and all(a is b for a, b in zip(self.told, last.told, strict=True)) and later(self.t, last.t)


def later(t: Tensor | float, last: Tensor | float) -> bool:
    """Return True if a run that was at timestep ``last`` may have arrived at ``t``.

    Rows of a plan are compared by their position in it: a method may call twice at one timestep, and comparing values
    on a GPU would wait for it. Rows of two plans belong to two runs. Other timesteps must decrease.
    """
    if isinstance(t, Tensor) and isinstance(last, Tensor) and t._base is not None and last._base is not None:
        return t._base is last._base and bool(t.storage_offset() > last.storage_offset())
    now, then = (v if isinstance(v, Tensor) else torch.tensor(v, device="cpu") for v in (t, last))
    return now.shape == then.shape and bool((now < then).all())
