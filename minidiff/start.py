"""Where a run begins: from noise, from a picture made noisy (image to image), or from a picture with a hole in it.

Image to image (Meng et al. 2022, SDEdit) adds as much noise to a picture as some row of the plan expects, and runs from
there. Inpainting does the same, and keeps what the mask does not cover, in one of two ways: an ordinary model is shown,
after every step, the known part of the picture at the noise of the next step (Lugmayr et al. 2022, without its
resampling); a model that was trained for it (Rombach et al. 2022, section 4.5) reads mask and masked picture as five
further channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.config import check
from minidiff.images import MASKED, Pictures, encode, spread
from minidiff.models.vae import VAE
from minidiff.noise import Source
from minidiff.samplers.method import Draw, Sampler
from minidiff.wrapped import Wrapped


class Start(NamedTuple):
    """The first sample (B, C, h, w), the sampler that goes on from it, and what the UNet reads beside (B, 5, h, w)."""

    x: Tensor
    sampler: Sampler[Any, Any]
    beside: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Keeping(Wrapped):
    """A sampler that, after every step, puts the known part of a picture back: what an ordinary model inpaints with.

    ``clean`` are the picture's latents and ``noise`` the same in every step, both (B, C, h, w); ``mask`` (B, 1, h, w)
    is 1 where the model paints. After row ``last`` the picture goes in as it is.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor
    last: int

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Draw) -> tuple[Tensor, Any]:
        x, state = self.inner.step(plan, i, x, out, state, draw)
        known = self.clean if i == self.last else plan.add_noise(self.clean, self.noise, i + 1)
        return (1 - self.mask) * known + self.mask * x, state


@dataclass(frozen=True)
class Beginning:
    """What every start needs: ``rows`` of ``plan`` are run by ``sampler``; noise comes from ``draw``, unless ``given``,
    and that of the steps from ``later``. A picture gets the noise of row ``noised``, which most programs run first.

    ``like`` is a tensor of the sample's shape (B, C, h, w), dtype and device; its values mean nothing.
    """

    plan: Any
    sampler: Sampler[Any, Any]
    rows: range
    draw: Source
    later: Source
    like: Tensor
    given: Tensor | None
    noised: int

    def noise(self) -> Tensor:
        """Standard normal noise, drawn or given."""
        return self._draw(tuple(self.like.shape)) if self.given is None else self.given

    def from_noise(self) -> Start:
        """Text to image: noise, at the level that the plan starts from."""
        # Euler counts noise in units of the picture (x = x0 + sigma * noise) and so starts from sigma_max * noise,
        # 14.6146 for SD; DDIM and PNDM keep the variance at 1 (x = a * x0 + s * noise) and start from plain noise.
        return Start(self.noise() * self.plan.init_noise_sigma, self.sampler)

    def from_picture(self, pictures: Pictures, vae: VAE, *, handed_over: bool) -> Start:
        """Image to image: the picture with as much noise as the first row expects.

        ``handed_over``: it comes from another model that stopped just there, with its noise in it.
        """
        clean = spread(self._latents(pictures, vae), len(self.like), "image")
        return Start(clean if handed_over else self._noisy(clean, self.noise()), self.sampler)

    def from_hole(self, pictures: Pictures, vae: VAE, *, strength: float, handed_over: bool, reads_mask: bool) -> Start:
        """Inpainting; ``reads_mask``: the UNet has the five channels more. At ``strength`` 1 it begins from pure noise.

        Every draw of the reference is drawn, also the one that it does not use: a sampler that draws in its steps
        gets the same noise.
        """
        assert pictures.mask is not None
        count, size = len(self.like), self.like.shape[2:]
        clean: Tensor | None = None
        if not reads_mask or handed_over or strength < 1:
            clean = spread(self._latents(pictures, vae), count, "image").contiguous()
        noise = self.noise()
        mask = spread(F.interpolate(pictures.mask, size=size), count, "mask").to(self.like)
        if handed_over and clean is not None:
            x = clean
        elif strength < 1 and clean is not None:
            x = self._noisy(clean, noise)
        else:
            x = noise * self.plan.init_noise_sigma
        if clean is not None and not reads_mask:
            if not pictures.encoded:
                pairs = max(len(pictures.pixels), len(pictures.mask)) if self.draw.shared else count
                self._draw((pairs, *self.like.shape[1:]))
            return Start(x, Keeping(self.sampler, clean, noise, mask, self.rows[-1]))
        check(not pictures.encoded, "image is latents; this model reads the masked picture, and needs its pixels")
        masked = pictures.pixels * (pictures.mask < MASKED)
        beside = spread(encode(vae, masked, count, self.draw, self.like.dtype), count, "image")
        return Start(x, self.sampler, torch.cat([mask, beside], dim=1))

    def _latents(self, pictures: Pictures, vae: VAE) -> Tensor:
        if pictures.encoded:
            return pictures.pixels.to(self.like)
        return encode(vae, pictures.pixels, len(self.like), self.draw, self.like.dtype).to(self.like.device)

    def _noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        noisy: Tensor = self.plan.add_noise(clean, noise, self.noised)
        return noisy

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return self.draw(shape, self.like.dtype, self.like.device)
