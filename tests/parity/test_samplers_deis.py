"""DEIS, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import DEIS, Scheduler
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, COSINE, PREDICTIONS, SIGMAS, SPACINGS
from tests.parity.lambda_twins import chains, refuses_to_step, starts, turn
from tests.parity.sampler_twins import compare, config, label, reference


def deis(**options):
    return config("DEISMultistepScheduler", **options)


ALL = [
    deis(**s, prediction_type=p, solver_order=turn((2, 3, 1, 3), i))
    for i, (s, p) in enumerate(product(SPACINGS, PREDICTIONS))
]
ALL += [
    deis(**g, prediction_type=turn(PREDICTIONS, i), solver_order=n) for i, (g, n) in enumerate(product(SIGMAS, (1, 2)))
]
ALL += [deis(**g, solver_order=n, lower_order_final=False) for g, n in product(SIGMAS, (2, 3))]
ALL += [deis(**g, solver_order=3) for g in SIGMAS]
ALL += [
    deis(**turn(SPACINGS, i), thresholding=True, sample_max_value=1.5, prediction_type=p)
    for i, p in enumerate(PREDICTIONS)
]
ALL += [deis(**g, **COSINE) for g in SIGMAS]
ALL += [deis(**g, sigma_min=0.05, sigma_max=20.0) for g in SIGMAS]
ALL += [deis(trained_betas=BETAS), deis(num_train_timesteps=400), {"_class_name": "DEISMultistepScheduler"}]
ALL += [deis(algorithm_type="dpmsolver++", solver_type="midpoint"), deis(beta_schedule="linear", solver_type="bh2")]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    chains(c)


@pytest.mark.parametrize("c", ALL[::2], ids=label)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", ALL[::6], ids=label)
def test_from_every_row(c):
    starts(c)


def test_many_steps_and_the_row_too_many():
    compare(deis(), 999)
    compare(deis(timestep_spacing="trailing"), 61)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(dtypes):
    for prediction in PREDICTIONS:
        compare(deis(solver_order=3, prediction_type=prediction), 10, dtypes[0], out_dtype=dtypes[1])


def test_where_the_reference_gives_nan():
    """Trap: limits of the reference."""
    c = deis(timestep_spacing="leading", steps_offset=1)
    assert refuses_to_step(c, 999)
    with pytest.raises(ConfigError, match="use fewer steps or steps_offset=0"):
        Scheduler.from_diffusers(c).set_timesteps(999)
    for spacing in SPACINGS[:2]:
        with pytest.raises(ConfigError, match=r"steps=1000 of spacing=.* visit a timestep twice"):
            Scheduler.from_diffusers(deis(**spacing)).set_timesteps(1000)


@pytest.mark.parametrize("options", [{"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "odd"}])
def test_what_neither_can_do(options):
    with pytest.raises(NotImplementedError):
        reference(deis(**options))
    with pytest.raises(ConfigError, match="is none of"):
        Scheduler.from_diffusers(deis(**options))


def test_a_plan_by_name_lands_on_the_smallest_sigma_with_its_last_step():
    """In the reference karras is there before, and the last step does nothing."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    ours, theirs = (DEIS(sigma_spacing="karras", like_diffusers=like).plan(schedule, 10) for like in (False, True))
    assert ours.levels.h[-1] > 0.1 > theirs.levels.h[-1] == 0
    assert torch.allclose(ours.sigmas[-1], theirs.sigmas[-1])
