"""Pictures, recipes, folders to train on, configs and things that are no files, as strangers may hand them over.

A case is a number. It picks one of the kinds below, makes an input with a generator seeded by that number, sound or odd
or damaged, and hands it to minidiff as a user would. Two ends are allowed: it is "taken", or it is "refused" with one
of minidiff's errors, in one line. A sound picture must be taken, and give the colours that it was made with.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import socket
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import minidiff
import weights_convert
from minidiff.cli import main
from minidiff.errors import MinidiffError
from minidiff.pipeline import images
from minidiff.pipeline.image_files import open_picture
from minidiff.pipeline.png import read_recipe
from minidiff.training.image_folder import ImageFolder
from tests.support import convert_sources, fuzz_adapters
from tests.support.tiny import tiny_sd

ALLOWED = ("taken", "refused")
LONGEST = 4000  # characters of a refusal
SIDE = 24  # pixels
# What a program that reads a file has no business with, by the names of Python's audit events.
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf")),
    *("", "a", "8", "\x1b[2J\u202e", "x" * 5000, "../../etc/passwd", "\ud800", [], [0], [1, 2], ["a", "b"], [[[]]], {}),
    *({"a": 1}, {"name": "ddim"}, [None, None], [8, 8, 8, 8], [16, "x"], "CrossAttnDownBlock2D", "epsilon", "trailing"),
)
heard: list[str] = []
listening = False


def listen() -> None:
    """From now on, note every program that is started and every connection that is opened."""
    global listening
    if not listening:
        sys.addaudithook(lambda event, _: heard.append(event) if event in FORBIDDEN else None)
        listening = True


class Base:
    """Everything that a case needs: tiny models in a folder, and room for the case."""

    def __init__(self, folder: Path) -> None:
        listen()
        self.models = folder / "models"
        self.models.mkdir()
        self.room = folder / "room"
        tiny_sd().save(self.models / "tiny.safetensors")
        convert_sources.write_folder(self.models / "folder")
        made = minidiff.load(self.models / "tiny.safetensors", "cpu").generate("a", steps=1, seed=0, progress=False)
        self.recipe = read_recipe(made[0])
        self.kinds: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
            "picture": self.picture,
            "recipe": self.a_recipe,
            "training": self.training,
            "config": self.a_config,
            "no file": self.no_file,
        }
        (folder / "adapters").mkdir()
        adapters = fuzz_adapters.Base(folder / "adapters")
        self.kinds["adapter"] = lambda rng, number: adapters.try_case(number)

    def kind(self, number: int) -> str:
        """Which kind case ``number`` is of."""
        return list(self.kinds)[number % len(self.kinds)]

    def try_case(self, number: int) -> tuple[str, str]:
        """Make case ``number`` and hand it over: (what it is, "taken" or "refused" or a fault in words)."""
        kind, rng = self.kind(number), random.Random(number)
        before = Path.cwd()
        self.room.mkdir()
        os.chdir(self.room)
        heard.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                how, end = self.kinds[kind](rng, number)
            if heard:
                end = f"FAULT something was started: {heard[0]}"
            return f"{kind}, {how}", end
        finally:
            os.chdir(before)
            shutil.rmtree(self.room, ignore_errors=True)

    # --- the kinds ----------------------------------------------------------------------------------------------------

    def picture(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A picture of any mode and format, sound or damaged, as an image, as a mask, to train on, or to be told of."""
        how, data, colours = drawn(rng)
        damage = rng.choice([*["none"] * len(DAMAGE), *DAMAGE])
        data = data if damage == "none" else DAMAGE[damage](data, rng)
        path = Path(rng.choice(["a.png", "a.jpg", "a.tif", "a", "a.webp", "a.PNG"]))
        path.write_bytes(data)
        if damage == "none" and colours is not None:
            found = open_picture(path)
            away = abs(np.asarray(found.convert("RGB")).astype(int) - colours).mean()
            if away > 40:
                return how, f"FAULT colours are {away:.0f} of 255 away"
        use = rng.choice(["image", "mask", "training", "info", "recipe", "memory"])
        how = f"{how}, {damage}, {use}"
        if use == "image":
            return how, verdict(lambda: images.open_pictures(path, None, None, None, 8, 4).resized())
        if use == "mask":
            return how, verdict(lambda: images.open_pictures(path, path, 16, 16, 8, 4).resized())
        if use == "training":
            return how, verdict(lambda: ImageFolder(".", 8))
        if use == "memory":
            return how, verdict(lambda: handed_over_open(path))
        return how, verdict(lambda: read_recipe(path)) if use == "recipe" else command("info", path)

    def a_recipe(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A recipe with a few odd fields, or one that is damaged, repeated by the command."""
        recipe, how = dict(self.recipe), []
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            name = rng.choice([*RECIPE, *recipe])
            value = rng.choice([*ODD, rng.choice(RECIPE.get(name, [0]))])
            how.append(f"{name}={value!r:.40}")
            recipe[name] = value
            if rng.random() < 0.2:
                del recipe[name]
        text = json.dumps(recipe)
        if rng.random() < 0.2:
            text = rng.choice(
                ["", "[", "[" * 10**5, text[: rng.randrange(len(text))], '{"a": 1e999}', "1" * 5000, "NaN"]
            )
            how.append(f"text {text[:20]}")
        data = with_text(text, rng)
        if rng.random() < 0.3:
            damage = rng.choice(list(DAMAGE))
            data = DAMAGE[damage](data, rng)
            how.append(damage)
        Path("a.png").write_bytes(data)
        more = rng.choice([["--steps", "1"], ["--steps", "2", "--sampler", "ddim"], ["--steps", "1", "--seed", "3"]])
        if rng.random() < 0.2:
            return f"info of {how}", command("info", "a.png")
        where = ["--model", self.models / "tiny.safetensors"] if rng.random() < 0.9 else []
        return f"{how} {more}", command("generate", "--recipe", "a.png", *where, *more, "--size", "16x16", "--quiet")

    def training(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A folder with pictures, captions and a list, much of it odd, to train on."""
        folder, names = Path("photos"), []
        for k in range(rng.randrange(1, 6)):
            name = rng.choice(["", "inner/", ".hidden/", "__MACOSX/", "a b/", "é/"]) + f"{k}" + rng.choice(SUFFIXES)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _, data, _ = drawn(rng)
            if rng.random() < 0.3:
                data = rng.choice(list(DAMAGE.values()))(data, rng)
            put(folder / name, data if rng.random() < 0.9 else None)
            names.append(name)
            if rng.random() < 0.7:
                text = rng.choice([b"a cat", b"", b"\xff\xfe", b"\xef\xbb\xbfa", b"a\xe2\x80\xa8b", b"\0", b"a" * 3000])
                put((folder / name).with_suffix(".txt"), text if rng.random() < 0.9 else None)
        if rng.random() < 0.6:
            rows = [{"file_name": name, "text": rng.choice(["a cat", "b\u2028c", "\ud800", ""])} for name in names]
            rows += [rng.choice(ODD) for _ in range(rng.choice([0, 0, 0, 1]))]
            rows += [
                {
                    "file_name": rng.choice([*names, "gone.png", "../a", "/", "", "\0", *ODD]),
                    "text": rng.choice(["d", *ODD]),
                }
            ]
            text = rng.choice(["\n", "\r\n", "\n\n", "\u2028"]).join(
                json.dumps(r, ensure_ascii=rng.random() < 0.5) for r in rows
            )
            put(folder / "metadata.jsonl", text.encode(errors="replace") if rng.random() < 0.95 else None)
        captions = rng.random() < 0.7
        how = f"{names}, captions={captions}"

        def use() -> None:
            found = ImageFolder(folder, 8, captions=captions, memory=rng.choice([0, 1 << 20]))
            batch = found.take(range(len(found)))
            assert batch.pixels.shape == (len(found), 3, 8, 8)
            assert batch.captions is None or len(batch.captions) == len(found)

        return how, verdict(use)

    def a_config(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A folder of diffusers' with odd values in one of its files, opened and run for a step."""
        folder = Path("folder")
        shutil.copytree(self.models / "folder", folder)
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".txt"))
        path = rng.choice([p for p in files if p.name not in ("vocab.json", "merges.txt")] * 3 + files)
        how = path.as_posix()
        if path.suffix == ".txt" or rng.random() < 0.1:
            damage = rng.choice(list(DAMAGE))
            path.write_bytes(DAMAGE[damage](path.read_bytes(), rng))
            how += f" {damage}"
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            for _ in range(rng.choice([1, 1, 2, 3])):
                how += f" {change(content, rng)}"
            text = json.dumps(content)
            path.write_text(text if rng.random() < 0.97 else rng.choice(["", "[]", "[" * 10**5, "null", text[:-3]]))
        if rng.random() < 0.15:  # a table of words of its own, or weights that are something else
            put(folder / "tokenizer" / "added_tokens.json", json.dumps(rng.choice(ODD)).encode())
            how += " added_tokens"

        def use() -> None:
            pipe: Any = weights_convert.load(folder, "cpu")
            with torch.no_grad():
                found = pipe.generate("a", steps=1, seed=0, output="latent", progress=False, height=16, width=16)
            assert found.isfinite().all()

        return how, verdict(use) if rng.random() < 0.8 else command("info", folder)

    def no_file(self, rng: random.Random, number: int) -> tuple[str, str]:
        """Something that is no regular file, or a name that leads nowhere, where a path is taken."""
        kind = rng.choice(list(NO_FILES))
        made = NO_FILES[kind]
        model = str(self.models / "tiny.safetensors")
        Image.new("RGB", (16, 16)).save("sound.png")
        if rng.random() < 0.35:
            return self._inside(kind, made, rng)
        with made("given") as path:
            argv = [path if part == "X" else model if part == "MODEL" else part for part in rng.choice(PLACES)]
            return f"{kind}: {argv}", command(*argv)

    def _inside(self, kind: str, made: Callable[[str], Any], rng: random.Random) -> tuple[str, str]:
        """The same in the place of a file in a folder."""
        place = rng.choice(INSIDE.split())
        target = Path(place)
        if place.startswith("folder/"):
            shutil.copytree(self.models / "folder", "folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        if place.startswith("photos/"):
            for name in ("1.png", "2.png"):
                Image.new("RGB", (16, 16)).save(f"photos/{name}")
        with made("given") as path:
            with contextlib.suppress(OSError):
                target.unlink()
            if os.path.exists(path) and "\0" not in path:
                os.symlink(os.path.abspath(path), target)
            if place.startswith("folder/"):
                return f"{kind} as {place}", verdict(lambda: weights_convert.load("folder", "cpu"))
            if place.startswith("photos/"):
                return f"{kind} as {place}", verdict(lambda: ImageFolder("photos", 8, captions=True))
            train = ("train", "--data", "shapes", "--out", "run", "--steps", "1", "--batch", "2", "--quiet", "--resume")
            return f"{kind} as {place}", command(*train, "--device", "cpu")


# --- what became of it ------------------------------------------------------------------------------------------------


def verdict(use: Callable[[], Any]) -> str:
    """ "taken" or "refused"; anything else is a fault of ours, in words."""
    try:
        use()
    except (MinidiffError, PermissionError) as e:
        text = str(e)
        return "refused" if "\n" not in text and len(text) < LONGEST else f"FAULT refused at length: {text[:200]!r}"
    except Exception as e:
        return f"FAULT {type(e).__name__}: {str(e)[:300]}"
    return "taken"


def command(*argv: Any) -> str:
    """The same of the command line, by its exit status and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(a) for a in argv])
    lines = err.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("minidiff: error: ")]
    if any(not c.isprintable() for line in lines for c in line) or any(len(line) > LONGEST for line in lines):
        return f"FAULT prints {max(lines, key=len)[:200]!r}"
    if any(not (c.isprintable() or c == "\n") for c in out.getvalue()):
        return f"FAULT prints {out.getvalue()[:200]!r}"
    if status == 0 and not errors:
        return "taken"
    if status == 2 and len(errors) == 1 and lines[-1] == errors[0]:
        return "refused"
    return f"FAULT status {status}: {lines[-2:]}"


def handed_over_open(path: Path) -> None:
    """What a program does that opens pictures itself, sensibly."""
    try:
        image = Image.open(path, formats=["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "TGA"])
    except Exception:
        return
    with image:
        images.open_pictures(image, None, None, None, 8, 4).resized()


# --- pictures ---------------------------------------------------------------------------------------------------------

LOSSLESS = ("PNG", "TIFF", "BMP", "TGA", "PPM", "GIF", "WEBP", "JPEG", "AVIF", "JPEG2000", "QOI")
OTHERS = ("EPS", "ICO", "PCX", "PDF", "DDS", "SGI", "ICNS", "IM", "XBM", "MSP", "SPIDER")
SUFFIXES = (
    ".png",
    ".jpg",
    ".jfif",
    ".tiff",
    ".webp",
    ".gif",
    ".heic",
    ".txt",
    "",
    ".avif",
    ".ppm",
    ".svg",
    ".TGA",
    ".bmp",
)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F")


def drawn(rng: random.Random) -> tuple[str, bytes, Any]:
    """A picture's file, and the colours it should give where that is certain."""
    if rng.random() < 0.15:
        how = rng.choice(list(BY_HAND))
        return how, BY_HAND[how](rng), None
    size = rng.choice([(SIDE, SIDE), (SIDE, SIDE), (1, 1), (1, 200), (200, 1), (9, 8), (3000, 8)])
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0])) * 255 // max(1, sum(size) - 2)
    grey = Image.fromarray(ramp.astype(np.uint8))
    mode, kind = rng.choice(MODES), rng.choice([*LOSSLESS] * 3 + [*OTHERS])
    deep = {"I": np.int32, "I;16": np.uint16, "I;16B": ">u2", "F": np.float32}
    if mode in deep:
        values = (ramp / 255 if mode == "F" else ramp * 257).astype(deep[mode])
        image = Image.frombytes(mode, size, values.tobytes()) if mode == "I;16B" else Image.fromarray(values)
    else:
        image = grey.convert("RGB").convert(mode)
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 2, 3, 0, 9, 77])
        options["exif"] = exif
    if rng.random() < 0.15 and kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options |= {"save_all": True, "append_images": [image, image]}
    if rng.random() < 0.2 and kind in ("PNG", "GIF") and mode in ("L", "P", "RGB", "1"):
        options["transparency"] = rng.choice([0, 5, bytes(20)]) if mode == "P" else (0, 0, 0) if mode == "RGB" else 0
    buffer = io.BytesIO()
    how = f"{mode} {kind} {size[0]}x{size[1]} {sorted(options)}"
    try:
        image.save(buffer, kind, **options)
    except Exception:  # a format that does not have this mode
        buffer = io.BytesIO()
        grey.save(buffer, "PNG")
        return f"PNG for {how}", buffer.getvalue(), as_rgb(ramp)
    kept = mode not in deep or kind in ("PNG", "TIFF", "PPM")  # the others cut deep pictures off as they write them
    certain = kind in LOSSLESS and kept and not options and mode not in ("1", "P", "PA") and min(size) > 7
    return how, buffer.getvalue(), as_rgb(ramp) if certain else None


