"""Recipes from untrusted files: the texts of a PNG without its pixels, and the types of the fields."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline import metadata
from minidiff.pipeline.png import KEY, read_recipe
from minidiff.pipeline.recipe import Made, Recipe, parse
from minidiff.pipeline.request import Request
from tests.support.tiny import tiny_ddpm, tiny_sd


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def drawn() -> tuple[bytes, bytes]:
    """A PNG in two parts, before its pixels and from there on."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, format="PNG")
    return buffer.getvalue()[:33], buffer.getvalue()[33:]


HEAD, REST = drawn()
RECIPE = json.dumps({"prompt": "é", "n": 1}).encode()
KEYED = KEY.encode() + b"\0"
TEXTS = {
    "tEXt": chunk(b"tEXt", KEYED + RECIPE),
    "zTXt": chunk(b"zTXt", KEYED + b"\0" + zlib.compress(RECIPE)),
    "iTXt": chunk(b"iTXt", KEYED + b"\0\0en\0recipe\0" + RECIPE),
    "packed iTXt": chunk(b"iTXt", KEYED + b"\1\0\0\0" + zlib.compress(RECIPE)),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_of_text(kind: str, tmp_path: Path) -> None:
    """Before the pixels and behind them, beside other texts, as Pillow reads them too; the first one counts."""
    other = chunk(b"tEXt", b"Software\0me") + chunk(b"zTXt", b"x\0\0not compressed")
    for data in (HEAD + TEXTS[kind] + REST, HEAD + other + REST[:-12] + TEXTS[kind] + REST[-12:]):
        (tmp_path / "a.png").write_bytes(data)
        assert read_recipe(tmp_path / "a.png") == {"prompt": "é", "n": 1}
    (tmp_path / "a.png").write_bytes(HEAD + TEXTS[kind] + chunk(b"tEXt", KEYED + b"{}") + REST)
    assert read_recipe(tmp_path / "a.png") == {"prompt": "é", "n": 1}


def test_the_pixels_are_not_looked_at(tmp_path: Path) -> None:
    """What stands before damaged or enormous pixels can be read."""
    enormous = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(HEAD[:8] + enormous + TEXTS["tEXt"] + chunk(b"IDAT", b"nonsense"))
    assert read_recipe(tmp_path / "a.png")["n"] == 1


BOMB = zlib.compress(b"1" * 2**26)
WRONG = {
    "none": (HEAD + REST, "carries no recipe"),
    "cut": (HEAD + TEXTS["tEXt"][:-9], "is damaged"),
    "cut in the head": (HEAD + TEXTS["tEXt"][:6], "carries no recipe"),
    "checksum": (HEAD + TEXTS["tEXt"][:-1] + b"\0" + REST, "is damaged"),
    "length": (HEAD + struct.pack(">I", 2**31) + b"tEXt" + REST, "is the most"),
    "longer": (HEAD + struct.pack(">I", 2**32 - 1) + b"IDAT" + REST, "carries no recipe"),
    "bomb": (HEAD + chunk(b"zTXt", KEYED + b"\0" + BOMB) + REST, "longer than"),
    "packed bomb": (HEAD + chunk(b"iTXt", KEYED + b"\1\0\0\0" + BOMB) + REST, "longer than"),
    "not compressed": (HEAD + chunk(b"zTXt", KEYED + b"\0abc") + REST, "is damaged"),
    "half compressed": (HEAD + chunk(b"zTXt", KEYED + b"\0" + zlib.compress(RECIPE)[:-6]) + REST, "it is cut short"),
    "no method": (HEAD + chunk(b"zTXt", KEYED) + REST, "is damaged"),
    "no flag": (HEAD + chunk(b"iTXt", KEYED) + REST, "is damaged"),
    "no unicode": (HEAD + chunk(b"iTXt", KEYED + b"\0\0\0\0\xff") + REST, "is damaged"),
    "huge number": (HEAD + chunk(b"tEXt", KEYED + b'{"seed": ' + b"1" * 5000 + b"}") + REST, "is damaged"),
    "deep": (HEAD + chunk(b"tEXt", KEYED + b'{"a":' * 100_000) + REST, "is damaged"),
    "a list": (HEAD + chunk(b"tEXt", KEYED + b"[]") + REST, "a list where an object should be"),
    "cut jpeg": (b"\xff\xd8\xff\xe0 JFIF", "no readable picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "carries no recipe"),
    "empty": (b"", "carries no recipe"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_carries_no_recipe_is_one_line(name: str, tmp_path: Path) -> None:
    content, words = WRONG[name]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_recipe(tmp_path / "a.png")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, words in ((tmp_path / "pipe.png", "named pipe"), ("/dev/zero", "device"), (tmp_path, "is a folder")):
        with pytest.raises(CheckpointError, match=words):
            read_recipe(path)


def test_a_file_of_endless_chunks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MOST_CHUNKS", 100)
    (tmp_path / "a.png").write_bytes(HEAD + chunk(b"aaaa", b"") * 100 + TEXTS["tEXt"] + REST)
    with pytest.raises(CheckpointError, match="carries no recipe"):
        read_recipe(tmp_path / "a.png")


def test_every_field_that_is_written_is_known() -> None:
    (image,) = tiny_sd().generate("a", steps=1, seed=0, progress=False, like="ldm", guidance_interval=(0.1, 0.9))
    found = read_recipe(image)
    recipe, unknown = parse(found, "a.png")
    assert unknown == []
    asked = recipe.request
    assert (asked.prompt, asked.seed, asked.guidance_interval, asked.like) == ("a", 0, (0.1, 0.9), found["like"])
    assert asked.sampler == found["sampler"]
    assert recipe.to_json() == found
    assert parse({**found, "later": [1], "\x1b[2J": 0}, "a.png")[1] == ["\x1b[2J", "later"]
    assert parse({}, "a.png") == (Recipe(request=Request(None), made=Made(), text=False), [])


NAN, HUGE = float("nan"), 10**400
WRONG_VALUES: list[tuple[str, Any]] = [
    *[
        (name, value)
        for name in ("prompt", "negative_prompt", "like", "image", "model_hash")
        for value in (5, [], True)
    ],
    *[(name, value) for name in ("steps", "width", "seed") for value in ("3", 3.0, True, [3], {}, HUGE, NAN)],
    *[("steps", value) for value in (0, -1, 2**40)],
    *[("height", value) for value in (0, -8, 2**20)],
    *[
        (name, value)
        for name in ("guidance_scale", "strength")
        for value in ("7", True, NAN, float("inf"), HUGE, [7.5])
    ],
    *[("guidance_interval", value) for value in ([0.1], [0.1, 0.2, 0.3], ["a", "b"], [NAN, 1], 0.5, "ab", {"a": 1})],
    *[("sampler", value) for value in ("ddim", [], {}, {"name": 5}, {"name": None}, {"eta": 1}, 3)],
    *[("lora", value) for value in (["a"], [["a"]], [["a", "b"]], [[1, 1]], {"a": 1}, "ab", [["a", 1, 2]], 5)],
    *[("embedding", value) for value in ([["a", 1]], [[None, None]], ["ab"], 5)],
    *[("approximate", value) for value in ([], "vae_tiles", 1)],
    *[("fast", value) for value in ("packed", [1], {"a": 1})],
    *[("sizes", value) for value in ([], "a", 3)],
    *[("place", value) for value in ("1", -1, 0.5)],
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda v: repr(v)[:20])
def test_fields_of_wrong_types_are_named(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"a.png: its recipe is damaged .*{name}") as caught:
        parse({"prompt": "a", name: value}, "a.png")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_fields_of_recipes_of_before() -> None:
    """A picture of the first version, which had no identity: its hash was the content hash, or nothing."""
    old = {"prompt": None, "negative_prompt": "", "guidance_scale": 7, "width": 64, "height": 64, "seed": 3, "steps": 5}
    old |= {"sampler": {"name": "pndm"}, "model": "sd1", "model_hash": "", "dtype": "float32", "device": "cpu"}
    old |= {"minidiff": "0.1", "torch": "2.6", "sizes": {"original": [40.0, 48], "crop": [0, 0], "target": None}}
    recipe, unknown = parse(old, "a.png")
    assert (recipe.request.guidance_scale, recipe.made.model_hash, recipe.request.steps, unknown) == (7.0, "", 5, [])


def test_texts_that_pillow_writes_are_read(tmp_path: Path) -> None:
    for compressed in (False, True):
        info = PngInfo()
        info.add_itxt(KEY, '{"a": "é"}', zip=compressed)
        Image.new("L", (3, 3)).save(tmp_path / "a.png", pnginfo=info)
        assert read_recipe(tmp_path / "a.png") == {"a": "é"}


def test_places_among_others_have_a_limit() -> None:
    assert Made(place=2**32, places=2**32).place == 2**32
    for wrong in ({"place": 2**32 + 1}, {"places": -1}, {"together": 2**32 + 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* 0..4294967296"):
            Made(**wrong)


def test_the_recipe_of_a_model_without_text_says_nothing_about_text() -> None:
    about_text = {"prompt", "negative_prompt", "guidance_scale"}
    assert about_text <= tiny_sd().steps("a", steps=1, seed=0).recipes[0].keys()
    assert not about_text & tiny_ddpm().steps(steps=1, seed=0).recipes[0].keys()
