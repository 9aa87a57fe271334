"""Memory of a run, told before it starts: an :class:`Estimate`, from the same count that refuses runs which cannot fit.

A run has four stages, one behind the other: text, the picture that it begins from, denoising, decoding. Each takes the
weights that are in memory by then and, on top of them, what its networks hold at their peak (:mod:`peaks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from minidiff.config import ControlNetConfig, ModelConfig, T2IAdapterConfig, UNetConfig, VAEConfig
from minidiff.models.unet import skip_widths
from minidiff.pipeline.group_sizes import decoded_at_once, rows_at_once
from minidiff.pipeline.peaks import Peaks, way_down
from minidiff.storage.files import FRESH_MAP

STAGES = ("text", "image", "denoising", "decoding")
PART_OF = {"text": ("text_encoder", "text_encoder_2"), "image": ("vae",), "denoising": ("unet",), "decoding": ("vae",)}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Facts on which a run's memory depends.

    They are ``count`` pictures of ``height`` x ``width`` pixels, each predicted in ``rows`` rows of the batch (with the
    prompt, without, and more with AND), with contexts of ``tokens``.

    ``size``, ``vae_size``: bytes of a number in the UNet and in the VAE. ``encoded``: pictures encoded at once, 0 for
    none. ``decoded``: pictures decoded at once; ``tile``: the side in latents of the tiles in which they are, 0 for
    whole pictures. ``together``: rows go through the UNet together; else one prediction after the other. ``grouped``:
    large pictures are computed a few at a time.
    """

    count: int
    height: int
    width: int
    rows: int = 1
    tokens: int = 0
    size: int = 4
    vae_size: int = 4
    encoded: int = 0
    decoded: int = 1
    tile: int = 0
    together: bool = True
    grouped: bool = False
    controls: tuple[ControlNetConfig | T2IAdapterConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of a run in bytes, beyond what the process takes before the model is loaded (torch itself: 0.2 to 0.4 GB).

    ``weights``: those of all parts and controls. ``activations``: the most that the tensors of each stage take.
    ``peak``: the largest sum of both at one time, in the stage ``at``. ``mapped``: weights stay in their file, and are
    read from it as they are used: the system counts these pages for the process, and takes them back if it must.

    On CUDA this is memory of the card, without cuDNN's workspaces. Speed-ups (:mod:`minidiff.fast`) are not counted,
    but for those that trade time for memory.
    """

    weights: int
    activations: Mapping[str, int]
    peak: int
    at: str
    mapped: bool = False
    extent: Extent = field(repr=False)

    def __str__(self) -> str:
        e = self.extent
        what = (
            f"{e.count} pictures of {e.width} x {e.height}" if e.count > 1 else f"a picture of {e.width} x {e.height}"
        )
        stages = ", ".join(f"{stage} {shown(n)}" for stage, n in self.activations.items() if n)
        weights = f"weights {shown(self.weights)}{' (mapped)' if self.mapped else ''}"
        return f"{what}: {shown(self.peak)} at the peak ({self.at}); {weights}; activations: {stages}"


def shown(count: int) -> str:
    """Return a number of bytes for a reader, in units of 10**6 or 10**9."""
    return f"{count / 1e6:.3g} MB" if count < 10**9 else f"{count / 1e9:,.3g} GB"


def activations(config: ModelConfig, e: Extent, copies: bool = False) -> dict[str, int]:
    """Return the bytes that the tensors of each stage take at their peak. ``copies``: see :class:`Peaks`."""
    vae = config.vae
    factor = 1 if vae is None else vae.factor
    h, w = e.height // factor, e.width // factor
    pixels, latents = 3 * e.count * e.height * e.width, e.count * config.unet.in_channels * h * w
    encoders = [c for c in (config.text_encoder, config.text_encoder_2) if c is not None]
    texts = max((Peaks(e.count, copies).text_encoder(c) for c in encoders), default=0)
    taken = {
        "text": texts * e.size,
        "image": 0,
        "denoising": (_denoising(config, e, h, w, copies) + 8 * latents) * e.size,
    }
    if vae is None:
        return {**taken, "decoding": 2 * pixels * 4}
    if e.encoded:
        encoder = Peaks(e.encoded, copies).encoder(vae, e.height, e.width)
        taken["image"] = encoder * e.vae_size + pixels * 4
    if e.tile and max(h, w) > e.tile:
        decoder = Peaks(e.decoded, copies).decoder(vae, min(h, e.tile), min(w, e.tile)) + 2 * pixels
    else:
        few = e.decoded
        if e.grouped and isinstance(vae, VAEConfig):
            few = min(few, decoded_at_once(vae, h * w, e.vae_size))
        decoder = Peaks(few, copies).decoder(vae, h, w)
    return {**taken, "decoding": decoder * e.vae_size + pixels * 4}


def _denoising(config: ModelConfig, e: Extent, h: int, w: int, copies: bool) -> int:
    """Return the numbers that a model call holds at its peak, with the controls that steer it."""
    unet, rows = config.unet, e.count * e.rows
    context = rows * e.tokens * (unet.context_dim or 0)
    nets = [c for c in e.controls if isinstance(c, ControlNetConfig)]
    adapters = [c for c in e.controls if isinstance(c, T2IAdapterConfig)]
    batch = Peaks(rows if e.together else e.count, copies)
    few = min(batch.rows, rows_at_once(unet, h * w, e.size, 2 - e.rows % 2 if e.together else 1))
    group = Peaks(few, copies) if e.grouped else batch
    outputs = batch.rows * _outputs(unet, h, w) if nets else 0
    pixels = e.count * e.height * e.width * sum(c.image_channels for c in nets)
    hints = batch.rows * unet.levels[0].channels * h * w * len(nets)
    features = e.count * sum(_features(c, e.height, e.width) for c in adapters)
    copied = batch.rows * max((_features(c, e.height, e.width) for c in adapters), default=0)
    call = outputs + copied + group.unet(unet, h, w, e.tokens, steered=bool(nets), features=bool(adapters))
    for k, c in enumerate(nets):
        before = min(k, 1) * outputs
        call = max(call, before + batch.hint(c, e.height, e.width) + batch.rows * c.image_channels * e.height * e.width)
        call = max(call, before + batch.control_net(c, h, w, e.tokens), (before + outputs) + min(k, 1) * outputs)
    for adapter in adapters:
        call = max(call, Peaks(e.count, copies).features(adapter, e.height, e.width))
    return call + context + pixels + hints + features


def _outputs(c: UNetConfig, h: int, w: int) -> int:
    """Return the numbers that a ControlNet adds to a UNet, for one row."""
    areas = [height * width for height, width in way_down(c, h, w)]
    skips = [areas[0]]
    for k in range(len(areas)):
        skips += [areas[k]] * c.layers + areas[k + 1 : k + 2]
    return sum(n * area for n, area in zip(skip_widths(c), skips, strict=True)) + c.mid.channels * areas[-1]


def _features(c: T2IAdapterConfig, height: int, width: int) -> int:
    """Return the numbers of a T2I-Adapter's features of one picture."""
    area = (height // c.factor) * (width // c.factor)
    halved = [int(k > 1) if c.kind == "xl" else k for k in range(len(c.channels))]
    return sum(channels * (area >> 2 * k) for channels, k in zip(c.channels, halved, strict=True))


def numbers(parts: Mapping[str, nn.Module]) -> Mapping[str, tuple[int, int]]:
    """Return for each part of a model its weights, and how many of them a run from noise never reads: most of the table
    of tokens, and the half of the VAE that encodes."""
    found = {}
    for name, part in parts.items():
        total = sum(p.numel() for p in part.parameters())
        unread = part.get_submodule({"vae": "encoder"}.get(name, "token")) if name not in ("unet", "control") else None
        found[name] = (total, 0 if unread is None else sum(p.numel() for p in unread.parameters()))
    return found


def estimate(
    config: ModelConfig,
    parts: Mapping[str, nn.Module],
    extent: Extent,
    sizes: Mapping[str, int],
    beside: int = 0,
    *,
    copies: bool,
    mapped: bool,
    in_turn: bool,
) -> Estimate:
    """Return the memory of a run.

    ``parts``: those of the model, whose shapes count; ``sizes``: bytes of a weight in each. ``beside``: bytes of the
    controls' weights. ``mapped``: the weights stay in their file. ``in_turn``: each part is in memory only while it
    works.
    """
    taken = activations(config, extent, copies)
    found = numbers(parts)
    weights = {name: total * sizes[name] for name, (total, _) in found.items()}
    unread = {name: few * sizes[name] if mapped else 0 for name, (_, few) in found.items()}
    if extent.encoded:
        unread["vae"] = 0
    peak, at, read = 0, STAGES[2], 0 if mapped or in_turn else sum(weights.values())
    seen: set[str] = set()
    for stage, most in taken.items():
        own = [name for name in PART_OF[stage] if name in weights]
        if in_turn:
            read = sum(weights[name] - unread[name] for name in own)
            read += min(FRESH_MAP, read)  # of the file, beside what was made of it
        elif mapped and most:
            read += sum(weights[name] - unread[name] for name in own if name not in seen)
            seen.update(own)
        if most and read + most > peak:
            peak, at = read + most, stage
    return Estimate(
        weights=sum(weights.values()) + beside,
        activations=taken,
        peak=peak + beside,
        at=at,
        mapped=mapped,
        extent=extent,
    )


def reorders(device: torch.device) -> bool:
    """Return True if convolutions on ``device`` reorder what they read and write (oneDNN)."""
    return device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def least(config: ModelConfig, extent: Extent) -> int:
    """Return the bytes that the tensors of a run take at its peak, where no library adds copies of its own."""
    return max(activations(config, extent).values())
