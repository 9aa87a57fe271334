"""Noise schedules against diffusers: tables, noising, velocities and spacings, equal bits."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import schedule_from_diffusers
from minidiff.samplers.betainc import betainc, inverse_betainc
from minidiff.samplers.diffusers.grid import DIFFUSERS
from minidiff.schedule import NoiseSchedule, betas, zero_terminal_snr
from tests.support.parity.axes import BETAS
from tests.tolerances import Tolerance, assert_close

CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
DOMAINS = (
    {},
    {"beta_start": 0.00085, "beta_end": 0.012},
    {"num_train_timesteps": 50},
    {"num_train_timesteps": 4000, "beta_start": 1e-5, "beta_end": 0.005},
)
DDPM = [{"beta_schedule": b, **d} for b in CURVES for d in DOMAINS] + [{"trained_betas": BETAS}]

SCIPY_BETA = Tolerance(1e-12, 0.0, "scipy evaluates the incomplete beta function by other series")


def twins(options):
    c = {"_class_name": "DDPMScheduler", **options}
    return NoiseSchedule.from_config(schedule_from_diffusers(c)), diffusers.DDPMScheduler(**options)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("options", DDPM, ids=str)
def test_tables(options, zero_snr):
    """Trap: numpy or float64 changes more than 94 % of the entries."""
    ours, theirs = twins({**options, "rescale_betas_zero_snr": zero_snr})
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("options", DDPM, ids=str)
def test_betas(options):
    config = schedule_from_diffusers({"_class_name": "DDPMScheduler", **options})
    assert_close(betas(config), diffusers.DDPMScheduler(**options).betas)
    rescaled = diffusers.DDPMScheduler(**options, rescale_betas_zero_snr=True).betas
    assert_close(zero_terminal_snr(betas(config)), rescaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("t", [[0, 999], [500, 500], [981, 1]])
@pytest.mark.parametrize("options", [DDPM[4], DDPM[5], {"rescale_betas_zero_snr": True}], ids=str)
def test_add_noise_and_velocity(options, t, dtype):
    ours, theirs = twins(options)
    x0, noise = torch.randn(2, 2, 4, 3, 5, dtype=dtype)
    index = torch.tensor(t)
    assert_close(ours.add_noise(x0, noise, index), theirs.add_noise(x0, noise, index))
    assert_close(ours.velocity(x0, noise, index), theirs.get_velocity(x0, noise, index))
    assert_close(ours.add_noise(x0, noise, 37), theirs.add_noise(x0, noise, torch.tensor([37])))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("train_steps", [1000, 400, 50])
def test_spacings_for_every_number_of_steps(spacing, train_steps):
    whole = diffusers.DDPMScheduler(
        num_train_timesteps=train_steps, timestep_spacing=spacing, steps_offset=1, beta_end=0.01
    )
    fractions = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=train_steps, timestep_spacing=spacing, steps_offset=1, beta_end=0.01
    )
    for n in range(1, train_steps + 1, 1 if train_steps < 1000 else 7):
        whole.set_timesteps(n)
        ours = DIFFUSERS.spaced(spacing, train_steps, n, 1)
        assert_close(torch.from_numpy(ours), whole.timesteps, where=f"{n} steps")
        fractions.set_timesteps(n)
        ours = DIFFUSERS.spaced(spacing, train_steps, n, 1, dtype=np.float32)
        assert_close(torch.from_numpy(ours), fractions.timesteps, where=f"{n} steps")


def test_betas_of_classes_that_know_fewer_curves():
    for name in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        with pytest.raises(NotImplementedError):
            getattr(diffusers, name)(beta_schedule="laplace")
        with pytest.raises(ConfigError, match="beta_schedule='laplace' is none of linear"):
            schedule_from_diffusers({"_class_name": name, "beta_schedule": "laplace"})


def test_schedule_has_no_zero_snr_where_the_class_has_none():
    c = {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}
    assert schedule_from_diffusers(c) == ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)


@pytest.mark.parametrize("a", [0.1, 0.5, 0.6, 0.7, 1.0, 2.5, 10.0, 100.0])
@pytest.mark.parametrize("b", [0.1, 0.5, 0.6, 0.7, 1.0, 2.5, 10.0, 100.0])
def test_incomplete_beta_function_and_its_inverse(a, b):
    """To 1e-12 of scipy, from one end to the other."""
    p = np.concatenate([np.linspace(0, 1, 501), 10.0 ** -np.arange(3, 13), 1 - 10.0 ** -np.arange(3, 13)])
    where = f"a={a} b={b}"
    ours = torch.from_numpy(inverse_betainc(a, b, p))
    assert_close(ours, torch.from_numpy(scipy.special.betaincinv(a, b, p)), SCIPY_BETA, where)
    assert_close(ours, torch.from_numpy(scipy.stats.beta.ppf(p, a, b)), SCIPY_BETA, where)
    x = p[:501]  # within 1e-5 of 1, scipy's own forward function loses digits: at (0.5, 0.5) it is an arcsine
    assert_close(
        torch.from_numpy(betainc(a, b, x)), torch.from_numpy(scipy.special.betainc(a, b, x)), SCIPY_BETA, where
    )


@pytest.mark.parametrize("n", [1, 2, 3, 20, 50, 999])
def test_beta_spacing_of_the_reference_is_met_exactly_in_float32(n):
    """Levels of Euler: the quantiles of Beta(0.6, 0.6), which end in float32 sigmas."""
    p = 1 - np.linspace(0, 1, n)
    theirs = np.array([scipy.stats.beta.ppf(q, 0.6, 0.6) for q in p])
    low, high = 0.0291675, 14.6146
    ours = low + inverse_betainc(0.6, 0.6, p) * (high - low)
    assert np.array_equal(ours.astype(np.float32), (low + theirs * (high - low)).astype(np.float32))
