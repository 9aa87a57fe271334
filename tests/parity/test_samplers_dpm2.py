"""DPM2 and DPM2 ancestral (KDPM2), chained against diffusers: equal bits at every call."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import DPM2, DPM2Ancestral, Scheduler, sampler_from_diffusers
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, SIGMAS, SPACINGS
from tests.parity.sampler_twins import DTYPES, SHAPE, compare, config, label, reference
from tests.tolerances import assert_close

PREDICTIONS = ("epsilon", "v_prediction")
NAMES = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")

# both classes together go through every pair of spacings; to build their references is what takes the time
PAIRS = [{**s, **g} for s, g in product(SPACINGS, SIGMAS)]
ALL = [config(NAMES[(i + i // 4) % 2], **c, prediction_type=PREDICTIONS[i // 2 % 2]) for i, c in enumerate(PAIRS)]
OTHER = [{"beta_schedule": b, "beta_start": 0.0001, "beta_end": 0.02} for b in ("linear", "squaredcos_cap_v2")]
OTHER += [{"trained_betas": BETAS}, {"num_train_timesteps": 400}]
ALL += [config(name, **o) for name in NAMES for o in OTHER]
ALL += [{"_class_name": name} for name in NAMES]


def title(c):
    return f"{c['_class_name'][5:10]}-{label(c)}"


@pytest.mark.parametrize(("turn", "c"), enumerate(ALL), ids=lambda v: title(v) if isinstance(v, dict) else "")
def test_trajectories(turn, c):
    twin = reference(c)
    for j, n in enumerate((1, 2, 3, 5, 20)):
        if not has_no_middle(c, n):
            compare(c, n, DTYPES[(turn + j) % 3], twin=twin)


def has_no_middle(c, n):
    ref = reference(c)
    ref.set_timesteps(n)
    return bool(ref.timesteps.isnan().any())


@pytest.mark.parametrize("c", ALL[:16:3], ids=title)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", [ALL[2], ALL[3]], ids=title)
def test_from_every_interval(c):
    twin = reference(c)
    for first in range(0, 39, 2):
        compare(c, 20, DTYPES[first // 2 % 3], first=first, twin=twin)


@pytest.mark.parametrize("c", [ALL[-6], ALL[-5], ALL[-4]], ids=title)
def test_where_the_reference_has_no_middle(c):
    """sigma_up rounds to the next sigma itself, so that sigma_down is 0 and its logarithm infinite."""
    assert has_no_middle(c, 2)
    with pytest.raises(ConfigError, match=r"sigma_down rounds to 0 in interval \[0\], .* use more steps"):
        Scheduler.from_diffusers(c).set_timesteps(2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "given",
    [(61, {"timestep_spacing": "trailing"}), (1000, {"timestep_spacing": "leading", "steps_offset": 1})],
    ids=str,
)
def test_many_steps_and_slips_of_the_reference(name, given):
    compare(config(name, **given[1]), given[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(name, dtypes):
    compare(config(name, prediction_type="v_prediction"), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("name", NAMES)
def test_sample_prediction_is_refused_as_in_the_reference(name):
    c = config(name, prediction_type="sample")
    ref = reference(c)
    ref.set_timesteps(3)
    with pytest.raises(NotImplementedError):
        ref.step(torch.zeros(SHAPE), ref.timesteps[0], torch.zeros(SHAPE))
    with pytest.raises(ConfigError, match="prediction_type='sample'"):
        Scheduler.from_diffusers(c)


@pytest.mark.parametrize("sampler", [DPM2(), DPM2Ancestral(like_diffusers=True)])
def test_it_refuses_to_start_in_the_middle_of_an_interval(sampler):
    plan, x = sampler.plan(Scheduler.from_diffusers(config(NAMES[0])).schedule, 5), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match="can't start at row 3"):
        sampler.step(plan, 3, x, x, sampler.start(), torch.zeros_like)


def test_by_name_karras_timesteps_are_not_rounded():
    schedule = Scheduler.from_diffusers(config(NAMES[0])).schedule
    ours, theirs = (DPM2(sigma_spacing="karras", like_diffusers=like).plan(schedule, 10) for like in (False, True))
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps[2::2].round(), theirs.timesteps[2::2].float())
    assert not torch.equal(ours.timesteps[2::2], theirs.timesteps[2::2].float())
    assert ours.timesteps.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 2, 8])
def test_the_familiar_loop(name, first):
    c = config(name, use_exponential_sigmas=True)
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    ours.set_timesteps(8)
    theirs.set_timesteps(8)
    theirs.set_begin_index(first)
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = y = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    for t in ours.timesteps[first:]:
        seen = ours.scale_model_input(x, t)
        assert torch.equal(seen, theirs.scale_model_input(y, t))
        x = ours.step(torch.sin(seen), t, x, generator=a)
        y = theirs.step(torch.sin(seen), t, y, **({"generator": b} if "Ancestral" in name else {})).prev_sample
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_of_every_row(name):
    """What inpainting by an ordinary model puts around the hole after each call, in the middle of an interval too."""
    c = config(name)
    theirs = reference(c)
    theirs.set_timesteps(6)
    plan = sampler_from_diffusers(c).plan(NoiseSchedule.from_config(ScheduleConfig()), 6)
    x, noise = torch.randn(2, *SHAPE).unbind()
    for i, t in enumerate(theirs.timesteps):
        assert_close(plan.add_noise(x, noise, i), theirs.add_noise(x, noise, t.expand(len(x))), where=f"row {i}")
