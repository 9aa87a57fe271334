"""LCM and TCD, the samplers of distilled models, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import TCD, Scheduler
from tests.parity.axes import BETAS, PREDICTIONS
from tests.parity.sampler_twins import compare, compare_all, compare_some, compare_starts, config, label, reference
from tests.tolerances import assert_close

LIMITS = (
    {},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 2.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"thresholding": True, "clip_sample": True},
)
PLANS = ({}, {"original_inference_steps": 100}, {"original_inference_steps": 30, "strength": 0.7}, {"strength": 0.5})
NAMES = ("LCMScheduler", "TCDScheduler")
OTHER = [{"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}]
OTHER += [{"trained_betas": BETAS}, {"num_train_timesteps": 400}]
OTHER += [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}]
OTHER += [{"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False}]  # which change nothing

LCM = [config("LCMScheduler", **a, prediction_type=p) for a, p in product(LIMITS, PREDICTIONS)]
LCM += [config("LCMScheduler", **o) for o in (*PLANS, *OTHER, {"timestep_scaling": 3.0}, {"timestep_scaling": 0.002})]
LCM += [config("LCMScheduler", rescale_betas_zero_snr=True, clip_sample=True)]
TCD_ALL = [config("TCDScheduler", eta=e, prediction_type=p) for e, p in product((0.0, 0.3, 0.75, 1.0), PREDICTIONS)]
TCD_ALL += [config("TCDScheduler", **o) for o in (*PLANS, *OTHER, LIMITS[3])]
ALL = [*LCM, *TCD_ALL, *({"_class_name": name} for name in NAMES)]


def title(c):
    return f"{c['_class_name'][:3]}-{label(c)}"


def most(c):
    return int(c.get("original_inference_steps", 50) * c.get("strength", 1.0))


@pytest.mark.parametrize(("turn", "c"), enumerate(ALL), ids=lambda v: title(v) if isinstance(v, dict) else "")
def test_trajectories(turn, c):
    lengths = tuple(n for n in (1, 2, 3, 5, 20, 50) if n <= most(c))
    compare_some(c, turn, lengths)


@pytest.mark.parametrize("c", ALL[::6], ids=title)
def test_every_length_in_every_dtype(c):
    compare_all(c, tuple(n for n in (1, 2, 3, 5, 20, 50) if n <= most(c)))


@pytest.mark.parametrize("c", [c for c in ALL[::4] if most(c) >= 20 and "strength" not in c], ids=title)
def test_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("name", NAMES)
def test_cosine_betas(name):
    """Not in half precision: the last alpha_bar is 2e-9, and x0 infinite."""
    for n in (1, 2, 3, 5, 20, 50):
        compare(config(name, beta_schedule="squaredcos_cap_v2"), n)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(name, dtypes):
    compare(config(name, prediction_type="v_prediction"), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"strength": 0.6}])
@pytest.mark.parametrize("timesteps", [[999, 759, 499, 259], [999, 500, 3, 2, 0], list(range(960, 0, -15))])
def test_custom_timesteps(name, options, timesteps):
    compare(config(name, **options), None, timesteps=timesteps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("n", "options"), [(51, {}), (26, {"strength": 0.5}), (101, {"original_inference_steps": 100})]
)
def test_more_steps_than_the_model_was_distilled_at_raise_in_both(name, n, options):
    """Trap: LCM and TCD raise for n > 50."""
    c = config(name, **options)
    strength = {k: v for k, v in options.items() if k == "strength"}
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`"):
        reference(c).set_timesteps(n, **strength)
    with pytest.raises(ConfigError, match=f"steps={n} is more than the {n - 1} original_steps"):
        Scheduler.from_diffusers(c).set_timesteps(n)


@pytest.mark.parametrize("name", NAMES)
def test_what_raises_or_is_infinite_in_the_reference(name):
    c = config(name, original_inference_steps=1001)
    with pytest.raises(ValueError, match="original_steps"):
        reference(c).set_timesteps(5)
    with pytest.raises(ConfigError, match="original_steps=1001 exceeds the 1000 timesteps of training"):
        Scheduler.from_diffusers(c).set_timesteps(5)
    for timesteps in ([1000, 5], [5, 9]):
        with pytest.raises(ValueError, match="timesteps"):
            reference(config(name)).set_timesteps(timesteps=timesteps)
        with pytest.raises(ConfigError, match="timesteps"):
            Scheduler.from_diffusers(config(name)).set_timesteps(timesteps=timesteps)
    c = config(name, rescale_betas_zero_snr=True)
    ref = reference(c)
    ref.set_timesteps(5)
    x = torch.ones(1, 4, 2, 2)
    assert not ref.step(0.5 * x, ref.timesteps[0], x).prev_sample.isfinite().all()
    with pytest.raises(ConfigError, match="zero_snr"):
        Scheduler.from_diffusers(c).set_timesteps(5)


def test_eta_beyond_1_raises_in_both():
    c = config("TCDScheduler", eta=1.5)
    ref = reference(c)
    ref.set_timesteps(5)
    x = torch.ones(1, 4, 2, 2)
    with pytest.raises(AssertionError):
        ref.step(x, ref.timesteps[0], x, eta=1.5)
    with pytest.raises(ConfigError, match=r"eta=1.5 must lie in 0\.\.1"):
        Scheduler.from_diffusers(c)


@pytest.mark.parametrize("n", [1, 4, 50])
def test_tcd_over_all_timesteps_of_training(n):
    """Where the reference goes when original_inference_steps is an argument, whatever its value."""
    ref, ours = reference(config("TCDScheduler")), TCD(original_steps=None)
    ref.set_timesteps(n, original_inference_steps=50)
    schedule = Scheduler.from_diffusers(config("TCDScheduler")).schedule
    assert_close(ours.plan(schedule, n).timesteps, ref.timesteps)
