"""Noise schedule and sampler of an original single file.

A single file has no scheduler config. It may contain the noise table of its training, and two markers on which
community trainers and ComfyUI agreed: the keys ``v_pred`` (the model predicts v) and ``ztsnr`` (its noise schedule was
rescaled to end in pure noise, Lin et al. 2023), whose values have no meaning. Everything else follows the scheduler
that the family was published with. The prediction type of SD2 and the sampler of a model that was distilled for few
steps remain open, and must be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import CheckpointError, ConfigError
from minidiff.schedule import NoiseSchedule
from minidiff.storage.files import Lazy, lazy
from weights_convert.engine import Drop

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PNDM = {
    "_class_name": "PNDMScheduler",
    **BETAS,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
DDIM = {"_class_name": "DDIMScheduler", **BETAS, "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}
EULER = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading", "steps_offset": 1}
# SD-Turbo, the one model of SD2's shape that was published in the layout of SDXL, was distilled for these timesteps.
TURBO = {**EULER, "timestep_spacing": "trailing"}
# Leading spacing never visits the last timestep, which is the one that was made pure noise.
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

# Each marker with the field of the ScheduleConfig that it sets, and its description.
MARKERS: dict[str, tuple[str, Any, str]] = {
    "v_pred": ("prediction", "v_prediction", "its model predicts v"),
    "ztsnr": ("zero_snr", True, "its noise schedule ends in pure noise"),
}
MARKERS_DROP = Drop("markers", "|".join(MARKERS), "what they say is kept in the schedule's config")
ROUNDING = 5e-3  # a table in bfloat16 differs by up to 2e-3, a zero-SNR one by 3.5e-2


def evidence(tensors: Mapping[str, Lazy]) -> list[str]:
    """Return the evidence of a file's markers, one line each."""
    return [f"has the marker {mark!r}: {words}" for mark, (_, _, words) in MARKERS.items() if mark in tensors]


def markers(config: ScheduleConfig, layout: str) -> dict[str, Lazy]:
    """Return the markers for a file of a family's ``layout``.

    SD2 files only have the one for zero terminal SNR, since every program that reads one asks for the prediction type.
    """
    if layout == "sd2" and not config.zero_snr:
        return {}
    return {
        mark: lazy(torch.zeros(0)) for mark, (field, value, _) in MARKERS.items() if getattr(config, field) == value
    }


def scheduler(tensors: Mapping[str, Lazy], family: str, override: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the scheduler of a single file as a diffusers config, always with its ``prediction_type``.

    Raises :class:`ConfigError` for settings that neither the file nor ``override`` has, and if they contradict each
    other: a wrong prediction type gives grey pictures, and a marker is there on purpose.
    """
    said = override.get("schedule")
    said = dict(said) if isinstance(said, Mapping) else {}
    for mark, (field, value, words) in MARKERS.items():
        if mark in tensors and said.setdefault(field, value) != value:
            raise ConfigError(
                f"{where}: has the marker {mark!r}, which says that {words}, and {field}={said[field]!r} was given; "
                "leave that out, or take the marker out of the file"
            )
    prediction, zero_snr = said.get("prediction"), said.get("zero_snr") is True
    if prediction is None and (family.startswith("sd2") or "ztsnr" in tensors):
        raise ConfigError(
            f"{where}: does not say what its model predicts; give --prediction (prediction= in Python): epsilon, as "
            "SD2 base, its inpainting model and SD-Turbo do, or v_prediction, as 768-v and most with zero terminal SNR"
        )
    if family.endswith("-lcm") and "sampler" not in override:
        raise ConfigError(
            f"{where}: its UNet was distilled for few steps, and a single file does not say for which sampler; give "
            "--sampler (sampler= in Python): lcm, for latent consistency models"
        )
    prediction = prediction or "epsilon"
    if family.startswith("sdxl"):
        published: dict[str, Any] = EULER
    else:
        first = TURBO if is_turbo(tensors, family) else PNDM
        published = DDIM if zero_snr or (family.startswith("sd2") and prediction == "v_prediction") else first
    return {**published, "prediction_type": prediction, **(ZERO_SNR if zero_snr else {})}


def is_turbo(tensors: Mapping[str, Lazy], family: str) -> bool:
    """Return True if a file of SD2's shape has its text encoder where SDXL's files have theirs, as SD-Turbo's has."""
    return family.startswith("sd2") and any(k.startswith("conditioner.") for k in tensors)


def check_table(tensors: Mapping[str, Lazy], config: ScheduleConfig, where: str) -> None:
    """Check the schedule of ``config`` against the noise table of its training, if the file contains it.

    Raises :class:`CheckpointError` if they differ.
    """
    stored = tensors.get("alphas_cumprod")
    if stored is None:
        return
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    gap = float((stored.load().float() - ours).abs().max()) if stored.shape == ours.shape else float("inf")
    if not gap <= ROUNDING:
        raise CheckpointError(
            f"{where}: its noise table (alphas_cumprod) differs from the schedule's by {gap:.3g}; say what it was "
            'trained with, such as config={"schedule": {"zero_snr": true, "prediction": "v_prediction"}}'
        )
