"""Finite samples from every run that a sampler accepts; what it can't do is refused by the plan."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import SAMPLERS
from minidiff.schedule import NoiseSchedule

TRAINING = 100
SLIPS = 31  # trailing spacing of the reference has a row too many
AXES = {
    "spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0, 1),
    "sigma_spacing": ("timesteps", "karras"),
    "clip": (None, 1.0),
    "like_diffusers": (False, True),
}


def schedules():
    for prediction, zero in product(("epsilon", "v_prediction", "sample"), (False, True)):
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0085, "beta_end": 0.12}
        yield NoiseSchedule.from_config(
            ScheduleConfig(**betas, steps=TRAINING, zero_snr=zero, prediction=prediction)  # type: ignore[arg-type]
        )


def samplers(name):
    known = {f.name for f in dataclasses.fields(SAMPLERS[name])}
    axes = {k: v for k, v in AXES.items() if k in known}
    if name.startswith("edm"):
        axes["sigma_spacing"] = ("karras", "exponential")
    for values in product(*axes.values()):
        try:
            yield SAMPLERS[name](**dict(zip(axes, values, strict=True)))
        except ConfigError:
            continue


def walk(sampler, plan, dtype):
    """The first row that gives something infinite or NaN without a word, of a model whose answer is the sample here and
    something else there."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 4, 2, 2, generator=g) * plan.init_noise_sigma).to(dtype)
    same = torch.arange(4).reshape(1, 1, 2, 2) == 0
    state = sampler.start()
    for i in range(len(plan)):
        seen = sampler.scale_input(plan, i, x)
        out = torch.where(same, seen, torch.randn(x.shape, generator=g)).to(dtype)
        try:
            x, state = sampler.step(plan, i, x, out, state, torch.ones_like)
        except ConfigError:
            return None
        if not x.isfinite().all():
            return i
    return None


def lengths(k, sampler, schedule):
    """A few numbers of steps: all that are known to be delicate, and the others by turns."""
    yield (1, 2, 5, 12)[k % 4]
    if schedule.prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        yield SLIPS
    beyond = getattr(sampler, "steps_offset", 0) and sampler.spacing == "leading" and sampler.like_diffusers
    if beyond and k % 6 == 0:
        yield TRAINING


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_can_be_planned_stays_finite(name):
    walked = 0
    for k, (sampler, schedule) in enumerate(product(samplers(name), schedules())):
        for n in lengths(k, sampler, schedule):
            try:
                plan = sampler.plan(schedule, n)
            except ConfigError:
                continue
            dtype = (torch.bfloat16, torch.float32)[(k + n) % 2]
            bad = walk(sampler, plan, dtype)
            assert bad is None, f"{sampler!r} of {n} steps, {schedule.prediction}, {dtype}: row {bad}"
            walked += 1
    assert walked >= 10
