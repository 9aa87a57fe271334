"""Euler and Euler ancestral, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler
from tests.parity.axes import BETAS, CHURN, ENDS, PREDICTIONS, SIGMAS, SPACINGS
from tests.parity.sampler_twins import SHAPE, compare, compare_all, compare_starts, config, label, reference


def euler(**options):
    return config("EulerDiscreteScheduler", **options)


def ancestral(**options):
    return config("EulerAncestralDiscreteScheduler", **options)


EULER = [euler(**s, **g, prediction_type=p) for s, g, p in product(SPACINGS, SIGMAS, PREDICTIONS)]
EULER += [euler(**g, **ENDS, **c, final_sigmas_type=f) for g, c, f in product(SIGMAS, CHURN, ("zero", "sigma_min"))]
EULER += [
    euler(**g, interpolation_type=i, timestep_type=t, prediction_type=p)
    for g, i, t, p in product(SIGMAS, ("linear", "log_linear"), ("discrete", "continuous"), ("epsilon", "v_prediction"))
]
EULER += [euler(interpolation_type="log_linear", s_churn=3.0, final_sigmas_type="sigma_min")]
EULER += [euler(prediction_type=p, **c, **SPACINGS[1]) for p, c in product(PREDICTIONS, CHURN)]
EULER += [euler(prediction_type="original_sample")]
EULER += [
    euler(rescale_betas_zero_snr=True, **s, prediction_type=p)
    for s, p in product(SPACINGS[1:], ("epsilon", "v_prediction"))
]
EULER += [euler(beta_schedule=b, beta_start=0.0001, beta_end=0.02) for b in ("linear", "squaredcos_cap_v2")]
EULER += [euler(trained_betas=BETAS), euler(num_train_timesteps=400)]

ANCESTRAL = [ancestral(**s, prediction_type=p) for s, p in product(SPACINGS, ("epsilon", "v_prediction"))]
ANCESTRAL += [ancestral(rescale_betas_zero_snr=True, **s, prediction_type="v_prediction") for s in SPACINGS]
ANCESTRAL += [ancestral(beta_schedule=b, beta_start=0.0001, beta_end=0.02) for b in ("linear", "squaredcos_cap_v2")]
ANCESTRAL += [ancestral(trained_betas=BETAS), ancestral(num_train_timesteps=400)]


@pytest.mark.parametrize("c", EULER, ids=label)
def test_euler_trajectories(c):
    compare_all(c)


@pytest.mark.parametrize("c", ANCESTRAL, ids=label)
def test_euler_ancestral_trajectories(c):
    compare_all(c)


@pytest.mark.parametrize("c", EULER[::3], ids=label)
def test_euler_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("c", ANCESTRAL, ids=label)
def test_euler_ancestral_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("c", [*EULER[:12:2], *EULER[48:60:5], *ANCESTRAL[:8:3]], ids=label)
def test_999_steps(c):
    compare(c, 999)


@pytest.mark.parametrize("make", [euler, ancestral])
def test_1000_steps_with_offset_1_works_in_the_reference(make):
    compare(make(timestep_spacing="leading", steps_offset=1), 1000)


@pytest.mark.parametrize("make", [euler, ancestral])
def test_trailing_row_too_many_of_the_reference(make):
    compare(make(timestep_spacing="trailing"), 61)


@pytest.mark.parametrize("make", [euler, ancestral])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(make, dtypes):
    compare(make(prediction_type="v_prediction"), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "leading"}, {"final_sigmas_type": "sigma_min"}])
@pytest.mark.parametrize("timesteps", [[999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500], [998.5, 17.25, 0]])
def test_custom_timesteps(options, timesteps):
    compare(euler(**options), None, timesteps=timesteps)
    compare(euler(**options, interpolation_type="log_linear"), None, timesteps=timesteps)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_karras_sigmas": True}, {"timestep_type": "continuous", "prediction_type": "v_prediction"}],
)
@pytest.mark.parametrize(
    "sigmas",
    [
        [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0],
        [700.0, 80.0, 3.0, 0.01, 0.001],
        list(np.linspace(10, 0.1, 7)),
    ],
)
def test_custom_sigmas(options, sigmas):
    compare(euler(**options), None, sigmas=sigmas)


def test_each_way_of_choosing_excludes_the_others_in_both():
    both = [
        {"num_inference_steps": 5, "timesteps": [5, 1]},
        {"timesteps": [5, 1], "sigmas": [5.0, 1.0]},
        {},
    ]
    for given in both:
        with pytest.raises(ValueError, match=r"[Oo]ne of"):
            reference(euler()).set_timesteps(**given)
        with pytest.raises(ConfigError, match="exactly one of"):
            Scheduler.from_diffusers(euler()).set_timesteps(**given)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_timesteps_with_a_sigma_spacing_raise_in_both(option):
    c = euler(**{option: True})
    with pytest.raises(ValueError, match="Cannot set"):
        reference(c).set_timesteps(timesteps=[900, 3])
    with pytest.raises(ConfigError, match="timesteps can't be given with sigma_spacing"):
        Scheduler.from_diffusers(c).set_timesteps(timesteps=[900, 3])


def test_euler_ancestral_refuses_sample_prediction_as_the_reference_does():
    c = ancestral(prediction_type="sample")
    ref = reference(c)
    ref.set_timesteps(3)
    with pytest.raises(NotImplementedError):
        ref.step(torch.zeros(SHAPE), ref.timesteps[0], torch.zeros(SHAPE))
    with pytest.raises(ConfigError, match="prediction_type='sample'"):
        Scheduler.from_diffusers(c)
