"""The judge of pictures of shapes: right about drawn pictures, also noisy and blurred ones, and strict otherwise."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff.pipeline.png import save_png, to_pil, to_unit
from minidiff.training import shapes
from minidiff.training.captions import BACKGROUNDS, COLOURS, SHAPES, SIZES, Facts, Named
from minidiff.training.scenes import Scene, draw
from minidiff.training.shapes import Item, drawn, items
from tests.support.tiny import tiny_sd

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # at the end: test.py there shares its name with a package of Python's own

import _judge  # noqa: E402
import eval_shapes  # noqa: E402

SETS: tuple[shapes.Kind, ...] = ("single", "held_out", "two")
KINDS: tuple[shapes.Kind, ...] = ("train", *SETS, "loose")


def seen(pixels: Tensor, folder: Path) -> list[_judge.Seen]:
    """The judge's reading of each of ``pixels`` (B, 3, 64, 64), saved as PNG."""
    found = []
    for image in to_pil(to_unit(pixels)):
        save_png(image, folder / "picture.png")
        found.append(_judge.read(folder / "picture.png"))
    return found


def noisy(pixels: Tensor) -> Tensor:
    return pixels + 0.08 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def soft(pixels: Tensor) -> Tensor:
    """A Gaussian blur of 0.7 pixels."""
    weights = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * 0.7**2))
    kernel = (weights / weights.sum()).outer(weights / weights.sum()).expand(3, 1, 7, 7)
    padded = torch.nn.functional.pad(pixels, (3, 3, 3, 3), mode="replicate")
    return torch.nn.functional.conv2d(padded, kernel, groups=3)


HARM: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda p: p,
    "noise": noisy,
    "blur": soft,
    "both": lambda p: noisy(soft(p)),
    "shifted colours": lambda p: (0.93 * p + torch.tensor([0.05, -0.03, 0.04])[:, None, None]).clamp(-1, 1),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_pictures_are_all_right(kind: shapes.Kind, harm: str, tmp_path: Path) -> None:
    chosen = items(11, 0, 50, kind)
    for item, picture in zip(chosen, seen(HARM[harm](drawn(chosen)[0]), tmp_path), strict=True):
        verdict = _judge.judge(picture, _judge.parse(item.caption))
        assert verdict.right, (item, picture)
        assert False not in (verdict.size, verdict.place), (item, picture)


@pytest.mark.parametrize("kind", SETS)
def test_shuffled_captions_score_near_zero(kind: shapes.Kind, tmp_path: Path) -> None:
    chosen = items(12, 0, 100, kind)
    make = eval_shapes.drawn_maker(kind, 12, 100)
    captions = [item.caption for item in chosen]
    assert eval_shapes.evaluate(make, captions, tmp_path).score("right") == 1
    shuffled = eval_shapes.evaluate(make, captions, tmp_path, shuffle=True)
    assert shuffled.score("right") <= 0.1  # of the 26 held-out triples, one in 26 meets its like by chance
    assert shuffled.score("shape") < 0.3
    assert shuffled.score("colour") < 0.3


# ---- what is wrong is noticed, and only that ----

ONE = next(i for i in items(13, 0, 500, "single") if i.facts.place and i.facts.things[0].size)
TWO = next(
    i
    for i in items(13, 0, 500, "two")
    if all(t.size for t in i.facts.things) and len({(t.shape, t.size) for t in i.facts.things}) == 2
)


def verdict(scene: Scene, facts: Facts, folder: Path) -> _judge.Verdict:
    return _judge.judge(seen(draw([scene]), folder)[0], facts)


def wrong(item: Item, field: str, value: str) -> Facts:
    """The facts of ``item`` with one word of its first thing, or its place or background, exchanged."""
    if field in ("background", "place", "relation"):
        words: dict[str, Any] = {field: value}
        return replace(item.facts, **words)
    first = replace(item.facts.things[0], **{field: value})
    return replace(item.facts, things=(first, *item.facts.things[1:]))


