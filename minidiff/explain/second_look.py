"""A second, plain forward of a run's model calls, by a UNet that can be looked into: attention maps and features.

The run itself is left alone. The UNet here is another module that shares the weights of the model's. It has none of the
switches of :mod:`minidiff.fast`, except that packed weights stay packed, and computes in its cross-attention also what
the run's kernel never writes down: the matrix softmax(q k^T / sqrt(d)) (Vaswani et al. 2017, equation 1), of each place
of the picture over the tokens of the prompt. It is called as the run called the UNet, for the picture with its prompt
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.explain.collect import Frame, Seen
from minidiff.explain.operations import count_in
from minidiff.fast.packed import Packing
from minidiff.models.attention import Attention, Kernel, Linear, SpatialTransformer
from minidiff.models.blocks import ResBlock
from minidiff.models.clip import CLIPText
from minidiff.models.unet import DownLevel, Middle, UNet, UpLevel
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.pipeline.model import Parts
from minidiff.precision import apply_policy
from minidiff.storage.checkpoint import build, build_part

SMALL = 100_000_000  # weights of a UNet up to which (almost) every step is looked into
MANY, FEW = 20, 2  # steps of a small model and of a large one
TOGETHER = 20 * 16 * 16 * 4  # numbers of samples that are looked at in one call; at least one sample
ADAPTERS = "minidiff.adapters.lora"


@dataclass(frozen=True, eq=False)
class Look:
    """Record of one model call. ``frame``: the call in the run; ``out``: what the UNet here predicted.

    ``maps``: by transformer ("down.1.attn.0"), the attention of each place to each token, (L, h, w) float32: averages
    over its heads and blocks, which sum to 1 over the tokens. ``features``: mean and standard deviation of what a part
    gives on; ``shapes``: (C, h, w) of that, and inside each ResBlock. ``shifts``: by ResBlock, the mean size of what
    the time adds to a channel, and that of the channels. ``operations``: floating-point operations, by module.
    """

    frame: Frame
    out: Tensor
    maps: dict[str, Tensor]
    features: dict[str, tuple[float, float]]
    shapes: dict[str, tuple[int, ...]]
    shifts: dict[str, tuple[float, float]]
    operations: Counter[str]


def weights(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) in float32, (B, heads, L, M), for q (B, heads, L, d) and k (B, heads, M, d)."""
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    found: Tensor = scores.softmax(dim=-1)
    return found


def own_unet(seen: Seen) -> UNet:
    """Return another UNet with the weights, adapters and precision of the model's, and nothing else that was put on it
    but the layout of packed weights."""
    own = build_part(seen.pipe.config, "unet")
    share(seen.pipe.unet, own, packed=True)
    apply_policy(seen.pipe.config, {"unet": own})
    assert isinstance(own, UNet)
    return own


def own_pipe(seen: Seen) -> StableDiffusion | Unconditional:
    """Return another pipeline with the weights and adapters of the run's, plain, which can be bent without it."""
    own, parts = copy(seen.pipe), build(seen.pipe.config)
    for name, part in parts.items():
        share(seen.pipe.parts[name], part)
        if hasattr(own, name):
            setattr(own, name, part)
    own.parts = Parts(parts)
    own.fast, own.kernels, own.approximations, own.low_memory = (), {}, {}, None
    own.__dict__.pop("_fast", None)
    apply_policy(own.config, own.parts)
    return own


def share(module: nn.Module, own: nn.Module, packed: bool = False) -> None:
    """Give ``own``, built alike, the weights of ``module`` and the adapters that are live in it.

    ``packed``: weights that :mod:`minidiff.fast` keeps in the processor's layout stay in it, and are multiplied there.
    Otherwise all are plain, which unpacks and copies them.
    """
    layers = dict(module.named_modules()) if packed else {}
    ready = {name for name, layer in layers.items() if isinstance(layer.__dict__.get("forward"), Packing)}
    state = {name: p.detach() for name, p in module.named_parameters()} if ready else module.state_dict()
    own.load_state_dict(state, assign=True)
    own.requires_grad_(False)
    for name in ready:
        own.get_submodule(name).__dict__["forward"] = layers[name].__dict__["forward"]
    for theirs, mine in zip(module.modules(), own.modules(), strict=True):
        for hook in theirs._forward_hooks.values():
            if getattr(hook, "__module__", "") == ADAPTERS:
                mine.register_forward_hook(hook)
        if isinstance(theirs, Linear) and isinstance(mine, Linear):
            mine.frozen.update(theirs.frozen)


