"""Controls: networks beside a model that read a picture and steer a run by it, ControlNets and T2I-Adapters.

    edges = minidiff.load("canny.safetensors")
    sd.generate("a castle", controls=[minidiff.Control(edges, "edges.png", weight=0.8, high=0.7)])

A :class:`ControlModel` is such a network, loaded; a :class:`Control` is one with its picture, as a request names it;
:class:`Steering` is what a run makes of them. At a row of the plan where some are at work, the UNet is called by way of
a :class:`SteeredUNet`, which hands it what the networks say: ``residuals`` and ``features``. Nothing is kept on the
model, so that runs with other controls, or none, may share it. The arithmetic follows the order of the reference.

``soft`` weighs the outputs by depth: the deepest counts whole, each one above it less than the one below by this factor
(0.825 is usual). ``guess`` does so along a fixed curve, from 0.1 to 1, and steers only the prediction with the prompt,
so that the picture alone can say what is there (Zhang et al. 2023, section 3.5: "guess mode").
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from minidiff.config import ControlConfig, ControlNetConfig, ModelConfig, T2IAdapterConfig, UNetConfig, check, quote
from minidiff.errors import CheckpointError
from minidiff.models.unet import Residuals, UNet, skip_widths
from minidiff.pipeline import images
from minidiff.pipeline.model import Model
from minidiff.pipeline.recipe import Steered
from minidiff.pipeline.request import basename

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.pipeline.images import Picture

LARGEST = 1e4  # weight; beyond, nothing but noise could come

Own = TypeVar("Own", bound=Model)


class ControlModel(Model):
    """A ControlNet or a T2I-Adapter. Create it with :func:`minidiff.load` or ``weights_convert.load``.

    ``net`` is the network. :mod:`minidiff.fast` makes it faster, as it does a pipeline.
    """

    config: ControlConfig

    @classmethod
    def _own(cls: type[Own], config: ModelConfig | ControlConfig, source: str) -> type[Own]:
        if isinstance(config, ModelConfig):
            raise CheckpointError(f"{source}: a {config.family} model, no control; open it by minidiff.load")
        return cls

    @property
    def net(self) -> nn.Module:
        """The network: a :class:`~minidiff.models.control.ControlNet` or
        :class:`~minidiff.models.t2i_adapter.T2IAdapter`."""
        return self.parts["control"]

    def __repr__(self) -> str:
        """Summary in a few lines: family, size, and active speed-ups."""
        return "\n  ".join([f"{type(self).__name__}: {self.config.family}", self._sizes(), *self._done()])


@dataclass(frozen=True, eq=False)
class Control:
    """A control of a request: a loaded ``model`` with the ``picture`` that it reads.

    ``picture``: a path, a PIL image, a list of these, or a tensor (N, C, H, W) in [0, 1], as its model expects it
    (edges, depth, a pose, ...); it is resized to the size of the run. For ControlNets that were trained for inpainting,
    pixels to be painted are -1, in a tensor. ``weight``: how much it counts. ``low``, ``high``: the part of the way,
    from noise (0) to picture (1) and counted in model calls, on which it is at work. ``soft`` and ``guess`` are
    explained in :mod:`minidiff.adapters.control`.

    Raises :class:`ConfigError` for values out of range.
    """

    model: Model  # as type checkers see what minidiff.load returns; anything but a ControlModel is refused
    picture: Picture
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    _: KW_ONLY
    soft: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        loads = "minidiff.load or weights_convert.load gives one"
        is_model = isinstance(self.model, ControlModel)
        shown = quote(self.model if isinstance(self.model, str) else type(self.model))
        check(is_model, f"model={shown} of a control must be a loaded ControlNet or T2I-Adapter; {loads}")
        for name in ("weight", "low", "high", "soft"):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
            check(real, f"{name}={quote(value)} of a control must be a finite number")
        check(abs(self.weight) <= LARGEST, f"weight={self.weight:g} of a control must lie in {-LARGEST:g}..{LARGEST:g}")
        ordered = 0 <= self.low < self.high <= 1
        check(ordered, f"low={self.low:g}, high={self.high:g} of a control must be 0 <= low < high <= 1")
        check(0 < self.soft <= 1, f"soft={self.soft:g} of a control must lie in 0..1, without 0")
        check(isinstance(self.guess, bool), f"guess={quote(self.guess)} of a control must be True or False")
        check(not self.guess or self.soft == 1, "soft and guess both weigh a control's outputs by depth; give one")

    def rows(self, rows: range, total: int) -> set[int]:
        """Return those of the ``rows`` of a plan with ``total`` rows at which this control is at work: each that lies
        between ``low`` and ``high`` as a whole, where the way is from the first of ``rows`` to the end of the plan."""
        n = total - rows.start
        return {i for k, i in enumerate(rows) if self.low <= k / n and (k + 1) / n <= self.high}


@dataclass(eq=False)
class Prepared:
    """A control of a run. ``opened``: its picture; ``pixels``: the same as numbers, a row for each picture of the run,
    and ``hash`` of them.

    ``features``: those of a T2I-Adapter, likewise. ``hints``: what a ControlNet's first network made of the picture, by
    number of copies in the batch: computed once a run.
    """

    control: Control
    where: str
    opened: list[Image.Image] | Tensor
    hash: str = ""
    pixels: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)
    hints: dict[int, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> ControlModel:
        return cast(ControlModel, self.control.model)

    @property
    def net(self) -> Any:
        return self.model.net

    @property
    def config(self) -> ControlNetConfig | T2IAdapterConfig:
        return self.model.config.control

    def scales(self, count: int, device: torch.device) -> Sequence[Tensor | float]:
        """Return the factors of ``count`` outputs, the deepest last."""
        c = self.control
        if c.guess and not getattr(self.config, "pooled", False):
            return list(torch.logspace(-1, 0, count, device=device) * c.weight)
        return [float(c.weight * c.soft ** (count - 1 - k)) for k in range(count)]

    def hint(self, copies: int) -> Tensor:
        """Return what the network before a ControlNet's picture makes of ``copies`` of it, one behind the other."""
        if copies not in self.hints:
            assert self.pixels is not None
            self.hints[copies] = self.net.hint(torch.cat([self.pixels] * copies))
        return self.hints[copies]

    def residuals(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None,
        added: tuple[Tensor, Tensor] | None,
        count: int,
        guided: bool,
    ) -> tuple[list[Tensor], Tensor]:
        """Return what a ControlNet adds, for a batch of one or more predictions of each of ``count`` pictures;
        ``guided``: the first is that without the prompt."""
        c = self.config
        assert isinstance(c, ControlNetConfig)
        half = guided and (self.control.guess or c.pooled)

        def own(given: Any) -> Any:
            return given[count:] if half and isinstance(given, Tensor) and given.ndim > 0 else given

        seen = own(x)
        if c.in_channels < x.shape[1]:  # without the mask and the masked picture of inpainting
            seen = seen[:, : c.in_channels].contiguous()
        sizes = None if added is None or c.added_dim is None else (own(added[0]), own(added[1]))
        down, mid = self.net(seen, own(t), own(context), self.hint(len(seen) // count), sizes)
        scales = self.scales(len(down) + 1, x.device)
        every = [_times(r, s) for r, s in zip([*down, mid], scales, strict=True)]
        if c.pooled:
            every = [r.mean(dim=(2, 3), keepdim=True) for r in every]
        if half:
            every = [torch.cat([torch.zeros_like(r[:count]), r]) for r in every]
        return every[:-1], every[-1]


class SteeredUNet:
    """A UNet under controls, called as the UNet is. ``count``: pictures of the run; ``guided``: the first prediction of
    each is that without the prompt."""

    def __init__(self, unet: UNet, controls: Sequence[Prepared], count: int, guided: bool) -> None:
        self.unet, self.count, self.guided = unet, count, guided
        self.nets = [c for c in controls if isinstance(c.config, ControlNetConfig)]
        self.adapters = [c for c in controls if not isinstance(c.config, ControlNetConfig)]

    @property
    def config(self) -> UNetConfig:
        """Config of the UNet."""
        return self.unet.config

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict, with the sum of what the controls say."""
        residuals: Residuals | None = None
        for control in self.nets:
            down, mid = control.residuals(x, t, context, added, self.count, self.guided)
            if residuals is not None:
                down, mid = [a + b for a, b in zip(residuals[0], down, strict=True)], residuals[1] + mid
            residuals = down, mid
        features: list[Tensor] | None = None
        for control in self.adapters:
            found = control.features
            features = found if features is None else [a + b for a, b in zip(features, found, strict=True)]
        if features is not None:
            features = [torch.cat([f] * (len(x) // self.count)) for f in features]
        out: Tensor = self.unet(x, t, context, added, guidance, residuals, features)
        return out


class Steering:
    """The controls of one run: their pictures, and the UNet of each row."""

    def __init__(self, unet: UNet, controls: Sequence[Control]) -> None:
        """Open the controls' pictures. Raises :class:`CheckpointError` and :class:`ConfigError` for what is none."""
        self.unet = unet
        self.controls: list[Prepared] = []
        for k, control in enumerate(controls):
            where = f"controls[{k}]"
            self.controls.append(Prepared(control, where, images.opened(control.picture, f"{where}.picture")))
        self.count = 0

    def size(self, factor: int) -> tuple[int, int] | None:
        """Return height and width of the first control's picture, rounded down to what the models can have."""
        for one in self.controls:
            c = one.config
            factor = math.lcm(factor, c.factor) if isinstance(c, T2IAdapterConfig) else factor
        if not self.controls:
            return None
        height, width = images.size_of(self.controls[0].opened)
        size = (height // factor * factor, width // factor * factor)
        what = f"{self.controls[0].where}.picture of {width} x {height} pixels is too small"
        check(min(size) > 0, f"{what}; {factor} x {factor} is the least")
        return size

    def fits(self, config: ModelConfig, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        """Raise :class:`ConfigError` for a control that does not fit the model of ``config``, or latents of ``shape``
        (B, C, h, w)."""
        for one in self.controls:
            model, c = one.model, one.config
            told = f"{one.where} ({model.name or model.config.family})"
            problem = _problem(c, config, shape)
            check(problem is None, f"{told}: {problem}")
            here = (model.device.type, model.dtype)
            is_near = here == (device.type, dtype)
            both = f"computes in {here[1]} on {here[0]}, the model in {dtype} on {device.type}"
            check(is_near, f"{told}: {both}; load both alike, or move it with .to(device, dtype)")

    def prepare(self, shape: tuple[int, ...], factor: int) -> None:
        """Turn the pictures into numbers, for latents of ``shape`` (B, C, h, w), and compute what is computed once."""
        self.count = shape[0]
        size = (shape[2] * factor, shape[3] * factor)
        for one in self.controls:
            model, channels = one.model, one.config.image_channels
            name = f"{one.where}.picture"
            mode: images.Mode = "L" if channels == 1 else "RGB"
            found = images.numbers(one.opened, size, mode, channels, name, least=-1)
            one.hash, pixels = images.digest(found), found.to(model.device, model.dtype)
            if isinstance(one.config, ControlNetConfig):
                one.pixels = images.spread(pixels, self.count, name).contiguous()
                continue
            with torch.no_grad():
                features = one.net(pixels)
            self.rest()
            scales = one.scales(len(features), pixels.device)
            weighed = [_times(f, s) for f, s in zip(features, scales, strict=True)]
            one.features = [images.spread(f, self.count, name) for f in weighed]

    def unets(self, rows: range, total: int, alone: Collection[int]) -> dict[int, SteeredUNet]:
        """Return the UNet of each row at which a control is at work. ``total``: rows of the whole plan; ``alone``: rows
        without guidance.

        Raises :class:`ConfigError` for a control that is at work at none.
        """
        at_work = [one.control.rows(rows, total) for one in self.controls]
        for one, where in zip(self.controls, at_work, strict=True):
            c = one.control
            part = f"low={c.low:g}, high={c.high:g} holds none of the {len(rows)} model calls"
            check(len(where) > 0, f"{one.where}: {part}; take more steps or a larger part")

        @functools.cache  # rows under the same controls share one
        def steered(which: tuple[int, ...], guided: bool) -> SteeredUNet:
            return SteeredUNet(self.unet, [self.controls[k] for k in which], self.count, guided)

        each = {i: tuple(k for k, where in enumerate(at_work) if i in where) for i in rows}
        return {i: steered(which, i not in alone) for i, which in each.items() if which}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by their place in the request."""
        return {one.where: one.net for one in self.controls}

    @property
    def notes(self) -> tuple[Steered, ...]:
        """Entries of the recipe, one a control."""
        return tuple(
            Steered(
                name=one.model.name or None,
                hash=one.model.identity,
                picture=basename(one.control.picture),
                picture_hash=one.hash or None,
                weight=float(one.control.weight),
                low=float(one.control.low),
                high=float(one.control.high),
                soft=float(one.control.soft),
                guess=one.control.guess,
            )
            for one in self.controls
        )

    def rest(self) -> None:
        """Free what is needed again only if the run is: hints, and weights of controls that are in memory only while
        they work (``low_memory``)."""
        for one in self.controls:
            one.hints.clear()
            if one.model.low_memory is not None:
                one.model.low_memory.free()


def _times(tensor: Tensor, scale: Tensor | float) -> Tensor:
    return tensor if isinstance(scale, float) and scale == 1 else tensor * scale


def _problem(c: ControlNetConfig | T2IAdapterConfig, config: ModelConfig, shape: tuple[int, ...]) -> str | None:
    """Return why a control cannot steer a model at latents of ``shape``, or None if it can."""
    unet, vae = config.unet, config.vae
    if isinstance(c, T2IAdapterConfig):
        return _adapter_problem(c, config, shape)
    if skip_widths(c) != skip_widths(unet) or c.mid.channels != unet.mid.channels or len(c.levels) != len(unet.levels):
        return f"its outputs are {skip_widths(c)} channels wide, the skips of this {config.family} {skip_widths(unet)}"
    if c.context_dim != unet.context_dim:
        return f"it reads prompts of width {c.context_dim}, and this {config.family} model has {unet.context_dim}"
    if c.added_dim is not None and c.added_dim != unet.added_dim:
        return f"it reads sizes beside the prompt ({c.added_dim} numbers), this {config.family} model {unet.added_dim}"
    if vae is not None and c.factor != vae.factor:
        return f"it makes 1 of {c.factor} pixels along a side, and the VAE of this {config.family} 1 of {vae.factor}"
    if c.in_channels > unet.in_channels:
        return f"it reads {c.in_channels} channels, and the UNet of this {config.family} {unet.in_channels}"
    return None


def _adapter_problem(c: T2IAdapterConfig, config: ModelConfig, shape: tuple[int, ...]) -> str | None:
    """Return the same for a T2I-Adapter."""
    unet, factor = config.unet, 1 if config.vae is None else config.vae.factor
    height, width = shape[2] * factor, shape[3] * factor
    if height % c.factor or width % c.factor:
        return f"{width} x {height} pixels are not divisible by {c.factor}, as it needs them"
    wanted = _feature_shapes(unet, shape[2:])
    found, h, w = [], height // c.factor, width // c.factor
    for i, channels in enumerate(c.channels):
        if i == 2 if c.kind == "xl" else i > 0:
            h, w = -(-h // 2), -(-w // 2)
        found.append((channels, h, w))
    if found != wanted[: len(found)] or len(found) < len(unet.levels):
        return f"its features have the shapes {found}, the UNet of this {config.family} takes {wanted}"
    return None


def _feature_shapes(unet: UNetConfig, size: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the shapes (C, h, w) of the features that a UNet takes, for latents of ``size``: one a level, one for the
    middle."""
    h, w = size
    found = []
    for i, level in enumerate(unet.levels):
        here, last = (h, w), i == len(unet.levels) - 1
        if not last:
            h, w = -(-h // 2), -(-w // 2)
        found.append((level.channels, *(here if level.attention != "none" or last else (h, w))))
    return [*found, (unet.mid.channels, h, w)]
