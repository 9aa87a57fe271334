"""Low-rank adapters: small files that adapt a model to a style or a subject (Hu et al. 2021, "LoRA").

An adapter adds a product of two thin matrices to the weight W of a layer, W + scale * up @ down, of rank 4 to 128 where
W has hundreds of rows and columns. It is applied from outside, in one of two ways:

    fused   the sum is computed once and replaces W; sampling costs nothing extra
    live    the layer adds scale * up(down(x)) to its output; weights are unchanged

:meth:`Applied.remove` undoes both and restores the bits of every weight: replaced weights are kept, and nothing is
subtracted. The arithmetic follows the order of the peft library, and gives the same bits.
``weights_convert.read_lora`` reads an :class:`Adapter` from a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.config import check, quote
from minidiff.errors import CheckpointError
from minidiff.models.attention import freeze
from minidiff.models.undo import forward_hook, surely
from minidiff.storage.identity import taught
from minidiff.storage.low_memory import check_present

LARGEST = torch.finfo(torch.float32).max  # a factor beyond it is infinite in float32
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of an update's halves


@dataclass(frozen=True)
class Update:
    """Update of one layer by an adapter: ``up @ down``, times its strength, times ``alpha`` / ``divisor``.

    The divisor is the rank, or its square root (``rank_stabilised``; Kalajdzievski 2023); ``alpha`` None means the
    divisor. For a linear layer ``down`` is (rank, in) and ``up`` (out, rank); for a convolution (rank, in, k, k) and
    (out, rank, 1, 1): first the layer's own kernel to few channels, then a 1x1 convolution to all. Dimensions of 1x1
    kernels may be missing or present, here and in the layer.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    rank_stabilised: bool = False

    def problem(self) -> str | None:
        """Return the reason why this product cannot be added to a weight, or None if it can; values are not read."""
        down, up = self.down, self.up
        shapes = f"up {list(up.shape)} {up.dtype}, down {list(down.shape)} {down.dtype}"
        if up.ndim == 4 and up.shape[2:] != (1, 1):
            return f"its up matrix has a kernel of {up.shape[2]}x{up.shape[3]}, not of 1x1 ({shapes})"
        halves = (down.ndim in (2, 4), up.ndim in (2, 4), down.numel() > 0, up.numel() > 0)
        if not all(halves) or up.shape[1] != len(down) or not {down.dtype, up.dtype}.issubset(KINDS):
            return f"it is not a product of two matrices ({shapes})"
        if self.alpha is not None and not abs(self.alpha) <= LARGEST:
            return f"its alpha is {quote(self.alpha)}, and must be a finite number"
        return None

    def factor(self, strength: float) -> float:
        """Return the factor of ``up @ down``, computed in this order: the quotient alone would round differently."""
        rank = self.down.shape[0]
        divisor = math.sqrt(rank) if self.rank_stabilised else rank
        return strength * (divisor if self.alpha is None else self.alpha) / divisor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the update is made for."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """Return the tensor that is added to ``weight``, with its shape, device and dtype."""
        down, up = self.down.to(weight), self.up.to(weight).flatten(1)
        if weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16):
            down, up = down.float(), up.float()  # as peft does it; the CPU's own products of such matrices can be slow
        if down.shape[2:] in ((), (1, 1)):
            change = up @ down.flatten(1)
        else:
            change = F.conv2d(down.transpose(0, 1), up[:, :, None, None]).transpose(0, 1)
        return (change * self.factor(strength)).to(weight.dtype).reshape(weight.shape)

    def live(self, layer: nn.Module, strength: float) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        """Return a forward hook for ``layer`` that adds the update to its output."""
        weight = plain(layer)
        down, up, factor = self.down.to(weight), self.up.to(weight).flatten(1), self.factor(strength)

        def hook(layer: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
            x = inputs[0]
            if isinstance(layer, nn.Conv2d):
                few = F.conv2d(x, down.reshape(len(down), -1, *layer.kernel_size), None, layer.stride, layer.padding)
                return out + F.conv2d(few, up[:, :, None, None]) * factor
            # One product of all rows, as torch itself does if the second matrix is trained, which it is in the
            # reference. Otherwise torch may compute one product per picture if the rows are not contiguous: other bits.
            few = F.linear(x.reshape(-1, x.shape[-1]), down.flatten(1))
            return out + F.linear(few, up).reshape(out.shape) * factor

        return hook


@dataclass(frozen=True)
class Adapter:
    """Updates of one file, by the name of their layer: "unet.down.0.attn.0.blocks.0.attn1.q".

    ``unmatched``: keys of the file that belong to no layer of the model. ``found``: number of layers in the file.
    """

    name: str
    updates: Mapping[str, Update]
    found: int = 0
    unmatched: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Hash of some values of every update, 16 hex digits: see :mod:`minidiff.storage.identity`."""
        halves = {f"{k} {half}": getattr(u, half) for k, u in self.updates.items() for half in ("down", "up")}
        alphas = " ".join(f"{k}={u.alpha}" for k, u in self.updates.items())
        return taught(alphas, halves)[:16]

    def __str__(self) -> str:
        """Summary in one line: how much of the file matched the model."""
        total = max(self.found, len(self.updates))
        lost = f"; {len(self.unmatched)} keys were left out, {quote(self.unmatched[0])} first" if self.unmatched else ""
        return f"{self.name}: {len(self.updates)} of {total} modules{lost}"


