"""Consistency models (CM stochastic iterative), chained against diffusers: equal bits at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import CM, Scheduler
from tests.parity.sampler_twins import compare, compare_all, compare_starts, label, reference


def cm(**options):
    return {"_class_name": "CMStochasticIterativeScheduler", **options}


ALL = [
    cm(),
    cm(clip_denoised=False),
    cm(s_noise=1.003),
    cm(sigma_data=1.0, rho=3.0),
    cm(sigma_min=0.01, sigma_max=50.0),
    cm(num_train_timesteps=201, clip_denoised=False),
    cm(num_train_timesteps=64, s_noise=0.0),
]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    compare_all(c, (1, 2, 3, 5, 20, 40, 50)[: 7 if c.get("num_train_timesteps", 40) >= 50 else 6])


@pytest.mark.parametrize("c", ALL, ids=label)
def test_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(dtypes):
    compare(cm(), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("timesteps", [[22, 0], [39], [38, 20, 7, 3], [0], list(range(39, -1, -1))])
def test_custom_timesteps(timesteps):
    compare(cm(), None, timesteps=timesteps)


def test_more_steps_than_training_had_raise_in_both():
    """Trap: CM raises for n > 40."""
    with pytest.raises(ValueError, match="cannot be larger"):
        reference(cm()).set_timesteps(41)
    with pytest.raises(ConfigError, match=r"steps=41 must lie in 1\.\.40"):
        Scheduler.from_diffusers(cm()).set_timesteps(41)
    for timesteps in ([40, 3], [3, 5]):
        with pytest.raises(ValueError, match="timesteps"):
            reference(cm()).set_timesteps(timesteps=timesteps)
        with pytest.raises(ConfigError, match="timesteps"):
            Scheduler.from_diffusers(cm()).set_timesteps(timesteps=timesteps)


def test_where_rounding_makes_the_last_step_of_the_reference_nan():
    """float32(sigma_min)**2 may lie below sigma_min**2, and the root of the difference is asked for."""
    bad = [v for v in np.linspace(0.001, 0.01, 37).tolist() if ends_in_nan(cm(sigma_min=v))]
    good = [v for v in np.linspace(0.001, 0.01, 37).tolist() if v not in bad]
    assert 5 <= len(bad) <= 32
    for v in bad:
        with pytest.raises(ConfigError, match=r"root of a negative number or NaN at rows \[2\]"):
            Scheduler.from_diffusers(cm(sigma_min=v)).set_timesteps(3)
        assert CM(sigma_min=v).plan(None, 3).rows.fresh[-1] == 0
    for v in good:
        compare(cm(sigma_min=v), 3)


def ends_in_nan(c):
    ref = reference(c)
    ref.set_timesteps(3)
    x = torch.ones(1, 4, 2, 2)
    for t in ref.timesteps:
        x = ref.step(x, t, x).prev_sample
    return not bool(x.isfinite().all())


def test_the_familiar_loop():
    ours, theirs = Scheduler.from_diffusers(cm()), reference(cm())
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = y = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    t = ours.timesteps[3:4]
    assert torch.equal(ours.add_noise(x, x + 1, t), theirs.add_noise(x, x + 1, t))
    for t in ours.timesteps:
        seen = ours.scale_model_input(x, t)
        assert torch.equal(seen, theirs.scale_model_input(y, t))
        out = torch.sin(seen)
        x, y = ours.step(out, t, x, generator=a), theirs.step(out, t, y, generator=b).prev_sample
        assert torch.equal(x, y)
