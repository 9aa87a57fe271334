"""A small picture of a run that is renewed while it runs.

A VAE is too slow to decode every step. Latents are nearly a picture already: each of their pixels stands for a square
of the picture, and its colour is close to a linear function of the channels. The function is fitted, once a run, to a
part of the run's own latents that the VAE decodes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.denoise import Step
from minidiff.pipeline.montage import enlarged
from minidiff.pipeline.png import marked, save_picture, to_pil

if TYPE_CHECKING:
    from PIL import Image

PART = 16  # latents of a side of what is decoded to fit the colours
SHARE = 0.02  # most of a run's time that is spent on its preview


class Preview:
    """File that shows the first picture of a run; call it with each :class:`Step`.

    ``decode``: a function from latents to pixels (1, 3, H, W) in [0, 1] that is used instead, such as
    :func:`weights_convert.open_decoder` gives. The file is written whole, and so rarely that it takes at most 2 % of
    the time. ``mark``: see :func:`save_picture`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        path: str | os.PathLike[str],
        decode: Callable[[Tensor], Tensor] | None = None,
        mark: bool = True,
    ) -> None:
        self.pipe, self.path, self.decode, self.mark = pipe, path, decode, mark
        self.colours: Tensor | None = None
        self.began = time.monotonic()
        self.spent = self.latest = 0.0  # seconds: in all, and for the latest picture

    def __call__(self, step: Step) -> None:
        """Renew the file if there was time enough since the run began."""
        begun = time.monotonic()
        if self.spent + self.latest > SHARE * (begun - self.began):
            return
        x0 = step.x0
        image = marked(enlarged(self.picture(step.x if x0 is None else x0)))
        save_picture(image, self.path, mark=self.mark)
        self.latest = time.monotonic() - begun
        self.spent += self.latest

    def picture(self, latents: Tensor) -> Image.Image:
        """Return the first entry of ``latents`` (B, C, h, w) as a picture of h x w pixels, or as ``decode`` has it."""
        with torch.no_grad():
            one = latents[:1]
            if self.decode is not None:
                return to_pil(self.decode(one))[0]
            if self.colours is None:
                self.colours = self.fitted(one)
            return to_pil(coloured(one.float(), self.colours).clamp(0, 1))[0]

    def fitted(self, latents: Tensor) -> Tensor:
        """Return the linear map from channels and 1 to colours, (C + 1, 3), by least squares on the middle part."""
        top, left = (max(0, (side - PART) // 2) for side in latents.shape[2:])
        part = latents[:, :, top : top + PART, left : left + PART]
        pixels = self.pipe.decode(part).float()
        wanted = F.adaptive_avg_pool2d(pixels, (part.shape[2], part.shape[3]))
        solution: Tensor = torch.linalg.lstsq(_features(part.float()), wanted.flatten(2)[0].t()).solution
        return solution


def coloured(latents: Tensor, colours: Tensor) -> Tensor:
    """Apply the map of :meth:`Preview.fitted` to (1, C, h, w): (1, 3, h, w)."""
    return (_features(latents) @ colours).t().reshape(1, -1, *latents.shape[2:])


def _features(latents: Tensor) -> Tensor:
    """Return the channels of each place and 1, (h * w, C + 1)."""
    channels = latents.flatten(2)[0].t()
    return torch.cat([channels, channels.new_ones(len(channels), 1)], dim=1)
