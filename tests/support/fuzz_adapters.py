"""Adapter and learned-word files as people, programs and attackers make them, by the thousand.

A case is a number. A generator seeded by it makes a sound file for a tiny model, in one of the dialects and containers
that are about, and most of the time does one odd thing to it. What each odd thing must lead to is known:

    SAME      the file still says the same, or something else that is known: it is read and gives just that
    REFUSE    it can't be used: one of minidiff's errors, in one line
    EITHER    nobody can tell: refused, or taken with finite weights and given back bit for bit

:func:`Base.try_case` answers "taken" or "refused"; anything else is a fault of ours, in words.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from minidiff.adapters import lora
from minidiff.adapters import words as embeddings
from minidiff.errors import MinidiffError
from minidiff.pipeline import StableDiffusion
from tests.support import fuzz, tiny
from tests.tolerances import FUSED
from weights_convert import read_embedding, read_lora
from weights_convert.read_lora import layers

SAME, REFUSE, EITHER = "same", "refuse", "either"
ALLOWED = ("taken", "refused")
Random = np.random.Generator
NUMBERS = (None, True, "8", [], {}, [8], {"a": 1}, -1, 0, 1.5, 1e39, 10**400, float("nan"), float("inf"), "x" * 5000)


class Made(NamedTuple):
    """A case: what it is, where it lies, and what must come of it."""

    what: str
    path: Path
    ends: str


class Spec:
    """A file in the making: tensors, settings, and what the layers should gain."""

    def __init__(self, rng: Random, sd: StableDiffusion) -> None:
        self.rng, self.sd = rng, sd
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.settings: dict[str, Any] | None = None
        self.strength = float(rng.choice([1.0, 0.5, -1.0, 0.0, 1.7]))
        self.suffix = str(rng.choice([".safetensors", ".pt", ".bin", ".ckpt", "", ".SFT"]))
        self.pickled = bool(rng.integers(3) == 0)
        self.halves: dict[str, tuple[str, Tensor, Tensor, float | None]] = {}  # layer -> key, down, up, alpha
        self.raw: bytes | None = None
        self.place = "file"
        self.word = ""

    def drawn(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.normal(0, 0.2, shape).astype(np.float32))

    def one(self) -> str:
        return str(self.rng.choice(list(self.halves)))

    def keys(self, layer: str) -> tuple[str, str, str]:
        """The keys of an update's halves and its alpha."""
        stem, style = self.halves[layer][0].split("|")
        first, second = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}.get(
            style, ("lora.down", "lora.up")
        )
        return f"{stem}.{first}.weight", f"{stem}.{second}.weight", f"{stem}.alpha"

    def fill(self) -> None:
        """The tensors of all updates."""
        for layer, (_, down, up, alpha) in self.halves.items():
            first, second, third = self.keys(layer)
            self.tensors |= {first: down, second: up}
            if alpha is not None:
                self.tensors[third] = torch.tensor(alpha)


def spelled(spec: Spec, layer: str, path: str) -> str:
    """A layer in one of the dialects, and which names its halves have there."""
    part, pick = layer.partition(".")[0], int(spec.rng.integers(5))
    flat = path.replace(".", "_")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    dotted = {"unet": "unet.", "text_encoder": "clip_l.text_model.", "text_encoder_2": "clip_g.text_model."}
    own = path if part == "unet" else f"text_model.{path}"
    return [
        f"{prefix[part]}{flat}|kohya",
        f"{dotted[part]}{path}|kohya",
        f"{part}.{own}|peft",
        f"{part}.{path}|peft",
        f"{part}.{own}|dots",
    ][pick]


def sound_adapter(spec: Spec) -> None:
    """One to four updates of layers of every kind."""
    table = layers(spec.sd.config)
    bendable = [n for n in table.paths if n.partition(".")[0] in spec.sd.parts and _weight(spec.sd, n) is not None]
    for layer in spec.rng.choice(bendable, int(spec.rng.integers(1, 5)), replace=False):
        weight = _weight(spec.sd, str(layer))
        assert weight is not None
        rank = int(spec.rng.integers(1, 5))
        down = spec.drawn(rank, *weight.shape[1:])
        up = spec.drawn(weight.shape[0], rank, *[1] * (weight.ndim - 2))
        alpha = float(spec.rng.choice([1.0, 4.0, -2.0, 0.0])) if spec.rng.integers(2) else None
        spec.halves[str(layer)] = (spelled(spec, str(layer), table.paths[str(layer)]), down, up, alpha)
    spec.fill()


