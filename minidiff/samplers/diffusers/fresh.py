"""State of a scheduler before ``set_timesteps``: as in diffusers, with all of training's timesteps.

Programs that use a scheduler at this point mostly train: they draw a timestep and add its noise. There are three kinds:

* a run over every timestep, with steps: DDPM, the methods that work in sigma (Euler and its family), EDM's Euler, CM
  and iPNDM;
* timesteps and noise, but no step: DDIM and its inverse, LCM, TCD, and the solvers in lambda;
* noise alone: PNDM has no timesteps yet.

Samplers read from a config (``like_diffusers``) reproduce the slips of the reference: Euler ignores its sigma spacing
and its final sigma until the number of steps is set, and the solvers in lambda list rising sigmas beside falling
timesteps, so that ``add_noise`` takes each timestep for its opposite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.errors import ConfigError
from minidiff.samplers.arithmetic import unit
from minidiff.samplers.consistency import CM, LCM, TCD
from minidiff.samplers.ddim import DDIM, DDIMInverse
from minidiff.samplers.ddpm import DDPM
from minidiff.samplers.dpm_solver import DPMSolverInverse
from minidiff.samplers.edm import MAX_STEPS, EDMEuler, EDMMultistep, Seen
from minidiff.samplers.euler import Euler, EulerAncestral
from minidiff.samplers.levels import Lambdas, Sigmas, sigma_table
from minidiff.samplers.method import NOTHING, Given, Levels, Method, Plan, Sampler
from minidiff.samplers.pndm import IPNDM, PNDM
from minidiff.samplers.sa_solver import SASolver
from minidiff.schedule import NoiseSchedule


class Listed(NamedTuple):
    """State that a scheduler shows. ``plan``: its rows; steps are possible only if ``steps`` is set. ``timesteps`` and
    ``sigmas`` are those that it lists, or None."""

    plan: Plan[Any]
    steps: bool
    timesteps: Tensor | None
    sigmas: Tensor | None


def listed(plan: Plan[Any]) -> Listed:
    """Return what a scheduler shows of a run."""
    return Listed(plan, True, plan.timesteps, None if plan.space == "alpha_bar" else plan.sigmas)


def fresh(sampler: Sampler[Any, Any], schedule: NoiseSchedule | None) -> Listed:
    """Return the state of ``sampler`` before the number of steps is set: a row for each timestep of training. Raises
    ConfigError if it has none."""
    options = sampler
    if not options.like_diffusers and hasattr(options, "steps_offset"):
        options = replace(cast(Any, options), steps_offset=0)  # which would lead beyond the last timestep
    total = MAX_STEPS if schedule is None else len(schedule)
    if isinstance(options, DDPM):
        return _run(options, schedule, Given(timesteps=range(total - 1, -1, -1)))
    if isinstance(options, Euler) and options.like_diffusers:
        options = replace(
            options, sigma_spacing="timesteps", interpolation="linear", final_sigma="zero", steps_offset=0
        )
    if isinstance(options, EulerAncestral) and options.like_diffusers:
        run = _run(replace(options, steps_offset=0), schedule, Given(total))
        return run._replace(timesteps=run.plan.timesteps.double())
    if isinstance(options, (Sigmas, IPNDM)):
        return _run(options, schedule, Given(total))
    if isinstance(options, CM):
        if not options.like_diffusers:
            return listed(options.plan(schedule, options.train_steps))
        s = options.karras(np.linspace(0, 1, options.train_steps))  # in float64; the last step lands on the last
        every = options.between(s, torch.from_numpy(np.append(s, s[-1:])), options.sigma_max)
        return listed(options.plan_at(every, "epsilon"))._replace(sigmas=every.here)
    if isinstance(options, (EDMEuler, EDMMultistep)):
        prediction = (schedule or NOTHING).prediction
        if isinstance(options, EDMEuler):
            levels = options.landed(
                options.sigmas_at(torch.arange(total + 1, dtype=torch.float64, device="cpu") / total)
            )
            return listed(options.plan_at(options.between(levels, options.sigma_max), prediction))
        levels = options.sigmas_at(torch.linspace(0, 1, total, dtype=torch.float32, device="cpu"))
        every = options.between(torch.cat([levels, torch.zeros_like(levels[:1])]), options.sigma_max)
        seen = Seen(options.wrapping(every.here, prediction))
        return listed(_plan(options, every, seen))._replace(steps=False)
    if isinstance(options, (DDIM, DDIMInverse, LCM, TCD, PNDM, Lambdas)):
        return _unstepped(options, options.schedule_of(schedule))
    raise ConfigError("the scheduler has no timesteps yet: call set_timesteps(50) first")


def _run(method: Method[Any, Any], schedule: NoiseSchedule | None, given: Given) -> Listed:
    """Return a run over ``given``, without the steps if the method can't do so many."""
    known = method.schedule_of(schedule)
    at = method.levels(known, given)
    plan = _plan(method, at, method.rows(at, known.prediction), method.predicts or known.prediction)
    try:
        method.require_usable(plan.rows)
    except ConfigError:
        return listed(plan)._replace(steps=False)
    return listed(plan)


def _unstepped(method: Method[Any, Any], schedule: NoiseSchedule) -> Listed:
    """Return timesteps and noise levels without the possibility of a step."""
    upward = torch.arange(len(schedule), dtype=torch.int64, device="cpu")
    t = upward if isinstance(method, (DDIMInverse, DPMSolverInverse)) else upward.flip(0)
    alpha_bars = schedule.alphas_cumprod[t]
    if not isinstance(method, Lambdas):
        plan = _plan(method, Levels(t, alpha_bars, alpha_bars, unit()))
        return Listed(plan, False, None if isinstance(method, PNDM) else t, None)
    table = torch.from_numpy(sigma_table(schedule, method.last_alpha_bar))
    shown = table if method.like_diffusers else table[t]
    put = ("alpha_bar", alpha_bars) if isinstance(method, SASolver) else None
    plan = _plan(method, Levels(t.float(), shown, shown, unit(), sigmas=shown, put=cast(Any, put)))
    return Listed(plan, False, plan.timesteps, shown)


def _plan(
    method: Method[Any, Any], levels: Levels, rows: tuple[Any, ...] = (), prediction: Prediction = "epsilon"
) -> Plan[Any]:
    return Plan(method=method.name, space=method.space, levels=levels, prediction=prediction, rows=rows)
