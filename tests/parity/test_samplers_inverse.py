"""DDIM and DPM-Solver backwards, from a picture to its noise, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import DDIM, DDIMInverse, DPMSolver, DPMSolverInverse, Scheduler
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, COSINE, PREDICTIONS, SIGMAS, SPACINGS
from tests.parity.lambda_twins import chains, refuses_to_step, starts, turn
from tests.parity.sampler_twins import compare, compare_all, compare_starts, config, label, reference
from tests.tolerances import Tolerance, assert_close


def ddim(**options):
    return config("DDIMInverseScheduler", **options)


CLIPS = ({"clip_sample": False}, {}, {"clip_sample_range": 2.5})
DDIMS = [
    ddim(**turn(CLIPS, i), **s, prediction_type=p, set_alpha_to_one=p != "sample" and i % 2 == 0)
    for i, (s, p) in enumerate(product(SPACINGS[1:], PREDICTIONS))
]
DDIMS += [
    ddim(**c, rescale_betas_zero_snr=True, prediction_type="v_prediction", **s)
    for c, s in zip(CLIPS, SPACINGS[1:], strict=True)
]
DDIMS += [ddim(**COSINE), ddim(beta_schedule="linear"), ddim(trained_betas=BETAS), ddim(num_train_timesteps=400)]
DDIMS += [{"_class_name": "DDIMInverseScheduler"}, ddim(set_alpha_to_zero=False)]


@pytest.mark.parametrize("c", DDIMS, ids=label)
def test_ddim_inverse_trajectories(c):
    compare_all(c, (1, 2, 3, 5, 20, 50))


@pytest.mark.parametrize("c", DDIMS[::3], ids=label)
def test_ddim_inverse_from_every_row(c):
    compare_starts(c)


def test_ddim_inverse_of_many_steps_and_the_row_too_many():
    compare(ddim(), 1000)
    compare(ddim(timestep_spacing="trailing"), 61)


def test_where_ddim_inverse_of_the_reference_fails():
    c = ddim(steps_offset=1)
    ref = reference(c)
    ref.set_timesteps(1000)
    with pytest.raises(IndexError):
        ref.step(torch.ones(1), ref.timesteps[-1], torch.ones(1))
    with pytest.raises(ConfigError, match="the model knows 0 to 999"):
        Scheduler.from_diffusers(c).set_timesteps(1000)
    c = ddim(prediction_type="sample", clip_sample=False)
    ref = reference(c)
    ref.set_timesteps(5)
    assert not ref.step(torch.ones(1), ref.timesteps[0], torch.zeros(1)).prev_sample.isfinite()
    with pytest.raises(ConfigError, match="a picture without noise has no epsilon"):
        Scheduler.from_diffusers(c).set_timesteps(5)
    with pytest.raises(ValueError, match="not supported"):
        reference(ddim(timestep_spacing="linspace")).set_timesteps(5)
    with pytest.raises(ConfigError, match="has no timestep_spacing='linspace'"):
        Scheduler.from_diffusers(ddim(timestep_spacing="linspace"))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_takes_back_what_its_inverse_does(spacing):
    """With one and the same epsilon at every step, and by name: there and back again."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    there, back = DDIMInverse(spacing=spacing), DDIM(spacing=spacing)
    plan, plan_back = there.plan(schedule, 7), back.plan(schedule, 7)
    assert plan.timesteps.tolist() == plan_back.timesteps.tolist()[::-1]
    start, epsilon = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x = start
    for i in range(7):
        x, _ = there.step(plan, i, x, epsilon, (), torch.zeros_like)
    for i in range(7):
        x, _ = back.step(plan_back, i, x, epsilon, (), torch.zeros_like)
    assert_close(x, start, Tolerance(2e-5, 0.0, "rounding, divided by sqrt(alpha_bar) as small as 0.07"))


def dpm(**options):
    return config("DPMSolverMultistepInverseScheduler", **options)


