"""SA-Solver, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler
from tests.parity.axes import BETAS, COSINE, PREDICTIONS, SIGMAS, SPACINGS
from tests.parity.lambda_twins import chains, refuses_to_step, starts, turn
from tests.parity.sampler_twins import compare, config, label, reference

NOISE = {"algorithm_type": "noise_prediction"}
ORDERS = [
    {"predictor_order": p, "corrector_order": c} for p, c in ((2, 2), (1, 1), (3, 3), (4, 4), (1, 3), (3, 1), (2, 4))
]


def sa(**options):
    return config("SASolverScheduler", **options)


ALL = [sa(**o, prediction_type=turn(PREDICTIONS, i), **turn(SPACINGS, i)) for i, o in enumerate(ORDERS)]
ALL += [sa(**o, **NOISE, prediction_type=turn(PREDICTIONS, i)) for i, o in enumerate(ORDERS)]
ALL += [sa(**g, prediction_type=p, **turn(ORDERS[:3], i)) for i, (g, p) in enumerate(product(SIGMAS, PREDICTIONS))]
ALL += [sa(**turn(ORDERS, i), lower_order_final=False, **s) for i, s in enumerate(SPACINGS)]
ALL += [sa(**s, thresholding=True, sample_max_value=1.5) for s in SPACINGS[:2]]
ALL += [sa(**COSINE, lambda_min_clipped=-5.1), sa(**COSINE, **SIGMAS[1]), sa(lambda_min_clipped=-2.0)]
ALL += [sa(**g, sigma_min=0.05, sigma_max=20.0) for g in SIGMAS[1:]]
ALL += [sa(trained_betas=BETAS), sa(num_train_timesteps=400), {"_class_name": "SASolverScheduler"}]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    chains(c)


@pytest.mark.parametrize("c", ALL[::3], ids=label)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", ALL[::8], ids=label)
def test_from_every_row(c):
    starts(c)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)])
def test_sample_and_model_of_different_dtypes(dtypes):
    for prediction in PREDICTIONS[:2]:
        compare(sa(prediction_type=prediction), 10, dtypes[0], out_dtype=dtypes[1])


def test_many_steps_and_the_row_too_many():
    compare(sa(), 999)
    compare(sa(timestep_spacing="trailing"), 61)


def test_where_the_reference_fails():
    """Trap: limits of the reference."""
    with pytest.raises(ConfigError, match="steps=1000 of spacing='linspace' visit a timestep twice"):
        Scheduler.from_diffusers(sa()).set_timesteps(1000)
    c = sa(timestep_spacing="leading", steps_offset=1)
    assert refuses_to_step(c, 999)
    with pytest.raises(ConfigError, match="use fewer steps or steps_offset=0"):
        Scheduler.from_diffusers(c).set_timesteps(999)
    with pytest.raises(RuntimeError):
        refuses_to_step(sa(**NOISE, thresholding=True), 5)
    with pytest.raises(ConfigError, match="thresholding raises with noise_prediction"):
        Scheduler.from_diffusers(sa(**NOISE, thresholding=True))
    c = sa(variance_type="learned")
    ref = reference(c)
    ref.set_timesteps(5)
    with pytest.raises(RuntimeError):
        ref.step(torch.ones(1, 6, 2, 2), ref.timesteps[0], torch.ones(1, 3, 2, 2))
    with pytest.raises(ConfigError, match="a learned variance raises"):
        Scheduler.from_diffusers(c)
    with pytest.raises(NotImplementedError):
        reference(sa(algorithm_type="odd"))
    with pytest.raises(ConfigError, match="algorithm='odd' is none of"):
        Scheduler.from_diffusers(sa(algorithm_type="odd"))
    with pytest.raises(ConfigError, match="a tau_func can't be read from a config"):
        Scheduler.from_diffusers(sa(tau_func=lambda t: 1))
