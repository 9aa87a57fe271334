"""Reader of LoRA files: maps their keys, in every common dialect, to the layers of minidiff.

    lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight      kohya, and LDM's block names for SDXL
    lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight             its text encoders: te, te1, te2
    unet.down_blocks.0.attentions.0....attn1.to_q.lora_A.weight               diffusers, as peft writes since 2023
    unet.down_blocks.0.attentions.0....attn1.processor.to_q_lora.down.weight  diffusers, before
    text_encoder.text_model.encoder....self_attn.to_q_lora.down.weight        its text encoder, early in 2023
    base_model.model.down_blocks.0....attn1.to_q.lora_A.weight                peft
    unet.input_blocks.1.1....to_q.lora_down.weight, clip_l.text_model....     OneTrainer
    diffusion_model.input_blocks.1.1....to_q.lora_up.weight                   ComfyUI

A dialect consists of a prefix for the part, a spelling of the layer, and an ending for the matrix. The layer's name,
with underscores instead of dots, is looked up in one table, which is generated from the key maps of the conversion.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minidiff.adapters.lora import KINDS, LARGEST, Adapter, Update
from minidiff.config import ModelConfig, quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.storage.files import Lazy
from minidiff.storage.reading import read_object
from weights_convert import keys_diffusers, keys_original
from weights_convert.adapter_file import file_of, open_tensors
from weights_convert.engine import Module
from weights_convert.peft_settings import Settings, settings_of

# Endings of keys by their meaning. In peft's "lora_A.default.weight" the middle is the name of the adapter.
ENDINGS = {
    "down": r"[._]lora[._](down|A(\.[\w-]+)?)\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"[._]lora[._](up|B(\.[\w-]+)?)\.weight|\.lora_linear_layer\.up\.weight",
    "alpha": r"([._]lora|\.lora_linear_layer)?\.alpha",
}
ENDING = re.compile("|".join(f"(?P<{kind}>{pattern})$" for kind, pattern in ENDINGS.items()))
# Additions to a layer's name without a meaning.
WRAPPER = re.compile(r"(?<![^.])(base_model\.model|_orig_mod|module|processor|transformer(?=\.text_model))\.")
PREFIXES = {  # of the flattened name
    **dict.fromkeys(("lora_unet_", "lycoris_", "unet_", "diffusion_model_", "model_diffusion_model_"), "unet"),
    **dict.fromkeys(("lora_te_", "lora_te1_", "text_encoder_", "clip_l_", "text_encoders_clip_l_"), "text_encoder"),
    **dict.fromkeys(("lora_te2_", "text_encoder_2_", "clip_g_", "text_encoders_clip_g_"), "text_encoder_2"),
}
LONGEST_FIRST = sorted(PREFIXES, key=len, reverse=True)
OTHERS = {  # of methods that are not a plain product of two matrices
    r"\.hada_[wt]\d(_[ab])?$": "LoHa",
    r"\.lokr_[wt]\d(_[ab])?$": "LoKr",
    r"\.(dora_scale|lora_magnitude_vector(\.[\w-]+)?(\.weight)?)$": "DoRA",
    r"\.(oft|boft)_\w+(\.[\w-]+)?(\.weight)?$": "OFT",
    r"\.lora_mid\.weight$": "LoCon in Tucker form",
    r"\.diff(_b)?$": "whole differences of weights",
    r"\.lora_(embedding_[AB]|E|ranknum)(\.[\w-]+)?$": "an update of a table, or AdaLoRA",
    r"[._]lora[._](up|B|down|A)(\.[\w-]+)?\.bias$": "LoRA with a bias",
    r"_custom_diffusion\.weight$": "Custom Diffusion",
    r"\.(ia3_l|on_input)(\.[\w-]+)?$": "IA3",
    r"\.(w|b)_norm$": "differences of norms",
    r"^bundle_emb\.": "a word that is bundled with an adapter",
    r"^(unet|text_encoder):\d+:(up|down)$": "the first trainer's numbered layers",
}
OTHER = {re.compile(pattern): method for pattern, method in OTHERS.items()}
METADATA = "lora_adapter_metadata"  # in diffusers' files: peft's settings as JSON
PEFT, PEFT_CONFIG = "adapter_model", "adapter_config.json"
NAMES = ("pytorch_lora_weights", PEFT)  # names of the files that diffusers and peft write into a folder
LONGEST_KEY = 1000


class Table(NamedTuple):
    """Layers that an adapter may change: flattened name in any layout -> full name; full name -> reference path."""

    layers: Mapping[str, str]
    paths: Mapping[str, str]


def read_lora(path: str | os.PathLike[str], config: ModelConfig, *, allow_unmatched: bool = False) -> Adapter:
    """Read the adapter in ``path`` (a file, or a folder that diffusers or peft wrote) for a model of ``config``.

    Raises :class:`CheckpointError` for a damaged file, an update that lacks one matrix or contains values that are not
    finite, and a key that matches no layer of the model, unless ``allow_unmatched``. Raises :class:`UnsupportedError`
    for methods other than LoRA, and for settings of peft that would change the result.
    """
    path = Path(path)
    file = file_of(path, NAMES)
    table = layers(config)
    found: dict[str, dict[str, Lazy]] = {}
    spelled: dict[str, str] = {}
    unmatched: dict[str, str] = {}  # key -> layer
    with open_tensors(file) as (tensors, metadata):
        for key, tensor in tensors.items():
            name, kind = split(key, file)
            layer = table.layers.get(flat(name, config))
            if layer is None or kind is None:
                require_unknown(key, config, table, file)
                unmatched[key] = name
                continue
            spelled[layer] = name
            if kind in found.setdefault(layer, {}):
                raise CheckpointError(
                    f"{file}: {quote(key)} is the second {kind} of {layer}; the file mixes two adapters"
                )
            found[layer][kind] = tensor
        if not found and not unmatched:
            raise CheckpointError(f"{file}: holds no tensors, and so no adapter")
        if unmatched and not allow_unmatched:
            more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
            raise CheckpointError(
                f"{file}: {quote(next(iter(unmatched)))}{more} belong to no layer of this {config.family} model; "
                "--allow-unmatched applies the rest"
            )
        told, where = read_settings(file, metadata)
        settings = {part: settings_of(told, part, where) for part in {name.partition(".")[0] for name in found}}
        updates = {
            layer: update(file, layer, halves, settings[layer.partition(".")[0]], names(layer, spelled[layer], table))
            for layer, halves in found.items()
        }
    return Adapter(path.name, updates, len(found) + len(set(unmatched.values())), tuple(unmatched))


def update(path: Path, layer: str, halves: Mapping[str, Lazy], settings: Settings, names: tuple[str, ...]) -> Update:
    """Return one update after checking its two matrices, with its alpha from the file or peft's settings, if any."""
    for half in ("down", "up"):
        if half not in halves:
            raise CheckpointError(f"{path}: the update of {layer} has no {half!r} half; the file is incomplete")
        if halves[half].dtype not in KINDS:
            raise CheckpointError(
                f"{path}: the {half!r} half of {layer} is {halves[half].dtype}; it must be floating point of 16 bits "
                "or more"
            )
    told = settings.alpha_of(names)
    alpha = settings.default if told is None else told
    if "alpha" in halves:
        alpha = alpha_of(path, layer, halves["alpha"])
        if told not in (None, alpha):
            raise CheckpointError(f"{path}: alpha of {layer} is {alpha:g}, and {told:g} by the settings")
    # Copies: an adapter is small, and its file need not stay open.
    made = Update(halves["down"].load().clone(), halves["up"].load().clone(), alpha, settings.rank_stabilised)
    problem = made.problem()
    if problem is not None:
        raise CheckpointError(f"{path}: the update of {layer} cannot be used: {problem}")
    if not (made.down.isfinite().all() and made.up.isfinite().all()):
        raise CheckpointError(f"{path}: the update of {layer} holds NaN or infinite values")
    settings.check(names, len(made.down))
    return made