def _weight(sd: StableDiffusion, name: str) -> Tensor | None:
    try:
        layer = lora.find(sd.parts, name)
    except MinidiffError:
        return None
    return layer.weight.detach() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) else None


# --- odd things done to adapters: each says what must come of it ------------------------------------------------------


def replaced(change: Callable[[Spec, Tensor], Tensor | None], half: int | None = None) -> Callable[[Spec], str]:
    """A way that puts something else in the place of one half (or of either)."""

    def way(spec: Spec) -> str:
        key = spec.keys(spec.one())[int(spec.rng.integers(2)) if half is None else half]
        new = change(spec, spec.tensors.pop(key))
        if new is not None:
            spec.tensors[key] = new
        return REFUSE

    return way


def other_alpha(spec: Spec) -> str:
    layer = spec.one()
    key, down, up, _ = spec.halves[layer]
    values: list[Tensor] = [torch.tensor([3.0]), torch.tensor(3), torch.tensor([[3.0]], dtype=torch.float16)]
    value = values[int(spec.rng.integers(len(values)))]
    spec.halves[layer] = (key, down, up, 3.0)
    spec.tensors[spec.keys(layer)[2]] = value
    return SAME


def bad_alpha(spec: Spec) -> str:
    values = [torch.tensor(float(x)) for x in ("nan", "inf", "-inf")]
    values += [torch.zeros(0), torch.ones(2), torch.tensor(1e300, dtype=torch.float64), torch.ones(2, 2, 2)]
    spec.tensors[spec.keys(spec.one())[2]] = values[int(spec.rng.integers(len(values)))]
    return REFUSE


def cast(spec: Spec) -> str:
    dtype = [torch.float16, torch.bfloat16, torch.float64][int(spec.rng.integers(3))]
    for layer, (key, down, up, alpha) in list(spec.halves.items()):
        spec.halves[layer] = (key, down.to(dtype), up.to(dtype), alpha)
    spec.fill()
    return SAME


def other_rank_of_kernel(spec: Spec) -> str:
    """Kernels of one pixel left out or added."""
    for layer, (key, down, up, alpha) in list(spec.halves.items()):
        if down.ndim == 2:
            down, up = down[..., None, None], up[..., None, None]
        elif down.shape[2:] == (1, 1):
            down, up = down.flatten(1), up.flatten(1)
        spec.halves[layer] = (key, down, up, alpha)
    spec.fill()
    return SAME


def kernel_in_second(spec: Spec) -> str:
    layer = spec.one()
    up = spec.halves[layer][2]
    size = [(3, 3), (1, 3), (5, 5)][int(spec.rng.integers(3))]
    spec.tensors[spec.keys(layer)[1]] = up.flatten(1)[..., None, None].expand(-1, -1, *size).clone()
    return REFUSE


def swapped(spec: Spec) -> str:
    layer = spec.one()
    first, second, _ = spec.keys(layer)
    spec.tensors[first], spec.tensors[second] = spec.tensors[second], spec.tensors[first]
    return REFUSE


def too_large(spec: Spec) -> str:
    layer = spec.one()
    _, down, up, _ = spec.halves[layer]
    spec.tensors[spec.keys(layer)[0]], spec.tensors[spec.keys(layer)[1]] = down * 1e25, up * 1e25
    return REFUSE


def odd_strength(spec: Spec) -> str:
    spec.strength = [float("nan"), float("inf"), -float("inf"), 1e39][int(spec.rng.integers(4))]
    return REFUSE


