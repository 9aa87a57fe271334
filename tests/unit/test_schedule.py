"""The noise schedule: closed forms, spacings, and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers.betainc import betainc, inverse_betainc
from minidiff.samplers.diffusers.grid import DIFFUSERS
from minidiff.schedule import (
    NoiseSchedule,
    epsilon_from_v,
    epsilon_from_x0,
    spaced,
    to_epsilon,
    to_x0,
    v_from_x0,
    x0_from_epsilon,
    x0_from_v,
)
from tests.tolerances import Tolerance, assert_close

ROUNDING = Tolerance(2e-5, 2e-5, "float32 conversions there and back, divided by a small signal or noise")
CLOSED_FORM = Tolerance(1e-14, 1e-13, "the closed form is evaluated by other functions, in float64")

CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def test_fifty_leading_steps_are_980_to_0():
    """Trap: 980 ... 0 or 981 ... 1 or 999 ...; all must be there."""
    assert spaced("leading", 1000, 50).tolist() == list(range(980, -1, -20))
    assert spaced("leading", 1000, 50, 1).tolist() == list(range(981, 0, -20))
    assert spaced("trailing", 1000, 50).tolist() == list(range(999, 18, -20))
    ends = spaced("linspace", 1000, 50)
    assert (ends[0], ends[1], ends[-1]) == (999, 979, 0)
    assert ends.dtype == np.int64


def test_fractional_spacing_is_float32_and_unrounded():
    t = spaced("linspace", 1000, 50, dtype=np.float32)
    assert t.dtype == np.float32
    assert t[1] == np.float32(999 - 999 / 49)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_gives_that_many_falling_rows(spacing):
    for n in range(1, 1001):
        t = spaced(spacing, 1000, n)
        assert len(t) == n
        assert (np.diff(t) < 0).all()
        assert 0 <= t[-1] <= t[0] <= 999


def test_slips_of_the_reference_are_repeated_only_on_request():
    assert spaced("linspace", 1000, 1).tolist() == [999]
    assert DIFFUSERS.spaced("linspace", 1000, 1, 0).tolist() == [0]
    assert len(spaced("trailing", 1000, 61)) == 61
    assert DIFFUSERS.spaced("trailing", 1000, 61, 0)[-2:].tolist() == [15, -1]


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "5", True, None])
def test_bad_numbers_of_steps(steps):
    with pytest.raises(ConfigError, match=f"steps={steps!r} must"):
        spaced("leading", 1000, steps)


def test_a_timestep_may_add_no_noise_at_all_or_nothing_else():
    table = NoiseSchedule.from_config(ScheduleConfig(steps=3, betas=(0.0, 0.5, 1.0))).alphas_cumprod
    assert table.tolist() == [1, 0.5, 0]


def test_unknown_spacing():
    with pytest.raises(ConfigError, match="'middle' is none of leading, trailing, linspace"):
        spaced("middle", 1000, 5)


@pytest.mark.parametrize("curve", CURVES)
def test_alpha_bar_falls_within_0_and_1(curve):
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule=curve))
    a = schedule.alphas_cumprod
    assert len(schedule) == len(a) == 1000
    assert a.dtype == torch.float32
    assert bool((a[1:] < a[:-1]).all())
    assert 0 < a[-1] < a[0] < 1


def test_stable_diffusions_largest_sigma_is_14_6146():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    assert f"{schedule.sigmas[-1]:.4f}" == "14.6146"


def test_table_is_float32_arithmetic():
    """Trap: the schedule in numpy or float64; most entries differ."""
    ours = NoiseSchedule.from_config(ScheduleConfig()).alphas_cumprod
    wide = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype(np.float32)
    assert (ours.numpy() != wide).mean() > 0.9


def test_default_device_and_dtype_do_not_matter():
    want = NoiseSchedule.from_config(ScheduleConfig()).alphas_cumprod
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            for curve in CURVES:
                NoiseSchedule.from_config(ScheduleConfig(beta_schedule=curve))
            assert_close(NoiseSchedule.from_config(ScheduleConfig()).alphas_cumprod, want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("curve", CURVES)
def test_zero_snr_ends_in_pure_noise_and_keeps_the_first_entry(curve):
    plain = NoiseSchedule.from_config(ScheduleConfig(beta_schedule=curve)).alphas_cumprod
    zero = NoiseSchedule.from_config(ScheduleConfig(beta_schedule=curve, zero_snr=True)).alphas_cumprod
    assert zero[-1] == 0
    assert abs(float(zero[0] - plain[0])) < 1e-6
    assert bool((zero[1:] < zero[:-1]).all())


def test_given_betas():
    schedule = NoiseSchedule.from_config(ScheduleConfig(betas=(0.1, 0.5), steps=2))
    assert_close(schedule.alphas_cumprod, torch.tensor([1 - 0.1, 1.0]) * torch.tensor([1, 0.5 * (1 - 0.1)]))


def test_refusals():
    with pytest.raises(ConfigError, match=r"0\.\.1|0 to 1"):
        NoiseSchedule.from_config(ScheduleConfig(betas=(0.1, 1.5), steps=2))
    with pytest.raises(ConfigError, match="float64"):
        NoiseSchedule(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"shape \(1, 3\)"):
        NoiseSchedule(torch.ones(1, 3))
    with pytest.raises(ConfigError, match="'flow' is none of"):
        NoiseSchedule(torch.ones(3), "flow")
    with pytest.raises(ConfigError, match="zero_snr"):
        NoiseSchedule.from_config(ScheduleConfig(steps=1, zero_snr=True))


@pytest.mark.parametrize("alpha_bar", [0.999, 0.5, 0.005])
def test_conversions_agree_and_come_back(alpha_bar):
    signal, noise = torch.tensor(alpha_bar) ** 0.5, (1 - torch.tensor(alpha_bar)) ** 0.5
    x0, epsilon = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x = signal * x0 + noise * epsilon
    v = v_from_x0(x0, epsilon, signal, noise)
    bound = Tolerance(ROUNDING.absolute / float(signal * noise), 0.0, ROUNDING.cause)
    for ours in (x0_from_epsilon(x, epsilon, signal, noise), x0_from_v(x, v, signal, noise)):
        assert_close(ours, x0, bound)
    for ours in (epsilon_from_x0(x, x0, signal, noise), epsilon_from_v(x, v, signal, noise)):
        assert_close(ours, epsilon, bound)
    for prediction, out in (("epsilon", epsilon), ("v_prediction", v), ("sample", x0)):
        assert_close(to_x0(prediction, x, out, signal, noise), x0, bound)
        assert_close(to_epsilon(prediction, x, out, signal, noise), epsilon, bound)


def test_add_noise_and_velocity_are_the_definitions():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    a = schedule.alphas_cumprod[t].reshape(3, 1, 1, 1)
    assert_close(schedule.add_noise(x0, noise, t), a**0.5 * x0 + (1 - a) ** 0.5 * noise)
    assert_close(schedule.velocity(x0, noise, t), a**0.5 * noise - (1 - a) ** 0.5 * x0)
    assert_close(schedule.add_noise(x0, noise, 500), schedule.add_noise(x0, noise, torch.tensor(500)))
    assert_close(schedule.add_noise(x0, noise, 500)[1], schedule.add_noise(x0, noise, t)[1])


def test_incomplete_beta_function_in_closed_form():
    """Scipy is not needed for these: Beta(1, b), Beta(a, 1) and the arcsine law Beta(0.5, 0.5)."""
    x = np.linspace(0, 1, 101)
    for k in (0.3, 1.0, 4.0):
        assert_close(torch.from_numpy(betainc(k, 1, x)), torch.from_numpy(x**k), CLOSED_FORM)
        assert_close(torch.from_numpy(betainc(1, k, x)), torch.from_numpy(1 - (1 - x) ** k), CLOSED_FORM)
    arcsine = torch.from_numpy(np.sin(math.pi / 2 * x) ** 2)
    assert_close(torch.from_numpy(inverse_betainc(0.5, 0.5, x)), arcsine, CLOSED_FORM)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.2, 3.0), (5.0, 0.4), (40.0, 60.0)])
def test_inverse_undoes_the_incomplete_beta_function(a, b):
    p = np.linspace(0, 1, 201)
    x = inverse_betainc(a, b, p)
    assert x[0] == 0
    assert x[-1] == 1
    assert (np.diff(x) > 0).all()
    bound = Tolerance(1e-13, 0, "one rounding of x is worth this much where the density is high")
    assert_close(torch.from_numpy(betainc(a, b, x[5:-5])), torch.from_numpy(p[5:-5]), bound)
