"""Input pictures and masks: a path, a PIL image or a tensor is converted to the VAE's input, and then to latents.

A PIL image is resized with the Lanczos filter, a tensor with nearest neighbours, both only if the size differs. The
resizing, the order of the steps, and even the strides of the result (a PIL image is stored pixel by pixel, and
convolutions choose their kernel by the strides) are those of the reference, so that the latents are bit-identical.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.config import check, quote
from minidiff.console import warn
from minidiff.errors import ConfigError
from minidiff.models.taesd import TAESD
from minidiff.models.vae import VAE
from minidiff.noise import Source
from minidiff.pipeline.image_files import complaint, open_picture, to_eight_bits, unused
from minidiff.pipeline.recipe import Origin
from minidiff.pipeline.request import Request, basename

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | os.PathLike[str] | Image.Image | Tensor | Sequence[str | os.PathLike[str] | Image.Image]

Mode = Literal["RGB", "L"]
MASKED = 0.5  # mask values from here up are painted


@dataclass(frozen=True)
class Pictures:
    """Input pictures of a run. ``pixels``: (N, 3, H, W) in [-1, 1], or latents (N, C, h, w), scaled, if ``encoded``.

    ``mask``: (M, 1, H, W), 1 where the picture is repainted and 0 where it is kept; None for img2img.
    """

    pixels: Tensor
    encoded: bool
    mask: Tensor | None = None

    def origins(self, request: Request) -> dict[str, Origin]:
        """Return for the recipe where ``image`` and ``mask`` came from, with a hash of what the run sees."""
        seen = {"image": self.pixels, "mask": self.mask}
        return {k: Origin(basename(getattr(request, k)), digest(v)) for k, v in seen.items() if v is not None}


def digest(values: Tensor) -> str:
    """Return a hash of shape, dtype and values, 16 hex digits; "" for a tensor without values (a FakeTensor)."""
    found = values.detach().contiguous().cpu()
    if type(found) is not Tensor:
        return ""
    told = f"{found.dtype} {tuple(found.shape)} ".encode()
    return hashlib.sha256(told + found.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Opened:
    """Image and mask as they were opened, and the size (height, width) in pixels that the run takes them in."""

    image: list[Image.Image] | Tensor
    mask: list[Image.Image] | Tensor | None
    size: tuple[int, int]
    encoded: bool
    channels: int

    def resized(self) -> Pictures:
        """Return the pictures as numbers, resized. Raises :class:`ConfigError` for tensors with values out of range."""
        mask = None if self.mask is None else (numbers(self.mask, self.size, "L", 1, "mask") >= MASKED).float()
        if self.encoded:
            assert isinstance(self.image, Tensor)
            return Pictures(self.image, True, mask)
        return Pictures(2.0 * numbers(self.image, self.size, "RGB", self.channels, "image") - 1.0, False, mask)


def open_pictures(
    image: Picture,
    mask: Picture | None,
    height: int | None,
    width: int | None,
    factor: int,
    latent_channels: int,
    image_channels: int = 3,
) -> Opened:
    """Open ``image`` and ``mask``, to be resized to ``height`` x ``width``, by default their own size rounded down to
    multiples of ``factor``.

    Each is a path, a PIL image, a list of these, or a tensor (N, channels, H, W) with values in [0, 1]. An image with
    ``latent_channels`` is taken as latents. Pictures may have any mode (:mod:`.image_files`). Files are
    rotated by their Exif orientation, PIL images are not. Raises :class:`ConfigError` for invalid sizes, and
    :class:`CheckpointError` for a file that is missing or not a picture.
    """
    covered = None if mask is None else opened(mask, "mask")
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == latent_channels != image_channels:
        check(image.numel() > 0, f"image is a tensor of shape {tuple(image.shape)}, which holds nothing")
        size = (image.shape[2] * factor, image.shape[3] * factor)
        for name, given, side in (("height", height, size[0]), ("width", width, size[1])):
            kept = f"{name}={given}, but the image is latents of {side} pixels; they keep their size"
            check(given in (None, side), kept)
        _check_mask(covered, size)
        return Opened(image, covered, size, True, image_channels)
    found = opened(image, "image")
    own = size_of(found)
    size = (height or own[0] // factor * factor, width or own[1] // factor * factor)
    check(min(size) > 0, f"image of {own[1]} x {own[0]} pixels is too small; {factor} x {factor} is the least")
    _check_mask(covered, own)
    return Opened(found, covered, size, False, image_channels)


def _check_mask(mask: list[Image.Image] | Tensor | None, image: tuple[int, int]) -> None:
    """Raise :class:`ConfigError` for a mask of another size than the image, before either is resized."""
    own = image if mask is None else size_of(mask)
    sizes = f"mask is {own[1]} x {own[0]} pixels, the image {image[1]} x {image[0]}; they must be of one size"
    check(own == image, sizes)


def opened(given: Any, name: str) -> list[Image.Image] | Tensor:
    """Return tensors unchanged, and paths and PIL images as a list of PIL images, 8-bit RGB or L."""
    if isinstance(given, Tensor):
        shape = tuple(given.shape)
        fits = given.ndim == 4 and given.numel() > 0
        check(fits, f"{name} is a tensor of shape {shape}; (images, channels, height, width) is wanted")
        return given
    many = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    check(len(many) > 0, f"{name} is an empty list; give at least one")
    found = [_picture(one, name) for one in many]
    for one in found:
        check(one.size == found[0].size, f"{name}s of one run must be of one size, got {found[0].size} and {one.size}")
    return found


def _picture(given: Any, name: str) -> Image.Image:
    """Return one picture, given as a path or a PIL image, as 8-bit RGB or L."""
    from PIL import Image

    if isinstance(given, (str, os.PathLike)):
        return open_picture(given, name)
    kinds = "a path, a PIL image, a list of them, or a tensor (B, C, H, W)"
    check(isinstance(given, Image.Image), f"{name} must be {kinds}, got {type(given).__name__}")
    try:
        image, parts = to_eight_bits(given), list(unused(given))
    except MemoryError:
        raise
    except Exception as e:  # of a file that was opened and is read only now, or of a mode that the library half knows
        raise ConfigError(f"{name} cannot be read ({complaint(e)})") from None
    for part in parts:
        warn(f"{name} has {part}")
    return image


def size_of(found: list[Image.Image] | Tensor) -> tuple[int, int]:
    """Return (height, width)."""
    if isinstance(found, Tensor):
        return found.shape[2], found.shape[3]
    return found[0].height, found[0].width


def numbers(
    found: list[Image.Image] | Tensor,
    size: tuple[int, int],
    mode: Mode,
    channels: int,
    name: str,
    least: float = 0,
) -> Tensor:
    """Return resized pictures as (N, channels, H, W) in [0, 1], float32. ``least``: smallest value of a tensor."""
    if isinstance(found, Tensor):
        shape = tuple(found.shape)
        check(found.shape[1] == channels, f"{name} is a tensor of shape {shape}; {channels} channels are wanted")
        wanted = f"in {least:g}..1"
        check(found.is_floating_point(), f"{name} is a tensor of {found.dtype}; float values {wanted} are wanted")
        low, high = found.aminmax()
        inside = bool(low >= least) and bool(high <= 1)
        check(inside, f"{name} has values from {quote(low.item())} to {high:g}, not {wanted}")
        found = found.float()
        return found if size_of(found) == size else F.interpolate(found, size=size)
    from PIL import Image

    arrays = []
    for picture in found:
        resized = picture.resize(size[::-1], resample=Image.Resampling.LANCZOS).convert(mode)
        arrays.append(np.asarray(resized).astype(np.float32) / 255.0)
    stacked = np.stack(arrays)
    stacked = stacked[..., None] if stacked.ndim == 3 else stacked
    return torch.from_numpy(stacked.transpose(0, 3, 1, 2))  # a view: its strides affect the bits of the results


# --- to latents ------------------------------------------------------------------------------------------------------


def encode(vae: VAE, pixels: Tensor, count: int, noise: Source, dtype: torch.dtype) -> Tensor:
    """Encode ``pixels`` (N, 3, H, W) in [-1, 1] and draw a sample: latents of unit variance, in ``dtype``.

    With one noise stream for all, the N pictures are encoded and sampled together: (N, C, h, w). With one stream for
    each of ``count`` images, each picture is encoded alone, and every image has its own sample: (count, C, h, w).
    """
    weight = vae.encoder.conv_in.weight
    pixels = pixels.to(weight)
    if noise.shared:
        found = [vae.encode(pixels)]
        drawn = [noise(tuple(found[0].mean.shape), weight.dtype, weight.device)]
    else:
        alone = [vae.encode(pixels[k : k + 1]) for k in range(len(pixels))]
        found = [alone[k] for k in owners(len(pixels), count, "image")]
        each = noise((count, *alone[0].mean.shape[1:]), weight.dtype, weight.device)
        drawn = [each[k : k + 1] for k in range(count)]
    latents = torch.cat([f.sample(noise=d) for f, d in zip(found, drawn, strict=True)])
    return vae.config.scaling_factor * latents.to(dtype)


def decode(vae: VAE | TAESD, latents: Tensor) -> Tensor:
    """Decode latents of a run (B, C, h, w) to pixels (B, 3, H, W), about in [-1, 1]."""
    latents = latents.to(vae.decoder.conv_in.weight)  # its device and dtype
    # Division by the factor: multiplication by its reciprocal would round differently.
    return vae.decode(latents / vae.config.scaling_factor)


def spread(given: Tensor, count: int, name: str) -> Tensor:
    """Spread ``given`` (N, ...) over the images of a run, (count, ...), as :func:`owners` assigns them."""
    return torch.cat([given[k : k + 1] for k in owners(len(given), count, name)])


def owners(n: int, count: int, name: str) -> list[int]:
    """Return, for each of ``count`` images, which of ``n`` pictures it reads: the only one, its prompt's, or its own.

    Raises :class:`ConfigError` if they cannot be distributed evenly.
    """
    check(count % n == 0, f"{n} {name}s for {count} pictures; give one, one for each prompt, or one for each picture")
    return [k * n // count for k in range(count)]
