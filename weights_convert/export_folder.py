"""Export of a model as a diffusers pipeline folder, for ``DiffusionPipeline.from_pretrained``.

``model_index.json`` names the parts; each has a folder with its config and its weights. The names of the weights come
from the key maps of ``keys_diffusers.py``, applied in reverse. One tensor at a time is in memory, and the folder
appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidiff.config import CLIPTextConfig, ModelConfig
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.models.clip import rows
from minidiff.models.tokenizer_out import tokenizer_files
from minidiff.samplers import sampler_from_config
from minidiff.samplers.diffusers.classes import READERS
from minidiff.samplers.diffusers.config import passed_to_call, sampler_to_diffusers
from minidiff.storage.checkpoint import build
from minidiff.storage.files import Lazy, write_tensors
from minidiff.storage.writing import atomic, atomic_folder
from weights_convert import keys_diffusers as keys
from weights_convert.component import AnyConfig, key_map, meta_model
from weights_convert.configs_out import class_of, config_json
from weights_convert.engine import Module, expand, restore
from weights_convert.folder import rewrite
from weights_convert.report import Report

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SMALLEST_SHARD = 1000  # bytes: less is a mistake, and would fill the folder with thousands of files
FORMAT = "0.42.1"  # the release of diffusers that the folder is written for; for inpainting models diffusers checks it
FULL_LIST = "the token table, written out: {} ids have a row of their own, all others share one"


def write_folder(
    dst: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    report: Report,
    sharded: int | None = None,
) -> None:
    """Write the model as the folder ``dst``; decisions are noted in ``report``.

    ``sharded``: maximum size of a file of weights in bytes, None for one file per part. Raises
    :class:`UnsupportedError`, before anything is written, for a model that diffusers' classes cannot represent, and
    :class:`CheckpointError` for a target that already exists.
    """
    config, tensors = full_tables(config, tensors, report)
    parts: dict[str, AnyConfig] = {name: getattr(config, name) for name in build(config)}
    jsons = {name: config_json(c) for name, c in parts.items()}
    scheduler = _scheduler(config, report)
    index = _model_index(config, jsons, scheduler)
    with atomic_folder(dst) as folder:
        for name, part in parts.items():
            (folder / name).mkdir()
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            _write_part(folder / name, part, jsons[name], own, sharded)
        for name in ("tokenizer", "tokenizer_2"):
            if getattr(config, name) is not None:
                (folder / name).mkdir()
                for file, content in tokenizer_files(getattr(config, name)):
                    _write_json(folder / name / file, content)
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(folder / "model_index.json", index)


def write_component(
    dst: str | os.PathLike[str], config: AnyConfig, tensors: Mapping[str, Lazy], sharded: int | None = None
) -> None:
    """Write one network alone as the folder ``dst``. Raises as :func:`write_folder` does."""
    found = config_json(config)
    with atomic_folder(dst) as folder:
        _write_part(folder, config, found, tensors, sharded)


def _write_part(
    folder: Path, part: AnyConfig, found: dict[str, Any], own: Mapping[str, Lazy], sharded: int | None
) -> None:
    _write_json(folder / "config.json", found)
    theirs = restore(expand(_layout(part), meta_model(part)), own)
    base = "model" if isinstance(part, CLIPTextConfig) else "diffusion_pytorch_model"
    write_weights(folder, base, theirs, sharded)


def write_weights(folder: Path, base: str, tensors: Mapping[str, Lazy], sharded: int | None = None) -> None:
    """Write the weights of one component: ``base``.safetensors, or numbered shards with their index.

    A shard holds at least one tensor, so a tensor that is larger than ``sharded`` bytes has a file to itself.
    """
    total = sum(t.nbytes for t in tensors.values())
    if sharded is None or total <= sharded:
        write_tensors(folder / f"{base}.safetensors", tensors, {"format": "pt"})
        return
    shards: list[dict[str, Lazy]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > sharded:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{base}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"{base}.safetensors.index.json", index)


def shard_size(given: int | str) -> int:
    """Return a size in bytes from "5GB", "500 MB", "2GiB" or a number. Raises :class:`ConfigError` otherwise."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(given).lower())
    if isinstance(given, bool) or found is None or found[2] not in UNITS:
        raise ConfigError(f"sharded={given!r} should be a size, such as 5GB or 500MB")
    size = int(float(found[1]) * UNITS[found[2]])
    if size < SMALLEST_SHARD:
        raise ConfigError(f"sharded={given!r} is {size} bytes; a file of weights takes at least {SMALLEST_SHARD}")
    return size


