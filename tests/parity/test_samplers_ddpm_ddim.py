"""DDPM and DDIM, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler, sampler_from_diffusers, schedule_from_diffusers
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, PREDICTIONS
from tests.parity.axes import SPACINGS_FROM_LEADING as SPACINGS
from tests.parity.sampler_twins import SHAPE, compare, compare_all, compare_starts, config, label, reference

LIMITS = (
    {"clip_sample": False},
    {"clip_sample_range": 2.5},
    {"thresholding": True},
    {"thresholding": True, "clip_sample": False, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
)
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

DDPM = [
    config("DDPMScheduler", prediction_type=p, variance_type=v)
    for p, v in product(PREDICTIONS, ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"))
]
DDPM += [config("DDPMScheduler", **s, **lim, prediction_type=p) for s, lim, p in product(SPACINGS, LIMITS, PREDICTIONS)]
DDPM += [config("DDPMScheduler", **ZERO_SNR, prediction_type=p, clip_sample=False) for p in PREDICTIONS[1:]]
DDPM += [config("DDPMScheduler", **ZERO_SNR)]  # an epsilon model, saved by the clamp
DDPM += [
    config("DDPMScheduler", beta_schedule=b, beta_start=0.0001, beta_end=0.02)
    for b in ("linear", "squaredcos_cap_v2", "sigmoid", "laplace")
]
DDPM += [config("DDPMScheduler", trained_betas=BETAS), config("DDPMScheduler", num_train_timesteps=400)]

DDIM = [
    config("DDIMScheduler", **lim, prediction_type=p, eta=eta, use_clipped_model_output=clipped)
    for lim, p, eta, clipped in product(LIMITS, PREDICTIONS, (0.0, 0.7), (False, True))
]
DDIM += [
    config("DDIMScheduler", **s, set_alpha_to_one=one, prediction_type=p, clip_sample=False, eta=0.3)
    for s, one, p in product(SPACINGS, (True, False), PREDICTIONS)
]
DDIM += [config("DDIMScheduler", **ZERO_SNR, prediction_type=p, clip_sample=False) for p in PREDICTIONS[1:]]
DDIM += [config("DDIMScheduler", eta=1.0), config("DDIMScheduler", eta=1.0, steps_offset=1)]
DDIM += [config("DDIMScheduler", **ZERO_SNR, prediction_type="v_prediction", eta=0.5, clip_sample=False)]
DDIM += [config("DDIMScheduler", **ZERO_SNR)]
DDIM += [
    config("DDIMScheduler", beta_schedule=b, beta_start=0.0001, beta_end=0.02) for b in ("linear", "squaredcos_cap_v2")
]
DDIM += [config("DDIMScheduler", trained_betas=BETAS), config("DDIMScheduler", num_train_timesteps=400)]


@pytest.mark.parametrize("c", DDPM, ids=label)
def test_ddpm_trajectories(c):
    compare_all(c)


@pytest.mark.parametrize("c", DDIM, ids=label)
def test_ddim_trajectories(c):
    compare_all(c)


@pytest.mark.parametrize("c", DDPM[::4], ids=label)
def test_ddpm_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("c", DDIM[::4], ids=label)
def test_ddim_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("c", [*DDPM[:2], DDPM[15], *DDIM[2:4], *DDIM[50:56:2]], ids=label)
def test_999_steps(c):
    compare(c, 999)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_1000_steps_without_offset(name):
    compare(config(name), 1000)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(name, dtypes):
    compare(config(name, prediction_type="v_prediction"), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("n", [61, 103, 997])
def test_trailing_row_too_many_of_the_reference(name, n):
    """For 62 step counts the reference's trailing spacing has one more row, at timestep -1; 997 is a plain one."""
    compare(config(name, timestep_spacing="trailing"), n)


@pytest.mark.parametrize("timesteps", [[999, 700, 333, 20, 0], [500], [981, 980, 3, 1], list(range(999, -1, -37))])
def test_custom_timesteps(timesteps):
    compare(config("DDPMScheduler", clip_sample=False), None, timesteps=timesteps)


