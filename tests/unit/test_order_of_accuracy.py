"""Order of accuracy: on Gaussian data the error of each sampler falls with its theoretical order.

What is measured, and how, stands in ``gaussian.py``; ``scripts/order_of_accuracy.py`` prints and plots the same.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from minidiff.samplers import SAMPLERS
from tests.support.gaussian import (
    DETERMINISTIC,
    NOT_MEASURED,
    SPREAD,
    STOCHASTIC,
    errors_of,
    measure,
    moments,
    slope_of,
    x0_of,
)

BELOW, ABOVE = 0.35, 0.6  # the last slope, before the limit: less than half of what would be another order


def same_name(run):
    return run.label


@pytest.mark.parametrize("run", DETERMINISTIC, ids=same_name)
def test_the_error_falls_with_the_order(run):
    errors = errors_of(run)
    assert errors == sorted(errors, reverse=True)
    assert run.order - BELOW < slope_of(run, errors) < run.order + ABOVE, errors
    assert measure(run, run.steps[0]).noises == 0 or run.name == "sa_solver"  # which draws noise for tau 0 as well


@pytest.mark.parametrize("run", STOCHASTIC, ids=same_name)
def test_mean_and_deviation_of_a_stochastic_method_fall_with_the_order(run):
    errors = errors_of(run)
    assert errors == sorted(errors, reverse=True)
    assert run.order - BELOW < slope_of(run, errors) < run.order + ABOVE, errors
    assert measure(run, run.steps[0]).noises >= run.steps[0] // 2


def test_every_sampler_is_measured_or_named_with_its_reason():
    measured = {run.name for run in (*DETERMINISTIC, *STOCHASTIC)}
    assert measured | {name for name in NOT_MEASURED if name in SAMPLERS} == set(SAMPLERS)


def changed(plan, **columns):
    """``plan`` with other columns."""
    return replace(plan, rows=plan.rows._replace(**columns))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_the_third_order_multistep_step_lacks_a_factor_of_2(algorithm):
    """Named in dpm_solver.py: k-diffusion and diffusers take the second divided difference for the second
    derivative. With twice that, the method is of order 3."""
    run = next(
        r for r in DETERMINISTIC if r.options.get("solver_order") == 3 and r.options.get("algorithm") == algorithm
    )
    assert run.name == "dpmpp_2m"
    few = replace(run, steps=(8, 16, 24))
    assert 1.6 < slope_of(few, errors_of(few)) < 2.7
    doubled = errors_of(few, lambda plan: changed(plan, inv_r=2 * plan.rows.inv_r))
    assert slope_of(few, doubled) > 2.8
    assert doubled[-1] < errors_of(few)[-1] / 4


def test_the_exact_path_solves_the_equation():
    """d x / d sigma = (x - x0) / sigma, by a difference of the closed form."""
    for sigma in (0.3, 1.0, 4.0):
        at = [moments(1.0, s, SPREAD) for s in (sigma - 1e-4, sigma, sigma + 1e-4)]
        x = [mean + 1.3 * deviation for mean, deviation in at]
        x0 = x0_of(torch.tensor(x[1], dtype=torch.float64), 1.0, sigma, SPREAD)
        assert (x[2] - x[0]) / 2e-4 == pytest.approx((x[1] - float(x0)) / sigma, rel=1e-6)


def test_a_wrong_coefficient_shows():
    """Half the correction of Heun: no longer of order 2. And noise that is too large: a deviation that stays wrong."""
    euler = next(run for run in DETERMINISTIC if run.name == "euler")
    heun = next(run for run in DETERMINISTIC if run.name == "heun")
    bent = errors_of(heun, lambda plan: changed(plan, dt=plan.rows.dt * (1 + 0.2 / len(plan))))
    assert slope_of(heun, bent) < 1.5 < slope_of(heun, errors_of(heun))
    assert math.isclose(
        errors_of(euler)[0], errors_of(replace(euler, name="dpmpp_2m", options={"solver_order": 1}))[0], rel_tol=1e-3
    )
    ancestral = STOCHASTIC[0]
    loud = errors_of(ancestral, lambda plan: changed(plan, sigma_up=plan.rows.sigma_up * 1.2))
    assert slope_of(ancestral, loud) < 0.3
