"""Token merging: similar tokens share one place in self-attention (Bolya & Hoffman 2023, token merging for diffusion).

At the UNet's highest resolution with attention there is one token per latent pixel, and the cost grows with the square
of their number. One of every 2 x 2 tokens is a target. Of the others, the share ``ratio`` most similar to some target
is averaged with it before the attention, and gets its output afterwards. The paper picks a random one of the four; here
it is always the upper left, so that the picture is reproducible. (On a GPU the order of summation varies, so the last
bits may differ.) This is an approximation, and pays only for large pictures, since finding the pairs takes time too.
"""

from __future__ import annotations

import threading
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.errors import ConfigError
from minidiff.fast.switch import Switch
from minidiff.models.attention import SpatialTransformer, TransformerBlock
from minidiff.models.replacement import CHANGED
from minidiff.models.undo import forward_hook, forward_pre_hook
from minidiff.models.unet import UNet

MOST = 0.75  # a quarter of the tokens are targets


class Merge(Switch):
    """Switch of self-attention at a UNet's highest resolution: ``ratio`` (0 to 0.75) of its tokens are merged away."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.handles: dict[nn.Module, list[RemovableHandle]] = {}

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet) and len(finest(layer)) > 0

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, UNet)
        handles = self.handles[layer] = []
        for transformer in finest(layer):
            merging = Merging(self.ratio)
            forward_pre_hook(transformer, merging.record_size, handles)
            for block in transformer.blocks:
                assert isinstance(block, TransformerBlock)
                forward_pre_hook(block.attn1, merging.before, handles)
                forward_hook(block.attn1, merging.after, handles)

    def take_off(self, layer: nn.Module) -> None:
        for handle in self.handles.get(layer, []):
            handle.remove()
        self.handles.pop(layer, None)


def finest(unet: UNet) -> list[SpatialTransformer]:
    """Return the transformers of the highest resolution that has any."""
    for down, up in zip(unet.down, reversed(unet.up), strict=True):
        found = [m for m in (*down.attn, *up.attn) if isinstance(m, SpatialTransformer)]  # type: ignore[misc]
        if found:
            return found
    return []


class Merging(threading.local):
    """Hooks around the self-attention of one transformer; their state during a call is local to the thread."""

    size = (0, 0)
    group: Tensor | None = None

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def record_size(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the size of the picture, which cannot be told from its tokens."""
        self.size = args[0].shape[-2:]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError(CHANGED)

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Merge the tokens, if there is anything to merge."""
        (tokens,) = args
        count = min(int(self.ratio * tokens.shape[1]), tokens.shape[1] - len(targets(*self.size, tokens.device)))
        self.group = groups(tokens, *self.size, count) if count else None
        return None if self.group is None else (merged(tokens, self.group, tokens.shape[1] - count),)

    def after(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Give every token the output of its group."""
        group, self.group = self.group, None
        return out if group is None else unmerged(out, group)


def targets(height: int, width: int, device: torch.device) -> Tensor:
    """Return the positions of the targets: the upper left token of every 2 x 2, including those cut by an edge."""
    return _every_other(height, width, 0, 0, device)


def groups(tokens: Tensor, height: int, width: int, count: int) -> Tensor:
    """Return the group of each of ``tokens`` (B, height * width, C) when ``count`` are merged away: (B, L).

    First come the unmerged tokens, each a group, then the targets with the tokens merged into them.
    """
    batch, length, _ = tokens.shape
    device = tokens.device
    target = targets(height, width, device)
    source = torch.cat([_every_other(height, width, y, x, device) for y, x in ((0, 1), (1, 0), (1, 1))])
    directions = F.normalize(tokens, dim=-1)
    likeness = directions[:, source] @ directions[:, target].transpose(1, 2)
    best, which = likeness.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, alone = order[:, :count], order[:, count:]
    first = alone.shape[1]  # the number of the first target's group
    group = torch.empty(batch, length, dtype=torch.long, device=device)
    group[:, target] = first + torch.arange(len(target), device=device)
    group.scatter_(1, source[gone], first + which.gather(1, gone))
    group.scatter_(1, source[alone], torch.arange(first, device=device).expand(batch, -1))
    return group


def merged(tokens: Tensor, group: Tensor, count: int) -> Tensor:
    """Return the mean of each of ``count`` groups: (B, L, C) -> (B, count, C)."""
    batch, _, channels = tokens.shape
    index = _rows(group, count)[:, None].expand(-1, channels)
    means = tokens.new_zeros(batch * count, channels)
    means = means.scatter_reduce(0, index, tokens.flatten(0, 1), "mean", include_self=False)
    return means.view(batch, count, channels)


def unmerged(answers: Tensor, group: Tensor) -> Tensor:
    """Return the output of its group for every token: (B, count, C) -> (B, L, C)."""
    rows = answers.flatten(0, 1).index_select(0, _rows(group, answers.shape[1]))
    return rows.view(*group.shape, -1)


def _rows(group: Tensor, count: int) -> Tensor:
    """Number the groups of all pictures consecutively: (B, L) -> (B * L,)."""
    return (group + count * torch.arange(len(group), device=group.device)[:, None]).flatten()


def _every_other(height: int, width: int, y: int, x: int, device: torch.device) -> Tensor:
    """Return the positions of every other token in every other row, starting at row ``y`` and column ``x``."""
    rows = torch.arange(y, height, 2, device=device)[:, None] * width
    return (rows + torch.arange(x, width, 2, device=device)).flatten()
