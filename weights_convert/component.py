"""One component of a diffusers folder (``unet/``, ``vae/``, ``text_encoder/``): translation of its config and tensors.

A component folder contains ``config.json`` and the weights: one file, or shards listed by an ``*.index.json``.
diffusers names them ``diffusion_pytorch_model``, transformers ``model``; older folders have pickles (``.bin``) instead
of safetensors. A variant of the weights (fp16, non_ema) may exist besides the plain ones, or instead of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidiff.config import (
    CLIPTextConfig,
    ControlNetConfig,
    T2IAdapterConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
    quote,
)
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.storage.checkpoint import MODELS
from minidiff.storage.files import Lazy
from minidiff.storage.reading import read_object
from weights_convert import configs_diffusers as configs
from weights_convert import keys_diffusers as keys
from weights_convert import keys_t2i, keys_taesd
from weights_convert.engine import Drop, Module, Pair, Part, expand, translate
from weights_convert.overlay import overlay
from weights_convert.tensors import read_tensors

NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
AnyConfig = UNetConfig | VAEConfig | TAESDConfig | CLIPTextConfig | T2IAdapterConfig  # ControlNetConfig is the first
LARGEST = (
    "eos_token_id is 2, as in configs before mid-2023: pooled at the largest id, as the reference does, "
    "which is the wrong position if the prompt has a learned word; end_token=49407 in its config is the end of the text"
)
BEYOND = "the file has more layers than its config, and the reference follows the config, too"


@dataclass
class Component:
    """Translated component: minidiff's config, the tensors, the dropped keys, the variant, and remarks.

    ``found`` is its ``config.json``.
    """

    config: AnyConfig
    part: Part
    found: Mapping[str, Any]
    variant: str | None = None
    notes: list[str] = field(default_factory=list)


def read_component(
    folder: Path, kind: str | None = None, override: Mapping[str, Any] | None = None, variant: str | None = None
) -> Component:
    """Read a component's folder; ``kind`` is its class name, if ``model_index.json`` gives it.

    ``override`` is merged into minidiff's config of the component before its tensors are checked against that.
    ``variant`` ("fp16", "non_ema"): the weights to use; if a component does not have them, the plain ones.

    Raises :class:`CheckpointError` for missing or damaged files and tensors that do not fit the config, and
    :class:`UnsupportedError` for a class or an option that minidiff's models do not have.
    """
    found = read_object(folder / "config.json")
    kind = kind or class_name(found)
    options = configs.Options({**found, "_class_name": kind}, f"{folder}/config.json")
    config = overlay(_config(kind, options), override or {})
    files, chosen = weight_files(folder, variant)
    tensors = read_files(files)
    model = meta_model(config)
    pairs = expand(key_map(config, tensors), model)
    drops = (*(keys.CLIP_DROPS if isinstance(config, CLIPTextConfig) else ()), *_beyond(pairs, tensors))
    part = translate(pairs, tensors, model, where=str(folder), drops=drops)
    notes = [f"{options.where}: {key} is not an option of {kind}" for key in options.unknown()]
    if chosen != variant:
        there = "the plain weights" if chosen is None else f"the {chosen} weights, there are no others"
        notes.append(f"{folder.name}: {there}{' (no ' + variant + ')' if variant else ''}")
    if isinstance(config, CLIPTextConfig) and config.end_token is None:
        notes.append(f"{folder.name}: {LARGEST}")
    return Component(config, part, found, chosen, notes)


def _beyond(pairs: list[Pair], tensors: Mapping[str, Lazy]) -> Iterator[Drop]:
    """Return the rule for tensors of layers that a config leaves out.

    They are after the last entry of a list of the model, or in a middle block that it does not have.
    """
    last: dict[str, int] = {}
    for pair in pairs:
        for name, i in _entries(pair.theirs):
            last[name] = max(last.get(name, 0), i)

    def beyond(name: str, i: int) -> bool:
        return i > last.get(name, -1 if ".mid_block." in f".{name}." else i)

    extra = [key for key in tensors if any(beyond(*entry) for entry in _entries(key))]
    if extra:
        yield Drop("layers beyond the config's", "|".join(map(re.escape, extra)), BEYOND)


def _entries(key: str) -> list[tuple[str, int]]:
    """Return the lists that contain a tensor, with its index: "a.0.b.12.weight" is in "a" at 0, in "a.0.b" at 12."""
    return [(key[: found.start()], int(found[1])) for found in re.finditer(r"\.(\d{1,6})(?=\.)", key)]


def class_name(found: Mapping[str, Any]) -> str:
    """Return the class of a ``config.json`` of diffusers (``_class_name``) or transformers (``architectures``)."""
    architectures = found.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return str(found.get("_class_name") or first)


def meta_model(config: AnyConfig) -> nn.Module:
    """Build the model for ``config`` on the meta device: shapes without memory."""
    make: Callable[[AnyConfig], nn.Module] = MODELS[type(config)]
    with torch.device("meta"):
        return make(config)


def _config(kind: str, options: configs.Options) -> AnyConfig:
    readers: dict[str, Callable[[configs.Options], AnyConfig]] = {
        "UNet2DConditionModel": configs.unet,
        "UNet2DModel": configs.unet,
        "AutoencoderKL": configs.vae,
        "AutoencoderTiny": configs.taesd,
        "CLIPTextModel": configs.clip,
        "CLIPTextModelWithProjection": configs.clip,
        "ControlNetModel": configs.controlnet,
        "T2IAdapter": configs.t2i_adapter,
    }
    if kind not in readers:
        named = quote(kind) if kind else "a class that it does not say"
        raise UnsupportedError(f"{options.where}: is of {named}; minidiff converts {', '.join(readers)}")
    try:
        return readers[kind](options)
    except ConfigError as e:
        raise CheckpointError(f"{options.where}: is not a usable config ({e})") from None


def key_map(config: AnyConfig, tensors: Mapping[str, Lazy]) -> Iterator[Module]:
    """Return the key map for these tensors, whose variant is determined from their names and shapes."""
    if isinstance(config, TAESDConfig):
        return keys_taesd.taesd(config)
    if isinstance(config, T2IAdapterConfig):
        return keys_t2i.t2i_adapter(config)
    if isinstance(config, ControlNetConfig):
        return keys.controlnet(config)
    if isinstance(config, UNetConfig):
        return keys.unet(config, old_names=any(key.endswith(".query.weight") for key in tensors))
    if isinstance(config, VAEConfig):
        old_names = "encoder.mid_block.attentions.0.query.weight" in tensors
        query = tensors.get(f"encoder.mid_block.attentions.0.{'query' if old_names else 'to_q'}.weight")
        return keys.vae(config, old_names=old_names, conv_attention=query is not None and len(query.shape) == 4)
    return keys.clip(config, prefix="text_model." if "text_model.final_layer_norm.weight" in tensors else "")


def weight_files(folder: Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """Return the files of a component's weights and their variant: the requested one, else the plain weights.

    Safetensors are preferred to pickles, and one file to shards. If there is only a single variant, it is used; between
    several the caller has to choose. Raises :class:`CheckpointError` if there are no weights at all.
    """
    for wanted in dict.fromkeys((variant, None)):
        found = _files_of(folder, wanted)
        if found:
            return found, wanted
    there = (
        sorted({v for v in map(_variant, folder.iterdir()) if v and _files_of(folder, v)}) if folder.is_dir() else []
    )
    if len(there) == 1:
        return _files_of(folder, there[0]), there[0]
    if there:
        raise CheckpointError(f"{folder}: has the variants {', '.join(there)} only; choose one with --variant")
    raise CheckpointError(f"{folder}: no weights; expected {NAMES[0]}.safetensors or {NAMES[1]}.safetensors there")


def _files_of(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of one variant (None: the plain weights); empty if there are none."""
    v = f".{variant}" if variant else ""
    for name in NAMES:
        for kind in ("safetensors", "bin"):
            if (folder / f"{name}{v}.{kind}").is_file():
                return [folder / f"{name}{v}.{kind}"]
            for index in (f"{name}.{kind}.index{v}.json", f"{name}{v}.{kind}.index.json"):
                if (folder / index).is_file():
                    return _shards(folder / index)
    return []


def _variant(file: Path) -> str | None:
    """Return the variant in the name of a file of weights or of an index of shards."""
    names = "|".join(NAMES)
    kind = r"\.(?:safetensors|bin)"
    found = re.fullmatch(rf"(?:{names})(?:\.(\w+))?{kind}(?:\.index(?:\.(\w+))?\.json)?", file.name)
    return found and (found[1] or found[2])


def read_files(files: list[Path]) -> dict[str, Lazy]:
    """Return the tensors of one file, or of all shards, without reading them. Raises :class:`CheckpointError`."""
    tensors: dict[str, Lazy] = {}
    for file in files:
        here = read_tensors(file).lazy
        twice = tensors.keys() & here.keys()
        if twice:
            raise CheckpointError(f"{file}: tensor {min(twice)!r} is in another shard too")
        tensors |= here
    return tensors


def _shards(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    if any(Path(n).name != n for n in names):  # shards must be in the folder of their index; nothing else is opened
        raise CheckpointError(f"{index}: names a shard in another folder")
    return [index.parent / n for n in names]