def alpha_of(path: Path, layer: str, entry: Lazy) -> float:
    """Return the alpha of an update: one finite number, in any shape and dtype."""
    if math.prod(entry.shape) != 1:
        raise CheckpointError(f"{path}: alpha of {layer} has shape {list(entry.shape)}; it is one number")
    value: Tensor = entry.load()
    if value.dtype.is_complex or not abs(float(value)) <= LARGEST:
        raise CheckpointError(f"{path}: alpha of {layer} is {value.item()}; it must be a finite number")
    return float(value)


def read_settings(file: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return peft's settings, from the header of a file or the file beside it, and their origin; empty if none."""
    beside = file.with_name(PEFT_CONFIG)
    if file.stem == PEFT and os.path.lexists(beside):
        return read_object(beside), str(beside)
    if METADATA not in metadata:
        return {}, str(file)
    try:
        found = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: its settings are no JSON ({e or type(e).__name__})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: its settings are no JSON object")
    return found, str(file)


def split(key: str, path: Path) -> tuple[str, str | None]:
    """Split a key into (layer as the file spells it, "down", "up", "alpha" or None for none of these)."""
    if len(key) > LONGEST_KEY:
        return key, None
    for pattern, method in OTHER.items():
        if pattern.search(key):
            raise UnsupportedError(f"{path}: {quote(key)} is of {method}, which minidiff does not apply; only LoRA is")
    found = ENDING.search(key)
    return (key[: found.start()], found.lastgroup) if found is not None else (key, None)


def require_unknown(key: str, config: ModelConfig, table: Table, path: Path) -> None:
    """Raise :class:`UnsupportedError` if a key that was not understood belongs to a layer of the model."""
    parts = key[:LONGEST_KEY].split(".")
    for n in range(max(1, len(parts) - 4), len(parts)):
        layer = table.layers.get(flat(".".join(parts[:n]), config))
        if layer is not None:
            rest = quote(".".join(parts[n:]))
            raise UnsupportedError(
                f"{path}: changes {layer} by its {rest}, which minidiff does not apply; only LoRA is"
            )


def flat(name: str, config: ModelConfig) -> str:
    """Return a layer's name in the spelling of the table: the part, then the path with underscores."""
    name = WRAPPER.sub("", name).replace(".", "_")
    for prefix in LONGEST_FIRST:
        if name.startswith(prefix):
            part, path = PREFIXES[prefix], name.removeprefix(prefix)
            break
    else:
        part, path = "unet", name
        if re.match(r"(text_model_)?encoder_layers_", name):
            part = "text_encoder" if config.text_encoder is not None else "text_encoder_2"
    return f"{part}.{path if part == 'unet' else path.removeprefix('text_model_')}"


def names(layer: str, spelled: str, table: Table) -> tuple[str, ...]:
    """Return the names of a layer in peft's settings: its path in the reference, now and before, and as spelled."""
    path = table.paths[layer]
    return (path, f"text_model.{path}", WRAPPER.sub("", spelled))


def layers(config: ModelConfig) -> Table:
    """Return every layer that an adapter may change."""
    table: dict[str, str] = {}
    paths: dict[str, str] = {}

    def enter(part: str, modules: Iterator[Module], prefix: str = "") -> None:
        for theirs, ours, _ in modules:
            path = theirs.removeprefix(prefix)
            paths[f"{part}.{ours}"] = path
            for spelled in (path, *aliases(path)):
                table[f"{part}.{spelled.replace('.', '_')}"] = f"{part}.{ours}"

    enter("unet", keys_original.unet(config.unet), f"{keys_original.UNET}.")
    enter("unet", keys_diffusers.unet(config.unet))
    for part in ("text_encoder", "text_encoder_2"):
        text = getattr(config, part)
        if text is not None:
            enter(part, keys_diffusers.clip(text, prefix=""))
    return Table(table, paths)


def aliases(path: str) -> Iterator[str]:
    """Return other names of a layer: those inside the attention processors of early 2023."""
    if path.endswith(".to_out.0"):
        yield path.removesuffix(".0")
    stem, dot, last = path.rpartition(".self_attn.")
    if dot:
        yield f"{stem}.self_attn.to_{last.removesuffix('_proj')}"
