"""The first sample of a run: noise, a noised picture (img2img), or a picture with a hole (inpainting).

Img2img (Meng et al. 2022, SDEdit) adds as much noise to a picture as a row of the plan expects, and runs from that row.
Inpainting does the same, and keeps the part that the mask does not cover in one of two ways. With an ordinary model,
the known part of the picture is put back after every step, at the noise level of the next one (Lugmayr et al. 2022,
without resampling). A model trained for inpainting (Rombach et al. 2022, section 4.5) reads the mask and the masked
picture as five further channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.config import check
from minidiff.models.vae import VAE
from minidiff.noise import Source
from minidiff.pipeline.images import MASKED, Pictures, encode, spread
from minidiff.pipeline.job import Keep, as_it_is


class Sample(NamedTuple):
    """First sample (B, C, h, w), what becomes of the sample after each step, and further UNet channels
    (B, 5, h, w) or None."""

    x: Tensor
    keep: Keep = as_it_is
    beside: Tensor | None = None


def putting_back(plan: Any, clean: Tensor, noise: Tensor, mask: Tensor, last: int) -> Keep:
    """Return the function that puts the known part of a picture back after every step, for inpainting with an ordinary
    model.

    ``clean`` holds the picture's latents and ``noise`` is the same in every step, both (B, C, h, w). ``mask``
    (B, 1, h, w) is 1 where the model paints. After row ``last`` the picture is put back without noise.
    """

    def keep(i: int, x: Tensor) -> Tensor:
        known = clean if i == last else plan.add_noise(clean, noise, i + 1)
        return (1 - mask) * known + mask * x

    return keep


@dataclass(frozen=True)
class FirstSample:
    """First sample of a run over ``rows`` of ``plan``: from noise, a picture, or a picture with a hole.

    Initial noise is ``given`` or drawn from ``draw``. A picture gets the noise of row ``noised``, in most programs the
    first row that is run. ``like`` is a tensor with the shape (B, C, h, w), dtype and device of the sample; its values
    are unused.
    """

    plan: Any
    rows: range
    noised: int
    draw: Source
    like: Tensor
    given: Tensor | None

    def noise(self) -> Tensor:
        """Return the initial standard normal noise, drawn or given."""
        return self._draw(tuple(self.like.shape)) if self.given is None else self.given

    def from_noise(self) -> Sample:
        """Return the first sample of text-to-image: noise at the level of the plan's first row."""
        # Euler keeps the picture at its own scale (x = x0 + sigma * noise) and starts from sigma_max * noise,
        # 14.6146 for SD. DDIM and PNDM keep the variance at 1 (x = a * x0 + s * noise) and start from plain noise.
        return Sample(self.noise() * self.plan.init_noise_sigma)

    def from_picture(self, pictures: Pictures, vae: VAE, *, handed_over: bool) -> Sample:
        """Return the first sample of img2img: the picture with as much noise as the first row expects.

        ``handed_over``: the picture comes from another model that stopped at this row, and has its noise already.
        """
        clean = spread(self._latents(pictures, vae), len(self.like), "image")
        return Sample(clean if handed_over else self._noisy(clean, self.noise()))

    def from_hole(
        self, pictures: Pictures, vae: VAE, *, strength: float, handed_over: bool, reads_mask: bool
    ) -> Sample:
        """Return the first sample of inpainting; at ``strength`` 1 it is pure noise. ``reads_mask``: the UNet has five
        further channels.

        All draws of the reference are made, including one whose result it does not use, so that samplers that draw
        noise in their steps get the same noise.
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
            return Sample(x, putting_back(self.plan, clean, noise, mask, self.rows[-1]))
        check(not pictures.encoded, "image is latents; this model reads the masked picture, and needs its pixels")
        masked = pictures.pixels * (pictures.mask < MASKED)
        beside = spread(encode(vae, masked, count, self.draw, self.like.dtype), count, "image")
        return Sample(x, beside=torch.cat([mask, beside], dim=1))

    def _latents(self, pictures: Pictures, vae: VAE) -> Tensor:
        if pictures.encoded:
            return pictures.pixels.to(self.like)
        return encode(vae, pictures.pixels, len(self.like), self.draw, self.like.dtype).to(self.like.device)

    def _noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        noisy: Tensor = self.plan.add_noise(clean, noise, self.noised)
        return noisy

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return self.draw(shape, self.like.dtype, self.like.device)
