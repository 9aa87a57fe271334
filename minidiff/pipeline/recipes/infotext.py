r"""AUTOMATIC1111's infotext, read and written.

    a large red star, <lora:ink:0.8>
    Negative prompt: fog
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 7, Size: 512x768, Model: photo, Version: "v1.6.0"

The last line is a list ``Name: value``, separated by commas; a value with a comma, a colon or a line break is a JSON
string. Before it stand the prompt and, from a line that begins with "Negative prompt:" on, the negative one. Adapters
are tags in the prompt. A last line of fewer than three entries is part of the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from minidiff.config import quote
from minidiff.pipeline.recipes.theirs import Theirs, number, whole

PROGRAM = "a1111"
NEGATIVE = "Negative prompt:"
ENTRY = re.compile(r'\s*([^\s:,"][^:,"]{0,60}?)\s*:\s*("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)')
FEWEST = 3  # entries of a last line that is a list
ADAPTER = re.compile(r"<(lora|lyco|hypernet):([^:<>]+)((?::[^:<>]*)*)>")
# Entries without an effect on the picture, or known from elsewhere.
HARMLESS = {"version", "model hash", "vae hash", "lora hashes", "hashes", "user", "batch size", "batch pos"}
# With levels "Automatic": these samplers have others than the default (modules/sd_samplers_kdiffusion.py, v1.9).
AUTOMATIC = {
    **dict.fromkeys(("dpm++ 2m", "dpm++ sde", "dpm++ 2s a", "dpm2", "dpm2 a", "restart"), "karras"),
    **dict.fromkeys(("dpm++ 2m sde", "dpm++ 2m sde heun", "dpm++ 3m sde"), "exponential"),
}
OUR_NAMES = {  # of samplers, as written into infotext
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "unipc": "UniPC",
    "lcm": "LCM",
}


def read(text: str) -> Theirs:
    """Read an infotext: see above. Any text is one, if only a prompt."""
    found = Theirs(PROGRAM)
    found.asked["prompt_style"] = PROGRAM
    *lines, last = [line.strip() for line in text.strip().split("\n")]
    entries = parameters(last)
    if len(entries) < FEWEST:
        lines, entries = [*lines, last], {}
    prompt, _, negative = "\n".join(["", *lines]).partition(f"\n{NEGATIVE}")
    found.asked["prompt"] = _without_adapters(found, prompt.strip())
    found.asked["negative_prompt"] = negative.strip() or None
    for name, value in entries.items():
        reader = READERS.get(name.lower())
        if reader is not None:
            reader(found, value, entries)
        elif name.lower() not in HARMLESS:
            found.notes.append(f"{name}: {quote(value)}")
    if not any(name.lower().startswith("hires") for name in entries) and "Denoising strength" in entries:
        found.pictures["image"] = None  # what else would have been denoised
    return found


def parameters(line: str) -> dict[str, str]:
    """Return the entries of a list ``Name: value, ...``; empty for a line that is none. The first of a name counts."""
    found: dict[str, str] = {}
    at = 0
    while at < len(line):
        entry = ENTRY.match(line, at)
        if entry is None or entry.end() == at:
            return {}
        found.setdefault(entry[1], _unquoted(entry[2].strip()))
        at = entry.end()
    return found


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def _without_adapters(found: Theirs, prompt: str) -> str:
    """Take the adapters' tags out of the prompt: ``<lora:NAME:STRENGTH>``."""
    for kind, name, rest in ADAPTER.findall(prompt):
        parts = rest.split(":")[1:]
        strength = number(parts[0]) if parts and parts[0] else 1.0
        if kind == "lora" and len(parts) < 2 and strength is not None:
            found.lora.append((name, strength))
        else:
            found.notes.append(quote(f"<{kind}:{name}{rest}>"))
    return ADAPTER.sub("", prompt).strip()


def _sampler(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    levels = entries.get("Schedule type", "").lower() or None  # before version 1.9, the sampler's name has it
    found.set_sampler(value, AUTOMATIC.get(value.lower()) if levels == "automatic" else levels)


def _steps(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    _put(found, "steps", "Steps", whole(value), value)


def _scale(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    _put(found, "guidance_scale", "CFG scale", number(value), value)


def _seed(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    _put(found, "seed", "Seed", whole(value), value)


def _size(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)
    if sides is None:
        found.notes.append(f"Size: {quote(value)}")
    else:
        found.asked |= {"width": int(sides[1]), "height": int(sides[2])}


def _clip_skip(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    layers = whole(value)
    _put(found, "clip_skip", "Clip skip", None if layers is None or layers < 1 else layers - 1, value)


def _strength(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    if not any(name.lower().startswith("hires") for name in entries):
        _put(found, "strength", "Denoising strength", number(value), value)


def _model(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    found.model = value


def _vae(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    found.notes.append(f"VAE: {quote(value)} (give it with --vae)")


def _words(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    found.words += [entry.partition(":")[0].strip() for entry in value.split(",") if entry.strip()]


def _rng(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    if value.lower() in ("cpu", "gpu", "nv"):
        found.device = value.lower()
    else:
        found.notes.append(f"RNG: {quote(value)}")


def _eta(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    if number(value) != (0 if entries.get("Sampler") in ("DDIM", "PLMS") else 1):
        found.notes.append(f"Eta: {quote(value)}")


def _none(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    """Do nothing: read together with another entry."""


def _ensd(found: Theirs, value: str, entries: Mapping[str, str]) -> None:
    if whole(value) != 0:
        found.notes.append(f"ENSD: {quote(value)}")


def _put(found: Theirs, field: str, name: str, value: Any, text: str) -> None:
    if value is None:
        found.notes.append(f"{name}: {quote(text)}")
    else:
        found.asked[field] = value


READERS: Mapping[str, Callable[[Theirs, str, Mapping[str, str]], None]] = {
    "steps": _steps,
    "sampler": _sampler,
    "schedule type": _none,
    "cfg scale": _scale,
    "seed": _seed,
    "size": _size,
    "clip skip": _clip_skip,
    "denoising strength": _strength,
    "model": _model,
    "vae": _vae,
    "ti hashes": _words,
    "rng": _rng,
    "eta": _eta,
    "ensd": _ensd,
}


def write(recipe: Mapping[str, Any], version: str) -> str:
    """Return minidiff's ``recipe`` (as JSON has it) as infotext, for programs that read no other.

    It says less than the recipe: neither ``like`` nor the options of a sampler have a place in it.
    """
    prompt = str(recipe.get("prompt") or "")
    tags = "".join(f" <lora:{_stem(name)}:{strength:g}>" for name, strength in recipe.get("lora", ()))
    sampler = recipe.get("sampler") or {}
    called = OUR_NAMES.get(str(sampler.get("name")), str(sampler.get("name")))
    levels = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta"}.get(str(sampler.get("sigma_spacing")))
    skip = recipe.get("clip_skip")
    entries = {
        "Steps": recipe.get("steps"),
        "Sampler": called,
        "Schedule type": levels,
        "CFG scale": recipe.get("guidance_scale"),
        "Seed": recipe.get("seed"),
        "Size": f"{recipe['width']}x{recipe['height']}" if recipe.get("width") and recipe.get("height") else None,
        "Clip skip": None if skip is None else skip + 1,
        "Denoising strength": recipe.get("strength"),
        "Version": f"minidiff {version}",
    }
    listed = ", ".join(f"{name}: {_quoted(value)}" for name, value in entries.items() if value is not None)
    negative = recipe.get("negative_prompt")
    return "\n".join([f"{prompt}{tags}", *([f"{NEGATIVE} {negative}"] if negative else []), listed])


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name