def full_tables(
    config: ModelConfig, tensors: Mapping[str, Lazy], report: Report
) -> tuple[ModelConfig, dict[str, Lazy]]:
    """Return the model with a row for every id in its token tables: other libraries do not support shorter ones."""
    tensors = dict(tensors)
    for name in ("text_encoder", "text_encoder_2"):
        text: CLIPTextConfig | None = getattr(config, name)
        if text is not None and text.kept is not None:
            report.notes.append(f"{name}: {FULL_LIST.format(len(text.kept))}")
            key = f"{name}.token.weight"
            tensors[key] = _full_table(tensors[key], text)
            full: dict[str, Any] = {name: replace(text, kept=None)}
            config = replace(config, **full)
    return config, tensors


def _full_table(table: Lazy, text: CLIPTextConfig) -> Lazy:
    row_of = rows(text.vocab, text.kept or ())
    return Lazy((text.vocab, text.width), table.dtype, lambda: table.load()[row_of])


def _layout(config: AnyConfig) -> Iterator[Module]:
    """Return the key map of a component in today's names, but with "text_model.", which older readers need."""
    return keys.clip(config) if isinstance(config, CLIPTextConfig) else key_map(config, {})


def _scheduler(config: ModelConfig, report: Report) -> dict[str, Any]:
    """Return the folder's scheduler config, noting what diffusers will do differently."""
    sampler: Any = sampler_from_config(config.sampler)
    found = sampler_to_diffusers(sampler, config.schedule)
    kind = found["_class_name"]
    if not sampler.like_diffusers:
        report.notes.append(f"sampler: {kind} of diffusers, which deviates from the mathematics in places")
    called = passed_to_call(found)
    if getattr(sampler, "eta", 0) and "eta" not in called:  # its pipelines pass 0 by default
        called.append("eta")
    if called:
        report.notes.append(
            f"sampler: {kind} of diffusers takes {', '.join(called)} from the call, not from the folder"
        )
    if config.text_encoder is not None and config.text_encoder_2 is None:
        if "steps_offset" in READERS[kind].fields:  # some have the field without using it, but diffusers warns anyway
            found.setdefault("steps_offset", 1)
        inpaint = config.vae is not None and config.unet.in_channels != config.vae.latent_channels
        for key, value in rewrite(found, inpaint=inpaint).items():
            if key in found:
                report.notes.append(f"sampler: diffusers will set {key}={value} when it loads this folder")
    return found


def _model_index(config: ModelConfig, jsons: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``model_index.json``: the pipeline's class, and library and class of each part; null for absent parts."""
    kind, extra = _pipeline(config, str(scheduler["_class_name"]))
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": FORMAT, **extra}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for name, found in jsons.items():
        index[name] = ["transformers" if "architectures" in found else "diffusers", class_of(found)]
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(config, name) is not None:
            index[name] = ["transformers", "CLIPTokenizer"]
    return index


NO_FILTER = {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
NO_FIRST_ENCODER = {"text_encoder": [None, None], "tokenizer": [None, None]}


def _pipeline(config: ModelConfig, scheduler: str) -> tuple[str, dict[str, Any]]:
    """Return the pipeline's class, determined by the parts, and the other entries of its index."""
    unet, vae = config.unet, config.vae
    if vae is None:
        return {"DDIMScheduler": "DDIMPipeline"}.get(scheduler, "DDPMPipeline"), {}
    if config.text_encoder is None and config.text_encoder_2 is None:
        raise UnsupportedError(f"{config.family}: diffusers has no pipeline for a VAE without a text encoder")
    two = config.text_encoder_2 is not None
    if config.text_layer != ("penultimate" if two else "last"):
        raise UnsupportedError(f"{config.family}: text_layer={config.text_layer!r} has no place in a diffusers folder")
    inpainting = unet.in_channels == 2 * vae.latent_channels + 1
    if not inpainting and unet.in_channels != vae.latent_channels:
        raise UnsupportedError(f"{config.family}: diffusers has no text pipeline for in_channels={unet.in_channels}")
    if not two and unet.guidance_dim is not None and scheduler == "LCMScheduler":
        return "LatentConsistencyModelPipeline", NO_FILTER
    if not two:
        return f"StableDiffusion{'Inpaint' if inpainting else ''}Pipeline", NO_FILTER
    zeros = {"force_zeros_for_empty_prompt": config.zero_empty}
    if config.text_encoder is None:
        return "StableDiffusionXLImg2ImgPipeline", {
            **NO_FIRST_ENCODER,
            **zeros,
            "requires_aesthetics_score": config.reads_score,
        }
    return f"StableDiffusionXL{'Inpaint' if inpainting else ''}Pipeline", zeros


def _write_json(path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    with atomic(path) as file:
        file.write((text.rstrip("\n") + "\n").encode("utf-8"))
