"""Odd prompts of every dialect, grids, lines of --prompts, controls, masks and recipes of other programs.

The kinds of :mod:`tests.support.fuzz_inputs` that are about what is asked for, and not about a file of a known format.
Each is handed to the command; ``refused`` in one line, or ``taken``, and nothing half-written is left.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff.cli import main
from minidiff.pipeline.metadata import EXIF, USER_COMMENT
from minidiff.pipeline.request import PROMPT_STYLES
from tests.support.comfyui import text_to_picture
from tests.support.tiny import tiny_adapter, tiny_controlnet

Kind = Callable[[random.Random, int], tuple[str, str]]
Command = Callable[..., str]
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**64, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "a", "8"),
    *("\x1b[2J\u202e", "x" * 3000, "../../etc/passwd", "\ud800", [], [0], ["6", 0], [["6"], 0], [[[]]], {}, {"a": 1}),
)
SIGNS = (
    *(*'()[]:|,.+-="\\{}<> \n', "a", "red", "1.3", "0.5", "3", "BREAK", "AND", "雪", "1e999", "-5"),
    *(".and(", ".blend(", ".swap(", "embedding:", "<lora:x:1>"),
)
INFOTEXT = (
    "a (red:1.2) star <lora:ink:0.5>\nNegative prompt: fog\nSteps: 2, Sampler: Euler a, Schedule type: Karras, "
    'CFG scale: 3, Seed: 5, Size: 64x64, Model: "a, b", Clip skip: 2, Denoising strength: 0.5, Hires upscale: 2, '
    'RNG: CPU, TI hashes: "cat: 12", ENSD: 31337, Eta: 0.5, VAE: kl.pt, Version: v1.9'
)
GRAPH: dict[str, Any] = {
    **text_to_picture("a (fox:1.2)", 64, 64, seed=5, steps=2, cfg=3, sampler_name="euler", scheduler="normal"),
    "10": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["4", 1], "model": ["4", 0]}},
    "11": {"class_type": "Reroute", "inputs": {"": ["10", 0]}},
    "12": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0]}},
}
CLASSES = [node["class_type"] for node in GRAPH.values()]
CLASSES += ["LoraLoader", "VAEEncode", "LoadImage", "KSamplerAdvanced", "PrimitiveNode", "ControlNetApplyAdvanced", ""]
AXES = (
    *(
        "steps=1,2",
        "scale=1,3",
        "sampler=euler,ddim",
        "seed=1,2",
        "prompt=a|b, c",
        "size=16x16,32x16",
        "like=a1111,ldm",
    ),
    *("clip-skip=0,1", "prompt-style=a1111,compel", "negative=fog,snow", "guidance-rescale=0,0.5"),
)
ODD_AXES = (
    *("", "=", "steps", "steps=", "steps=,", "steps=1,,2", "=1,2", "steps=x", "steps=0,1", "steps=-1", "nothing=1,2"),
    *("seed=" + ",".join(map(str, range(5000))), "prompt=" + "|" * 50, "prompt=\x1b[2J|\ud800", "size=1x1,16x16"),
    *("size=x", "size=99999999x99999999", "scale=nan,1", "scale=1e999", "sampler=nothing", "num-images=1,2", "image=a"),
    *(
        "clip-skip=99",
        "like=nobody",
        "prompt-style=nobody",
        "strength=0.5,2",
        "guidance-interval=0.9,0.1",
        "--steps=1,2",
    ),
    *("prompt=(((|[a:b", "steps=1000000000", "seed=" + "9" * 5000, "prompt=" + "x" * 3000 + "|b"),
)


class Requests:
    """The kinds, and what they need: ``models``, a folder with ``tiny.safetensors``."""

    def __init__(self, models: Path, command: Command) -> None:
        self.models, self.command = models, command
        tiny_controlnet().save(models / "net.safetensors")
        tiny_adapter().save(models / "adapter.safetensors")
        self.kinds: dict[str, Kind] = {
            "dialect": self.dialect,
            "grid": self.grid,
            "lines": self.lines,
            "control": self.control,
            "theirs": self.theirs,
        }

    def generate(self, *options: Any) -> str:
        """Run the command with the tiny model; a fault is also a file that was left half-written."""
        given = ["--model", self.models / "tiny.safetensors", "--steps", "1", "--seed", "1", "--quiet", *options]
        end = self.command("generate", *given)
        left = [path.name for path in Path().rglob("*") if ".part" in path.name or path.name.startswith(".")]
        return f"FAULT left {left}" if left else end

    def dialect(self, rng: random.Random, number: int) -> tuple[str, str]:
        """Any text as a prompt, a negative one, or both, in any dialect."""
        style = rng.choice(PROMPT_STYLES)
        texts = ["".join(rng.choice(SIGNS) for _ in range(rng.choice([0, 3, 9, 40]))) for _ in range(2)]
        if rng.random() < 0.1:
            texts[0] = rng.choice(["(", "[", "((a:1.1)", "[a|", "[a:b:", '("a", ', "a+", "{"]) * rng.choice([60, 3000])
        if rng.random() < 0.4:
            told = ["--prompt-style", style, "--steps", rng.choice(["1", "20", "1000000"])]
            return f"tokens {style} {texts[0]!r:.80}", self.command("tokens", *told, "--", texts[0])
        options = ["--prompt-style", style, f"--negative={texts[1]}", "--size", "16x16"]
        return f"{style} {texts!r:.120}", self.generate(*options, "--sampler", "euler", "--", texts[0])

    def grid(self, rng: random.Random, number: int) -> tuple[str, str]:
        """One to three axes, sound and odd, with options that may not go with them."""
        axes = [rng.choice(AXES if rng.random() < 0.7 else ODD_AXES) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        if rng.random() < 0.15:
            axes.append(axes[0])
        more = rng.choice([[], [], [], ["--strip"], ["--num-images", "2"], ["--out", "g.jpg"], ["--out", "no/g.png"]])
        if rng.random() < 0.15:
            Path("grid-cells").mkdir()
            Path("grid-cells", "01-01.png").write_bytes(rng.choice([b"", b"x", b"\x89PNG\r\n\x1a\n" + bytes(40)]))
        elif rng.random() < 0.05:
            Path("grid-cells").write_text("in the way")
        sized = [] if any("size" in axis for axis in axes) else ["--size", "16x16"]
        return f"{axes!r:.150} {more}", self.generate("a fox", *sized, *more, "--grid", *axes)

    def lines(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A file of lines, many of them broken; the sound ones are made, and the others named."""
        rows: list[bytes] = []
        for _ in range(rng.randrange(1, 6)):
            row: dict[str, Any] = {"prompt": "a fox"}
            for _ in range(rng.choice([0, 0, 1, 2])):
                row[rng.choice(KEYS)] = rng.choice(ODD)
            text = json.dumps(row)
            rows.append(text.encode() if rng.random() < 0.85 else rng.choice(BROKEN)(text))
        name = rng.choice(["p.jsonl", "p.txt"])
        end = rng.choice([b"\n", b"\r\n", b"\n\n"])
        Path(name).write_bytes(end.join(rows))
        given = ["--prompts", name, "--out", "out/", "--size", "16x16", "--together", rng.choice(["1", "2", "8"])]
        return f"{rows!r:.200}", self.many(*given)

    def many(self, *options: Any) -> str:
        """The same of --prompts, which ends with status 1 and an error for each broken line."""
        out, err = io.StringIO(), io.StringIO()
        given = ["--model", self.models / "tiny.safetensors", "--steps", "1", "--seed", "1", "--quiet", *options]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["generate", *map(str, given)])
        lines = err.getvalue().splitlines()
        errors = [line for line in lines if line.startswith("minidiff: error: ")]
        if any(not c.isprintable() for line in lines for c in line) or any(len(line) > 4000 for line in lines):
            return f"FAULT prints {max(lines, key=len)[:200]!r}"
        if any(not path.endswith(".png") or not Path(path).is_file() for path in out.getvalue().splitlines()):
            return f"FAULT names {out.getvalue()[:200]!r}"
        left = [path.name for path in Path().rglob("*") if ".part" in path.name]
        if left:
            return f"FAULT left {left}"
        if status == 0 and not errors:
            return "taken"
        told = all(", line " in line for line in errors)
        if (status == 1 and errors and told) or (status == 2 and len(errors) == 1 and not told):
            return "refused"
        return f"FAULT status {status}: {lines[-2:]}"

    def control(self, rng: random.Random, number: int) -> tuple[str, str]:
        """Values of --control of any form, with models and pictures that are none."""
        Image.new("RGB", (32, 32), "white").save("edges.png")
        Image.new("L", (3, 3)).save("a=b,1.png")
        Path("bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + rng.randbytes(50))
        net, adapter, whole = (self.models / f"{name}.safetensors" for name in ("net", "adapter", "tiny"))
        models = [net, net, net, adapter, adapter, whole, "edges.png", "gone.safetensors", "", self.models, "a=b"]
        pictures = ["edges.png"] * 4 + ["a=b,1.png", "bad.png", "gone.png", "", ".", net, "/dev/null"]
        settings = [
            "",
            "",
            ",0.5",
            ",1,0,0.5",
            ",1,0.9,0.1",
            ",soft",
            ",guess",
            ",soft,guess",
            ",nan",
            ",1e9",
            ",,",
            ",x",
        ]
        settings += [",1,2,3,4", ",-1", ",1,0.99,1", ",0.5,soft,0.1", ",1,0,1,guess", ",=", ",1e999"]
        texts = [
            f"{net}=edges.png,0.5,0,1"
            if rng.random() < 0.5
            else "".join(map(str, map(rng.choice, (models, ["=", "=", "=", "=", ""], pictures, settings))))
            for _ in range(rng.choice([1, 1, 2, 3]))
        ]
        more = rng.choice([[], [], ["--steps", "4"], ["--size", "24x40"], ["--image", "edges.png"], ["--scale", "1"]])
        if rng.random() < 0.2:
            more = ["--image", "edges.png", "--mask", rng.choice(pictures)]
        options = [word for text in texts for word in ("--control", text)]
        return f"{texts!r:.200} {more}", self.generate("a fox", *options, *more)

    def theirs(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A recipe of another program, changed or damaged, in any format, described and repeated."""
        path = Path(rng.choice(["a.png", "a.png", "a.jpg", "a.webp"]))
        text, name = (
            (infotext(rng), "parameters")
            if rng.random() < 0.5
            else (graph(rng), rng.choice(["prompt", "prompt", "workflow"]))
        )
        store(path, name, text)
        how = f"{path} {name} {text!r:.200}"
        if rng.random() < 0.4:
            return how, self.command("info", path)
        if rng.random() < 0.2:
            return how, self.command("replay", path)
        Image.new("RGB", (64, 64)).save("from.png")
        more = rng.choice([[], ["--image", "from.png"], ["--negative", "x"]])
        wanted = ["--size", "16x16"] if rng.random() < 0.7 else []
        return how, self.generate("--recipe", path, *wanted, *more, *rng.choice([["a fox"], []]))


KEYS = (
    *(
        "prompt",
        "negative_prompt",
        "steps",
        "seed",
        "guidance_scale",
        "sampler",
        "num_images",
        "width",
        "height",
        "image",
    ),
    *("mask", "strength", "control", "prompt_style", "like", "clip_skip", "sizes", "stepss", "", "output", "controls"),
    *("guidance_interval", "denoising_end", "prompt_2", "latents", "progress"),
)
BROKEN: tuple[Callable[[str], bytes], ...] = (
    lambda text: text[:-2].encode(),
    lambda text: b"\xff" + text.encode(),
    lambda text: b"",
    lambda text: b"[" * 20_000,
    lambda text: b"null",
    lambda text: b'{"prompt": "a", "prompt": "b"}',
    lambda text: b'{"a": ' * 5000,
    lambda text: text.replace('"', "'").encode(),
    lambda text: b"\xe2\x80\xa8" + text.encode(),
    lambda text: b"1" * 6000,
)


def infotext(rng: random.Random) -> str:
    """One with entries that are missing, doubled, swapped, or hold anything."""
    head, _, last = INFOTEXT.rpartition("\n")
    entries = last.split(", ")
    for _ in range(rng.choice([0, 1, 2, 5])):
        at = rng.randrange(len(entries))
        key = entries[at].partition(":")[0]
        value = rng.choice(
            [*map(str, ODD), '"', '"a', '""', "\\", '"\\', "a:b", "1x1", "0x0", "Euler", "-1", "1e999", "½", "٣"]
        )
        entries[at] = rng.choice([f"{key}: {value}", key, f"{key}:", f": {value}", value, entries[at] * 2])
    if rng.random() < 0.2:
        rng.shuffle(entries)
    if rng.random() < 0.2:
        head = "".join(rng.choice([*SIGNS, "Negative prompt:", "<lora:", "<lora:a:b:c>", "\r"]) for _ in range(30))
    text = f"{head}\n{', '.join(entries)}"
    return text[: rng.randrange(len(text))] if rng.random() < 0.1 else text


def graph(rng: random.Random) -> str:
    """One with nodes that are missing, lead in a circle, are of another class, or hold anything."""
    found: Any = copy.deepcopy(GRAPH)
    if rng.random() < 0.1:  # a long way round
        for k in range(500):
            link = [f"r{k + 1}", 0]
            kind = rng.choice(["Reroute", "ControlNetApply", "LoraLoader"])
            found[f"r{k}"] = {"class_type": kind, "inputs": {"model": link, "clip": link, "conditioning": link}}
        found["3"]["inputs"] |= {"model": ["r0", 0], "positive": ["r0", 0]}
    for _ in range(rng.choice([0, 1, 2, 4])):
        key = rng.choice(list(found) or ["3"])
        node = found.get(key)
        way = rng.randrange(7)
        if way == 0 or not isinstance(node, dict):
            found.pop(key, None)
        elif way == 1:
            node["class_type"] = rng.choice([*CLASSES, *ODD])
        elif way == 2:
            found[key] = rng.choice(ODD)
        elif way == 3:
            found[str(rng.randrange(60))] = {
                "class_type": rng.choice(CLASSES),
                "inputs": rng.choice([*ODD, node.get("inputs")]),
            }
        elif isinstance(node.get("inputs"), dict) and node["inputs"]:
            name = rng.choice(list(node["inputs"]))
            node["inputs"][name] = rng.choice([*ODD, [rng.choice(list(GRAPH)), 0], [key, 0]])
    text = json.dumps(found)
    return rng.choice(["[" * 50_000, '{"3":' * 5000, text[:-3], "NaN", "[]", "7"]) if rng.random() < 0.1 else text


def store(path: Path, name: str, text: str) -> None:
    """Write a picture that carries ``text`` as the program of ``name`` writes it."""
    picture = Image.new("RGB", (16, 16))
    data = text.encode("utf-8", "replace")
    if path.suffix == ".png":
        info = PngInfo()
        info.add_itxt(name, data.decode())
        picture.save(path, pnginfo=info)
        return
    exif = Image.Exif()
    if name == "parameters":
        exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + data.decode().encode("utf-16-be")
    else:
        exif[0x010F if name == "workflow" else 0x0110] = f"{name}:{data.decode()}"
    try:
        picture.save(path, exif=exif)
    except (ValueError, OSError):  # longer than a segment of a JPEG
        picture.save(path)