def as_rgb(ramp: Any) -> Any:
    return np.stack([ramp] * 3, axis=-1)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rng: random.Random, *more: bytes) -> bytes:
    """A PNG whose header says anything."""
    width, height = (rng.choice([0, 1, 7, 5000, 30_000, 2**16, 2**31 - 1]) for _ in range(2))
    head = struct.pack(
        ">IIBBBBB", width, height, rng.choice([1, 2, 4, 8, 16, 3]), rng.randrange(8), 0, 0, rng.randrange(3)
    )
    rows = zlib.compress(bytes(rng.choice([0, 10, 10**6])))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(rng: random.Random) -> bytes:
    """A TIFF whose directory says anything."""
    tags = [tag for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279, 339, 274, 34665) if rng.random() < 0.9]
    values = (0, 1, 8, 16, 32, 100, 2**32 - 1)
    entries = [(tag, rng.randrange(14), rng.choice([0, 1, 3, 2**31]), rng.choice(values)) for tag in tags]
    out = rng.choice([b"II*\0", b"MM\0*"]) + struct.pack("<IH", 8, len(entries))
    return (
        out + b"".join(struct.pack("<HHII", *e) for e in entries) + struct.pack("<I", rng.choice([0, 8])) + bytes(400)
    )


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\nshowpage\n%%EOF\n"
COUNTS = (0, 1, 3, 255, 65535, 10**9)
FLOATS = (0, 1, -1, 0.5, 300, 1e30, np.nan, np.inf)
BY_HAND: dict[str, Callable[[random.Random], bytes]] = {
    "lying png": png,
    "text bomb": lambda rng: png(rng, chunk(b"zTXt", b"minidiff\0\0" + zlib.compress(bytes(2**25)))),
    "profile bomb": lambda rng: png(rng, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**25)))),
    "lying tiff": tiff,
    "postscript": lambda rng: POSTSCRIPT,
    "dos postscript": lambda rng: b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 99) + bytes(20) + POSTSCRIPT,
    "emf": lambda rng: b"\1\0\0\0" + rng.randbytes(36) + b" EMF" + rng.randbytes(200),
    "wmf": lambda rng: b"\xd7\xcd\xc6\x9a" + rng.randbytes(200),
    "avif": lambda rng: b"\0\0\0\x1cftypavif" + rng.randbytes(300),
    "bmp": lambda rng: b"BM" + rng.randbytes(12) + struct.pack("<IiiHHI", 40, 9, 9, 1, 24, 0) + rng.randbytes(300),
    "gif": lambda rng: b"GIF89a" + rng.randbytes(7) + b"\x2c" + rng.randbytes(200),
    "pgm": lambda rng: b"P%d %d 3 %d\n" % (rng.randrange(1, 8), rng.choice(COUNTS), rng.choice(COUNTS)) + bytes(60),
    "pfm": lambda rng: b"Pf 2 2 -1\n" + np.array(rng.choices(FLOATS, k=4), "<f4").tobytes(),
    "noise": lambda rng: rng.randbytes(rng.choice([0, 1, 15, 16, 600])),
    "pointer": lambda rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "qoi": lambda rng: b"qoif" + struct.pack(">II", rng.choice([0, 5, 2**31]), 5) + rng.randbytes(100),
    "jp2": lambda rng: b"\0\0\0\x0cjP  \r\n\x87\n" + rng.randbytes(200),
}  # fmt: skip


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 3, 10])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_in_front(data: bytes, rng: random.Random) -> bytes:
    return flip(data[:200], rng) + data[200:]


