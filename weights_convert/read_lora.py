"""Adapter files: which layer of minidiff's a key of a LoRA file means, in each of the dialects that are about.

    lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight      kohya, and LDM's block names for SDXL
    unet.down_blocks.0.attentions.0....attn1.to_q.lora_A.weight               diffusers, as peft writes since 2023
    unet.down_blocks.0.attentions.0....attn1.processor.to_q_lora.down.weight  diffusers, before
    base_model.model.down_blocks.0....attn1.to_q.lora_A.weight                peft

A dialect is a prefix that names the part, a spelling of the layer, and an ending that names the matrix. Spelled with
underscores instead of dots, every layer's name is looked up in one table, made from the key maps of conversion.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.config import ModelConfig, quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.files import TensorFile
from minidiff.lora import Adapter, Update
from weights_convert import keys_diffusers, keys_original
from weights_convert.ckpt import read_pickle
from weights_convert.engine import Module

# What a key ends with, by what it holds. Of peft's, "lora_A.default.weight" names the adapter in between.
ENDINGS = {
    "down": r"[._]lora[._](down|A(\.[\w-]+)?)\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"[._]lora[._](up|B(\.[\w-]+)?)\.weight|\.lora_linear_layer\.up\.weight",
    "alpha": r"\.alpha",
}
ENDING = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in ENDINGS.items()))
PREFIXES = {  # of the flattened name, the longest first
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet_": "unet",
    "text_encoder_2_": "text_encoder_2",
    "text_encoder_": "text_encoder",
}
OTHERS = {  # endings of methods that are no plain product of two matrices
    r"\.hada_w[12]_[ab]": "LoHa",
    r"\.lokr_w[12](_[ab])?": "LoKr",
    r"\.(dora_scale|lora_magnitude_vector(\.[\w-]+)?(\.weight)?)": "DoRA",
    r"\.oft_(blocks|diag)": "OFT",
    r"\.lora_mid\.weight": "LoCon in Tucker form",
    r"\.diff(_b)?": "whole differences of weights",
}
METADATA = "lora_adapter_metadata"  # of diffusers' files: peft's settings as JSON
PEFT = ("adapter_model.safetensors", "adapter_model.bin")


def read_lora(path: str | os.PathLike[str], config: ModelConfig, *, allow_unmatched: bool = False) -> Adapter:
    """The adapter in ``path`` (a file, or a folder that peft wrote) for a model of ``config``.

    Raises :class:`CheckpointError` for a file that is damaged, an update of which one half is missing or that holds a
    value that is not finite, and a key that belongs to no layer of the model, unless ``allow_unmatched``;
    :class:`UnsupportedError` for methods that are not LoRA.
    """
    path = Path(path)
    tensors, settings = read_file(path)
    table = layers(config)
    found: dict[str, dict[str, Tensor]] = {}
    spelled: dict[str, str] = {}
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        name, kind = split(key, path)
        layer = table.get(flat(name))
        if layer is None or kind is None:
            unmatched.append(key)
            continue
        spelled[layer] = name
        if kind in found.setdefault(layer, {}):
            raise CheckpointError(f"{path}: {quote(key)} is the second {kind} of {layer}; the file mixes two adapters")
        found[layer][kind] = tensor
    if unmatched and not allow_unmatched:
        more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
        raise CheckpointError(
            f"{path}: {quote(unmatched[0])}{more} belong to no layer of this {config.family} model; "
            "--allow-unmatched applies the rest"
        )
    updates = {layer: update(path, layer, found[layer], of_part(settings, layer), spelled[layer]) for layer in found}
    strangers = {split(key, path)[0] for key in unmatched}
    return Adapter(path.name, updates, len(found) + len(strangers), tuple(unmatched))


def update(path: Path, layer: str, halves: Mapping[str, Tensor], settings: Mapping[str, Any], name: str) -> Update:
    """The two halves of one update, checked, and its alpha where the file or peft's settings tell one."""
    for half in ("down", "up"):
        if half not in halves:
            raise CheckpointError(f"{path}: the update of {layer} has no {half!r} half; the file is incomplete")
    down, up = halves["down"], halves["up"]
    rank = down.shape[0] if down.ndim else 0
    same = down.ndim == up.ndim and down.ndim in (2, 4) and rank > 0 and up.shape[1] == rank
    if not same or not (down.is_floating_point() and up.is_floating_point()):
        shapes = f"up {list(up.shape)} {up.dtype}, down {list(down.shape)} {down.dtype}"
        raise CheckpointError(f"{path}: the update of {layer} is no product of two matrices ({shapes})")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise CheckpointError(f"{path}: the update of {layer} holds NaN or infinite values")
    alpha = alpha_of(settings, name)
    if "alpha" in halves:
        if halves["alpha"].numel() != 1:
            raise CheckpointError(f"{path}: alpha of {layer} has shape {list(halves['alpha'].shape)}; it is one number")
        alpha = float(halves["alpha"])
    if settings.get("use_dora"):
        raise UnsupportedError(f"{path}: is DoRA, which minidiff does not apply; only plain LoRA is")
    return Update(down, up, alpha, bool(settings.get("use_rslora")))


