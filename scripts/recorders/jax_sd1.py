"""Writer for JAX: a run of a whole port of Stable Diffusion 1, from prompt to pixels.

    python scripts/recorders/jax_sd1.py FOLDER GOLDEN OUT                # FOLDER: a model in diffusers' layout
    python scripts/recorders/jax_sd1.py FOLDER GOLDEN OUT --local        # every layer on the golden's values
    python scripts/recorders/jax_sd1.py FOLDER GOLDEN OUT --slip gelu    # with a mistake

The tokenizer and the sampler (PLMS) are here, the networks in ``jax_networks.py``. It repeats the run of the recording
GOLDEN: its prompts, first noise, steps and guidance scale. Pictures are (B, H, W, C), and the recording says so.

:data:`SLIPS` are mistakes that were reported of ports, each made anew by one of ``Choices``; the README of this folder
has the reports. Needs jax, safetensors and ``minidiff/parity/writer.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax_networks import RIGHT, Choices, Part, text_encoder, unet, vae_decoder
from safetensors import safe_open
from safetensors.numpy import load_file

from minidiff.parity.writer import Writer

Numbers = np.ndarray[Any, Any]
UNET, TEXT = "step.0/unet/down.0.attn.0.", "prompt/text_encoder/"
# name: the first stage that is wrong, and the choice that makes it so
SLIPS: dict[str, tuple[str, Choices]] = {
    "padding": ("prompt/ids", Choices(pad_with_end=False)),
    "text gelu": (TEXT + "layers.0.fc2:in", Choices(quick_gelu=False)),
    "causal mask": (TEXT + "layers.0.attn.out:in", Choices(causal_text=False)),
    "text layer": (TEXT + "norm", Choices(text_layer=-2)),
    "guidance order": ("step.0/context", Choices(negative_first=False)),
    "sine first": ("step.0/unet/time:in", Choices(cosine_first=False)),
    "frequencies": ("step.0/unet/time:in", Choices(frequency_shift=1)),
    "norm eps": (UNET + "norm", Choices(transformer_eps=1e-5)),
    "head width": (UNET + "blocks.0.attn1.out:in", Choices(counts_heads=False)),
    "attention scale": (UNET + "blocks.0.attn1.out:in", Choices(scaled_scores=False)),
    "gelu": (UNET + "blocks.0.ff.out:in", Choices(gelu_by_tanh=True)),
    "betas": ("step.0/x", Choices(scaled_linear=False)),
    "offset": ("plan/timesteps", Choices(steps_offset=0)),
    "vae scaling": ("decode/vae/post_quant:in", Choices(unscaled_latents=False)),
}


# Tokenizer

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = (byte for byte in range(256) if byte not in PRINTABLE)
LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+")


def tokenize(text: str, table: Mapping[str, Any], choices: Choices) -> Numbers:
    """Return the tokens (1, 77) of a prompt, by the vocabulary and the merges of tokenizer.json."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(table["merges"])}
    found: list[int] = []
    for word in WORDS.findall(text.lower()):
        parts = [LETTERS[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, k = min((ranks.get(pair, len(ranks)), k) for k, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        found += [table["vocab"][part] for part in parts]
    start, end = (table["vocab"][f"<|{which}oftext|>"] for which in ("start", "end"))
    ids = [start, *found[:75], end]
    return np.array([ids + [end if choices.pad_with_end else 0] * (77 - len(ids))])


# Sampler


def plan(steps: int, config: Mapping[str, Any], choices: Choices) -> tuple[Numbers, Numbers]:
    """Return the timesteps of PLMS, whose second one is there twice, and the table of alpha_bar."""
    power, count = 2 if choices.scaled_linear else 1, config["num_train_timesteps"]
    betas = np.linspace(config["beta_start"] ** (1 / power), config["beta_end"] ** (1 / power), count) ** power
    t = np.arange(steps)[::-1] * (count // steps) + choices.steps_offset
    return np.concatenate([t[:2], t[1:]]), np.cumprod(1 - betas)


def transfer(x: Array, epsilon: Array, a: float, b: float) -> Array:
    """Carry x from alpha_bar a to alpha_bar b: the same noise and the same picture, in other shares."""
    x0 = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
    return jnp.asarray(b**0.5 * x0 + (1 - b) ** 0.5 * epsilon)


def adams_bashforth(history: list[Array]) -> Array:
    """Return epsilon for the next interval from those so far, the latest last; four are enough."""
    weights = ([1], [3, -1], [23, -16, 5], [55, -59, 37, -9])[min(len(history), 4) - 1]
    latest = [w * epsilon for w, epsilon in zip(weights, reversed(history), strict=False)]
    return jnp.asarray(sum(latest) / sum(weights))


# The run


@dataclass(frozen=True)
class Shower:
    """A recording that is being written, and another one (or none) whose values the run goes on with."""

    writer: Writer
    handed: Mapping[str, Numbers]

    def __call__(self, stage: str, value: Any) -> Any:
        """Add a value; return the other recording's where it has one."""
        self.writer.add(stage, np.asarray(value))
        other = self.handed.get(stage, value)
        return jax.device_put(to_nhwc(other)) if other is not value and isinstance(value, Array) else other

    def part(self, folder: Path, section: str, choices: Choices) -> Part:
        """Return a network from its folder, which shows its layers in ``section``."""
        (file,) = folder.glob("*.safetensors")
        weights = {key.removeprefix("text_model."): jax.device_put(value) for key, value in load_file(file).items()}
        config = json.loads((folder / "config.json").read_text())
        return Part(weights, config, choices, lambda layer, value: self(section + stage_of(layer), value))


def record(folder: Path, golden: Path, out: Path, choices: Choices = RIGHT, *, local: bool = False) -> None:
    """Run the model in ``folder`` as the recording ``golden`` was run, and record it.

    ``local``: hand the golden's value to every layer after its own is recorded, so that differences do not add up.
    """
    asked, tape = read_recording(golden)
    table = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    about = {key: asked[key] for key in ("prompt", "negative", "steps", "scale", "sampler")}
    about |= {"on": identity(golden)} if local else {}
    with Writer(out, "jax_sd1", version=jax.__version__, layout="NHWC", dtype="float32", **about) as writer:
        show = Shower(writer, tape if local else {})
        contexts = []
        for section in ("prompt", "negative"):
            ids = show(f"{section}/ids", tokenize(asked[section], table, choices))
            encoder = show.part(folder / "text_encoder", f"{section}/text_encoder/", choices)
            contexts.append(show(f"{section}/context", text_encoder(encoder, ids)))
        timesteps, alpha_bar = plan(asked["steps"], schedule, choices)
        network = show.part(folder / "unet", "step.0/unet/", choices)
        base = x = show("start/x", jax.device_put(to_nhwc(tape["start/x"])))
        apart = schedule["num_train_timesteps"] // asked["steps"]
        history: list[Array] = []
        for i, t in enumerate(show("plan/timesteps", timesteps)):
            step = f"step.{i}/"
            context = jnp.concatenate(contexts[::-1] if choices.negative_first else contexts)
            given = [("input", jnp.concatenate([x, x])), ("t", t), ("context", context)]
            prediction = unet(network, *(show(step + name, value) for name, value in given))
            unconditional, conditional = jnp.split(show(step + "prediction", prediction), 2)
            epsilon = show(step + "out", unconditional + asked["scale"] * (conditional - unconditional))
            if i == 1:  # the first interval again, with the mean of the noise at its ends
                x = transfer(base, (epsilon + history[0]) / 2, alpha_bar[t + apart], alpha_bar[t])
            else:
                history.append(epsilon)
                x = transfer(x, adams_bashforth(history), alpha_bar[t], alpha_bar[max(t - apart, 0)])
            x = show(step + "x", x)
            network = replace(network, show=lambda layer, value: value)  # the layers of one step are enough
        decoder = show.part(folder / "vae", "decode/vae/", choices)
        pixels = vae_decoder(decoder, x / decoder.config["scaling_factor"] if choices.unscaled_latents else x)
        show("decode/pixels", jnp.clip(pixels / 2 + 0.5, 0, 1))


def read_recording(file: Path) -> tuple[dict[str, Any], dict[str, Numbers]]:
    """Return the description of a recording's run, and its values."""
    with safe_open(file, "np") as opened:
        return json.loads(opened.metadata()["recording.run"]), load_file(file)


def identity(file: Path) -> str:
    """Return the identity of a recording: a hash of its header."""
    data = file.read_bytes()
    return hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()[:16]


def to_nhwc(value: Numbers) -> Numbers:
    """Return a value of the golden in this program's layout."""
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


# Pieces of names in diffusers and in minidiff, in the order in which they are replaced
RENAMED = """
    to_out.0=to_out embeddings.token_embedding=token encoder.layers=layers final_layer_norm=norm layer_norm=norm
    self_attn=attn mlp.= time_embedding=time time_emb_proj=time .linear_=.linear _proj=
    decoder.mid_block.attentions.0.group_norm=decoder.mid.attn.norm_of_picture
    decoder.mid_block.attentions.0.to_=decoder.mid.attn.attn. decoder.mid_block.attentions.0=decoder.mid.attn
    mid_block.resnets.0=mid.res1 mid_block.resnets.1=mid.res2 mid_block=mid down_blocks=down up_blocks=up
    resnets=res attentions=attn transformer_blocks=blocks downsamplers.0=down upsamplers.0=up
    conv_shortcut=skip conv_norm_out=norm_out post_quant_conv=post_quant
    ff.net.0.proj=ff.gate ff.net.2=ff.out to_=
"""


def stage_of(layer: str) -> str:
    """Return minidiff's name for one of diffusers.

    The norm in the VAE's attention keeps a name of its own: diffusers has tokens there, (B, C, L), and not a picture.
    """
    for piece in RENAMED.split():
        theirs, ours = piece.split("=")
        layer = layer.replace(theirs, ours)
    return layer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("folder", "golden", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--local", action="store_true", help="hand the golden's value to every layer")
    parser.add_argument("--slip", choices=SLIPS, help="make a mistake")
    args = parser.parse_args()
    record(args.folder, args.golden, args.out, SLIPS[args.slip][1] if args.slip else RIGHT, local=args.local)
