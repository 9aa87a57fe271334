"""Scenes to pixels: flat shapes with smooth edges, drawn with signed distance functions.

A signed distance function gives the distance of a point from a shape's outline, here in pixels, negative inside.
Coverage falls from 1 to 0 within half a pixel on either side of the outline; there is no other smoothing. Polygons are
first folded along their mirror lines until one edge is left (after Quilez, "2D distance functions"), so a star costs
little more than a circle. Only sums, products, roots and comparisons of float32 are used, whose rounding is the same
everywhere: a picture has the same bits on any machine and in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64  # side of a picture in pixels

# Far apart, so that pictures of a small model can still be judged: the nearest two differ by 99 of 255.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 50),
    "green": (30, 165, 60),
    "blue": (35, 80, 225),
    "purple": (150, 45, 190),
    "pink": (255, 120, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}


@dataclass(frozen=True)
class Thing:
    """One shape. ``x``, ``y``: centre in pixels from the top left corner; ``radius``: half its width in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Contents of a picture: the colour of the background, and things that do not overlap."""

    background: str
    things: tuple[Thing, ...]


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance of (``x``, ``y``), in pixels right of and below the centre, from the shape; as all below."""
    return (x * x + y * y).sqrt() - r


def ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Ring from 0.55 of the radius outwards."""
    return ((x * x + y * y).sqrt() - 0.775 * r).abs() - 0.225 * r


def box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    outside = (dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0)


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return box(x, y, r, r)


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Plus sign with bars 0.66 of the radius wide."""
    return torch.minimum(box(x, y, r, 0.33 * r), box(x, y, 0.33 * r, r))


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral triangle, tip up, 2 ``r`` wide."""
    tip = r * (2 / math.sqrt(3))
    # Half its height lies a quarter of the tip's distance above the centre of its circumcircle.
    return pointed(x, y - 0.25 * tip, tip, 0.5 * tip, mirrors=(30,))


def star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Star with five tips, one up, 2 ``r`` wide, its dents at 0.45 of the tips' distance."""
    tip = r / math.sin(math.radians(72))
    shift = (1 - math.cos(math.radians(36))) / 2
    return pointed(x, y - shift * tip, tip, 0.45 * tip, mirrors=(18, 54))


def pointed(x: Tensor, y: Tensor, tip: Tensor, dent: Tensor, mirrors: Sequence[int]) -> Tensor:
    """Shape with tips and dents at two distances from the origin, the first tip straight up.

    ``mirrors``: lines, in degrees, along which the right half is folded; the last one goes through a dent.
    """
    x, y = x.abs(), -y
    for degrees in mirrors:
        nx, ny = -math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        below = (x * nx + y * ny).clamp(max=0)  # distance below the line
        x, y = (x - 2 * below * nx).abs(), y - 2 * below * ny
    angle = math.radians(mirrors[-1])
    ex, ey = dent * math.cos(angle), dent * math.sin(angle) - tip  # the edge, from the tip to the dent
    y = y - tip
    along = ((x * ex + y * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    dx, dy = x - along * ex, y - along * ey
    outside = torch.where(x * ey - y * ex < 0, 1.0, -1.0)  # which side of the edge
    return outside * (dx * dx + dy * dy).sqrt()


DISTANCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "ring": ring,
    "cross": cross,
}


def draw(scenes: Sequence[Scene]) -> Tensor:
    """Draw ``scenes``: float32 (B, 3, 64, 64) in [-1, 1]."""
    pixels = torch.stack([_colour(scene.background) for scene in scenes])[:, :, None, None]
    pixels = pixels.repeat(1, 1, SIDE, SIDE)
    centres = torch.arange(SIDE, dtype=torch.float32) + 0.5
    for place in range(max(len(scene.things) for scene in scenes)):
        for shape, distance in DISTANCE.items():
            rows = [i for i, s in enumerate(scenes) if len(s.things) > place and s.things[place].shape == shape]
            if not rows:
                continue
            things = [scenes[i].things[place] for i in rows]
            x, y, r = torch.tensor([(t.x, t.y, t.radius) for t in things]).T[:, :, None, None]
            cover = (0.5 - distance(centres - x, centres[:, None] - y, r)).clamp(0, 1)[:, None]
            colour = torch.stack([_colour(t.colour) for t in things])[:, :, None, None]
            pixels[rows] = pixels[rows] + cover * (colour - pixels[rows])
    return pixels


def _colour(name: str) -> Tensor:
    return torch.tensor(PALETTE[name], dtype=torch.float32) / 127.5 - 1