def zero_a_run(data: bytes, rng: random.Random) -> bytes:
    at, n = rng.randrange(len(data) + 1), rng.randrange(1, 300)
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def lengthen_a_number(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(min(len(data), 300) + 1)
    return data[:at] + rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"]) + data[at + 4 :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "grown": lambda data, rng: data + rng.randbytes(rng.randrange(1, 2000)),
    "flipped": flip,
    "flipped in front": flip_in_front,
    "zeros": zero_a_run,
    "lies": lengthen_a_number,
}


# --- recipes, configs, and what is no file ----------------------------------------------------------------------------

RECIPE: dict[str, list[Any]] = {
    "prompt": ["a fox", "", None, "x" * 10**5, "\x1b]0;a\x07", "\ud83d"],
    "negative_prompt": ["rain", None],
    "steps": [1, 2, 10**6, -3],
    "seed": [0, -1, 2**64 - 1, 2**64, None],
    "guidance_scale": [1, 0.0, -7, 1e30],
    "sampler": [{"name": n} for n in ("ddim", "euler", "lcm", "dpmpp_2m", "nothing", "a" * 5000)]
    + [{"name": "ddim", "eta": 5}, {"name": "euler", "spacing": []}, {"name": "pndm", "later": 1}, {"name": {}}],
    "like": ["a1111", "ldm", "comfyui", "nobody", "diffusers 0.1"],
    "strength": [0.5, 2],
    "image": ["a.png", None],
    "mask": ["m.png", None],
    "sizes": [{"original": [8, 8]}, {"crop": [1]}, {"score": 3}, {"x": 1}, {"original": [10**400, 1]}],
    "negative_sizes": [{"original": [8, 8]}],
    "clip_skip": [1, 7, -1],
    "guidance_rescale": [0.5, 3],
    "guidance_interval": [[0.1, 0.9], [0.9, 0.1], [0, 1]],
    "denoising_start": [0.5],
    "denoising_end": [0.5, 0.001],
    "lora": [[["a.safetensors", 1.0]], [["\x1b[2J", 1]]],
    "embedding": [[["a.pt", None]]],
    "approximate": [{"vae_tiles": 512}, {"vae_tiles": "a"}, {"vae_tiles": -1}, {"deep": {}}, {"vae_tiles": None}],
    "fast": [[], ["packed"]],
    "place": [1, 0],
    "model": ["tiny sd", "sd1", ""],
    "model_hash": ["0" * 32, ""],
    "later": [1],
}


