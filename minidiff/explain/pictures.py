"""Samples to pictures, and pictures into the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.page.html import Html, data_uri, tag
from minidiff.page.languages import Text, label
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.png import to_pil, to_unit
from minidiff.pipeline.preview import Preview, coloured

if TYPE_CHECKING:
    from PIL import Image

EXACT = 64 * 64 * 4  # numbers of a sample up to which each one is decoded; beyond, its colours are fitted
EXACT_WEIGHTS = 20_000_000  # and of a decoder
TOGETHER = 5  # samples that are decoded in one call
SIDE = 256  # longest side in pixels of a picture in the page
QUALITY = 85


class Painter:
    """Function from samples to pictures. ``exact``: they are decoded by the VAE, or are pixels already; otherwise the
    colour of each place is a linear function of its channels, fitted to the part of the result that the VAE decodes
    (:class:`minidiff.pipeline.preview.Preview`), since decoding every step would take longer than the run."""

    def __init__(self, pipe: Pipeline, result: Tensor) -> None:
        self.pipe = pipe
        vae = pipe.config.vae
        weights = 0 if vae is None else sum(p.numel() for p in pipe.parts["vae"].parameters())
        self.exact = vae is None or (weights <= EXACT_WEIGHTS and result[0].numel() <= EXACT)
        self.colours = None if self.exact else Preview(pipe, "").fitted(result[:1])

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return (1, C, h, w) as (3, H, W) in [0, 1]."""
        return self.each([x])[0]

    @torch.no_grad()
    def each(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Return the picture of each sample. A few are decoded at once, which changes them by rounding."""
        if self.colours is not None:
            return [coloured(x[:1].float(), self.colours)[0].clamp(0, 1).cpu() for x in samples]
        parts = [samples[k : k + TOGETHER] for k in range(0, len(samples), TOGETHER)]
        return [p for part in parts for p in self.pipe.decode(torch.cat([x[:1] for x in part])).float().cpu()]


def false_colours(x: Tensor, reach: float = 3.0) -> Tensor:
    """Return the first three channels of (1, C, h, w) as red, green and blue, (3, h, w): -reach black, reach full."""
    planes = x[0, :3].float().cpu()
    planes = planes if len(planes) == 3 else planes[:1].expand(3, -1, -1)
    return to_unit(planes / reach)


def img(picture: Tensor, alt: Text, cls: str | None = None, side: int = SIDE) -> Html:
    """Return a picture (3, H, W) in [0, 1] as an element, scaled down to ``side`` pixels if it is larger. ``alt``: what
    it shows."""
    words = label(alt)
    height, width = picture.shape[1:]
    if max(height, width) > side:
        scale = side / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        picture = F.interpolate(picture[None], size, mode="area")[0]
    return tag(
        "img", src=uri(to_pil(picture[None])[0]), alt=words, cls=cls, width=picture.shape[2], height=picture.shape[1]
    )


def uri(image: Image.Image) -> str:
    """Return an image as an address that holds it: WebP, of which no eye sees the loss."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    return data_uri(buffer.getvalue(), "image/webp")