WORDS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "background": BACKGROUNDS, "place": tuple(_judge.PLACES)}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WORDS.items() for v in values])
def test_each_wrong_word_about_one_thing_is_noticed(field: str, value: str, tmp_path: Path) -> None:
    true = ONE.facts.things[0]
    holds = value == getattr(true if hasattr(true, field) else ONE.facts, field)
    v = verdict(ONE.scene, wrong(ONE, field, value), tmp_path)
    for name in WORDS:
        assert getattr(v, name) is (holds or name != field), (field, value, v)
    assert v.right is (holds or field in ("size", "place"))


@pytest.mark.parametrize("field", ["shape", "colour", "size", "background", "relation"])
def test_each_wrong_word_about_two_things_is_noticed(field: str, tmp_path: Path) -> None:
    assert verdict(TWO.scene, TWO.facts, tmp_path) == _judge.Verdict(True, True, True, True, True, True, True)
    values = ("left of", "above") if field == "relation" else WORDS[field]
    taken = {getattr(t, field, None) for t in TWO.facts.things} | {getattr(TWO.facts, field, None)}
    value = next(v for v in values if v not in taken)
    v = verdict(TWO.scene, wrong(TWO, field, value), tmp_path)
    assert getattr(v, "place" if field == "relation" else field) is False
    assert v.right is (field == "size")


def test_two_things_that_changed_places_are_noticed(tmp_path: Path) -> None:
    backwards = replace(TWO.facts, things=TWO.facts.things[::-1])
    assert not verdict(TWO.scene, backwards, tmp_path).right
    # Joined by "and" they promise no order.
    assert verdict(TWO.scene, replace(backwards, relation=None), tmp_path).right


def test_colours_that_changed_things_are_noticed(tmp_path: Path) -> None:
    a, b = TWO.facts.things
    crossed = (replace(a, colour=b.colour), replace(b, colour=a.colour))
    assert a.colour != b.colour
    assert not verdict(TWO.scene, replace(TWO.facts, things=crossed), tmp_path).right


def test_too_many_and_too_few_things_are_noticed(tmp_path: Path) -> None:
    for kept in ((0,), (1,), ()):
        scene = replace(TWO.scene, things=tuple(TWO.scene.things[i] for i in kept))
        v = verdict(scene, TWO.facts, tmp_path)
        assert v.background
        assert (v.right, v.shape, v.colour) == (False, False, False)
    one = replace(TWO.facts, things=TWO.facts.things[:1], relation=None)
    assert not verdict(TWO.scene, one, tmp_path).right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_shape_and_colour_is_read_on_every_background(shape: str, colour: str, tmp_path: Path) -> None:
    grounds = [g for g in BACKGROUNDS if g != colour]
    thing = next(i for i in items(1, 0, 1, "single")).scene.things[0]
    scenes = [
        Scene(g, (replace(thing, shape=shape, colour=colour, radius=shapes.RADIUS[size], x=33.3, y=30.6),))
        for g in grounds
        for size in SIZES
    ]
    for scene, picture in zip(scenes, seen(draw(scenes), tmp_path), strict=True):
        (found,) = picture.things
        assert (found.shape, found.colour, picture.background) == (shape, colour, scene.background)
        assert found.radius == pytest.approx(scene.things[0].radius, rel=0.08)
        assert math.hypot(found.x - 33.3, found.y - 30.6) < 0.8


def test_no_picture_of_shapes_is_never_right(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    facts = [item.facts for item in items(14, 0, 50)]
    flat = torch.zeros(1, 3, 64, 64)
    blobs = torch.nn.functional.interpolate(torch.rand(20, 3, 6, 6, generator=g) * 2 - 1, size=64, mode="bicubic")
    for picture in seen(torch.cat([flat, torch.randn(5, 3, 64, 64, generator=g), blobs]), tmp_path):
        assert not any(_judge.judge(picture, f).right for f in facts)


def test_a_shapeless_patch_has_no_shape(tmp_path: Path) -> None:
    """A thin bar and an L: connected and of one colour, but none of the six."""
    for box in ((slice(30, 34), slice(8, 56)), (slice(20, 46), slice(20, 24))):
        pixels = torch.ones(1, 3, 64, 64)
        pixels[0, :, box[0], box[1]] = -1
        (found,) = seen(pixels, tmp_path)[0].things
        assert (found.shape, found.colour) == (None, "black")


# ---- what the judge knows ----


def test_the_judge_shares_no_code_with_the_drawing() -> None:
    tree = ast.parse((ROOT / "scripts" / "_judge.py").read_text(encoding="utf-8"))
    taken = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minidiff")
        for alias in node.names
    }
    assert taken == {("minidiff.training.captions", "Facts"), ("minidiff.training.captions", "Named")}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(name.startswith(("minidiff", "torch")) for name in names)


