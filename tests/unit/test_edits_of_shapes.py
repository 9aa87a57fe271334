"""Image to image and inpainting with the bundled model, judged by what the pictures show."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import minidiff
from minidiff.pipeline.png import to_pil, to_unit
from minidiff.training.scenes import Scene, Thing, draw

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))  # at the end: see test_eval_shapes.py
import _judge

OF = 8  # pictures a test; other processors round otherwise, so one or two may differ


def drawn(x: float, y: float) -> Image.Image:
    """A large red circle at (x, y) on white."""
    return to_pil(to_unit(draw([Scene("white", (Thing("circle", "red", "large", x, y, 13.0),))])))[0]


def read(image: Image.Image) -> _judge.Seen:
    return _judge.see(np.asarray(image, dtype=np.float64))


def test_another_colour_is_painted_where_the_thing_was() -> None:
    sd, right = minidiff.bundled(), 0
    for seed, (x, y) in enumerate([(16, 32), (48, 32), (32, 16), (32, 48)]):
        images = sd.generate(
            "a large blue circle on a white background",
            image=drawn(x, y),
            strength=0.7,
            steps=20,
            num_images=OF // 4,
            seed=10 * seed,
        )
        for image in images:
            things = read(image).things
            right += len(things) == 1 and (things[0].shape, things[0].colour) == ("circle", "blue") and (
                abs(things[0].x - x) < 4 and abs(things[0].y - y) < 4
            )  # fmt: skip
    assert right >= OF - 1


def test_a_star_is_painted_into_the_hole_and_the_rest_stays() -> None:
    sd, hole = minidiff.bundled(), np.zeros((64, 64), np.uint8)
    hole[:, 32:] = 255
    prompt = "a large red circle left of a blue star on a white background"
    options = dict(image=drawn(16, 32), mask=Image.fromarray(hole), steps=20, num_images=OF, seed=0)
    images = sd.generate(prompt, **options)
    assert sum(_judge.judge(read(image), _judge.parse(prompt)).right for image in images) >= OF - 2
    other = "a large red circle left of a small green ring on a white background"
    latents = [sd.generate(p, output="latent", **{**options, "num_images": 2}) for p in (prompt, other)]
    outside, inside = (torch.equal(*(x[..., part] for x in latents)) for part in (slice(8), slice(8, None)))
    assert outside
    assert not inside
