"""Heun, chained against diffusers: equal bits at every call."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Heun, Scheduler
from tests.parity.axes import BETAS, PREDICTIONS, SIGMAS, SPACINGS
from tests.parity.sampler_twins import compare, compare_all, compare_some, compare_starts, config, label, reference

CLIPS = ({}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 2.5})


def heun(**options):
    return config("HeunDiscreteScheduler", **options)


# every pair of options appears: a covering sample
ALL = [heun(**s, **g, **CLIPS[(i + j) % 3]) for (i, s), (j, g) in product(enumerate(SPACINGS), enumerate(SIGMAS))]
ALL = [{**c, "prediction_type": PREDICTIONS[i % 3]} for i, c in enumerate(ALL)]
ALL += [heun(**c, prediction_type=p) for c, p in product(CLIPS, PREDICTIONS)]
ALL += [heun(beta_schedule=b, beta_start=0.0001, beta_end=0.02) for b in ("linear", "squaredcos_cap_v2", "exp")]
ALL += [heun(trained_betas=BETAS), heun(num_train_timesteps=400), {"_class_name": "HeunDiscreteScheduler"}]


@pytest.mark.parametrize(("turn", "c"), enumerate(ALL), ids=lambda v: label(v) if isinstance(v, dict) else "")
def test_trajectories(turn, c):
    compare_some(c, turn, (1, 2, 3, 5, 20, 50) if turn % 3 == 0 else (1, 2, 3, 5, 20))


@pytest.mark.parametrize("c", ALL[::9], ids=label)
def test_every_length_in_every_dtype(c):
    compare_all(c, (1, 2, 3, 5, 20, 50))


@pytest.mark.parametrize("c", ALL[::5], ids=label)
def test_from_every_row(c):
    """Also from the odd ones, where the reference goes nowhere."""
    compare_starts(c)


@pytest.mark.parametrize("given", [{"steps": 999}, {"steps": 61, "timestep_spacing": "trailing"}], ids=str)
def test_many_steps_and_the_row_too_many(given):
    compare(heun(**{k: v for k, v in given.items() if k != "steps"}), given["steps"])


def test_1000_steps_with_offset_1_works_in_the_reference():
    compare(heun(timestep_spacing="leading", steps_offset=1), 1000)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(dtypes):
    compare(heun(prediction_type="v_prediction"), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "leading"}, {"clip_sample": True}])
@pytest.mark.parametrize("timesteps", [[999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500], [998.5, 17.25, 0]])
def test_custom_timesteps(options, timesteps):
    compare(heun(**options), None, timesteps=timesteps)


@pytest.mark.parametrize("options", SIGMAS[1:])
def test_timesteps_with_a_sigma_spacing_raise_in_both(options):
    with pytest.raises(ValueError, match="Cannot"):
        reference(heun(**options)).set_timesteps(timesteps=[900, 3])
    with pytest.raises(ConfigError, match="timesteps can't be given with sigma_spacing"):
        Scheduler.from_diffusers(heun(**options)).set_timesteps(timesteps=[900, 3])


def test_two_sigma_spacings_exclude_each_other_in_both():
    c = heun(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="Only one"):
        reference(c)
    with pytest.raises(ConfigError, match="exclude each other"):
        Scheduler.from_diffusers(c)


def test_by_name_it_refuses_to_start_inside_an_interval():
    ours = Scheduler.from_diffusers(heun())
    plan, x = Heun().plan(ours.schedule, 5), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match="can't start at row 3"):
        Heun().step(plan, 3, x, x, Heun().start(), torch.zeros_like)


@pytest.mark.parametrize("first", [0, 2, 8])
def test_the_familiar_loop(first):
    """Through the shell, as image to image slices the timesteps: at the start of an interval."""
    c = heun(use_karras_sigmas=True)
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    ours.set_timesteps(8)
    theirs.set_timesteps(8)
    assert ours.order == theirs.order == 2
    x = y = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    for t in ours.timesteps[first:]:
        seen = ours.scale_model_input(x, t)
        assert torch.equal(seen, theirs.scale_model_input(y, t))
        x, y = ours.step(torch.sin(seen), t, x), theirs.step(torch.sin(seen), t, y).prev_sample
        assert torch.equal(x, y)
