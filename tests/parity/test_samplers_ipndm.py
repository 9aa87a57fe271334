"""iPNDM, chained against diffusers: equal bits at every step."""

from __future__ import annotations

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import IPNDM, Scheduler
from minidiff.schedule import v_from_x0
from tests.parity.sampler_twins import compare, compare_all, compare_starts, reference
from tests.tolerances import Tolerance, assert_close

CONFIG = {"_class_name": "IPNDMScheduler"}


def test_trajectories():
    compare_all(CONFIG, (1, 2, 3, 4, 5, 20, 50))


@pytest.mark.parametrize("n", [50, 999, 1000])
def test_many_steps(n):
    compare(CONFIG, n)


def test_from_every_row():
    compare_starts(CONFIG)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(dtypes):
    compare(CONFIG, 10, dtypes[0], out_dtype=dtypes[1])


def test_trained_betas_are_refused():
    """In the reference they make as many rows as there are of them, whatever the number of steps."""
    c = {**CONFIG, "trained_betas": [0.9, 0.5, 0.1]}
    ref = reference(c)
    ref.set_timesteps(50)
    assert len(ref.timesteps) == 2
    with pytest.raises(ConfigError, match="trained_betas are the noise of every row"):
        Scheduler.from_diffusers(c)


def test_a_perfect_model_gives_the_picture():
    sampler, plan = IPNDM(), IPNDM().plan(None, 12)
    x0, epsilon = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x, state = plan.rows.told_signal[0] * x0 + plan.rows.told_noise[0] * epsilon, sampler.start()
    for i in range(12):
        v = v_from_x0(x0, epsilon, plan.rows.told_signal[i], plan.rows.told_noise[i])
        if i:
            assert_close(sampler.denoised(plan, i, x, v, state), x0, Tolerance(1e-5, 0.0, "rounding of float32"))
        x, state = sampler.step(plan, i, x, v, state, torch.zeros_like)
        if i == 0:  # from pure noise nothing of the picture is known; the method takes it for 0
            x = plan.rows.to_signal[0] * x0 + plan.rows.to_noise[0] * epsilon
    assert_close(x, x0, Tolerance(1e-5, 0.0, "rounding of float32"))


def test_the_familiar_loop():
    ours, theirs = Scheduler.from_diffusers(CONFIG), reference(CONFIG)
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    x = y = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    for t in ours.timesteps:
        seen = ours.scale_model_input(x, t)
        x, y = ours.step(torch.sin(seen), t, x), theirs.step(torch.sin(seen), t, y).prev_sample
        assert torch.equal(x, y)
    noisy = ours.add_noise(x, x + 1, ours.timesteps[3:4])
    assert torch.equal(noisy, ours.plan.add_noise(x, x + 1, 3))
    alpha_bar = ours.plan.alpha_bars[3]
    assert_close(noisy, alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * (x + 1))