def looks(seen: Seen) -> list[Look]:
    """Return a look at some of the model calls, at equal distances, the last one among them; made once."""
    if "looks" not in seen.kept:
        unet = own_unet(seen)
        many = MANY if sum(p.numel() for p in unet.parameters()) <= SMALL else FEW
        n = min(many, len(seen.frames))
        frames = [seen.frames[(k + 1) * len(seen.frames) // n - 1] for k in range(n)]
        seen.kept["looks"] = [each for part in _alike(frames) for each in look(unet, part)]
    found: list[Look] = seen.kept["looks"]
    return found


def _alike(frames: list[Frame]) -> list[list[Frame]]:
    """Return the frames, in order, in parts that the UNet can be called with at once: each call of a small sample costs
    more than its arithmetic."""
    most = max(1, TOGETHER // frames[0].call.x.numel())
    parts: list[list[Frame]] = []
    for frame in frames:
        if parts and len(parts[-1]) < most and _shapes(parts[-1][0].call) == _shapes(frame.call):
            parts[-1].append(frame)
        else:
            parts.append([frame])
    return parts


def _shapes(call: Any) -> Any:
    if isinstance(call, Tensor):
        return call.shape
    return tuple(map(_shapes, call)) if isinstance(call, (tuple, list)) else call is None


def _joined(each: Sequence[Any]) -> Any:
    """Return tensors of batch 1 as one, also inside tuples and lists."""
    if isinstance(each[0], (tuple, list)):
        return type(each[0])(map(_joined, zip(*each, strict=True)))
    return torch.cat(list(each)) if isinstance(each[0], Tensor) else each[0]


@torch.no_grad()
def look(unet: UNet, frames: Sequence[Frame]) -> list[Look]:
    """Call ``unet``, which must be the caller's own, once, with what the run gave it in each of ``frames``, whose
    arguments have the same shapes."""
    watch, calls = _Watch(unet), [frame.call for frame in frames]
    try:
        t = torch.tensor([float(call.t) for call in calls], device=calls[0].x.device)
        out = unet(
            torch.cat([call.x for call in calls]), t, *map(_joined, zip(*(call[2:] for call in calls), strict=True))
        )
    finally:
        watch.end()
    maps = {name: torch.stack(each).mean(dim=0) for name, each in watch.maps.items()}
    operations = Counter({name: count // len(frames) for name, count in watch.operations.items()})
    return [
        Look(
            frame=frame,
            out=out[k : k + 1],
            maps={name: each[k].cpu() for name, each in maps.items()},
            features={name: each[k] for name, each in watch.features.items()},
            shapes=watch.shapes,
            shifts={name: each[k] for name, each in watch.shifts.items()},
            operations=operations,
        )
        for k, frame in enumerate(frames)
    ]


class _Watch:
    """Recorder that is put on a UNet for one call: recording kernels, and hooks on its parts. What it keeps of a batch
    is that of each of its pictures; ``operations`` are those of all."""

    def __init__(self, unet: UNet) -> None:
        self.maps: dict[str, list[Tensor]] = {}
        self.features: dict[str, list[tuple[float, float]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shifts: dict[str, list[tuple[float, float]]] = {}
        self.operations: Counter[str] = Counter()
        self.undo = count_in(unet, self.operations)
        for name, part in unet.named_modules():
            if isinstance(part, SpatialTransformer):
                self._transformer(name, part)
            if isinstance(part, ResBlock) and part.time is not None:
                self.undo.append(part.conv1.register_forward_hook(self._sizes(name)).remove)
                self.undo.append(part.time.register_forward_hook(self._shift(name)).remove)
            if isinstance(part, (DownLevel, Middle, UpLevel)) or name in ("conv_in", "conv_out"):
                self.undo.append(part.register_forward_hook(self._feature(name)).remove)

    def end(self) -> None:
        """Take everything off again, what was put on last first."""
        for undo in reversed(self.undo):
            undo()

    def _transformer(self, name: str, part: SpatialTransformer) -> None:
        size: list[int] = []

        def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            size[:] = args[0].shape[-2:]

        def keep(found: Tensor) -> None:
            place = found.mean(dim=1).transpose(1, 2)  # (B, L, h * w)
            self.maps.setdefault(name, []).append(place.reshape(*place.shape[:2], *size))

        self.undo.append(part.register_forward_pre_hook(before).remove)
        for block in part.blocks:
            self.undo.append(record(block.get_submodule("attn2"), keep))

    def _feature(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def after(layer: nn.Module, args: object, out: Tensor) -> None:
            values = out.float().flatten(1)
            self.features[name] = list(zip(values.mean(dim=1).tolist(), values.std(dim=1).tolist(), strict=True))
            self.shapes[name] = tuple(out.shape[1:])

        return after

    def _sizes(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def after(layer: nn.Module, args: object, out: Tensor) -> None:
            self.shifts[name] = [(0.0, size) for size in _mean_size(out)]
            self.shapes[name] = tuple(out.shape[1:])

        return after

    def _shift(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def after(layer: nn.Module, args: object, out: Tensor) -> None:
            sizes = [size for _, size in self.shifts[name]]
            self.shifts[name] = list(zip(_mean_size(out), sizes, strict=True))

        return after


def _mean_size(values: Tensor) -> list[float]:
    found: list[float] = values.float().abs().flatten(1).mean(dim=1).tolist()
    return found


def record(attention: nn.Module, keep: Callable[[Tensor], None]) -> Callable[[], None]:
    """Let an :class:`Attention` hand its weights to ``keep`` in every call; return what undoes it."""
    assert isinstance(attention, Attention)
    kernel = attention.kernel

    def recording(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        keep(weights(q, k, causal))
        return kernel(q, k, v, causal)

    attention.kernel = recording
    return lambda: _put_back(attention, kernel)


def _put_back(attention: Attention, kernel: Kernel) -> None:
    attention.kernel = kernel


@torch.no_grad()
def read_prompt(seen: Seen, name: str, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return, for int64 ``ids`` (1, L), the causal attention of each layer of the text encoder of that ``name``, (L, L)
    each, averages over heads, and the output of its last layer (L, width). The model's encoder is left alone."""
    encoder, own = seen.pipe.parts[name], build_part(seen.pipe.config, name)
    assert isinstance(own, CLIPText)
    share(encoder, own)
    maps: list[Tensor] = []
    for layer in own.layers:
        record(layer.get_submodule("attn"), lambda found: maps.append(found[0].mean(dim=0).cpu()))
    return maps, own(ids.to(own.token.weight.device)).last[0].float().cpu()
