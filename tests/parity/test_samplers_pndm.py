"""PNDM, with and without its Runge-Kutta warm-up, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler
from tests.parity.axes import BETAS
from tests.parity.sampler_twins import SHAPE, compare, compare_all, compare_starts, config, label, reference

SPACINGS = (
    {},
    {"steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
CONFIGS = [
    config("PNDMScheduler", skip_prk_steps=skip, **s, set_alpha_to_one=one, prediction_type=p)
    for skip, s, one, p in product((True, False), SPACINGS, (True, False), ("epsilon", "v_prediction"))
]
CONFIGS += [
    config("PNDMScheduler", skip_prk_steps=skip, **b)
    for skip, b in product(
        (True, False),
        (
            {"beta_schedule": "linear", "beta_end": 0.02},
            {"beta_schedule": "squaredcos_cap_v2"},
            {"trained_betas": BETAS},
            {"num_train_timesteps": 400},
        ),
    )
]


@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_trajectories(c):
    compare_all(c, (1, 2, 3, 5, 20, 50) if c["skip_prk_steps"] else (4, 5, 7, 20, 30, 50))


@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("c", [c for c in CONFIGS if "num_train_timesteps" not in c][::3], ids=label)
def test_999_steps(c):
    compare(c, 999)


@pytest.mark.parametrize("skip", [True, False])
def test_trailing_row_too_many_of_the_reference(skip):
    compare(config("PNDMScheduler", timestep_spacing="trailing", skip_prk_steps=skip), 61)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_warm_up_with_fewer_than_4_steps_raises_in_both(n):
    with pytest.raises(ValueError, match="broadcast"):
        reference(config("PNDMScheduler")).set_timesteps(n)
    with pytest.raises(ConfigError, match=f"steps={n}: PNDM's Runge-Kutta warm-up needs at least 4"):
        Scheduler.from_diffusers(config("PNDMScheduler")).set_timesteps(n)


def test_1000_steps_with_offset_1():
    c = config("PNDMScheduler", steps_offset=1, skip_prk_steps=True)
    ref = reference(c)
    ref.set_timesteps(1000)
    x = torch.zeros(SHAPE)
    with pytest.raises(IndexError):
        ref.step(x, ref.timesteps[0], x)
    with pytest.raises(ConfigError, match="run from 1000 to 1"):
        Scheduler.from_diffusers(c).set_timesteps(1000)


def test_prediction_sample_raises_in_both():
    c = config("PNDMScheduler", prediction_type="sample")
    ref = reference(c)
    ref.set_timesteps(5)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="prediction_type"):
        ref.step(x, ref.timesteps[0], x)
    with pytest.raises(ConfigError, match="prediction_type='sample' is none of epsilon, v_prediction"):
        Scheduler.from_diffusers(c)