SOLVERS = [{"algorithm_type": a, "solver_order": n} for a in ("dpmsolver++", "dpmsolver") for n in (1, 2, 3)]
KINDS = ("midpoint", "heun")
DPMS = [
    dpm(**turn(SPACINGS[:3], i), **a, solver_type=k, prediction_type=turn(PREDICTIONS, i))
    for i, (a, k) in enumerate(product(SOLVERS, KINDS))
]
DPMS += [dpm(**g, prediction_type=p) for g, p in product(SIGMAS[1:], PREDICTIONS)]
DPMS += [dpm(timestep_spacing="trailing", prediction_type=p) for p in PREDICTIONS]
DPMS += [dpm(**e, solver_order=3) for e in ({"lower_order_final": False}, {"euler_at_final": True})]
DPMS += [dpm(**a, thresholding=True, sample_max_value=1.5) for a in SOLVERS[1::3]]
DPMS += [dpm(**COSINE, lambda_min_clipped=-5.1, **s) for s in SPACINGS] + [dpm(**g, **COSINE) for g in SIGMAS]
DPMS += [dpm(**g, sigma_min=0.05, sigma_max=20.0) for g in SIGMAS]
DPMS += [dpm(trained_betas=BETAS), dpm(num_train_timesteps=400), {"_class_name": "DPMSolverMultistepInverseScheduler"}]


@pytest.mark.parametrize("c", DPMS, ids=label)
def test_dpm_inverse_trajectories(c):
    chains(c)


@pytest.mark.parametrize("c", DPMS[:16:2], ids=label)
def test_dpm_inverse_of_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", DPMS[:12:3], ids=label)
def test_dpm_inverse_from_every_row(c):
    starts(c)


def test_dpm_inverse_drops_timesteps_but_not_sigmas_in_the_reference():
    c = dpm(use_karras_sigmas=True)
    compare(c, 50)
    ours = Scheduler.from_diffusers(c)
    ours.set_timesteps(50)
    assert len(ours.timesteps) < 50 == len(ours.sigmas) - 1


def test_where_dpm_inverse_of_the_reference_gives_nan():
    """Trailing rows end at the top, where the last step is to land: h is 0, and heun divides by it."""
    c = dpm(timestep_spacing="trailing", solver_type="heun")
    assert refuses_to_step(c, 20)
    with pytest.raises(ConfigError, match="no finite coefficients of order 2"):
        Scheduler.from_diffusers(c).set_timesteps(20)
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    assert DPMSolverInverse(spacing="trailing", solver_type="heun").plan(schedule, 20).levels.h[-1] < -0.1
    with pytest.raises(ConfigError, match="visit a timestep twice"):
        Scheduler.from_diffusers(dpm()).set_timesteps(1000)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
def test_noise_can_not_be_taken_back(algorithm):
    ref = reference(dpm(algorithm_type=algorithm))
    ref.set_timesteps(5)
    x = torch.ones(1, 4, 2, 2)
    assert not bool(ref.step(x, ref.timesteps[0], x).prev_sample.isfinite().any())
    with pytest.raises(ConfigError, match="it can't be inverted"):
        Scheduler.from_diffusers(dpm(algorithm_type=algorithm))


def test_a_perfect_model_takes_the_picture_to_its_noise_and_back():
    """With one epsilon, from the smallest sigma to the largest, and by name."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    there = DPMSolverInverse(algorithm="dpmsolver", final_sigma="sigma_min", sigma_spacing="karras")
    back = DPMSolver(algorithm="dpmsolver", final_sigma="sigma_min", sigma_spacing="karras")
    start, epsilon = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x = start
    for sampler in (there, back):
        plan, state = sampler.plan(schedule, 7), sampler.start()
        for i in range(7):
            x, state = sampler.step(plan, i, x, epsilon, state, torch.zeros_like)
    assert_close(x, start, Tolerance(2e-5, 0.0, "rounding, divided by sqrt(alpha_bar) as small as 0.07"))