def method(spec: Spec) -> str:
    stem = spec.halves[spec.one()][0].partition("|")[0]
    ends = ("hada_w1_a", "lokr_w2", "dora_scale", "oft_blocks", "lora_mid.weight", "diff", "scalar", "lora_B.bias")
    ends += ("lora_magnitude_vector.default.weight", "base_layer.weight", "lora_E", "on_input", "w_norm", "x.y.z")
    spec.tensors[f"{stem}.{spec.rng.choice(ends)}"] = torch.ones(2)
    return REFUSE


def strange_layer(spec: Spec) -> str:
    name = str(spec.rng.choice(["lora_unet_no_such", "x", "", "." * 2000, "unet.down_blocks.99.conv", "lora_te3_a"]))
    spec.tensors |= {f"{name}.lora_down.weight": torch.ones(1, 2), f"{name}.lora_up.weight": torch.ones(2, 1)}
    return REFUSE


def odd_key(spec: Spec) -> str:
    key = str(spec.rng.choice(list(spec.tensors)))
    at = int(spec.rng.integers(len(key)))
    spec.tensors[key[:at] + str(spec.rng.choice(list("._aZ0\x00\u202e"))) + key[at + 1 :]] = spec.tensors.pop(key)
    return EITHER


def known_settings(spec: Spec) -> str:
    """Settings that say what is so, alphas by pattern among them."""
    table = layers(spec.sd.config)
    alphas: dict[str, float] = {}
    spec.settings = {"peft_type": "LORA", "use_dora": False, "lora_alpha": 2, "target_modules": None, "bias": "none"}
    for layer, (key, down, up, alpha) in list(spec.halves.items()):
        spec.tensors.pop(spec.keys(layer)[2], None)
        if spec.rng.integers(2):
            alphas[f"^{table.paths[layer]}$"] = alpha = float(spec.rng.choice([3, 5.5, -1]))
        else:
            alpha = 2.0
        spec.halves[layer] = (key, down, up, alpha)
    if len({layer.partition(".")[0] for layer in spec.halves}) == 1:  # or a name could be that of two layers
        spec.settings["alpha_pattern"] = alphas
        return SAME
    return EITHER


def odd_settings(spec: Spec) -> str:
    """Any field with any value."""
    fields = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "bias", "peft_type")
    fields += (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "init_lora_weights",
        "new",
        "layers_to_transform",
    )
    spec.settings = {
        str(spec.rng.choice(["", "unet.", "text_encoder."])) + str(spec.rng.choice(fields)): _any(spec.rng, 0)
        for _ in range(int(spec.rng.integers(1, 4)))
    }
    return EITHER


def _any(rng: Random, depth: int) -> Any:
    pick = int(rng.integers(len(NUMBERS) + 4))
    if pick < len(NUMBERS):
        return NUMBERS[pick]
    if pick == len(NUMBERS) and depth < 3:
        return {str(rng.choice(["to_q", "(a+)+b", ".*" * 300, "^", "|", "a" * 3000])): _any(rng, depth + 1)}
    if pick == len(NUMBERS) + 1 and depth < 3:
        return [_any(rng, depth + 1) for _ in range(3)]
    return str(rng.choice(["gaussian", "pissa", "LORA", "all-linear", ".*attn.*", "\u2028\x1b[31m", "to_q"]))


def hanging_pattern(spec: Spec) -> str:
    spec.settings = {"lora_alpha": 2, "alpha_pattern": {str(spec.rng.choice(["(a+)+b", "(.*)*x", "[^x]*", "a{9}"])): 1}}
    return REFUSE


def many_patterns(spec: Spec) -> str:
    spec.settings = {"lora_alpha": 2, "alpha_pattern": {".*_" * 300 + str(i): 1 for i in range(500)}}
    return EITHER


def lying_json(spec: Spec) -> str:
    spec.pickled = False
    texts = ["{", "[]", "null", "7", "", "[" * 100_000, '{"a":' * 5000, '"' + "x" * 10**6 + '"', "\ud7ff{}"]
    spec.metadata["lora_adapter_metadata"] = texts[int(spec.rng.integers(len(texts)))]
    return REFUSE


def training_notes(spec: Spec) -> str:
    spec.metadata |= {"ss_network_dim": "4", "ss_network_alpha": "nan", "format": "pt", "modelspec.title": "\x1b[2J"}
    return SAME


