"""The familiar loop on the solvers in lambda (and DPM++ SDE), on ``Scheduler`` and on diffusers: equal bits."""

from __future__ import annotations

import inspect

import pytest
import torch

from minidiff.samplers import Scheduler
from tests.support.parity.sampler_twins import DTYPES, SHAPE, config, label, output, reference
from tests.tolerances import assert_close

CONFIGS = [
    config("DPMSolverMultistepScheduler"),
    config("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3),
    config("DPMSolverMultistepScheduler", use_karras_sigmas=True, euler_at_final=True),
    config("UniPCMultistepScheduler", solver_order=3),
    config("DEISMultistepScheduler", timestep_spacing="leading", steps_offset=1),
    config("DPMSolverSinglestepScheduler"),
    config("DPMSolverMultistepInverseScheduler"),
    config("DDIMInverseScheduler"),
    config("SASolverScheduler"),
    config("DPMSolverSDEScheduler", noise_sampler_seed=3),
]
PNDM = config("PNDMScheduler", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, clip_sample=False)


def loop(ours, theirs, c, n=12, first=0, dtype=torch.float32):
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    assert_close(ours.timesteps, theirs.timesteps)
    model, a, b = (torch.Generator().manual_seed(k) for k in (1, 2, 2))
    noise = torch.randn(SHAPE, generator=model).to(dtype)
    x, y = noise * ours.init_noise_sigma, noise * theirs.init_noise_sigma
    given = {"generator": b} if "generator" in inspect.signature(theirs.step).parameters else {}
    for t in ours.timesteps[first:]:
        seen = ours.scale_model_input(x, t)
        assert_close(seen, theirs.scale_model_input(y, t))
        out = output(c, seen, model)
        x, y = ours.step(out, t, x, generator=a), theirs.step(out, t, y, **given).prev_sample
        assert_close(x, y, where=f"{label(c)} t={t}")


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: c["_class_name"])
def test_familiar_loop(c):
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    assert ours.order == theirs.order
    for dtype in DTYPES:
        loop(ours, theirs, c, dtype=dtype)
    loop(ours, theirs, c, n=7)


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: c["_class_name"])
def test_image_to_image_slices_the_timesteps(c):
    for first in (2, 6, 10):
        loop(Scheduler.from_diffusers(c), reference(c), c, first=first)


@pytest.mark.parametrize("c", [c for c in CONFIGS if c["_class_name"] != "DDIMInverseScheduler"], ids=label)
def test_add_noise(c):
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    ours.set_timesteps(12)
    theirs.set_timesteps(12)
    for dtype in DTYPES:
        x0, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for rows in ([0], [5], [11], [3, 9]):
            t = theirs.timesteps[rows]
            assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), where=label(c))
        assert_close(ours.plan.add_noise(x0, noise, 5), theirs.add_noise(x0, noise, theirs.timesteps[5:6]))


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: c["_class_name"])
def test_made_from_another_schedulers_config(c):
    """X.from_config(pipe.scheduler.config): fields of siblings are ignored, those that X knows too are not."""
    name = {"_class_name": c["_class_name"], "noise_sampler_seed": 5}
    for source in (PNDM, config("UniPCMultistepScheduler", solver_order=3), config("EulerDiscreteScheduler")):
        whole = {**dict(reference(source).config), **name}
        theirs = type(reference(c)).from_config(whole)
        ours = Scheduler.from_diffusers(whole)
        loop(ours, theirs, name)
        again = Scheduler.from_diffusers({**dict(theirs.config), **name})
        assert again.sampler == ours.sampler
