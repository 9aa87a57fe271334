"""Contrastive training of the bundled model's text encoder, as in CLIP (Radford et al. 2021).

A picture encoder and the text encoder each turn a batch into unit vectors, and are asked to find each picture's caption
among all captions of the batch: cross-entropy over the cosines, both ways. To be told apart from two hundred others, a
picture needs all that its caption says: colour, shape, size and place of everything. The picture encoder is then thrown
away. A UNet that has to discover by itself which of the words colour the star and which its background, from the error
in a few pixels under noise, takes many times as long.

One thing differs from CLIP: the vector is the mean over the end token and the padding behind it, not the end token
alone, since the UNet's cross-attention reads all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.pipeline import StableDiffusion
from minidiff.training.batch import Batch
from minidiff.training.data import ShapesStream

WIDTH = 128  # of the common space
WARMUP = 50  # steps
BETAS = (0.9, 0.98)
HOTTEST = math.log(100)  # the most that cosines are multiplied by, as in CLIP


class Report(NamedTuple):
    """``found``: the share of pictures whose own caption came first."""

    step: int
    loss: float
    found: float


class PictureEncoder(nn.Module):
    """Picture encoder, (B, 3, 64, 64) to (B, WIDTH). No pooling at the end, since the place of a thing matters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(16 * widths[-1], WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.out(self.layers(pixels).flatten(1))
        return out


def teach(pipe: StableDiffusion, stream: ShapesStream, steps: int, batch: int, rate: float) -> Iterator[Report]:
    """Train ``pipe.text_encoder`` in place, for ``steps`` of ``batch`` pairs; the rate falls along a half cosine."""
    torch.manual_seed(0)
    text = pipe.text_encoder.requires_grad_(True)
    picture, project = PictureEncoder(), nn.Linear(text.config.width, WIDTH, bias=False)
    heat = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    weights = [*text.parameters(), *picture.parameters(), *project.parameters(), heat]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=BETAS, weight_decay=0.01)
    curve = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / WARMUP) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    for k in range(steps):
        examples = Batch(*stream.batch(k * batch, batch))
        assert examples.captions is not None
        ids = pipe.tokenizer(list(examples.captions))
        end = (ids == text.config.end_token).float()[..., None]
        said = project((text(ids).last * end).sum(1) / end.sum(1))
        cosines = F.normalize(picture(examples.pixels), dim=-1) @ F.normalize(said, dim=-1).T
        scores = cosines * heat.clamp(max=HOTTEST).exp()
        own = torch.arange(batch)
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        curve.step()
        optimizer.zero_grad()
        yield Report(k + 1, float(loss.detach()), float((scores.argmax(1) == own).float().mean()))
    text.requires_grad_(False)
