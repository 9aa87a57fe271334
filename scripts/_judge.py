"""Recognition of shapes in a picture by colour and by overlap with templates; no learned model, no drawing code.

Everything here is the judge's own: its reading of captions, its palette, its outlines. It is given a saved PNG and
nothing else, and must agree with the other side about the words only.

    each pixel takes the nearest colour of the palette; the frame's colour is the background
    what differs from it falls into connected pieces; specks are passed over
    each piece is cut out, scaled to one size, and laid over 6 shapes at several sizes and offsets; the largest overlap
    (area in common over area in all) names the shape
"""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from minidiff.training.captions import Facts, Named  # two records without any code

Array = npt.NDArray[np.float64]

SIDE = 64
PALETTE = {
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
NAMES = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# Half the width of a small, a medium and a large thing is 7, 9.6 and 13 pixels; these are the bounds between them.
SMALL_TO, MEDIUM_TO, LARGEST, SMALLEST = 8.2, 11.2, 16.5, 5.0
PLACES = {"left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48), "centre": (32, 32)}
NEAR = 7.0  # pixels from a place; neighbours are 16 apart

SPECK = 20  # pixels: the smallest thing, a small star, has 70
FRAME = 0.6  # this share of the outermost two rows of pixels must agree about the background
OVERLAP = 0.72  # less than this is no shape; drawn ones reach 0.85 even when small
RIM = 0.35  # a row or column belongs to a thing where it covers this share of a pixel: low, for the tips of stars


@dataclass(frozen=True)
class Found:
    """Thing in a picture. ``shape`` is None if no template fits; ``x``, ``y``, ``radius`` in pixels."""

    shape: str | None
    colour: str
    x: float
    y: float
    radius: float
    overlap: float

    @property
    def size(self) -> str | None:
        """Nearest of small, medium and large; None far outside them."""
        if not SMALLEST <= self.radius <= LARGEST:
            return None
        return "small" if self.radius < SMALL_TO else "medium" if self.radius < MEDIUM_TO else "large"

    @property
    def place(self) -> str | None:
        """Nearest place of those with names, or None."""
        gaps = {place: math.hypot(self.x - x, self.y - y) for place, (x, y) in PLACES.items()}
        nearest = min(gaps, key=gaps.__getitem__)
        return nearest if gaps[nearest] <= NEAR else None


@dataclass(frozen=True)
class Seen:
    """Contents of a picture: its background (None: no one colour), and its things from the largest to the smallest."""

    background: str | None
    things: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Correct parts of a caption in a picture; None where the caption says nothing of them.

    ``place`` is also the relation of two things. ``right``: shape, colour and background of everything as far as they
    are said, the relation of two, and neither more nor fewer things than named. Size and the place of a single thing
    are counted apart. ``all_right``: these as well, on a background of one colour.
    """

    background: bool | None
    shape: bool
    colour: bool | None
    size: bool | None
    place: bool | None
    right: bool
    all_right: bool


# ---- the caption ----

_SIZE = {"small": "small", "little": "small", "medium": "medium", "large": "large", "big": "large"}
_PLURAL = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}
_WORDS = (*_PLURAL, *SHAPES)
_THING = re.compile(rf"(\btwo )?(?:\b({'|'.join(_SIZE)}) )?(?:\b({'|'.join(NAMES)}) )?\b({'|'.join(_WORDS)})\b")
_GROUND = re.compile(rf"\b({'|'.join(NAMES)}|grey) background\b|\bon ({'|'.join(NAMES)}|grey)$")
_PLACE = re.compile(r"\b(?:on|at|in) (?:the )?(left|right|top|bottom|centre|center|middle)\b(?! of)")
_RELATION = re.compile(r"\b(left of|above)\b")


def parse(caption: str) -> Facts:
    """Parse ``caption``. Raises ValueError for one that is not in the language of the shapes."""
    ground, found = _GROUND.search(caption), _THING.findall(caption)
    things = [
        Named(_PLURAL.get(shape, shape), colour or None, _SIZE.get(size))
        for two, size, colour, shape in found
        for _ in range(2 if two else 1)
    ]
    if len(things) not in (1, 2) or any(bool(two) != (shape in _PLURAL) for two, _, _, shape in found):
        raise ValueError(f"{caption!r} does not name one or two things")
    background = None if ground is None else (ground[1] or ground[2]).replace("grey", "gray")
    place, relation = _PLACE.search(caption), _RELATION.search(caption)
    return Facts(
        background,
        tuple(things),
        place=re.sub("center|middle", "centre", place[1]) if place and len(things) == 1 else None,
        relation=relation[1] if relation else None,
    )


# ---- the picture ----


def read(path: str | os.PathLike[str]) -> Seen:
    """Return the contents of the PNG at ``path``. Raises ValueError unless it is 64 x 64."""
    from PIL import Image

    with Image.open(path) as image:
        return see(np.asarray(image.convert("RGB"), dtype=np.float64))


def see(pixels: Array) -> Seen:
    """Return the contents of a picture, (64, 64, 3) with levels 0..255."""
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"a picture of shape {pixels.shape}; the judge knows (64, 64, 3)")
    colours = np.array(list(PALETTE.values()), dtype=np.float64)
    nearest = ((pixels[:, :, None] - colours) ** 2).sum(-1).argmin(-1)
    inner = np.zeros((SIDE, SIDE), dtype=bool)
    inner[2:-2, 2:-2] = True
    counts = np.bincount(nearest[~inner], minlength=len(NAMES))
    ground = int(counts.argmax())
    name = NAMES[ground] if counts[ground] >= FRAME * counts.sum() else None
    pieces = [piece for piece in connected(nearest != ground) if piece.sum() >= SPECK]
    level = np.median(pixels[(nearest == ground)], axis=0)
    found = [_recognise(pixels, nearest, piece, level, pieces) for piece in pieces]
    return Seen(name, tuple(sorted(found, key=lambda thing: -thing.radius)))


def connected(mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """Return the connected pieces of ``mask`` (along the sides of pixels), each as a mask."""
    left, pieces = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        piece, edge = np.zeros_like(mask), [left.pop()]
        while edge:
            y, x = edge.pop()
            piece[y, x] = True
            around = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= around
            edge.extend(around)
        pieces.append(piece)
    return pieces


def grown(mask: npt.NDArray[np.bool_], by: int) -> npt.NDArray[np.bool_]:
    """Return ``mask`` grown by ``by`` pixels."""
    for _ in range(by):
        padded = np.pad(mask, 1)
        mask = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def _recognise(
    pixels: Array,
    nearest: npt.NDArray[np.intp],
    piece: npt.NDArray[np.bool_],
    ground: Array,
    pieces: list[npt.NDArray[np.bool_]],
) -> Found:
    """Name the colour and the shape of one ``piece`` of a picture whose background has the levels ``ground``."""
    core = ~grown(~piece, 1)  # without its rim, where the colours of both sides mix
    core = core if core.sum() >= SPECK // 2 else piece
    counts = np.bincount(nearest[core], minlength=len(NAMES))
    colour = int(counts.argmax())
    own = np.median(pixels[core & (nearest == colour)], axis=0)
    # The share of each pixel that is covered: how far it is on the way from the background's colour to the thing's.
    way = own - ground
    cover = np.clip((pixels - ground) @ way / (way @ way), 0, 1)
    region = grown(piece, 2)
    for other in pieces:
        if other is not piece:
            region &= ~grown(other, 1)
    cover = np.where(region, cover, 0)
    rows, columns = np.nonzero(cover.max(1) >= RIM)[0], np.nonzero(cover.max(0) >= RIM)[0]
    if not len(rows) or not len(columns):
        return Found(None, NAMES[colour], 0, 0, 0, 0)
    x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    half = float(max(columns[-1] - columns[0], rows[-1] - rows[0])) / 2 + 0.5
    shapes, stack, fits = templates(min(max(round(half), 3), SIDE))
    cut = _cut_out(cover, x, y, half * REACH).ravel()
    shared = np.minimum(cut, stack).sum(1)
    overlap = shared / (cut.sum() + stack.sum(1) - shared)
    best = int(overlap.argmax())
    dx, dy, scale = fits[best]
    shape = shapes[best] if overlap[best] >= OVERLAP else None
    return Found(shape, NAMES[colour], float(x + dx * half), float(y + dy * half), half * scale, float(overlap[best]))


# ---- the templates ----

GRID = 32  # points along the side of a cut-out
REACH = 1.3  # half the side of a cut-out, in half widths of the thing
BLUR = (0.4, 0.9)  # pixels (standard deviation): as sharp as drawn, as soft as a small decoder may leave it


def _cut_out(cover: Array, x: float, y: float, half: float) -> Array:
    """Sample ``cover`` (64, 64) at GRID x GRID points around (x, y), bilinearly; what lies outside is empty."""
    offsets = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * half
    padded = np.pad(cover, 1)

    def between(centre: float) -> tuple[npt.NDArray[np.intp], Array]:
        at = np.clip(centre + offsets - 0.5, -1, SIDE) + 1  # pixel k of the padded picture is centred on k
        low = np.minimum(at.astype(np.intp), SIDE)
        return low, at - low

    (top, v), (left, u) = between(y), between(x)
    rows = padded[top] * (1 - v)[:, None] + padded[top + 1] * v[:, None]
    return np.asarray(rows[:, left] * (1 - u) + rows[:, left + 1] * u)


def outline(shape: str, x: Array, y: Array) -> npt.NDArray[np.bool_]:
    """Return a mask of the points in ``shape``, given in half widths right of and below the middle."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2)
    if shape == "square":
        return (abs(x) <= 1) & (abs(y) <= 1)
    if shape == "cross":
        return ((abs(x) <= 1) & (abs(y) <= 0.33)) | ((abs(x) <= 0.33) & (abs(y) <= 1))
    if shape == "triangle":
        height = math.sqrt(3)
        return (abs(y) <= height / 2) & (abs(x) <= (y + height / 2) / height)
    # A star in polar form: between a tip and a dent the outline is a straight line, so by the law of sines the
    # distance to it follows from the angle to the tip.
    tip = 1 / math.cos(math.radians(18))
    dent, turn = 0.45 * tip, math.radians(36)
    y = y - tip * (1 - math.cos(turn)) / 2
    angle = abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)
    slope = math.atan2(dent * math.sin(turn), tip - dent * math.cos(turn))  # of the edge, at the tip
    return np.hypot(x, y) <= tip * math.sin(slope) / np.sin(angle + slope)


@lru_cache(maxsize=1)
def sharp() -> tuple[list[str], Array, list[tuple[float, float, float]]]:
    """Draw the shapes at several scales and offsets: names, covers (T, GRID, GRID), (dx, dy, scale) in half widths."""
    fine = 4  # points across one point of the grid
    offsets = ((np.arange(GRID * fine) + 0.5) / (GRID * fine) * 2 - 1) * REACH
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    names, covers, fits = [], [], []
    for shape, scale in itertools.product(SHAPES, (0.84, 0.9, 0.95, 1.0, 1.05, 1.12)):
        for dx, dy in itertools.product((-0.08, 0.0, 0.08), repeat=2):
            inside = outline(shape, (x - dx) / scale, (y - dy) / scale)
            covers.append(inside.reshape(GRID, fine, GRID, fine).mean((1, 3)))
            names.append(shape)
            fits.append((dx, dy, scale))
    return names, np.array(covers), fits


@lru_cache(maxsize=32)
def templates(half: int) -> tuple[list[str], Array, list[tuple[float, float, float]]]:
    """:func:`sharp` as they look in pixels when a thing is 2 * ``half`` pixels wide: each at every ``BLUR``, flat."""
    names, covers, fits = sharp()
    steps = np.arange(GRID)
    stack = []
    for blur in BLUR:
        sigma = blur * GRID / (2 * REACH * half)
        weights = np.exp(-((steps[:, None] - steps) ** 2) / (2 * sigma**2))
        weights /= weights.sum(1, keepdims=True)
        stack.append((weights @ covers @ weights.T).reshape(len(covers), -1))
    return names * len(BLUR), np.concatenate(stack), fits * len(BLUR)


# ---- the verdict ----


def judge(seen: Seen, facts: Facts) -> Verdict:
    """Compare the contents of a picture with its caption."""
    background = None if facts.background is None else seen.background == facts.background
    orders = [seen.things, seen.things[::-1]] if len(facts.things) == 2 else [seen.things]
    if len(seen.things) != len(facts.things):
        named = any(t.size for t in facts.things)
        placed = facts.place or facts.relation
        coloured = any(t.colour for t in facts.things)
        said = [False if stated else None for stated in (coloured, named, placed)]
        return Verdict(background, False, *said, right=False, all_right=False)
    plain = seen.background is not None
    return max((_compare(order, facts, background, plain) for order in orders), key=_merit)


def _merit(verdict: Verdict) -> tuple[int, int]:
    """Return the merit of a match of two things with the caption; the order that explains more counts."""
    return verdict.all_right + verdict.right, sum(
        map(bool, (verdict.shape, verdict.colour, verdict.size, verdict.place))
    )


def _compare(things: tuple[Found, ...], facts: Facts, background: bool | None, plain: bool) -> Verdict:
    pairs = list(zip(things, facts.things, strict=True))
    shape = all(found.shape == named.shape for found, named in pairs)
    colours = [found.colour == named.colour for found, named in pairs if named.colour]
    colour = all(colours) if colours else None
    sizes = [found.size == named.size for found, named in pairs if named.size]
    size = all(sizes) if sizes else None
    place = things[0].place == facts.place if facts.place else None
    if facts.relation:
        dx, dy = things[1].x - things[0].x, things[1].y - things[0].y
        place = bool(dx > abs(dy) if facts.relation == "left of" else dy > abs(dx))
    right = background is not False and shape and colour is not False and (place or not facts.relation)
    every = right and size is not False and place is not False and plain
    return Verdict(background, shape, colour, size, place, bool(right), bool(every))
