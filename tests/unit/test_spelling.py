"""Unknown names are refused with a suggestion (``spelling.py``, ``samplers/elsewhere.py``)."""

from __future__ import annotations

import re
import time

import pytest
import torch

from minidiff import StableDiffusion, config, fast
from minidiff import programs as conventions
from minidiff.console.spelling import near
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.samplers import SAMPLERS, elsewhere, name_of, sampler_from_config, sampler_from_diffusers
from minidiff.samplers.diffusers.classes import READERS
from minidiff.training.settings import TrainConfig
from weights_convert import convert


def test_the_nearest_name() -> None:
    known = ("--help", "--steps", "--num-images", "--negative", "euler")
    assert near("--hlep", known) == "; did you mean --help?"
    assert near("--NUM_IMAGE", known) == "; did you mean --num-images?"
    assert near("--neg", known) == "; did you mean --negative?"
    assert near("large", ("learned", "fixed_large", "larges")) == "; did you mean larges?"
    assert near("large", ("learned", "fixed_large")) == "; did you mean fixed_large?"
    assert near("magic", known) == ""
    assert near(3, known) == ""
    assert near("", known) == ""
    began = time.monotonic()
    near("e" * 1_000_000, SAMPLERS)
    assert time.monotonic() - began < 1


# What A1111, ComfyUI and k-diffusion call a method, and what it is here. A1111's names with their schedule, as the
# releases before 1.9 listed them.
OTHERS = {
    "Euler": ("euler", {}),
    "Euler a": ("euler_ancestral", {}),
    "LMS": ("lms", {}),
    "Heun": ("heun", {}),
    "DPM2": ("dpm2", {}),
    "DPM2 a": ("dpm2_ancestral", {}),
    "DPM++ 2M": ("dpmpp_2m", {}),
    "DPM++ SDE": ("dpmpp_sde", {}),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", {}),
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde", {"solver_type": "heun", "sigma_spacing": "exponential"}),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", {}),
    "DPM++ 3M SDE Karras": ("dpmpp_3m_sde", {"sigma_spacing": "karras"}),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", {"sigma_spacing": "exponential"}),
    "LMS Karras": ("lms", {"sigma_spacing": "karras"}),
    "DPM2 Karras": ("dpm2", {"sigma_spacing": "karras"}),
    "DPM2 a Karras": ("dpm2_ancestral", {"sigma_spacing": "karras"}),
    "DPM++ 2M Karras": ("dpmpp_2m", {"sigma_spacing": "karras"}),
    "DPM++ SDE Karras": ("dpmpp_sde", {"sigma_spacing": "karras"}),
    "DDIM": ("ddim", {}),
    "PLMS": ("pndm", {}),
    "UniPC": ("unipc", {}),
    "k_euler_a": ("euler_ancestral", {}),
    "k_dpmpp_2m_ka": ("dpmpp_2m", {"sigma_spacing": "karras"}),
    "sample_dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", {}),
    "dpm_2": ("dpm2", {}),
    "dpm_2_ancestral": ("dpm2_ancestral", {}),
    "uni_pc": ("unipc", {}),
    "uni_pc_bh2": ("unipc", {"solver_type": "bh2"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_programs(name: str) -> None:
    sampler, options = OTHERS[name]
    with pytest.raises(ConfigError) as e:
        sampler_from_config({"name": name})
    typed = "".join(f" --set {key}={value}" for key, value in options.items())
    assert f"; did you mean --sampler {sampler}{typed}? " in str(e.value)
    assert repr(options or sampler).strip("{}") in str(e.value)
    made = sampler_from_config({"name": sampler, **options})
    assert {key: getattr(made, key) for key in options} == options


def test_every_scheduler_class_of_diffusers_is_called_what_its_reader_makes() -> None:
    for name in READERS:
        found = elsewhere.meant(name, SAMPLERS)
        assert found == (name_of(sampler_from_diffusers({"_class_name": name})), {}), name


def test_every_entry_leads_to_a_sampler_that_takes_it() -> None:
    for called in (*elsewhere.METHODS, *SAMPLERS):
        for ending in ("", *elsewhere.LEVELS):
            found = elsewhere.meant(called + ending, SAMPLERS)
            if found is not None:
                sampler_from_config({"name": found[0], **found[1]})
    for nearest in elsewhere.ABSENT.values():
        assert nearest in SAMPLERS
    for name in elsewhere.OTHER_LEVELS:
        with pytest.raises(ConfigError, match="sigma_spacing"):
            sampler_from_config({"name": name, "sigma_spacing": "beta"})


def test_a_method_that_is_not_here_is_not_called_another_one() -> None:
    with pytest.raises(ConfigError, match="; it is not here, and dpmpp_2s is the nearest"):
        sampler_from_config({"name": "DPM++ 2S a Karras"})


def test_every_unknown_name_gets_a_guess(sd: StableDiffusion, tmp_path: object) -> None:
    for meant, wrong in (
        ("euler", lambda: sd.steps("a", sampler="eulre")),
        ("spacing", lambda: sampler_from_config({"name": "ddim", "spacin": "leading"})),
        ("leading", lambda: sampler_from_config({"name": "ddim", "spacing": "leadin"})),
        ("comfyui", lambda: conventions.read("comfy-ui")),
        ("karras", lambda: conventions.read("a1111:karas")),
        ("dpm2_ancestral", lambda: conventions.read("a1111").sampler(config.ScheduleConfig(), "dpm2_ancestrl")),
        ("many_keys", lambda: fast.optimize(sd, ("manykeys",))),
        ("latent", lambda: sd.generate("a", output="latents")),
        ("in_channels", lambda: config.from_json(config.UNetConfig, {"in_chanels": 4})),
        ("scaled_linear", lambda: config.from_json(config.ScheduleConfig, {"beta_schedule": "scaled-linear"})),
        ("cosine", lambda: TrainConfig(steps=1, batch=1, curve="cosinus")),
        ("diffusers", lambda: convert("a", "b", to="diffuser")),
        ("float16", lambda: convert("a", "b", dtype="flaot16")),
        ("DDIMScheduler", lambda: sampler_from_diffusers({"_class_name": "DDIMSheduler"})),
    ):
        with pytest.raises((ConfigError, UnsupportedError)) as e:
            wrong()
        assert re.search(rf"; did you mean (--sampler )?{meant}\?", str(e.value)), (meant, str(e.value))
    assert torch.is_grad_enabled()
