"""Samplers against k-diffusion, whose trajectories stand in tests/fixtures/k_diffusion.safetensors, in float64.

Each run is repeated in float32 from the same first sample, with the same sigmas and noises and the same formula for a
denoiser, and held to the recording before every step and at the end. The methods in lambda keep x at unit variance
where k-diffusion keeps the picture at its own scale: x is multiplied by signal there. ``scripts/record_k_diffusion.py``
writes the recording; neither k-diffusion nor diffusers is needed here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minidiff.config import ScheduleConfig
from minidiff.programs import read
from minidiff.programs.profiles import PROFILES
from minidiff.samplers import SAMPLERS, Scheduler, name_of, sampler_to_config
from minidiff.samplers.arithmetic import rates
from minidiff.schedule import NoiseSchedule
from tests.tolerances import K_DIFFUSION, K_DIFFUSION_PROFILE, assert_close

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "k_diffusion.safetensors"
SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
MULTISTEP = {"lower_order_final": False}

SAME = {
    "euler": SAMPLERS["euler"](),
    "euler_exponential": SAMPLERS["euler"](),
    "euler_ancestral": SAMPLERS["euler_ancestral"](),
    "heun": SAMPLERS["heun"](),
    "dpm2": SAMPLERS["dpm2"](),
    "dpm2_ancestral": SAMPLERS["dpm2_ancestral"](),
    "lms": SAMPLERS["lms"](),
    "lms_order_3": SAMPLERS["lms"](solver_order=3),
    "dpmpp_2m": SAMPLERS["dpmpp_2m"](**MULTISTEP),
    "dpmpp_2m_exponential": SAMPLERS["dpmpp_2m"](**MULTISTEP),
    "dpmpp_2s": SAMPLERS["dpmpp_2s"](),
    "dpmpp_sde": SAMPLERS["dpmpp_sde"](),
    "dpmpp_2m_sde": SAMPLERS["dpmpp_2m_sde"](**MULTISTEP),
    "dpmpp_2m_sde_heun": SAMPLERS["dpmpp_2m_sde"](**MULTISTEP, solver_type="heun"),
    "dpmpp_3m_sde": SAMPLERS["dpmpp_3m_sde"](**MULTISTEP, solver_type="heun"),
}


def load():
    with safe_open(FIXTURE, "pt") as file:
        return json.loads(file.metadata()["facts"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


FACTS, TENSORS = load()


def denoise(x, sigma):
    """x0 at the picture's scale, by the recording's formula."""
    low, high = FACTS["denoiser"]["means"]
    spread = FACTS["denoiser"]["spread"]
    variance = spread**2 + sigma**2
    mean = low + (high - low) * torch.sigmoid((high - low) * (x - (high + low) / 2) / variance)
    return mean + spread**2 / variance * (x - mean)


def with_middles(sigmas):
    """With the geometric means, at which the singlestep method of order 2 asks the model."""
    found = [float(sigmas[0])]
    for a, b in pairwise(sigmas.tolist()):
        found += [(a * b) ** 0.5, b] if b else [b]
    return found


def gap(name, sampler, change=lambda plan: plan, steps=None):
    """(steps + 1, ...): what minidiff's samples are, at the picture's scale, and the recording's; float64 both."""
    sigmas, wanted = TENSORS[f"{name}.sigmas"], TENSORS[f"{name}.samples"]
    noises = iter(TENSORS.get(f"{name}.noises", ()))
    singlestep = name_of(sampler) == "dpmpp_2s"
    given = {"sigmas": with_middles(sigmas) if singlestep else sigmas.tolist()}
    plan = change(sampler.plan(SCHEDULE, steps) if steps else sampler.plan(SCHEDULE, **given))
    sampler = getattr(sampler, "inner", sampler)  # a program plans, and this takes the steps
    in_lambda = plan.space == "lambda"

    def draw(like):
        return next(noises, torch.zeros_like(like)).to(like.dtype)  # the last step to 0 draws for nothing

    x = wanted[0].float() * (plan.signal[0] if in_lambda else 1)
    found, state = [], sampler.start()
    levels = plan.columns()["sigma"]
    for i, sigma in enumerate(levels):
        scale = plan.signal[i] if in_lambda else 1
        if i % (2 if singlestep else sampler.order) == 0:
            found.append(x / scale)
        out = (x / scale - denoise(x / scale, sigma)) / sigma
        x, state = sampler.step(plan, i, x, out, state, draw)
    assert next(noises, None) is None, "fewer noises than k-diffusion asked for"
    return torch.stack([*found, x]).double(), wanted


