"""Samplers held against the pinned diffusers schedulers: one chain of steps, compared number by number.

Each model output depends on what the sampler shows the model, so an error in one step carries on into the next.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar
from unittest import mock

import diffusers
import torch
from torch import Tensor

from minidiff.samplers import sampler_from_diffusers, schedule_from_diffusers
from minidiff.schedule import NoiseSchedule
from tests.support.parity.axes import SD, Config
from tests.tolerances import EXACT, Tolerance, assert_close

SHAPE = (2, 4, 3, 5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTILES = Tolerance(1e-11, 1e-12, "scipy's Beta quantiles in float64, which only the timesteps of KDPM2 keep")
STEP_OPTIONS = ("order", "eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise")
PLAN_OPTIONS = ("strength",)
LARGEST_IN_HALF = 2000.0  # x0 is noise of up to 5 standard deviations times sigma: beyond 65504 float16 is infinite

T = TypeVar("T")


def turn(values: Sequence[T], i: int) -> T:
    """The i-th of ``values``, beginning again at the end."""
    return values[i % len(values)]


def config(name: str, **options: Any) -> Config:
    """A scheduler_config.json with Stable Diffusion's betas unless ``options`` say otherwise."""
    return {"_class_name": name, **SD, **options}


def label(c: Config) -> str:
    """A test id: the class and what differs from Stable Diffusion's betas."""
    # a list by its length, a function without its address: workers must agree on the names of tests
    told = {k: len(v) if isinstance(v, list) else "function" if callable(v) else v for k, v in c.items()}
    shown = [f"{k}={told[k]}" for k, v in c.items() if k not in SD or SD[k] != v]
    return ",".join(str(s) for s in shown if not s.startswith("_class_name"))[:120] or "defaults"


def reference(c: Config) -> Any:
    """The diffusers scheduler of ``c``, without the options that belong to its ``step``."""
    kind = getattr(diffusers, c["_class_name"])
    elsewhere = {*STEP_OPTIONS, *PLAN_OPTIONS}.difference(inspect.signature(kind.__init__).parameters)
    own = {k: v for k, v in c.items() if k not in elsewhere}
    if not c["_class_name"].startswith(("Heun", "KDPM2", "LMS")):
        return kind.from_config(own)
    # these plan a run of every training step when they are made, up to 0.3 s, of which the next set_timesteps leaves
    # nothing: let them plan a short one
    plan = kind.set_timesteps
    with mock.patch.object(kind, "set_timesteps", lambda self, *_: plan(self, 2)):
        return kind.from_config(own)


def step_options(ref: Any, c: Config) -> dict[str, Any]:
    """The options of ``c`` that are arguments of the reference's ``step``."""
    takes = inspect.signature(ref.step).parameters
    return {k: v for k, v in c.items() if k in STEP_OPTIONS and k in takes}


def takes_generator(ref: Any) -> bool:
    """True if ``step`` of the reference draws noise."""
    return "generator" in inspect.signature(ref.step).parameters


def output(c: Config, seen: Tensor, generator: torch.Generator) -> Tensor:
    """A pseudo-random model output for the model's input ``seen``; twice the channels where the variance is learned."""
    out = torch.tanh(seen.float()) + torch.randn(seen.shape, generator=generator)
    if str(c.get("variance_type")).startswith("learned"):
        out = torch.cat([out, torch.rand(seen.shape, generator=generator)], dim=1)
    return out.to(seen.dtype)


