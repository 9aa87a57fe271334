"""The procedural data set of shapes: reproducible, drawn as its captions say, without the held-out combinations."""

from __future__ import annotations

import gc
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minidiff.errors import ConfigError
from minidiff.training import shapes
from minidiff.training.captions import (
    BACKGROUNDS,
    COLOURS,
    ONE,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TWO,
    Facts,
    Named,
    caption,
    loose_vocabulary,
    vocabulary,
    words,
)
from minidiff.training.scenes import PALETTE, SIDE, Scene, Thing, draw
from minidiff.training.shapes import HELD_OUT, RADIUS, TRAINED, Item, Shapes, batch, drawn, held_out, items
from tests.tolerances import assert_close

FIRST = [
    "a large orange circle on a yellow background",
    "a big pink cross above a purple circle on a white background",
    "a medium purple cross on a blue background",
    "a purple square above a medium pink ring on gray",
    "orange square above little purple star, blue background",
]
FIRST_PIXELS = "d1b9fcc9ecc4db01"
PROMPTS = {
    "single": ["blue cross, yellow background", "a green background with a purple triangle at the top"],
    "held_out": [
        "a green background with a little blue star in the centre",
        "a white ring at the left on a green background",
    ],
    "two": [
        "small blue ring left of big blue star, grey background",
        "a green background with a medium purple triangle to the left of a small red triangle",
    ],
}

LOOSE = [
    "white triangle and purple triangle",
    "the red triangle",
    "a yellow triangle on a blue background",
    "two green crosses, blue background",
]


@pytest.fixture(scope="module")
def many() -> list[shapes.Item]:
    return items(5, 0, 20_000)


# ---- the same everywhere ----


def test_the_first_items_of_seed_0_never_change() -> None:
    """Recorded: models are trained and scored on these; a change here makes old scores incomparable."""
    pixels, captions = batch(0, 0, 5)
    assert captions == FIRST
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8)
    assert hashlib.sha256(levels.numpy().tobytes()).hexdigest()[:16] == FIRST_PIXELS


def test_the_palette_never_changes() -> None:
    """Recorded, as the pictures are; the nearest two colours are as far apart as the module says."""
    assert bytes(sum(PALETTE.values(), ())).hex(" ", -3) == (
        "e12328 ff8c00 ffe132 1ea53c 2350e1 962dbe ff78be fafafa 0f0f0f 808080"
    )
    assert round(min(math.dist(a, b) for a, b in itertools.combinations(PALETTE.values(), 2))) == 99


def test_an_item_is_the_same_in_any_batch() -> None:
    pixels, captions = batch(3, 0, 40)
    for start, count in ((0, 1), (7, 1), (39, 1), (11, 20)):
        part, said = batch(3, start, count)
        assert_close(part, pixels[start : start + count])
        assert said == captions[start : start + count]
    assert items(3, 0, 40)[17] == items(3, 17, 1)[0]


def test_seeds_kinds_and_far_items_differ() -> None:
    streams = [
        [i.scene for i in items(seed, start, 50)] for seed, start in ((0, 0), (1, 0), (2**63 - 1, 0), (0, 10**12))
    ]
    streams.append([i.scene for i in items(0, 0, 50, "single")])
    for a, b in itertools.combinations(streams, 2):
        assert not any(x == y for x, y in zip(a, b, strict=True))