@pytest.mark.parametrize("name", SAME)
def test_every_step_is_that_of_k_diffusion(name):
    found, wanted = gap(name, SAME[name])
    assert_close(found, wanted, K_DIFFUSION, name)


@pytest.mark.parametrize("name", [name for name in SAME if name_of(SAME[name]) in PROFILES["k-diffusion"].methods])
def test_under_the_profile_of_k_diffusion(name):
    """like="k-diffusion" finds the very sigmas by itself, from Stable Diffusion's table, and makes the same steps."""
    run, method = FACTS["runs"][name], name_of(SAME[name])
    plain = sampler_to_config(SAMPLERS[method]())
    chosen = {key: value for key, value in sampler_to_config(SAME[name]).items() if value != plain[key]}
    program = read(f"k-diffusion:{run['spacing']}").sampler(ScheduleConfig(), {"name": method, **chosen})
    found, wanted = gap(name, program, steps=run["steps"])
    assert_close(found, wanted, K_DIFFUSION_PROFILE, name)


def test_every_recording_is_used():
    assert sorted(SAME) == sorted(FACTS["runs"])
    assert FACTS["k-diffusion"] == "0.1.1.post1"
    for name, run in FACTS["runs"].items():
        assert len(TENSORS[f"{name}.samples"]) == run["steps"] + 1
        assert float(TENSORS[f"{name}.samples"].std(dim=(1, 2, 3, 4))[0]) > 10


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dpmpp_2m_sde", SAME["dpmpp_2m_sde_heun"]),
        ("dpmpp_2m", SAMPLERS["dpmpp_2m"](**MULTISTEP, solver_order=3)),
        ("lms", SAME["lms_order_3"]),
    ],
)
def test_another_method_is_far_outside_the_bound(name, wrong):
    found, wanted = gap(name, wrong)
    assert float((found - wanted).abs().max()) > 100 * K_DIFFUSION.absolute


def less_signal(plan):
    """``plan`` with D2 multiplied by the signal of the landing less."""
    signal, _ = rates(plan.levels.to)
    return replace(plan, rows=plan.rows._replace(d2=plan.rows.d2 - signal))


def test_the_sign_of_diffusers_third_order_term_is_not_that_of_k_diffusion():
    """In sde-dpmsolver++ of diffusers 0.42.1 (like_diffusers) D2 is multiplied by signal less."""
    name = "dpmpp_3m_sde"
    found, wanted = gap(name, SAME[name], less_signal)
    assert float((found - wanted).abs().max()) > 100 * K_DIFFUSION.absolute


def test_by_name_karras_and_exponential_are_spaced_as_in_k_diffusion():
    low, high = 0.0291675, 14.614642
    for name, spacing in (("dpmpp_2m", "karras"), ("dpmpp_2m_exponential", "exponential")):
        wanted = TENSORS[f"{name}.sigmas"]
        sampler = SAMPLERS["dpmpp_2m"](sigma_spacing=spacing, sigma_min=low, sigma_max=high)
        ours = Scheduler(sampler, SCHEDULE)
        ours.set_timesteps(len(wanted) - 1)
        assert_close(ours.sigmas.double(), wanted, K_DIFFUSION, name)
