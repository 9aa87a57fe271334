"""What a scheduler is before ``set_timesteps``: as diffusers makes it, with all of training's timesteps.

Most programs that use one so early train: they draw a timestep and add its noise. Three kinds are told apart:

* a run of every timestep, which can be walked: DDPM, all that work in sigma (Euler and its family), EDM's Euler, CM
  and iPNDM;
* timesteps and noise, but no step: DDIM and its inverse, LCM, TCD, and the solvers in lambda;
* noise alone: PNDM has no timesteps yet.

The reference's slips come with a sampler that is read from its config (``like_diffusers``): Euler forgets its sigma
spacing and where it should land, until it is told a number of steps; and the solvers in lambda list their sigmas rising
beside timesteps that fall, so that ``add_noise`` takes each timestep for its opposite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Options, Plan, Sampler, need_schedule, unit
from minidiff.samplers.cm import CM
from minidiff.samplers.ddim import DDIM
from minidiff.samplers.ddim_inverse import DDIMInverse
from minidiff.samplers.ddpm import DDPM
from minidiff.samplers.dpm2 import DPM2
from minidiff.samplers.dpm_inverse import DPMSolverInverse
from minidiff.samplers.dpmpp_sde import DPMSDE
from minidiff.samplers.edm import MAX_STEPS, EDMEuler, EDMPlan
from minidiff.samplers.edm_multistep import EDMMultistep
from minidiff.samplers.euler import Euler
from minidiff.samplers.euler_ancestral import EulerAncestral
from minidiff.samplers.heun import Heun
from minidiff.samplers.ipndm import IPNDM
from minidiff.samplers.lambda_plan import LambdaPlan, LambdaSpacing, lambda_rows
from minidiff.samplers.lcm import LCM
from minidiff.samplers.lms import LMS
from minidiff.samplers.pndm import PNDM
from minidiff.samplers.sa_solver import SASolver
from minidiff.samplers.tcd import TCD
from minidiff.schedule import NoiseSchedule


class Fresh(NamedTuple):
    """``plan`` has a row for each timestep of training; only where ``steps`` is a step of it possible. ``timesteps``
    and ``sigmas`` are what the scheduler lists: None where it has none."""

    plan: Plan
    steps: bool
    timesteps: Tensor | None
    sigmas: Tensor | None


def fresh(sampler: Sampler[Any, Any], schedule: NoiseSchedule | None) -> Fresh:
    """The state of ``sampler`` before it knows how many steps there are to be. ConfigError where it has none."""
    options = cast(Options, sampler)
    if not options.like_diffusers and hasattr(options, "steps_offset"):
        options = replace(cast(Any, options), steps_offset=0)  # which would lead beyond the last timestep
    total = MAX_STEPS if schedule is None else len(schedule)
    falling = range(total - 1, -1, -1)
    if isinstance(options, DDPM):
        return _walkable(options.plan(schedule, timesteps=falling))
    if isinstance(options, (Heun, DPM2, IPNDM)):
        return _walkable(options.plan(schedule, total))
    if isinstance(options, LMS):
        steps = options.unchecked(need_schedule(schedule, options), total)
        return _walkable(steps)._replace(steps=bool(steps.coefs.isfinite().all()))
    if isinstance(options, DPMSDE):
        halves = options.unchecked(need_schedule(schedule, options), total)
        return _walkable(halves)._replace(steps=bool(halves.first_part.isfinite().all()))
    if isinstance(options, Euler):
        plain = replace(options, sigma_spacing="timesteps", interpolation="linear", final_sigma="zero", steps_offset=0)
        return _walkable((plain if options.like_diffusers else options).plan(schedule, total))
    if isinstance(options, EulerAncestral):
        plan = replace(options, steps_offset=0).plan(schedule, total)
        listed = _walkable(plan)
        return listed._replace(timesteps=plan.timesteps.double()) if options.like_diffusers else listed
    if isinstance(options, CM):
        if not options.like_diffusers:
            return _walkable(options.plan(schedule, options.train_steps))
        every = options.every_level()
        return _walkable(every)._replace(sigmas=every.sigmas[:-1])
    if isinstance(options, EDMEuler):
        places = torch.arange(total + 1, dtype=torch.float64, device="cpu") / total
        levels = options.spaced(places)
        return _walkable(options.plan_of(options.landing(levels, levels[-1]), schedule, options.sigma_max))
    if isinstance(options, EDMMultistep):
        levels = options.spaced(torch.linspace(0, 1, total, dtype=torch.float32, device="cpu"))
        rows = options.rows(torch.cat([levels, torch.zeros_like(levels[:1])]), schedule, options.sigma_max)
        return _walkable(EDMPlan(**rows))._replace(steps=False)
    if isinstance(options, (DDIM, DDIMInverse, LCM, TCD, PNDM, LambdaSpacing)):
        return _listed(options, need_schedule(schedule, options))
    raise ConfigError("the scheduler has no timesteps yet: call set_timesteps(50) first")


def _walkable(plan: Plan) -> Fresh:
    return Fresh(plan, True, plan.timesteps, getattr(plan, "sigmas", None))


def _listed(sampler: Options, schedule: NoiseSchedule) -> Fresh:
    """Timesteps and noise levels, of which no step can be made."""
    upward = torch.arange(len(schedule), dtype=torch.int64, device="cpu")
    t = upward if isinstance(sampler, (DDIMInverse, DPMSolverInverse)) else upward.flip(0)
    if isinstance(sampler, LambdaSpacing):
        table = torch.from_numpy(spacings.sigma_table(schedule, sampler.last_alpha_bar))
        levels = table if sampler.like_diffusers else table[t]
        rows = lambda_rows(t.float(), levels, schedule.prediction)
        plan: Plan = LambdaPlan(**rows, noise_by_timestep=isinstance(sampler, SASolver))
        return Fresh(plan, False, plan.timesteps, levels)
    plan = Plan(
        timesteps=t,
        alpha_bars=schedule.alphas_cumprod[t],
        init_noise_sigma=unit(),
        prediction=schedule.prediction,
    )
    return Fresh(plan, False, None if isinstance(sampler, PNDM) else t, None)
