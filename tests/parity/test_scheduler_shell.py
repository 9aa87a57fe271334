"""The familiar loop on ``Scheduler`` and on diffusers, with generators: equal bits."""

from __future__ import annotations

import inspect

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler
from tests.support.parity.sampler_twins import SHAPE, STEP_OPTIONS, config, label, output, reference
from tests.tolerances import assert_close

CONFIGS = [
    config("DDPMScheduler"),
    config("DDPMScheduler", variance_type="learned_range", timestep_spacing="trailing"),
    config("DDIMScheduler", steps_offset=1, clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True),
    config("DDIMScheduler", eta=0.8, use_clipped_model_output=True),
    config("PNDMScheduler", steps_offset=1, skip_prk_steps=True, clip_sample=False),
    config("PNDMScheduler"),
    config("EulerDiscreteScheduler"),
    config("EulerDiscreteScheduler", use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1),
    config("EulerDiscreteScheduler", s_churn=5.0, s_noise=1.01, prediction_type="v_prediction"),
    config("EulerAncestralDiscreteScheduler"),
    config("EulerAncestralDiscreteScheduler", timestep_spacing="trailing", prediction_type="v_prediction"),
    config("LMSDiscreteScheduler", use_karras_sigmas=True),
    config("LCMScheduler"),
    config("TCDScheduler", eta=0.6),
    {"_class_name": "CMStochasticIterativeScheduler"},
]


def pair(c, n):
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    return ours, theirs


def loop(ours, theirs, c, first=0, dtype=torch.float32, make=lambda: torch.Generator().manual_seed(3)):
    options = {k: v for k, v in c.items() if k in STEP_OPTIONS}
    model, a, b = torch.Generator().manual_seed(1), make(), make()
    draws = "generator" in inspect.signature(theirs.step).parameters
    noise = torch.randn(SHAPE, generator=model).to(dtype)
    x, y = noise * ours.init_noise_sigma, noise * theirs.init_noise_sigma
    assert_close(ours.timesteps, theirs.timesteps)
    for t in ours.timesteps[first:]:
        seen = ours.scale_model_input(x, t)
        assert_close(seen, theirs.scale_model_input(y, t))
        out = output(c, seen, model)
        x = ours.step(out, t, x, generator=a)
        step = theirs.step(out, t, y, **options, **({"generator": b} if draws else {}))
        y = step.prev_sample
        assert_close(x, y, where=f"{label(c)} t={t}")
        if "pred_original_sample" in step and "s_churn" not in options:
            assert_close(ours.last_x0, step.pred_original_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_familiar_loop(c, dtype):
    for n in (4, 20):
        ours, theirs = pair(c, n)
        assert float(ours.init_noise_sigma) == float(theirs.init_noise_sigma)
        assert ours.order == theirs.order
        loop(ours, theirs, c, dtype=dtype)


@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_set_timesteps_again_starts_afresh(c):
    ours, theirs = pair(c, 20)
    loop(ours, theirs, c)
    for n in (20, 7):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        loop(ours, theirs, c)


@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_image_to_image_slices_the_timesteps(c):
    """Also at PNDM's repeated timestep (rows 1 and 2), and inside its warm-up."""
    for first in (1, 2, 3, 5, 12, 19):
        ours, theirs = pair(c, 20)
        loop(ours, theirs, c, first=first)


@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_one_generator_for_each_image(c):
    ours, theirs = pair(c, 5)
    loop(ours, theirs, c, make=lambda: [torch.Generator().manual_seed(k) for k in (5, 6)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_add_noise(c, dtype):
    ours, theirs = pair(c, 20)
    x0, noise = torch.randn(2, *SHAPE).to(dtype)
    for row in (0, 7, len(ours.timesteps) - 1):
        t = ours.timesteps[row : row + 1]
        assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
        at_row = ours.plan.add_noise(x0, noise, row)
        assert_close(at_row, theirs.add_noise(x0, noise, t), where=f"plan.add_noise of row {row}")
    both = ours.timesteps[[3, 9]]
    assert_close(ours.add_noise(x0, noise, both), theirs.add_noise(x0, noise, both))


@pytest.mark.parametrize("c", CONFIGS, ids=label)
def test_noise_may_be_given_instead_of_drawn(c):
    ours, _ = pair(c, 5)
    x, out = torch.randn(2, *SHAPE)
    out = output(c, out, torch.Generator().manual_seed(0))
    t = ours.timesteps[0]
    drawn = ours.step(out, t, x, generator=torch.Generator().manual_seed(1))
    ours.set_timesteps(5)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert_close(ours.step(out, t, x, noise=noise), drawn)
    with pytest.raises(ConfigError, match="generator and noise"):
        ours.step(out, t, x, noise=noise, generator=torch.Generator())


def test_custom_timesteps_and_sigmas():
    c = config("EulerDiscreteScheduler")
    for given in ({"timesteps": [900, 500.5, 3]}, {"sigmas": [10.0, 2.0, 0.5, 0.0]}):
        ours, theirs = Scheduler.from_diffusers(c), reference(c)
        ours.set_timesteps(**given)
        theirs.set_timesteps(**given)
        assert_close(ours.sigmas, theirs.sigmas)
        loop(ours, theirs, c)
    c = config("DDPMScheduler")
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    ours.set_timesteps(timesteps=[900, 500, 3])
    theirs.set_timesteps(timesteps=[900, 500, 3])
    loop(ours, theirs, c)


def test_samplers_made_from_another_schedulers_config():
    """Switching samplers, as people do: X.from_config(pipe.scheduler.config) ignores the fields of its siblings."""
    pndm = dict(reference(config("PNDMScheduler", skip_prk_steps=True, steps_offset=1)).config)
    for c in CONFIGS:
        theirs = type(reference(c)).from_config(pndm)
        ours = Scheduler.from_diffusers({**pndm, "_class_name": c["_class_name"]})
        ours.set_timesteps(8)
        theirs.set_timesteps(8)
        loop(ours, theirs, {"_class_name": c["_class_name"]})
        whole = dict(theirs.config)  # with everything that diffusers writes down
        assert Scheduler.from_diffusers({**whole, "_class_name": c["_class_name"]}).sampler == ours.sampler