def with_text(text: str, rng: random.Random) -> bytes:
    """A PNG of 16 x 16 pixels that carries ``text`` as minidiff's, in one of the ways there are."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    data, content = buffer.getvalue(), text.encode()
    key = b"minidiff\0"
    piece = rng.choice(
        [
            chunk(b"tEXt", key + content),
            chunk(b"zTXt", key + b"\0" + zlib.compress(content)),
            chunk(b"iTXt", key + b"\0\0\0\0" + content),
            chunk(b"iTXt", key + b"\1\0\0\0" + zlib.compress(content)),
        ]
    )
    at = rng.choice([33, len(data) - 12])
    return data[:at] + piece + data[at:]


CONFIG_KEYS = """
in_channels out_channels block_out_channels layers_per_block attention_head_dim norm_num_groups cross_attention_dim
down_block_types up_block_types mid_block_type act_fn sample_size norm_eps class_embed_type addition_embed_type
time_cond_proj_dim use_linear_projection num_attention_heads transformer_layers_per_block
reverse_transformer_layers_per_block only_cross_attention dual_cross_attention latent_channels scaling_factor
shift_factor latents_mean latents_std use_quant_conv force_upcast hidden_size hidden_act num_hidden_layers
vocab_size max_position_embeddings projection_dim eos_token_id beta_start beta_schedule num_train_timesteps
prediction_type trained_betas clip_sample timestep_spacing steps_offset rescale_betas_zero_snr algorithm_type
_class_name use_karras_sigmas model_max_length pad_token unk_token add_prefix_space do_lower_case unet vae scheduler
later
"""


def change(content: Any, rng: random.Random) -> str:
    """Put something odd somewhere into parsed JSON; says what."""
    if not isinstance(content, (dict, list)) or not content:
        return "nothing"
    place: Any = content
    for _ in range(4):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.5:
            place = place[key]
            continue
        break
    if isinstance(place, dict) and rng.random() < 0.4:
        key = rng.choice(CONFIG_KEYS.split())
    value = rng.choice(ODD)
    if rng.random() < 0.15 and isinstance(place, dict):
        place.pop(key, None)
        return f"without {key!r:.40}"
    place[key] = value
    return f"{key!r:.40}={value!r:.40}"


def put(path: Path, data: bytes | None) -> None:
    """A file, or a pipe in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    if data is None:
        os.mkfifo(path)
    else:
        path.write_bytes(data)