def test_a_loader_gets_the_same_pictures() -> None:
    pixels, captions = batch(4, 0, 12)
    seen = list(DataLoader(Shapes(4, length=12), batch_size=5))
    assert_close(torch.cat([p for p, _ in seen]), pixels)
    assert [c for _, said in seen for c in said] == captions
    one, said = Shapes(4)[7]
    assert_close(one, pixels[7])
    assert said == captions[7]
    assert len(Shapes(4, length=12)) == 12
    with pytest.raises(IndexError, match="item 12 of a data set of 12"):
        Shapes(4, length=12)[12]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((-1, 0, 1), "seed=-1"),
        ((0, -1, 1), "start=-1"),
        ((0, 0, 0), "count=0"),
        ((0, 0, 1, "other"), "kind='other'"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments: tuple[int, int, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        items(*arguments)


# ---- the pictures ----


def cover(shape: str, radius: float, x: float = 32.0, y: float = 32.0) -> Tensor:
    """The share of each pixel that is covered: a white thing on black, the levels undone."""
    pixels = draw([Scene("black", (Thing(shape, "white", "large", x, y, radius),))])[0, 0]
    low, high = (PALETTE[c][0] / 127.5 - 1 for c in ("black", "white"))
    return (pixels - low) / (high - low)


# In squares of the radius: half the width.
AREAS = {
    "circle": math.pi,
    "ring": math.pi * (1 - 0.55**2),
    "square": 4.0,
    "cross": 4 * 0.66 - 0.66**2,
    "triangle": math.sqrt(3),
    "star": 5 * 0.45 * math.sin(math.radians(36)) / math.cos(math.radians(18)) ** 2,
}
HEIGHTS = {"triangle": math.sqrt(3) / 2, "star": (1 + math.cos(math.radians(36))) / 2 / math.cos(math.radians(18))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [13.0, 20.0])
def test_a_shape_has_its_area_width_and_height(shape: str, radius: float) -> None:
    c = cover(shape, radius)
    assert c.sum().item() == pytest.approx(AREAS[shape] * radius**2, rel=0.03)  # half a pixel's rounding of corners
    halves = radius, radius * HEIGHTS.get(shape, 1.0)
    for across, half in zip((0, 1), halves, strict=True):
        (inside,) = torch.nonzero(c.amax(across) > 0.25, as_tuple=True)
        assert (inside.min() + inside.max() + 1).item() / 2 == pytest.approx(32, abs=0.6)
        assert (inside.max() - inside.min() + 1).item() / 2 == pytest.approx(half, abs=1.1)
    assert_close(c, c.flip(1))  # mirror images, to the bit
    assert (c[0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_edge_is_one_pixel_wide_and_smooth(shape: str) -> None:
    c = cover(shape, 13.3, 31.7, 32.2)
    assert c.min() >= -1e-6
    assert c.max() == pytest.approx(1, abs=1e-6)
    partial = ((c > 0.01) & (c < 0.99)).sum().item()
    assert 20 < partial < 4.5 * AREAS[shape] ** 0.5 * 13.3 * 2  # a rim, and not an area


def test_a_picture_shows_its_scene() -> None:
    for item in items(6, 0, 200):
        pixels, _ = drawn([item])
        assert pixels.shape == (1, 3, SIDE, SIDE)
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1
        levels = (pixels[0] + 1) * 127.5
        assert levels[:, 0, 0].round().tolist() == list(PALETTE[item.scene.background])
        for t in item.scene.things:
            # Somewhere on the line from the middle to the right the thing is met in its full colour.
            row = levels[:, int(t.y), int(t.x) : int(t.x + t.radius)]
            assert (row.round() == torch.tensor(PALETTE[t.colour])[:, None]).all(0).any(), item


# ---- the scenes ----


def test_things_stay_inside_and_apart_and_differ(many: list[shapes.Item]) -> None:
    for item in many:
        things = item.scene.things
        for t in things:
            assert all(t.radius + 0.5 <= v <= SIDE - t.radius - 0.5 for v in (t.x, t.y))
            assert t.colour != item.scene.background
        if len(things) == 2:
            a, b = things
            assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius >= 3  # a gap one can see
            assert (a.shape, a.colour) != (b.shape, b.colour)


def test_the_caption_says_what_is_drawn(many: list[shapes.Item]) -> None:
    for scene, facts, said in ((i.scene, i.facts, i.caption) for i in many):
        assert facts.background == scene.background
        shown = {(t.shape, t.colour): t for t in scene.things}
        assert [(n.shape, n.colour) for n in facts.things if (n.shape, n.colour) not in shown] == []
        assert len(facts.things) == len(shown) == len(scene.things)
        for n in facts.things:
            assert n.size in (None, shown[n.shape, n.colour].size)
        if facts.relation:
            a, b = (shown[n.shape, n.colour] for n in facts.things)
            assert (b.x - a.x if facts.relation == "left of" else b.y - a.y) >= 2 * shapes.OFF - 2
        if facts.place:
            (t,) = scene.things
            dx, dy = shapes.CENTRES[facts.place]
            assert math.hypot(t.x - 32 - dx, t.y - 32 - dy) <= math.hypot(2, 2)
        for n in facts.things:
            assert f"{n.colour} {n.shape}" in said


def test_everything_occurs_in_its_share(many: list[shapes.Item]) -> None:
    n = len(many)
    singles = [i for i in many if len(i.scene.things) == 1]
    assert len(singles) / n == pytest.approx(shapes.TWO_THINGS, abs=0.02)
    assert sum(i.facts.place is not None for i in singles) / len(singles) == pytest.approx(shapes.PLACE_NAMED, abs=0.02)
    assert Counter(i.facts.relation for i in many).keys() == {None, *RELATIONS}
    assert Counter(i.facts.place for i in many).keys() == {None, *PLACES}
    sizes = Counter(t.size for i in many for t in i.scene.things)
    assert all(sizes[s] / sum(sizes.values()) == pytest.approx(1 / 3, abs=0.02) for s in SIZES)
    triples = Counter((t.shape, t.colour, i.scene.background) for i in many for t in i.scene.things)
    assert set(triples) == set(TRAINED)
    assert max(triples.values()) < 2 * min(triples.values())


def test_sizes_are_told_apart() -> None:
    bounds = [(RADIUS[s] * (1 - shapes.SWELL), RADIUS[s] * (1 + shapes.SWELL)) for s in SIZES]
    assert all(large[0] / small[1] > 1.25 for small, large in itertools.pairwise(bounds))


# ---- what is held out ----


def test_one_triple_in_ten_is_held_out_and_each_pair_of_words_is_trained() -> None:
    assert len(HELD_OUT) == 26
    assert len(TRAINED) == 264 - 26
    assert set(HELD_OUT).isdisjoint(TRAINED)
    assert all(held_out(*t) for t in HELD_OUT)
    assert not any(held_out(*t) for t in TRAINED)
    for column, names in enumerate((SHAPES, COLOURS, BACKGROUNDS)):
        assert {t[column] for t in HELD_OUT} == set(names)  # composition of every word is tested
    for a, b in itertools.combinations(range(3), 2):
        trained = Counter((t[a], t[b]) for t in TRAINED)
        held = Counter((t[a], t[b]) for t in HELD_OUT)
        assert min(trained[pair] for pair in held) >= 4


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Millions of short-lived records, none in a circle: the collector would only count them."""
    gc.disable()
    yield
    gc.enable()


THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
GROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}|grey) background\b|\bon ({'|'.join(BACKGROUNDS)}|grey)$")


def forbidden(chosen: list[shapes.Item]) -> list[str]:
    """The captions of ``chosen`` that name a held-out triple, or stand by a scene that has one."""
    kept = {f"{s} {c} {g}" for s, c, g in HELD_OUT}
    wrong = []
    for item in chosen:
        ground = GROUND.search(item.caption)
        assert ground is not None, item.caption
        name = (ground[1] or ground[2]).replace("grey", "gray")
        named = {f"{shape} {colour} {name}" for colour, shape in THING.findall(item.caption)}
        shown = {f"{t.shape} {t.colour} {item.scene.background}" for t in item.scene.things}
        assert len(named) == len(shown), item.caption
        if named & kept or shown & kept:
            wrong.append(item.caption)
    return wrong


@pytest.mark.slow
def test_no_held_out_triple_in_a_million_items(no_collector: None) -> None:
    """Scenes and captions, paraphrases and scenes of two things included; read back from the words themselves."""
    for start in range(0, 1_000_000, 20_000):
        assert forbidden(items(0, start, 20_000)) == []


def test_the_search_for_held_out_triples_finds_them() -> None:
    chosen = items(0, 0, 300, "held_out")
    assert forbidden(chosen) == [item.caption for item in chosen]


def test_prompts_for_evaluation() -> None:
    single, held, two = (make(300, 1) for make in (
        shapes.single_object_prompts, shapes.held_out_prompts, shapes.two_object_prompts))  # fmt: skip
    for prompts, triples in ((single, TRAINED), (held, HELD_OUT)):
        assert all(
            len(f.things) == 1 and (f.things[0].shape, f.things[0].colour, f.background) in triples for _, f in prompts
        )
        assert len({c for c, _ in prompts}) > 200
    assert {(f.things[0].shape, f.things[0].colour, f.background) for _, f in held} == set(HELD_OUT)
    assert all(len(f.things) == 2 and f.relation in RELATIONS for _, f in two)
    assert shapes.two_object_prompts(10, 1) == two[:10]  # the first of a longer list
    assert shapes.two_object_prompts(10, 2) != two[:10]


def test_the_first_prompts_of_every_kind_never_change() -> None:
    """Recorded, as the first items are: scores of one release are held against those of another."""
    assert {kind: [item.caption for item in items(0, 0, 2, kind)] for kind in PROMPTS} == PROMPTS


def test_which_of_two_things_is_named_first_never_changes() -> None:
    """Joined by "and", which promises no order: either the one that was drawn first or the other."""
    joined = [item for item in items(0, 0, 60) if len(item.facts.things) == 2 and item.facts.relation is None]
    assert {item.caption: item.facts.things[0].shape == item.scene.things[0].shape for item in joined} == {
        "small white cross and orange star, black background": False,
        "little blue star and red cross, white background": False,
        "green background, small orange star and pink triangle": False,
        "white background with a large blue circle and a blue triangle": True,
        "white background, big pink triangle and large green square": True,
    }


# ---- the words ----

STAR = Facts("blue", (Named("star", "red", "large"),))


def wordings(facts: Facts) -> set[str]:
    return {caption(facts, choice) for choice in range(2000)}


def test_one_picture_is_said_in_several_ways() -> None:
    said = wordings(STAR)
    assert len(said) == 2 * (len(ONE) - 1)  # two forms differ only in where the place stands; "big" for "large"
    assert {"a large red star on a blue background", "blue background with a big red star"} <= said
    two = wordings(Facts("gray", (Named("ring", "orange"), Named("cross", "white", "small")), relation="left of"))
    assert len(two) == 2 * 2 * 2 * len(TWO)
    assert "an orange ring to the left of a little white cross on a grey background" in two
    assert wordings(Facts("black", (Named("ring", "pink"), Named("cross", "white")))) >= {
        "pink ring and white cross on black"
    }


def test_the_vocabulary_is_what_captions_use(many: list[shapes.Item]) -> None:
    assert {word for item in many for word in words(item.caption)} == vocabulary()
    assert 40 <= len(vocabulary()) <= 60
    every = [*many, *items(5, 0, 20_000, "loose")]
    assert {word for item in every for word in words(item.caption)} == loose_vocabulary()
    assert all(re.fullmatch(r"[a-z ,]+", item.caption) for item in every)
    assert not any("  " in item.caption or " ," in item.caption or item.caption[0] == " " for item in every)


def test_what_a_loose_caption_does_not_say_never_hides_the_thing() -> None:
    loose = items(6, 0, 20_000, "loose")
    for item in loose:
        assert len(item.scene.things) == len(item.facts.things)
        for thing in item.scene.things:
            assert (thing.shape, thing.colour, item.scene.background) in TRAINED
    kinds = {
        "no background": sum(item.facts.background is None for item in loose),
        "no colour": sum(not any(thing.colour for thing in item.facts.things) for item in loose),
        "plural": sum(item.caption.startswith("two ") or " two " in item.caption for item in loose),
        "nothing but a shape": sum(item.caption in SHAPES for item in loose),
    }
    assert all(count > 200 for count in kinds.values()), kinds


def test_in_order_and_joins_things_as_they_are_read() -> None:
    """The scenes are those of loose captions; of these, half of the pairs are named in the other order."""
    either, ordered = (items(8, 0, 4_000, kind) for kind in ("loose", "ordered"))
    assert [item.scene for item in either] == [item.scene for item in ordered]

    def as_read(item: Item) -> bool:
        return [thing.shape for thing in item.scene.things] == [thing.shape for thing in item.facts.things]

    pairs = [k for k, item in enumerate(ordered) if len(item.facts.things) == 2 and item.facts.relation is None]
    assert all(as_read(ordered[k]) for k in pairs)
    swapped = sum(not as_read(either[k]) for k in pairs)
    distinct = sum(len({thing.shape for thing in ordered[k].facts.things}) == 2 for k in pairs)
    assert 0.4 * distinct < swapped < 0.6 * distinct
    for k, item in enumerate(ordered):
        assert item == either[k] or k in pairs


def test_the_first_loose_prompts_never_change() -> None:
    assert [c for c, _ in shapes.loose_prompts(4)] == LOOSE