def test_fixed_large_log_is_nan_in_the_reference_and_refused():
    c = config("DDPMScheduler", variance_type="fixed_large_log")
    ref = reference(c)
    ref.set_timesteps(5)
    x = torch.zeros(SHAPE)
    assert ref.step(x, ref.timesteps[0], x).prev_sample.isnan().any()
    with pytest.raises(ConfigError, match="use fixed_large"):
        sampler_from_diffusers(c)


def test_ddim_where_rounding_makes_the_reference_nan():
    """eta 1 at zero terminal SNR: 1 - alpha_bar_prev - std**2 is 0 but for rounding."""
    c = config("DDIMScheduler", **ZERO_SNR, prediction_type="v_prediction", clip_sample=False, eta=1.0)
    ref = reference(c)
    ref.set_timesteps(50)
    x = torch.zeros(SHAPE)
    assert ref.step(x, ref.timesteps[0], x, eta=1.0).prev_sample.isnan().any()
    schedule = NoiseSchedule.from_config(schedule_from_diffusers(c))
    with pytest.raises(ConfigError, match="rows \\[0\\]"):
        sampler_from_diffusers(c).plan(schedule, 50)
    compare(c, 20)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_epsilon_at_zero_terminal_snr_is_not_finite_in_the_reference_and_refused(name):
    c = config(name, **ZERO_SNR, clip_sample=False)
    ref = reference(c)
    ref.set_timesteps(5)
    x = torch.ones(SHAPE)
    assert not ref.step(x, ref.timesteps[0], x).prev_sample.isfinite().all()
    with pytest.raises(ConfigError, match="zero_snr"):
        Scheduler.from_diffusers(c).set_timesteps(5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_pure_noise_in_the_last_row_is_refused_before_the_first_call(name):
    """61 steps of trailing spacing end with a row too many, at timestep -1, which reads the table's last alpha_bar: 0.
    x is a picture by then, clamped to whole values, and where the model answers the same, x0 is 0 / 0."""
    c = config(name, **ZERO_SNR)
    ref = reference(c)
    ref.set_timesteps(61)
    x = torch.ones(SHAPE, dtype=torch.bfloat16)
    assert ref.timesteps[-1] == -1
    assert ref.step(x, ref.timesteps[-1], x).prev_sample.isnan().all()
    with pytest.raises(ConfigError, match=r"x0 is not finite at row 61, timestep -1, .*or another number of steps"):
        Scheduler.from_diffusers(c).set_timesteps(61)
    compare(c, 60)
    compare({**c, "prediction_type": "v_prediction"}, 61)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler"])
def test_an_answer_that_equals_pure_noise_is_an_error_and_not_nan(name):
    c = config(name, **ZERO_SNR, clip_sample=True)
    ref, ours = reference(c), Scheduler.from_diffusers(c)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    out = -x
    out[0, 0, 0, 0] = x[0, 0, 0, 0]
    for s in (ref, ours):
        s.set_timesteps(5)
    t = ref.timesteps[0]
    assert ref.step(out, t, x).prev_sample.isnan().sum() == 1
    with pytest.raises(ConfigError, match=r"x0 is 0 / 0 where the model's answer equals x, .*use a v_prediction model"):
        ours.step(out, t, x)
    assert ours.step(-x, t, x).isfinite().all()


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_1000_steps_with_offset_1(name):
    """DF #10003: index 1000 does not exist."""
    ref = reference(config(name, steps_offset=1))
    ref.set_timesteps(1000)
    x = torch.zeros(SHAPE)
    with pytest.raises(IndexError):
        ref.step(x, ref.timesteps[0], x)
    with pytest.raises(ConfigError, match="run from 1000 to 1, the model knows 0 to 999; use fewer steps"):
        Scheduler.from_diffusers(config(name, steps_offset=1)).set_timesteps(1000)
