"""DPM++ SDE and its Brownian tree, against diffusers and torchsde: equal bits at every call."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torchsde

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import DPMSDE, Scheduler
from minidiff.samplers.brownian import BrownianTree, draw_increment
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, COSINE, SIGMAS, SPACINGS
from tests.parity.lambda_twins import turn
from tests.parity.sampler_twins import DTYPES, compare, config, label, reference

PREDICTIONS = ("epsilon", "v_prediction")


def sde(**options):
    return config("DPMSolverSDEScheduler", **{"noise_sampler_seed": 7, **options})


ALL = [sde(**s, **g, prediction_type=turn(PREDICTIONS, i)) for i, (s, g) in enumerate(product(SPACINGS, SIGMAS))]
ALL += [sde(prediction_type="v_prediction", noise_sampler_seed=2**40), sde(s_noise=1.003), sde(**COSINE)]
ALL += [sde(trained_betas=BETAS), sde(num_train_timesteps=400), sde(beta_schedule="linear")]
ALL += [{"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": 0}]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    for n, dtype in ((1, 0), (2, 1), (3, 2), (6, 0)):
        compare(c, n, DTYPES[dtype])


@pytest.mark.parametrize("c", [ALL[0]], ids=label)
def test_many_steps(c):
    compare(c, 20)
    compare(c, 50)


def test_from_every_even_row():
    c = sde(timestep_spacing="leading")
    for first in range(0, 23, 2):
        compare(c, 12, DTYPES[first // 2 % 3], first=first)


def test_the_tree_draws_what_torchsde_draws():
    a, b = torch.rand(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torchsde.BrownianInterval(
        t0=0.03, t1=14.6, size=(2, 3), dtype=torch.float32, entropy=11, tol=1e-6, pool_size=24, halfway_tree=True
    )
    tree = BrownianTree(0.03, 14.6, 11)
    for low, high in (torch.stack([torch.minimum(a, b), torch.maximum(a, b)], dim=1) * 14 + 0.1).tolist():
        ours = draw_increment(tree.root, tree.increment(low, high), torch.empty(2, 3))
        assert torch.equal(ours, theirs(low, high))
    assert tree.increment(5.0, 5.0) == ()


def test_a_run_can_not_begin_in_the_middle_of_an_interval():
    """The reference gives NaN there."""
    ours, ref = Scheduler.from_diffusers(sde()), reference(sde())
    ours.set_timesteps(5)
    ref.set_timesteps(5)
    ref.set_begin_index(3)
    x = torch.ones(1, 4, 2, 2)
    assert not bool(ref.step(x, ref.timesteps[3], x).prev_sample.isfinite().any())
    with pytest.raises(ConfigError, match="can't start at row 3, in the middle"):
        ours.step(x, ours.timesteps[3], x)


def test_without_a_seed_both_draws_of_an_interval_lie_on_one_path():
    sampler = DPMSDE()
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 5)
    torch.testing.assert_close(plan.rows.first_part[1::2] ** 2 + plan.rows.second_part[1::2] ** 2, torch.ones(4))
    x, made = torch.zeros(1, 4, 64, 64), torch.Generator().manual_seed(0)

    def draw(like):
        return torch.randn(like.shape, generator=made)

    middle, state = sampler.step(plan, 0, x, x, sampler.start(), draw)
    first = state.noise
    end, _ = sampler.step(
        plan, 1, middle, middle / plan.levels.here[1], state, draw
    )  # an x0 of 0, as in the first call
    second = end / plan.rows.sigma_up[1]
    assert abs(float(second.std()) - 1) < 0.02
    share = (plan.levels.here[0] - plan.levels.here[1]) / (plan.levels.here[0] - plan.sigmas[1])
    assert abs(float((first * second).mean()) - float(share**0.5)) < 0.03


def test_what_the_reference_can_not_do():
    ref = reference(sde(prediction_type="sample"))
    ref.set_timesteps(3)
    with pytest.raises(NotImplementedError):
        ref.step(torch.ones(1, 4, 2, 2), ref.timesteps[0], torch.ones(1, 4, 2, 2))
    with pytest.raises(ConfigError, match="prediction_type='sample'"):
        Scheduler.from_diffusers(sde(prediction_type="sample"))
    with pytest.raises(ConfigError, match="noise_seed=-1 must not be negative"):
        DPMSDE(noise_seed=-1)


def test_two_equal_sigmas_are_nan_in_the_reference_and_refused():
    """1000 steps with offset 1 visit timesteps 1000 and 999, whose sigmas are the same: no noise over no way."""
    c = config("DPMSolverSDEScheduler", timestep_spacing="leading", steps_offset=1, noise_sampler_seed=3)
    ref = reference(c)
    ref.set_timesteps(1000)
    x = torch.ones(1, 1, 2, 2)
    assert ref.step(x, ref.timesteps[0], x).prev_sample.isnan().all()
    with pytest.raises(ConfigError, match=r"DPMSDE: no finite coefficients at rows \[0, 1\] of 1999"):
        Scheduler.from_diffusers(c).set_timesteps(1000)