def compare(
    c: Config,
    steps: int | None,
    dtype: torch.dtype = torch.float32,
    *,
    first: int = 0,
    out_dtype: torch.dtype | None = None,
    twin: Any = None,
    shape: tuple[int, ...] = SHAPE,
    overflows: bool = False,
    **given: Any,
) -> list[Tensor]:
    """Run both from row ``first`` to the end and demand equal bits of everything on the way.

    Returns what a user can see of the run: timesteps, first scale, and of each row the model's input, x0 (where the
    method has one) and the sample. ``overflows``: what is infinite or NaN must be so in both."""
    sampler = sampler_from_diffusers(c)
    schedule = NoiseSchedule.from_config(schedule_from_diffusers(c))
    plan = sampler.plan(schedule, steps, **given)
    ref = copy.deepcopy(twin) if twin is not None else reference(c)
    plans = {k: v for k, v in c.items() if k in PLAN_OPTIONS}
    ref.set_timesteps(**({"num_inference_steps": steps} if steps is not None else given), **plans)
    where = f"{label(c)} n={steps} {dtype} first={first}"
    doubles = c.get("use_beta_sigmas") and plan.timesteps.dtype == torch.float64
    assert_close(plan.timesteps, ref.timesteps, QUANTILES if doubles else EXACT, f"{where}: timesteps")
    if dtype == torch.float16 and plan.init_noise_sigma > 10_000 and not overflows:
        return []  # beyond 65504 float16 is infinite, in both
    initial = torch.as_tensor(ref.init_noise_sigma, dtype=torch.float32)
    assert_close(plan.init_noise_sigma, initial, where=f"{where}: init_noise_sigma")
    if hasattr(ref, "sigmas"):
        assert_close(plan.sigmas, ref.sigmas, where=f"{where}: sigmas")
    if hasattr(ref, "set_begin_index"):
        ref.set_begin_index(first)
    elif hasattr(ref, "_step_index"):
        ref._step_index = first
    options, draws = step_options(ref, c), takes_generator(ref)
    model = torch.Generator().manual_seed(1)
    ours_noise, theirs_noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=ours_noise, dtype=like.dtype)

    def same(ours: Tensor, theirs: Tensor, what: str) -> None:
        if overflows:
            assert torch.equal(ours.isnan(), theirs.isnan()), f"{where}: {what} is NaN in one of both"
            ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
        assert_close(ours, theirs, where=f"{where}: {what}")

    x = (torch.randn(shape, generator=model) * plan.init_noise_sigma).to(dtype)
    state = sampler.start()
    shown = [plan.timesteps, plan.init_noise_sigma]
    for i in range(first, len(plan)):
        t = ref.timesteps[i]
        seen = sampler.scale_input(plan, i, x)
        same(seen, ref.scale_model_input(x, t), f"input of row {i}")
        out = output(c, seen.to(out_dtype or dtype), model)
        denoised = sampler.denoised(plan, i, x, out, state)
        after, state = sampler.step(plan, i, x, out, state, draw)
        theirs = ref.step(out, t, x, **options, **({"generator": theirs_noise} if draws else {}))
        same(after, theirs.prev_sample, f"row {i}")
        for x0 in ("pred_original_sample", "denoised"):
            if x0 in theirs and not c.get("s_churn"):
                same(denoised, theirs[x0], f"x0 of row {i}")
        shown += [seen, after] if denoised is None else [seen, denoised, after]
        x = after
    assert torch.equal(ours_noise.get_state(), theirs_noise.get_state()), f"{where}: drew more or less noise"
    return shown


def walk_reference(
    c: Config,
    given: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    shape: tuple[int, ...] = SHAPE,
) -> bool:
    """Run the reference alone, as :func:`compare` does: whether all that it gives is finite. Raises what it raises."""
    ref = reference(c)
    ref.set_timesteps(**given, **{k: v for k, v in c.items() if k in PLAN_OPTIONS})
    options = step_options(ref, c)
    model = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=model) * ref.init_noise_sigma).to(dtype)
    finite = bool(torch.as_tensor(ref.timesteps).isfinite().all())
    for t in ref.timesteps:
        out = output(c, ref.scale_model_input(x, t).to(out_dtype or dtype), model)
        x = ref.step(out, t, x, **options).prev_sample
        finite = finite and bool(x.isfinite().all())
    return finite


def compare_all(c: Config, steps: Sequence[int]) -> None:
    """Whole trajectories of every length and dtype; the longest in float32 only, to save time."""
    twin = reference(c)
    for n in steps:
        for dtype in DTYPES if n < max(steps) else DTYPES[:1]:
            compare(c, n, dtype, twin=twin)


def compare_some(c: Config, first: int, steps: Sequence[int]) -> None:
    """Whole trajectories of every length, the dtypes taking turns: where a test has many options to go through."""
    twin = reference(c)
    for j, n in enumerate(steps):
        compare(c, n, turn(DTYPES, first + j), twin=twin)


def compare_wide(c: Config, steps: Sequence[int]) -> None:
    """Whole trajectories: all in float32, and some of each length class in half precision."""
    twin = reference(c)
    for n in steps:
        compare(c, n, twin=twin)
    for n, dtype in ((2, DTYPES[1]), (5, DTYPES[2]), (16, DTYPES[1])):
        if dtype != torch.float16 or fits_in_half(c):
            compare(c, n, dtype, twin=twin)


def compare_starts(c: Config, steps: int, every: int) -> None:
    """A run of ``steps``, started at ``every`` so many of its rows."""
    twin = reference(c)
    twin.set_timesteps(steps)
    half = fits_in_half(c)
    for j, first in enumerate(range(0, len(twin.timesteps), every)):
        compare(c, steps, turn(DTYPES, j) if half else DTYPES[0], first=first, twin=twin)


def fits_in_half(c: Config) -> bool:
    """True if the sigmas of a solver in lambda lie in float16's range, x0 of an epsilon model included."""
    plan = sampler_from_diffusers(c).plan(NoiseSchedule.from_config(schedule_from_diffusers(c)), 20)
    return plan.space != "lambda" or bool(plan.sigmas.max() < LARGEST_IN_HALF)