def test_the_judge_reads_every_caption() -> None:
    for kind in KINDS:
        for item in items(15, 0, 3000, kind):
            facts = _judge.parse(item.caption)
            assert facts == item.facts, item.caption


@pytest.mark.parametrize(
    "text", ["", "a dragon", "a blue background", "a red dragon on blue", "three stars", "two stars and a ring"]
)
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not name"):
        _judge.parse(text)


def test_a_caption_is_read() -> None:
    assert _judge.parse("a big orange ring to the left of a red cross on a grey background") == Facts(
        "gray", (Named("ring", "orange", "large"), Named("cross", "red")), relation="left of"
    )


def test_a_loose_caption_is_read() -> None:
    assert _judge.parse("two big circles") == Facts(None, (Named("circle", None, "large"),) * 2)
    assert _judge.parse("the star on top") == Facts(None, (Named("star", None),), place="top")


def test_of_a_loose_caption_only_what_it_says_counts(tmp_path: Path) -> None:
    scene, thing = ONE.scene, ONE.facts.things[0]
    verdicts = {
        said: verdict(scene, Facts(None, (said,)), tmp_path)
        for said in (
            Named(thing.shape, None),
            Named(thing.shape, thing.colour),
            Named(thing.shape, None, next(size for size in SIZES if size != thing.size)),
            Named(next(shape for shape in SHAPES if shape != thing.shape), None),
        )
    }
    assert [found.all_right for found in verdicts.values()] == [True, True, False, False]
    assert [found.right for found in verdicts.values()] == [True, True, True, False]
    assert all(found.background is None and found.place is None for found in verdicts.values())
    twice = verdict(scene, Facts(None, (Named(thing.shape, None),) * 2), tmp_path)
    assert not twice.right


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_fills_its_width(shape: str) -> None:
    y, x = np.meshgrid(np.linspace(-1.2, 1.2, 481), np.linspace(-1.2, 1.2, 481), indexing="ij")
    inside = _judge.outline(shape, x, y)
    assert abs(x[inside]).max() == pytest.approx(1, abs=0.012)  # tips are thin
    assert y[inside].max() == pytest.approx(-y[inside].min(), abs=0.012)


def test_another_size_of_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (32, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\(64, 32, 3\)"):
        _judge.read(tmp_path / "a.png")


# ---- the command ----


def test_the_command_judges_drawn_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "new" / "grid.png"
    args = ["--drawn", "--prompts", "12", "--grid", str(png), "--keep", str(tmp_path / "kept")]
    assert eval_shapes.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [*SETS, "loose"]
    assert all(line.split()[1:11:2] == ["100.0"] * 5 for line in lines[1:5])
    assert len(list((tmp_path / "kept").glob("*/*.png"))) == 48
    with Image.open(png) as sheet:
        assert sheet.getpixel((2, 2)) == eval_shapes.GREEN


def test_the_command_asks_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_sd().save(tmp_path / "m.safetensors")
    png, kept = tmp_path / "grid.png", tmp_path / "kept"
    args = ["--model", str(tmp_path / "m.safetensors"), "--prompts", "3", "--steps", "2", "--sets", "two"]
    assert eval_shapes.main([*args, "--grid", str(png), "--keep", str(kept)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["two", "0.0"]  # its weights are random
    guided = (kept / "two" / "001.png").read_bytes()
    with Image.open(png) as sheet:
        assert sheet.getpixel((2, 2)) == eval_shapes.RED
    assert eval_shapes.main([*args, "--no-guidance", "--grid", str(png), "--keep", str(kept)]) == 0
    assert (kept / "two" / "001.png").read_bytes() != guided


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_shapes.main(["--model", str(tmp_path / "none.safetensors"), "--prompts", "3"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.safetensors" in line
    with pytest.raises(SystemExit):
        eval_shapes.main(["--prompts", "0"])
    assert "--prompts 0" in capsys.readouterr().err