def of_part(settings: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """peft's settings for the part that ``layer`` is in: diffusers writes them as "unet.lora_alpha", peft plainly."""
    part = layer.partition(".")[0]
    return {
        key.removeprefix(f"{part}."): value
        for key, value in settings.items()
        if key.startswith(f"{part}.") or "." not in key
    }


def alpha_of(settings: Mapping[str, Any], name: str) -> float | None:
    """peft's alpha for layer ``name``: that of the first pattern that ends the name, else the common one."""
    for pattern, alpha in dict(settings.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith(f".{pattern}"):
            return float(alpha)
    return float(settings["lora_alpha"]) if "lora_alpha" in settings else None


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter's file or folder, and peft's settings where they are told."""
    settings: dict[str, Any] = {}
    if path.is_dir():
        config = path / "adapter_config.json"
        if config.is_file():
            settings = parse(config, config.read_text(encoding="utf-8", errors="replace"))
        inside = [path / name for name in PEFT if (path / name).is_file()]
        if not inside:
            raise CheckpointError(f"{path}: a folder without {PEFT[0]}; name the adapter's file")
        path = inside[0]
    if path.suffix.lower() not in (".safetensors", ".sft"):
        return {key: tensor.load() for key, tensor in read_pickle(path)[0].items()}, settings
    file = TensorFile(path)
    try:
        if METADATA in file.metadata:
            settings = parse(path, file.metadata[METADATA])
        # Copies: an adapter is small, and its file need not stay open.
        return {key: tensor.load().clone() for key, tensor in file.lazy.items()}, settings
    finally:
        file.close()


def parse(path: Path, text: str) -> dict[str, Any]:
    """JSON settings. Raises :class:`CheckpointError` for text that is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: its settings are no JSON ({e})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its settings are no JSON object")
    return found


def split(key: str, path: Path) -> tuple[str, str | None]:
    """A key as (layer as the file spells it, "down", "up", "alpha" or None for none of these)."""
    for pattern, method in OTHERS.items():
        if re.search(f"({pattern})$", key):
            raise UnsupportedError(f"{path}: {quote(key)} is of {method}, which minidiff does not apply; only LoRA is")
    for found in ENDING.finditer(key):
        if found.end() == len(key):
            return key[: found.start()], found.lastgroup
    return key, None


def flat(name: str) -> str:
    """A layer's name as the table spells it: the part, then the path with underscores."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".").replace(".", "_")
    name = re.sub(r"_to_out$", "_to_out_0", name)  # as it is called inside an attention processor
    part, path = "unet", name
    for prefix, meant in PREFIXES.items():
        if name.startswith(prefix):
            part, path = meant, name.removeprefix(prefix)
            break
    else:
        if re.match(r"(text_model_)?encoder_layers_", name):
            part = "text_encoder"
    if part != "unet":
        path = path.removeprefix("text_model_")
    return f"{part}.{path}"


def layers(config: ModelConfig) -> dict[str, str]:
    """Flattened name in diffusers or in LDM -> full name of the layer here, for all that an adapter may bend."""
    table: dict[str, str] = {}

    def enter(part: str, modules: Iterator[Module], prefix: str = "") -> None:
        for theirs, ours, _ in modules:
            table[f"{part}.{theirs.removeprefix(prefix).replace('.', '_')}"] = f"{part}.{ours}"

    enter("unet", keys_original.unet(config.unet), f"{keys_original.UNET}.")
    enter("unet", keys_diffusers.unet(config.unet))
    for part in ("text_encoder", "text_encoder_2"):
        text = getattr(config, part)
        if text is not None:
            enter(part, keys_diffusers.clip(text, prefix=""))
    return table
