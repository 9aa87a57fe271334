"""Translation of a diffusers pipeline folder: ``model_index.json`` names the parts, each with a folder of its own.

Small unconditional checkpoints (the published ddpm-* ones) have no subfolders: config and weights of the only part are
at the top, beside ``scheduler_config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidiff.config import (
    CLIPTextConfig,
    ModelConfig,
    ScheduleConfig,
    TAESDConfig,
    TokenizerConfig,
    UNetConfig,
    VAEConfig,
    quote,
)
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.models.tokenizer_files import tokenizer_config
from minidiff.samplers import sampler_to_config, schedule_from_diffusers
from minidiff.samplers.diffusers.classes import READERS
from minidiff.samplers.diffusers.config import read_sampler, unknown_fields
from minidiff.storage.files import Lazy
from minidiff.storage.reading import read_object
from weights_convert.component import read_component
from weights_convert.overlay import overlay
from weights_convert.report import Report, Source

UNWANTED = {
    "safety_checker": "minidiff includes no content filter",
    "feature_extractor": "prepares pictures for the safety checker",
    "image_encoder": "reads picture prompts (IP-Adapter), which this conversion leaves out",
}
DDPM_SCHEDULER = {"_class_name": "DDPMScheduler"}  # with its defaults, as Ho et al. trained
REWRITING = tuple(f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
# Pipelines that replace the folder's scheduler by their own, with its settings.
OWN_SCHEDULER = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
SCORED = ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
LIBRARIES = ("diffusers", "transformers")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


def read_folder(
    folder: Path,
    index: Mapping[str, Any],
    report: Report,
    *,
    override: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Source:
    """Read a folder of any family as minidiff's config and tensors.

    Raises :class:`CheckpointError` for a part that is missing, damaged or does not fit the others, and
    :class:`UnsupportedError` for an option that minidiff's models do not have.
    """
    override, pipeline, xl = dict(override or {}), str(index.get("_class_name", "")), is_xl(report.family)
    names = _parts(index, report.family)
    components = {n: read_component(_place(folder, n), _class(index, n), override.get(n), variant) for n in names}
    if variant is not None and all(c.variant != variant for c in components.values()):
        raise CheckpointError(f"{folder}: no component has {variant} weights; leave out --variant")
    for name, found in components.items():
        report.mapped[name] = len(found.part.tensors)
        report.drop(found.part.dropped)
        report.notes += found.notes
    for name, reason in UNWANTED.items():
        if _class(index, name):
            report.dropped.append((name, 1, reason))
    if _flag(index, "add_watermarker", False):
        report.dropped.append(("add_watermarker", 1, "minidiff adds no invisible watermark"))
    chosen = override.get("sampler")
    own_sampler = isinstance(chosen, Mapping) and "name" in chosen
    schedule, sampler = _scheduler(folder, index, report, own_sampler)
    unet, vae = (components[n].config if n in components else None for n in ("unet", "vae"))
    assert isinstance(unet, UNetConfig)
    assert vae is None or isinstance(vae, (VAEConfig, TAESDConfig))
    texts: dict[str, Any] = {}
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if name in components:
            assert isinstance(components[name].config, CLIPTextConfig)
            texts |= {name: components[name].config, tokenizer: _tokenizer(folder / tokenizer, index)}
    if xl and "text_encoder" in texts and texts["text_encoder"].projection is not None:
        raise UnsupportedError(
            f"{folder}: text_encoder is a CLIPTextModelWithProjection, whose pooled text diffusers would take, not "
            "text_encoder_2's; minidiff does not: save it as a CLIPTextModel, if that is meant"
        )
    if pipeline in REWRITING:
        unet = _sample_size(unet, components["unet"].found, folder, report)
    if isinstance(vae, VAEConfig) and not xl:  # its config may say so, but only the pipelines of SDXL use it
        vae = replace(vae, upcast=False)
    try:
        config = ModelConfig(
            family=report.family,
            unet=unet,
            vae=vae,
            **texts,
            schedule=schedule,
            sampler=sampler,
            text_layer="penultimate" if xl else "last",
            zero_empty=xl and _flag(index, "force_zeros_for_empty_prompt", True),
        )
    except ConfigError as e:
        raise CheckpointError(f"{folder}: its parts are from different models ({e})") from None
    score = _flag(index, "requires_aesthetics_score", False)
    if pipeline in SCORED and unet.added_dim is not None and score != config.reads_score:
        told = "a score" if config.reads_score else "sizes alone"
        raise CheckpointError(f"{folder}: requires_aesthetics_score={score}, but its UNet is told {told}; correct it")
    tensors: dict[str, Lazy] = {f"{n}.{k}": t for n, c in components.items() for k, t in c.part.tensors.items()}
    # Corrections of a component were applied to its config before its tensors were checked against it.
    return Source(overlay(config, {k: v for k, v in override.items() if k not in names}), tensors, report)


def is_xl(family: str) -> bool:
    """Return True if a family has SDXL's conditioning: two text encoders or the second alone, pooled text and sizes."""
    return family.startswith("sdxl")


def _parts(index: Mapping[str, Any], family: str) -> list[str]:
    """Return the components of a family; optional ones only if the folder has them."""
    if family == "ddpm":
        return ["unet"]
    if not is_xl(family):
        return ["unet", "vae", "text_encoder"]
    return ["unet", "vae", *(["text_encoder"] if _class(index, "text_encoder") else []), "text_encoder_2"]


