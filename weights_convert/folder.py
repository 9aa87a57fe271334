"""A diffusers pipeline folder, translated: ``model_index.json`` names the parts, each has a folder of its own.

Small unconditional checkpoints (the published ddpm-* ones) have no folders: config and weights of the only part lie
at the top, beside ``scheduler_config.json``.
"""

from __future__ import annotations

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
)
from minidiff.errors import CheckpointError, ConfigError
from minidiff.files import Lazy
from minidiff.models.tokenizer_files import tokenizer_config
from minidiff.samplers import sampler_from_diffusers, sampler_to_config, schedule_from_diffusers
from weights_convert.component import read_component, read_json
from weights_convert.overlay import overlay
from weights_convert.report import Report, Source

UNWANTED = {
    "safety_checker": "minidiff includes no content filter",
    "feature_extractor": "prepares pictures for the safety checker",
    "image_encoder": "reads picture prompts (IP-Adapter), which this conversion leaves out",
}
DDPM_SCHEDULER = {"_class_name": "DDPMScheduler"}  # with its defaults, as Ho et al. trained
# Schedulers whose clip_sample is on unless their config says otherwise.
CLIPS_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")


def read_folder(
    folder: Path,
    index: Mapping[str, Any],
    report: Report,
    *,
    override: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Source:
    """A folder of any family as minidiff's config and tensors.

    Raises :class:`CheckpointError` for a part that is missing, damaged or does not fit the others, and
    :class:`UnsupportedError` for an option that minidiff's models do not have.
    """
    override = dict(override or {})
    names = _parts(index, report.family)
    components = {n: read_component(_place(folder, n), _class(index, n), override.get(n), variant) for n in names}
    if variant is not None and all(c.variant != variant for c in components.values()):
        raise CheckpointError(f"{folder}: no component has {variant} weights; leave --variant out")
    for name, found in components.items():
        report.mapped[name] = len(found.part.tensors)
        report.drop(found.part.dropped)
        report.notes += found.notes
    for name, reason in UNWANTED.items():
        if _class(index, name):
            report.dropped.append((name, 1, reason))
    schedule, sampler = _scheduler(folder, str(index.get("_class_name", "")), report, "sampler" in override)
    unet, vae = (components[n].config if n in components else None for n in ("unet", "vae"))
    assert isinstance(unet, UNetConfig)
    assert vae is None or isinstance(vae, (VAEConfig, TAESDConfig))
    texts: dict[str, Any] = {}
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if name in components:
            assert isinstance(components[name].config, CLIPTextConfig)
            texts |= {name: components[name].config, tokenizer: _tokenizer(folder / tokenizer)}
    xl = is_xl(report.family)
    if isinstance(vae, VAEConfig) and not xl:  # its config may say so, but only the pipelines of SDXL heed it
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
            zero_empty=xl and index.get("force_zeros_for_empty_prompt", True) is True,
        )
    except ConfigError as e:
        raise CheckpointError(f"{folder}: its parts are from different models ({e})") from None
    tensors: dict[str, Lazy] = {f"{n}.{k}": t for n, c in components.items() for k, t in c.part.tensors.items()}
    # What concerns a component has been laid over its own config already, before its tensors were checked against it.
    return Source(overlay(config, {k: v for k, v in override.items() if k not in names}), tensors, report)


def is_xl(family: str) -> bool:
    """Whether a family has SDXL's conditioning: two text encoders, or the second alone, pooled text and sizes."""
    return family.startswith("sdxl")


def _parts(index: Mapping[str, Any], family: str) -> list[str]:
    """The components of a family, those that the folder may leave out only where it has them."""
    if family == "ddpm":
        return ["unet"]
    if not is_xl(family):
        return ["unet", "vae", "text_encoder"]
    return ["unet", "vae", *(["text_encoder"] if _class(index, "text_encoder") else []), "text_encoder_2"]


def _place(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _class(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a part by ``model_index.json``; None where the part is absent (null, or [null, null])."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def _scheduler(folder: Path, pipeline: str, report: Report, own_sampler: bool) -> tuple[ScheduleConfig, dict[str, Any]]:
    """Noise schedule and sampler of the folder, with what the reference's pipelines change when they load it.

    ``own_sampler``: the user names a sampler, so the folder's may be one that minidiff does not have.
    """
    place = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    file = place / "scheduler_config.json"
    if file.is_file() or report.family != "ddpm":
        found = read_json(file)
    else:
        found = dict(DDPM_SCHEDULER)
        report.notes.append("no scheduler_config.json: the family's rule, DDPM with linear betas from 0.0001 to 0.02")
    changes: dict[str, Any] = {}
    if report.family.startswith(("sd1", "sd2")) and not report.family.endswith("-lcm"):
        inpaint = pipeline == "StableDiffusionInpaintPipeline"
        changes = rewrite(found, inpaint=inpaint)
        pipeline = pipeline if inpaint else "StableDiffusionPipeline"
    elif pipeline == "DDIMPipeline" and found.get("_class_name") != "DDIMScheduler":
        changes = {"_class_name": "DDIMScheduler"}
    for key, value in changes.items():
        was = found.get(key, "absent")
        report.notes.append(f"scheduler: {key} was {was}, set to {value} as {pipeline} does with such a folder")
    found = {**found, **changes}
    sampler = {} if own_sampler else sampler_to_config(sampler_from_diffusers(found))
    return schedule_from_diffusers(found), sampler


def rewrite(found: Mapping[str, Any], *, inpaint: bool = False) -> dict[str, Any]:
    """What StableDiffusionPipeline changes in an outdated scheduler config: ``steps_offset`` 1, ``clip_sample`` off.
    StableDiffusionInpaintPipeline leaves ``clip_sample``, and switches PNDM's warm-up off.

    All as the scheduler sees them, that is with its defaults where the file is silent.
    """
    changes: dict[str, Any] = {}
    if found.get("steps_offset", 0) != 1:
        changes["steps_offset"] = 1
    if inpaint:
        if found.get("skip_prk_steps", found.get("_class_name") != "PNDMScheduler") is False:
            changes["skip_prk_steps"] = True
    elif found.get("clip_sample", found.get("_class_name") in CLIPS_BY_DEFAULT) is True:
        changes["clip_sample"] = False
    return changes


def _tokenizer(place: Path) -> TokenizerConfig:
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; the checkpoint is incomplete")
    return tokenizer_config(place)
