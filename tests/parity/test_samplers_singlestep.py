"""DPM-Solver, singlestep, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import DPMSolverSinglestep, Scheduler
from minidiff.samplers.method import rates
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, COSINE, PREDICTIONS, SIGMAS, TO_MIN
from tests.parity.lambda_twins import chains, refuses_to_step, starts, turn
from tests.parity.sampler_twins import compare, config, label, reference

SOLVERS = [
    *({"algorithm_type": a, "solver_order": n} for a in ("dpmsolver++", "sde-dpmsolver++") for n in (1, 2, 3)),
    *({"algorithm_type": "dpmsolver", "solver_order": n, **TO_MIN} for n in (1, 2, 3)),
]
ENDS = ({}, {"lower_order_final": True}, TO_MIN, {**TO_MIN, "lower_order_final": True})


def single(**options):
    return config("DPMSolverSinglestepScheduler", **options)


ALL = [
    single(**s, solver_type=k, prediction_type=turn(PREDICTIONS, i))
    for i, (s, k) in enumerate(product(SOLVERS, ("midpoint", "heun")))
]
ALL += [single(**{**turn(SOLVERS, i), **e}) for i, (e, g) in enumerate(product(ENDS[1:], SIGMAS[:3]))]
ALL += [
    single(**turn(SOLVERS, 2 * i + 1), **g, prediction_type=p) for i, (g, p) in enumerate(product(SIGMAS, PREDICTIONS))
]
ALL += [single(**s, thresholding=True, sample_max_value=1.5) for s in SOLVERS[:6:2]]
ALL += [single(**COSINE, lambda_min_clipped=-5.1), single(**COSINE, **SIGMAS[1]), single(lambda_min_clipped=-2.0)]
ALL += [single(**g, sigma_min=0.05, sigma_max=20.0) for g in SIGMAS[1:]]
ALL += [single(trained_betas=BETAS), single(num_train_timesteps=400), {"_class_name": "DPMSolverSinglestepScheduler"}]
ALL += [single(algorithm_type="deis", solver_type="bh1", **TO_MIN), single(beta_schedule="linear", solver_order=3)]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    chains(c, (1, 2, 3, 4, 5, 6, 20))


@pytest.mark.parametrize("c", ALL[::2], ids=label)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", ALL[::6], ids=label)
def test_from_every_row(c):
    starts(c)


@pytest.mark.parametrize("timesteps", [[999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500], [998, 17, 0]], ids=len)
def test_custom_timesteps(timesteps):
    for options in ({}, {"solver_order": 3}):
        compare(single(**options), None, timesteps=timesteps)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(dtypes):
    for prediction, order in zip(PREDICTIONS, (3, 2, 3), strict=True):
        compare(single(solver_order=order, prediction_type=prediction), 10, dtypes[0], out_dtype=dtypes[1])


def test_learned_variance_is_left_out():
    compare(single(variance_type="learned_range"), 7, shape=(2, 3, 4, 5))


def test_where_the_reference_fails():
    """Trap: limits of the reference."""
    with pytest.raises(ConfigError, match="steps=1000 of spacing='linspace' visit a timestep twice"):
        Scheduler.from_diffusers(single()).set_timesteps(1000)
    c = single(algorithm_type="dpmsolver", thresholding=True, **TO_MIN)
    with pytest.raises(RuntimeError):
        refuses_to_step(c, 5)
    with pytest.raises(ConfigError, match="thresholding raises with algorithm_type='dpmsolver'"):
        Scheduler.from_diffusers(c)
    for options in ({"algorithm_type": "sde-dpmsolver", **TO_MIN}, {"algorithm_type": "dpmsolver"}):
        with pytest.raises((NotImplementedError, ValueError)):
            reference(single(**options))
        with pytest.raises(ConfigError):
            Scheduler.from_diffusers(single(**options))


def test_third_order_sde_has_the_right_sign_unless_like_diffusers():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    options = {"algorithm": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}
    ours, theirs = (DPMSolverSinglestep(**options, like_diffusers=like).plan(schedule, 31) for like in (False, True))
    third = [i for i, order in enumerate(ours.rows.order) if order == 3]
    assert torch.allclose((ours.rows.d2 - theirs.rows.d2)[third, 2], rates(ours.levels.to)[0][third])
    assert bool((ours.rows.d2[third, 2] > 0).all())