@contextlib.contextmanager
def pipe(name: str) -> Iterator[str]:
    os.mkfifo(name)
    yield name


@contextlib.contextmanager
def listening_socket(name: str) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(name)
        yield name


@contextlib.contextmanager
def a_folder(name: str) -> Iterator[str]:
    Path(name).mkdir()
    Path(name, "x").write_text("x")
    yield name


@contextlib.contextmanager
def link(name: str, to: str) -> Iterator[str]:
    os.symlink(to, name)
    yield name


def named(text: str) -> Callable[[str], Any]:
    return lambda name: contextlib.nullcontext(text)


@contextlib.contextmanager
def holding(name: str, data: bytes) -> Iterator[str]:
    Path(name).write_bytes(data)
    yield name


NO_FILES: dict[str, Callable[[str], Any]] = {
    "pipe": pipe,
    "socket": listening_socket,
    "folder": a_folder,
    "zeros": named("/dev/zero"),
    "null": named("/dev/null"),
    "full": named("/dev/full"),
    "random": named("/dev/urandom"),
    "nothing": named("nothing"),
    "no folder": named("no/such/folder/x.png"),
    "null character": named("a\0b"),
    "empty name": named(""),
    "long name": named("x" * 5000),
    "escapes": named("\x1b[2J\u202e\x9b\n.png"),
    "surrogate": named("\udcff.png"),
    "link to itself": lambda name: link(name, name),
    "dangling link": lambda name: link(name, "nowhere"),
    "link to a device": lambda name: link(name, "/dev/zero"),
    "empty file": lambda name: holding(name, b""),
    "text": lambda name: holding(name, b"hello"),
    "file as a folder": lambda name: named("sound.png/x")(name),
    "proc": named("/proc/self/maps"),
}  # fmt: skip
MADE = ("generate", "a", "--model", "MODEL", "--steps", "1", "--seed", "1", "--size", "16x16", "--quiet")
PLACES: tuple[tuple[str, ...], ...] = (
    ("info", "X"),
    ("info", "X", "--check"),
    ("convert", "X", "out.safetensors"),
    ("convert", "MODEL", "X"),
    ("convert", "MODEL", "X", "--force"),
    ("convert", "MODEL", "X", "--to", "diffusers"),
    ("convert", "MODEL", "out.safetensors", "--config", "X"),
    ("convert", "MODEL", "out.safetensors", "--vae", "X"),
    ("plan", "--model", "X"),
    ("generate", "a", "--model", "X", "--quiet"),
    *((*MADE, option, "X") for option in ("--lora", "--embedding", "--recipe", "--image", "--out")),
    *((*MADE, option, "X") for option in ("--vae", "--unet", "--text-encoder")),
    (*MADE, "--image", "sound.png", "--mask", "X"),
    (*MADE, "--out", "X", "--force"),
    ("parity", "X"),
    ("parity", "record", "X", "out.safetensors"),
    ("parity", "record", "MODEL", "X", "--steps", "1", "--size", "16x16"),
    ("parity", "compare", "X", "X"),
    ("train", "--data", "X", "--out", "run", "--quiet"),
    ("train", "--data", "shapes", "--model", "X", "--out", "run", "--quiet"),
    ("train", "--data", "shapes", "--config", "X", "--out", "run", "--quiet"),
    ("train", "--data", "shapes", "--out", "X", "--resume", "--quiet"),
    ("train", "--data", "shapes", "--out", "run", "--held-out", "X", "--quiet"),
)  # fmt: skip
INSIDE = """
folder/model_index.json folder/unet/config.json folder/vae/config.json folder/text_encoder/config.json
folder/scheduler/scheduler_config.json folder/tokenizer/vocab.json folder/tokenizer/merges.txt
folder/tokenizer/tokenizer.json folder/tokenizer/added_tokens.json folder/tokenizer/special_tokens_map.json
folder/tokenizer/tokenizer_config.json folder/unet/diffusion_pytorch_model.safetensors
folder/unet/diffusion_pytorch_model.safetensors.index.json folder/text_encoder/model.safetensors
photos/a.png photos/1.txt photos/metadata.jsonl photos/inner/b.jpg
run/state.safetensors run/model.safetensors run/log.csv run/latents.safetensors
"""