def _place(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _class(index: Mapping[str, Any], name: str) -> str | None:
    """Return the class of a part by ``model_index.json``; None if the part is absent (null, or [null, null])."""
    entry = index.get(name)
    if entry in (None, [None, None]):
        return None
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(f"model_index.json: {name}={quote(entry)} should be a library and a class, or null")
    if entry[0] not in LIBRARIES and name not in UNWANTED:
        raise UnsupportedError(
            f"model_index.json: {name} comes from {quote(entry[0])}; minidiff knows {' and '.join(LIBRARIES)}"
        )
    return entry[1]


def _flag(index: Mapping[str, Any], name: str, default: bool) -> bool:
    value = index.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"model_index.json: {name}={quote(value)} should be true or false")
    return bool(value)


def _sample_size(unet: UNetConfig, found: Mapping[str, Any], folder: Path, report: Report) -> UNetConfig:
    """Correct a smaller value to 64 for configs of diffusers before 0.9.0, as Stable Diffusion's pipelines do."""
    version, size = found.get("_diffusers_version", "1"), found.get("sample_size")
    numbers = re.match(r"v?(\d{1,6}(\.\d{1,6})*)", version) if isinstance(version, str) else None
    if numbers is None:
        raise CheckpointError(f"{folder}/unet/config.json: _diffusers_version={quote(version)} is no version")
    if not isinstance(size, int) or size >= 64 or tuple(map(int, numbers[1].split("."))) >= (0, 9):
        return unet
    report.notes.append(f"unet: sample_size was {size}, set to 64 as diffusers does with configs of before 0.9.0")
    return replace(unet, sample_size=64)


def _scheduler(
    folder: Path, index: Mapping[str, Any], report: Report, own_sampler: bool
) -> tuple[ScheduleConfig, dict[str, Any]]:
    """Return noise schedule and sampler of the folder, with the changes that the reference's pipelines make on loading.

    ``own_sampler``: the user chose a sampler, so the folder's may be one that minidiff does not have.
    """
    place = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    file = place / "scheduler_config.json"
    if file.exists() or report.family != "ddpm":
        found = read_object(file)
    else:
        found = dict(DDPM_SCHEDULER)
        report.notes.append("no scheduler_config.json: the family's rule, DDPM with linear betas from 0.0001 to 0.02")
    kind, named = _class(index, "scheduler"), found.get("_class_name")
    if kind is not None and kind != named:
        said = "none" if named is None else quote(named)
        report.notes.append(f"scheduler: {kind}, as model_index.json says; scheduler_config.json names {said}")
        found = {**found, "_class_name": kind}
    changes: dict[str, Any] = {}
    pipeline = str(index.get("_class_name"))
    if pipeline in REWRITING:
        inpaint = pipeline == "StableDiffusionInpaintPipeline"
        changes = rewrite(found, inpaint=inpaint)
        pipeline = pipeline if inpaint else "StableDiffusionPipeline"
    elif found.get("_class_name") != OWN_SCHEDULER.get(pipeline, found.get("_class_name")):
        changes = {"_class_name": OWN_SCHEDULER[pipeline]}
    for key, value in changes.items():
        was = found.get(key, "absent")
        report.notes.append(f"scheduler: {key} was {was}, set to {value} as {pipeline} does with such a folder")
    found = {**found, **changes}
    try:
        unknown = unknown_fields(found)
        report.notes += [f"scheduler: {quote(key)} is no option of any scheduler; ignored" for key in unknown]
        schedule, sampler = schedule_from_diffusers(found), None if own_sampler else read_sampler(found)
    except ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from None
    if sampler is not None and sampler.space == "sigma" and pipeline == "DDPMPipeline":
        kind = found["_class_name"]
        raise UnsupportedError(f"{file}: DDPMPipeline gives {kind} noise of the wrong size; choose a --sampler instead")
    return schedule, {} if sampler is None else sampler_to_config(sampler)


def rewrite(found: Mapping[str, Any], *, inpaint: bool = False) -> dict[str, Any]:
    """Update an outdated scheduler config as StableDiffusionPipeline does: ``steps_offset`` 1, ``clip_sample`` off.

    StableDiffusionInpaintPipeline leaves ``clip_sample``, and turns off PNDM's warm-up. Missing options count with the
    scheduler's defaults.
    """
    changes: dict[str, Any] = {}
    kind = found.get("_class_name")
    seen = {**(READERS[kind].fields if isinstance(kind, str) and kind in READERS else {}), **found}
    if seen.get("steps_offset", 1) != 1:
        changes["steps_offset"] = 1
    if inpaint:
        if seen.get("skip_prk_steps") is False:
            changes["skip_prk_steps"] = True
    elif seen.get("clip_sample") is True:
        changes["clip_sample"] = False
    return changes


def _tokenizer(place: Path, index: Mapping[str, Any]) -> TokenizerConfig:
    kind = _class(index, place.name)
    if kind not in (None, *TOKENIZERS):
        raise UnsupportedError(f"model_index.json: {place.name} is a {quote(kind)}; minidiff has CLIP's tokenizer")
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; the checkpoint is incomplete")
    return tokenizer_config(place)
