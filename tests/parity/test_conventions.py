"""``like="diffusers"`` against the pinned diffusers: the same plan as the scheduler's, for every class it names."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from minidiff.config import ScheduleConfig
from minidiff.programs import read
from minidiff.programs.profiles import PROFILES
from minidiff.samplers import Scheduler
from tests.tolerances import assert_close

# runwayml's scheduler_config.json
SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize("name", PROFILES["diffusers"].methods)
def test_like_diffusers_is_what_a_folder_of_sd_gives(name: str) -> None:
    """The class taken over from the folder's scheduler, as ``X.from_config(pipe.scheduler.config)`` does it."""
    options = dict(PROFILES["diffusers"].methods[name].options)
    kind = getattr(diffusers, options["_class_name"])
    own = {key: value for key, value in options.items() if key not in (*SD15, "_class_name")}
    theirs = kind.from_config(diffusers.PNDMScheduler.from_config(SD15).config, **own)
    ours, shell = read("diffusers").sampler(ScheduleConfig(), name), Scheduler.from_diffusers(dict(theirs.config))
    for steps in (1, 7, 20):
        plan = ours.plan(None, steps)
        shell.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert_close(plan.timesteps, shell.timesteps)
        assert plan.timesteps.tolist() == theirs.timesteps.tolist()
        assert_close(plan.init_noise_sigma, shell.init_noise_sigma)
        assert float(plan.init_noise_sigma) == float(theirs.init_noise_sigma)
        for field, row in vars(shell.plan).items():
            if isinstance(row, torch.Tensor):
                assert torch.equal(getattr(plan, field).nan_to_num(), row.nan_to_num()), field
        if hasattr(plan, "sigmas") and hasattr(theirs, "sigmas"):
            assert_close(plan.sigmas, theirs.sigmas.float())


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20, 50, 333])
def test_comfyui_beta_timesteps_are_scipys_quantiles(steps: int) -> None:
    places = scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999
    want = sorted({int(t) for t in np.rint(places)}, reverse=True)
    assert read("comfyui:beta").sampler(ScheduleConfig(), "euler").plan(None, steps).timesteps.tolist() == want
