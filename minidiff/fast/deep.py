"""Deep features of the UNet, computed at every few steps and used again in between (Ma, Fang & Wang 2023, DeepCache).

From one step to the next the coarse features of a picture hardly change, and they are most of the work. So one call in
``every`` runs the whole UNet, and keeps what arrives at the last layer of the way up. The calls in between run that
layer alone, on the kept features and on the new sample's first convolution, the one skip that reaches it (the paper's
first branch, ``cache_branch_id=0`` of its program). An approximation: the picture changes.

What is kept belongs to one run and must not leak into the next. A call goes on with it only if it comes later than the
last one with the same prompt and size; every other call is taken for the first of a new run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast.switch import Switch
from minidiff.models.unet import Residuals, UNet, UpLevel


class DeepCache(Switch):
    """UNets that run whole at one call in ``every``; 1 is all of them, and the plain model's bits."""

    def __init__(self, every: int) -> None:
        self.every = every

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, UNet)
        layer.forward = Reusing(layer, self.every)  # type: ignore[method-assign]

    def take_off(self, layer: nn.Module) -> None:
        reusing = layer.__dict__.pop("forward")
        if reusing.before is not None:
            layer.forward = reusing.before


class Reusing:
    """What stands in for the ``forward`` of one UNet. With gradients on, or a ControlNet's residuals, it is the plain
    one: a graph ends with its step, and residuals reach every depth anew."""

    def __init__(self, unet: UNet, every: int) -> None:
        self.unet = unet
        self.every = every
        level = unet.up[-1]
        assert isinstance(level, UpLevel)
        self.level = level  # the highest resolution on the way up
        self.before = unet.__dict__.get("forward")  # what another switch put there
        self.plain = unet.forward
        self.last: Call | None = None
        self.age = 0  # calls since the whole UNet ran
        self.deep: Tensor

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        if torch.is_grad_enabled() or residuals is not None:
            self.last = None
            return self.plain(x, t, context, added, guidance, residuals)
        call = Call((x.shape, x.dtype, x.device), (context, guidance, *(added or ())), t)
        goes_on = self.last is not None and call.follows(self.last)
        self.age = (self.age + 1) % self.every if goes_on else 0
        self.last = None  # should this call fail, there is nothing to go on from
        run = self.whole if self.age == 0 else self.shallow
        out = run(x, t, context, added, guidance)
        self.last = call
        return out

    def whole(self, *given: Any) -> Tensor:
        """The plain UNet; what comes from below into its last ResBlock is kept."""
        seen: list[Tensor] = []
        handle = self.level.res[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            out = self.plain(*given)
        finally:
            handle.remove()
        skip = self.unet.config.levels[0].channels
        self.deep = seen[0][:, :-skip].clone()
        return out

    def shallow(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None,
        added: tuple[Tensor, Tensor] | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """The first convolution and the last layer of the way up, with the kept features between."""
        unet = self.unet
        temb = unet.embed_time(x, t, added, guidance)
        h = self.level.res[-1](torch.cat([self.deep, unet.conv_in(x)], dim=1), temb)
        for attn in list(self.level.attn)[-1:]:
            h = attn(h, context)
        out: Tensor = unet.conv_out(F.silu(unet.norm_out(h)))
        return out


class Call(NamedTuple):
    """One call of a UNet: the kind of its sample, what it was told, and when."""

    kind: tuple[torch.Size, torch.dtype, torch.device]
    told: tuple[Tensor | None, ...]
    t: Tensor | float

    def follows(self, last: Call) -> bool:
        """Whether this call can be of the same run as ``last``, and later. The prompt is the very tensor of then."""
        same = self.kind == last.kind and len(self.told) == len(last.told)
        return same and all(a is b for a, b in zip(self.told, last.told, strict=True)) and later(self.t, last.t)


def later(t: Tensor | float, last: Tensor | float) -> bool:
    """Whether a run that was at timestep ``last`` may have come to ``t``.

    Rows of a plan are told by their place in it: a method may ask twice at one timestep, and values on a GPU would have
    to be waited for. Rows of two plans belong to two runs. Timesteps of any other origin must fall.
    """
    if isinstance(t, Tensor) and isinstance(last, Tensor) and t._base is not None and last._base is not None:
        return t._base is last._base and bool(t.storage_offset() > last.storage_offset())
    now, then = torch.as_tensor(t), torch.as_tensor(last)
    return now.shape == then.shape and bool((now < then).all())