def twice(spec: Spec) -> str:
    layer = spec.one()
    path = layers(spec.sd.config).paths[layer]
    part = layer.partition(".")[0]
    first, second, _ = spec.keys(layer)
    key = f"base_model.model.{part}.{path}.lora_A.default.weight"
    spec.tensors |= {key: spec.tensors[first], key.replace("lora_A", "lora_B"): spec.tensors[second]}
    return REFUSE


def in_a_folder(spec: Spec) -> str:
    spec.place = str(spec.rng.choice(["pytorch_lora_weights", "adapter_model", "ink"]))
    spec.suffix, spec.pickled = ".safetensors", False
    return SAME


def several_in_a_folder(spec: Spec) -> str:
    spec.place = "several"
    return REFUSE


def not_a_file(spec: Spec) -> str:
    spec.place = str(
        spec.rng.choice(["fifo", "device", "empty folder", "missing", "fifo beside"][: 5 if spec.halves else 4])
    )
    return REFUSE


def other_content(spec: Spec) -> str:
    contents = [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html>", b"GGUF\3\0\0\0", b"{}"]
    contents += [b"\x89PNG\r\n\x1a\n" + bytes(100), spec.rng.bytes(300), b"PK\x03\x04", b"\x80\x02.", b"\x80\x04K\x01."]
    spec.raw = contents[int(spec.rng.integers(len(contents)))]
    return REFUSE


def damaged(spec: Spec) -> str:
    """Any of the ways in which checkpoints are damaged."""
    spec.place = "damaged"
    return EITHER


COMMON = (not_a_file, other_content, damaged, damaged)
ADAPTERS: dict[str, Callable[[Spec], str]] = {
    **{f.__name__: f for f in (other_alpha, bad_alpha, cast, other_rank_of_kernel, kernel_in_second, swapped)},
    **{f.__name__: f for f in (too_large, odd_strength, method, strange_layer, odd_key, known_settings, odd_settings)},
    **{f.__name__: f for f in (hanging_pattern, many_patterns, lying_json, training_notes, twice, in_a_folder)},
    **{f.__name__: f for f in (several_in_a_folder, *COMMON)},
    "one half": replaced(lambda spec, t: None),
    "whole numbers": replaced(lambda spec, t: t.to([torch.int64, torch.uint8, torch.bool][spec.rng.integers(3)])),
    "nan": replaced(lambda spec, t: t * [float("nan"), float("inf")][spec.rng.integers(2)]),
    "empty": replaced(lambda spec, t: t[:0]),
    "a row more": replaced(lambda spec, t: torch.cat([t, t[:1]])),
    "dimensions": replaced(lambda spec, t: [t.flatten(), t[..., None], t[None, None, None]][spec.rng.integers(3)]),
}


# --- words ------------------------------------------------------------------------------------------------------------


def sound_word(spec: Spec) -> dict[str, Tensor]:
    """Vectors in one of the forms that are about; what each encoder should gain."""
    xl = spec.sd.config.text_encoder_2 is not None
    n = int(spec.rng.integers(1, 4))
    left, right = spec.drawn(n, 16), spec.drawn(n, 8)
    if xl:
        names = [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")][int(spec.rng.integers(2))]
        pairs = list(zip(names, (left, right), strict=True))
        spec.tensors = dict(pairs if spec.rng.integers(2) else pairs[::-1])
        return {"text_encoder": left, "text_encoder_2": right}
    key = str(spec.rng.choice(["<cat>", "emb_params", "*", "clip_l", "string_to_param"]))
    if key == "string_to_param":
        spec.pickled, spec.word = True, "parameters"
    spec.tensors = {key: left[0].clone() if n == 1 and spec.rng.integers(2) else left}
    return {"text_encoder": left}


def word_tensor(change: Callable[[Spec, Tensor], Tensor]) -> Callable[[Spec], str]:
    def way(spec: Spec) -> str:
        key = str(spec.rng.choice(list(spec.tensors)))
        spec.tensors[key] = change(spec, spec.tensors[key])
        return REFUSE

    return way


def few_bytes(spec: Spec) -> str:
    """A stored number that says it is a million rows."""
    spec.pickled = True
    spec.tensors[next(iter(spec.tensors))] = torch.ones(1).expand(10**6, 16)
    return REFUSE


def network(spec: Spec) -> str:
    spec.tensors = {f"{i}.weight": torch.ones(3, 16) for i in range(int(spec.rng.integers(1, 400)))}
    spec.word = ""
    return REFUSE


def odd_name(spec: Spec) -> str:
    name = str(spec.rng.choice(["two words", "", "<|endoftext|>", "!", "\x1b[31m", "\u202e", "x" * 20_000, "a\nb"]))
    spec.tensors = {name: next(iter(spec.tensors.values()))}
    spec.word = ""
    return EITHER


WORDS: dict[str, Callable[[Spec], str]] = {
    **{f.__name__: f for f in (few_bytes, network, odd_name, *COMMON)},
    "wide": word_tensor(lambda spec, t: torch.cat([t, t], -1)),
    "nan": word_tensor(lambda spec, t: t * float("nan")),
    "whole numbers": word_tensor(lambda spec, t: t.long()),
    "dimensions": word_tensor(lambda spec, t: t.reshape(1, *t.shape)[None]),
    "empty": word_tensor(lambda spec, t: t[:0]),
}


# --- what becomes of it -----------------------------------------------------------------------------------------------


class Base:
    """Two tiny models, and a folder that a case is written to: everything that a case needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [tiny.tiny_sd(), tiny.tiny_xl()]
        self.before = [_bits(sd) for sd in self.models]
        self.mark = folder / "a program was run"

    def try_case(self, number: int) -> tuple[str, str]:
        """Make case ``number`` and read it: (what it is, "taken" or "refused" or a fault in words)."""
        rng = np.random.default_rng(number)
        which = int(rng.integers(2))
        spec = Spec(rng, self.models[which])
        place = self.folder / "case"
        place.mkdir()
        try:
            if rng.integers(10) < 7:
                return self._adapter(spec, place, self.before[which])
            return self._word(spec, place, which)
        finally:
            shutil.rmtree(place)

    def _adapter(self, spec: Spec, place: Path, before: dict[str, Tensor]) -> tuple[str, str]:
        sound_adapter(spec)
        how, ends = self._odd(spec, ADAPTERS)
        path = write(spec, place, self.mark)
        what = f"adapter, {how}: {', '.join(spec.halves)}"
        live = bool(spec.rng.integers(2))
        try:
            adapter = read_lora(path, spec.sd.config)
            applied = lora.apply(spec.sd.parts, [(adapter, spec.strength)], live=live)
        except Exception as e:
            verdict = refusal(e, ends)
        else:
            verdict = "taken" if ends != REFUSE else "FAULT taken, and it can't be used"
            after = _bits(spec.sd)
            if not live and not all(t.isfinite().all() for t in after.values()):
                verdict = "FAULT weights are not finite"
            if ends == SAME and not live:
                verdict = self._compared(spec, before, after)
            applied.remove()
        if self.mark.exists():
            self.mark.rmdir()
            return what, "FAULT a program was run"
        same = all(torch.equal(t, before[name]) for name, t in _bits(spec.sd).items())
        return what, verdict if same else "FAULT the model is not what it was"

    def _compared(self, spec: Spec, before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
        for layer, (_, down, up, alpha) in spec.halves.items():
            weight = before[f"{layer}.weight"].double()
            scale = spec.strength * (1.0 if alpha is None else alpha / len(down))
            product = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
            wanted = weight + scale * product.reshape(weight.shape)
            fused = after[f"{layer}.weight"].double()
            if not torch.allclose(fused, wanted, atol=FUSED.absolute, rtol=FUSED.relative):
                return f"FAULT another sum for {layer}"
        bent = {f"{layer}.weight" for layer in spec.halves}
        others = all(torch.equal(t, before[name]) for name, t in after.items() if name not in bent)
        return "taken" if others else "FAULT other weights changed, too"

    def _word(self, spec: Spec, place: Path, which: int) -> tuple[str, str]:
        wanted = sound_word(spec)
        how, ends = self._odd(spec, WORDS)
        path = write(spec, place, self.mark)
        what = f"word, {how}: {', '.join(spec.tensors)[:80]}"
        sd = (tiny.tiny_sd, tiny.tiny_xl)[which]()
        name = None if spec.rng.integers(2) else "<mine>"
        try:
            word = read_embedding(path, sd.config, name)
            embeddings.add(sd, word)
        except Exception as e:
            verdict = refusal(e, ends)
            same = all(torch.equal(t, self.before[which][k]) for k, t in _bits(sd).items())
            return what, verdict if same else "FAULT the model is not what it was"
        if ends == REFUSE:
            return what, "FAULT taken, and it can't be used"
        if ends == SAME:
            ids = sd.tokenizer.encode(word.name)
            right = all(torch.equal(getattr(sd, part).token.weight[ids], v) for part, v in wanted.items())
            return what, "taken" if right else "FAULT other vectors"
        return what, "FAULT a program was run" if self.mark.exists() else "taken"

    def _odd(self, spec: Spec, ways: dict[str, Callable[[Spec], str]]) -> tuple[str, str]:
        if spec.rng.integers(8) == 0:
            return "sound", SAME
        how = str(spec.rng.choice(list(ways)))
        return how, ways[how](spec)


def refusal(error: Exception, ends: str) -> str:
    """ "refused", or what is wrong with how it was refused."""
    if not isinstance(error, MinidiffError):
        return f"FAULT {type(error).__name__}: {str(error)[:300]}"
    if ends == SAME:
        return f"FAULT refused, and it is sound: {str(error)[:300]}"
    return "refused" if len(str(error)) < 1000 else f"FAULT refused in {len(str(error))} characters"


def write(spec: Spec, place: Path, mark: Path) -> Path:
    """Put a case on disk; the path to read."""
    path = place / f"x{spec.suffix}"
    if spec.place in ("pytorch_lora_weights", "adapter_model", "ink", "several"):
        path = place / f"{spec.place}.safetensors"
    settings = None if spec.settings is None else json.dumps(spec.settings)
    if settings is not None and (spec.pickled or spec.rng.integers(2)):  # a pickle has no header
        path = place / f"adapter_model{spec.suffix if spec.pickled else '.safetensors'}"
        (place / "adapter_config.json").write_text(settings)
    elif settings is not None:
        spec.metadata["lora_adapter_metadata"] = settings
    if spec.pickled:
        found: Any = spec.tensors
        if spec.word == "parameters":
            (held,) = spec.tensors.values()
            inner: Any = {"*": held}
            if held.is_floating_point() and spec.rng.integers(2):
                inner = torch.nn.ParameterDict({"*": torch.nn.Parameter(held)})
            found = {"string_to_param": inner, "string_to_token": {"*": 265}}
        torch.save(found, path)
    else:
        whole = {k: t.clone(memory_format=torch.contiguous_format) for k, t in spec.tensors.items()}
        safetensors.torch.save_file(whole, path, spec.metadata)
    if spec.place == "several":
        shutil.copy(path, place / "other.safetensors")
    if spec.raw is not None:
        path.write_bytes(spec.raw)
    if spec.place == "damaged":
        ways = fuzz.PICKLES if spec.pickled else fuzz.SAFETENSORS
        how = str(spec.rng.choice([way for way in ways if way not in ("bomb", "other_config")]))
        path.write_bytes(ways[how](path.read_bytes(), spec.rng, mark)[0])
    odd = {"fifo": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "empty folder": path.mkdir}
    if spec.place in (*odd, "missing"):
        path.unlink()
        odd.get(spec.place, lambda: None)()
    if spec.place == "fifo beside":
        shutil.move(path, place / "adapter_model.safetensors")
        path = place / "adapter_model.safetensors"
        (place / "adapter_config.json").unlink(missing_ok=True)
        os.mkfifo(place / "adapter_config.json")
    return path.parent if spec.place in ("pytorch_lora_weights", "adapter_model", "ink", "several") else path


def _bits(sd: StableDiffusion) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.detach().clone() for n, part in sd.parts.items() for k, t in part.named_parameters()}
