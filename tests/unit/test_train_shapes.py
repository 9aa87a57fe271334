"""The training data of the bundled model: the streams of scripts/train_shapes.py, without the training itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidiff.pipeline import random_model
from minidiff.training import shapes
from minidiff.training.captions import COLOURS, SHAPES, loose_vocabulary

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))  # at the end: see test_eval_shapes.py
import train_shapes
from _judge import Facts, parse


def said(stream: train_shapes.Data, count: int) -> list[Facts]:
    return [parse(caption) for caption in stream.batch(0, count)[1]]


STREAMS = [train_shapes.Singles, train_shapes.MostlySingles, train_shapes.HardSingles, train_shapes.HalfLoose]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_picture_does_not_depend_on_its_batch(kind: type) -> None:
    """A resumed run, or one with another batch size, sees the same pictures."""
    whole, captions = kind(7).batch(20, 12)
    parts = [kind(7).batch(20, 5), kind(7).batch(25, 7)]
    assert torch.equal(torch.cat([pixels for pixels, _ in parts]), whole)
    assert [caption for _, words in parts for caption in words] == captions


@pytest.mark.parametrize("kind", STREAMS)
def test_nothing_held_out_is_shown(kind: type) -> None:
    for facts in said(kind(7), 600):
        for thing in facts.things:
            assert (thing.shape, thing.colour, facts.background) not in shapes.HELD_OUT


def test_three_pictures_of_four_are_of_one_thing() -> None:
    for kind in (train_shapes.MostlySingles, train_shapes.HardSingles):
        one = sum(len(facts.things) == 1 for facts in said(kind(7), 2000))
        assert (
            0.72 < one / 2000 < 0.78
        )  # half of the even ones by chance: 3 / 4, and nearly four standard deviations either way


def test_hard_captions_come_more_often_and_all_come() -> None:
    hard = said(train_shapes.HardSingles(7), 2000)[1::2]
    alone = said(train_shapes.Singles(7), 1000)
    assert {facts.things[0].shape for facts in hard} == set(SHAPES)
    assert {facts.things[0].colour for facts in hard} == set(COLOURS)

    def share(of: list[Facts], colours: tuple[str, ...]) -> float:
        return sum(facts.things[0].colour in colours for facts in of) / len(of)

    assert share(hard, ("green", "purple")) > share(alone, ("green", "purple")) + 0.1


def test_every_other_caption_leaves_parts_out() -> None:
    facts = said(train_shapes.HalfLoose(7), 400)
    whole = [f.background is not None and all(thing.colour for thing in f.things) for f in facts]
    assert all(whole[::2])
    assert sum(whole[1::2]) < 100


def test_every_other_loose_caption_is_the_harder_of_two() -> None:
    data = train_shapes.HalfLoose(7)
    hardness = [data.hardness(data.loose(k)) for k in range(1200)]
    easy, hard = hardness[::2], hardness[1::2]
    for level in (2, 4):  # one thing; two things that are named apart
        assert (easy.count(level) > 1.3 * hard.count(level)) == (level == 2)
        assert (hard.count(level) > 1.3 * easy.count(level)) == (level == 4)


def test_the_later_loose_captions_name_things_as_they_are_read() -> None:
    data, first = train_shapes.HalfLoose(7), train_shapes.HalfLoose.ORDERED

    def swapped(start: int) -> int:
        found = [data.loose(k) for k in range(start, start + 400)]
        orders = (([t.shape for t in item.scene.things], [t.shape for t in item.facts.things]) for item in found)
        return sum(there != named for there, named in orders)

    assert swapped(first - 400) > 20
    assert swapped(first) == 0


def test_new_words_begin_as_what_they_are_like() -> None:
    known = train_shapes.known_tokens(loose_vocabulary())
    old = train_shapes.begun(None)
    text = old.config.text_encoder
    encode = train_shapes.Tokenizer().encode
    without = tuple(token for token in known if token not in (*encode("circles"), *encode("two")))
    smaller = replace(old.config, text_encoder=replace(text, kept=without))
    narrow = random_model(smaller, seed=1)
    wide = train_shapes.widened(narrow)
    ids, parts = wide.tokenizer(["a red circle", "and"]), (narrow.text_encoder, wide.text_encoder)
    assert wide.config.text_encoder.kept == known
    assert torch.equal(*(part(ids).last for part in parts))
    for new, like in (("circles", "circle"), ("two", "and")):
        assert torch.equal(*(wide.text_encoder(wide.tokenizer([word])).last for word in (new, like)))
    assert train_shapes.widened(wide) is wide