class Applied:
    """Adapters that are active in a model until :meth:`remove`."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[nn.Module, nn.Parameter]] = {}
        self.hooks: list[RemovableHandle] = []
        self.noted: list[tuple[Any, tuple[str, float, str]]] = []  # the model's parts, and what recipes say of it

    def remove(self) -> None:
        """Restore the model, bit for bit. Calling it twice is harmless."""
        surely(self._remove)

    def _remove(self) -> None:
        for layer, weight in self.kept.values():
            layer.weight = weight
        for hook in self.hooks:
            hook.remove()
        for parts, note in self.noted:
            parts.adapters = tuple(other for other in parts.adapters if other is not note)
        self.kept.clear()
        self.hooks.clear()
        self.noted.clear()

    def _note(self, parts: Mapping[str, nn.Module], adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Name the adapters in the recipes of pictures from now on, if ``parts`` are those of a pipeline."""
        if hasattr(parts, "adapters"):
            for adapter, strength in adapters:
                note = (os.path.basename(adapter.name), float(strength), adapter.hash)
                self.noted.append((parts, note))
                parts.adapters = (*parts.adapters, note)


def apply(parts: Mapping[str, nn.Module], adapters: Sequence[tuple[Adapter, float]], *, live: bool = False) -> Applied:
    """Apply ``adapters``, each with its strength (1 is as trained, 0 has no effect), to a model's ``parts``.

    Several adapters add up in the given order; remove the last applied first. If an error is raised, the model is
    unchanged. Raises :class:`ConfigError` for a strength that is not a finite number, and :class:`CheckpointError` for
    an update that does not fit its layer or exceeds the range of the weights' dtype, and for an adapter without
    updates.
    """
    for adapter, strength in adapters:
        check(abs(strength) <= LARGEST, f"{adapter.name}: a strength of {strength}; it must be a finite number")
        if not adapter.updates:
            raise CheckpointError(f"{adapter.name}: holds no update for any layer of this model")
        for name, update in adapter.updates.items():
            fits(parts, adapter.name, name, update, strength)
    each = [(a.name, name, find(parts, name), u, at) for a, at in adapters for name, u in a.updates.items()]
    applied = Applied()
    try:
        for part in {name.partition(".")[0] for _, name, _, _, _ in each}:
            freeze(parts[part], applied.hooks)
        with torch.no_grad():
            if live:
                for adapter_name, name, layer, update, strength in each:
                    # An update that is too large to be fused would overflow the layer's output as well.
                    require_finite(update.delta(plain(layer), strength), f"{adapter_name}: {name}")
                    forward_hook(layer, update.live(layer, strength), applied.hooks)
                applied._note(parts, adapters)
                return applied
            layers = {name: layer for _, name, layer, _, _ in each}
            before = {name: plain(layer) for name, layer in layers.items()}
            bent = dict(before)
            for adapter_name, name, _, update, strength in each:
                weight = bent[name]
                bent[name] = nn.Parameter(weight + update.delta(weight, strength), requires_grad=weight.requires_grad)
                require_finite(bent[name], f"{adapter_name}: {name}")
            applied.kept.update((name, (layer, before[name])) for name, layer in layers.items())
            for name, weight in bent.items():
                layers[name].weight = weight
            applied._note(parts, adapters)
        return applied
    except BaseException:
        applied.remove()
        raise


def plain(layer: nn.Module) -> nn.Parameter:
    """Return the weight of ``layer``, in rows if it is packed (:mod:`minidiff.fast.packed`)."""
    weight = layer.get_parameter("weight")
    return nn.Parameter(weight.detach().to_dense(), requires_grad=False) if weight.is_mkldnn else weight


def fits(parts: Mapping[str, nn.Module], adapter: str, name: str, update: Update, strength: float) -> None:
    """Raise :class:`CheckpointError` unless layer ``name`` is linear or a convolution that ``update`` fits."""
    layer = find(parts, name)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise CheckpointError(f"{adapter}: {name} is not a layer that an adapter can change ({type(layer).__name__})")
    check_present(layer.weight, adapter)
    problem = update.problem()
    if problem is not None:
        raise CheckpointError(f"{adapter}: the update of {name} cannot be used: {problem}")
    wanted, got = tuple(layer.weight.shape), update.shape
    if got != wanted and not (got[:2] == wanted[:2] and set(got[2:] + wanted[2:]) <= {1}):
        shapes = f"up {tuple(update.up.shape)} and down {tuple(update.down.shape)}"
        raise CheckpointError(f"{adapter}: {shapes} do not fit {name}, whose weight is {wanted}")
    if not abs(update.factor(strength)) <= LARGEST:
        raise CheckpointError(f"{adapter}: {name} is multiplied by {update.factor(strength):g}; its alpha is too large")
    for half in (update.down, update.up):
        require_finite(half.to(layer.weight), f"{adapter}: {name}")


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise :class:`CheckpointError` if an adapter makes ``tensor`` exceed the range of its dtype."""
    # If an entry is not finite, neither is the sum, which is much faster to test; but a sum may overflow by itself.
    if not (tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all()):
        raise CheckpointError(
            f"{what}: is not finite in {tensor.dtype}; the adapter's values, its alpha or its strength are too large"
        )


def find(parts: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the layer with a full name, the part's name first. Raises :class:`CheckpointError` if there is none."""
    part, _, path = name.partition(".")
    try:
        return parts[part].get_submodule(path)
    except (KeyError, AttributeError):
        raise CheckpointError(f"this model has no layer {name!r}") from None
