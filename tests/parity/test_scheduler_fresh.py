"""``Scheduler`` before ``set_timesteps``, beside a fresh scheduler of diffusers: equal bits, or refused in both."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler
from minidiff.samplers.diffusers.classes import READERS
from tests.support.parity.sampler_twins import DTYPES, QUANTILES, SHAPE, STEP_OPTIONS, config, label, output
from tests.tolerances import EXACT, assert_close

SHORT = {"num_train_timesteps": 50}
SIGMAS = ({"use_karras_sigmas": True}, {"use_beta_sigmas": True})
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    SHORT,
    SHORT | {"timestep_spacing": "leading", "steps_offset": 1},
    SHORT | {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    SHORT | {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    *(SHORT | sigmas for sigmas in SIGMAS),
    SHORT | {"final_sigmas_type": "sigma_min", "sigma_schedule": "exponential", "timestep_type": "continuous"},
    SHORT | {"interpolation_type": "log_linear", "s_churn": 4.0, "variance_type": "learned_range", "sigma_data": 0.7},
    SHORT | {"use_exponential_sigmas": True, "prediction_type": "v_prediction", "timestep_type": "continuous"},
)


def own(name: str, variant: dict[str, Any]) -> dict[str, Any]:
    """``variant`` as far as the class knows it."""
    known = {*READERS[name].fields, "num_train_timesteps", "prediction_type", "beta_schedule"}
    if name == "DPMSolverSDEScheduler":  # without a seed its noise is another at every run
        variant = variant | {"noise_sampler_seed": 3}
    kept = {k: v for k, v in variant.items() if k in known}
    if kept.get("prediction_type", "epsilon") not in READERS[name].predictions:
        del kept["prediction_type"]
    if "variance_type" in kept and not name.startswith("DDPM"):
        del kept["variance_type"]
    return kept


def pair(c: dict[str, Any]) -> tuple[Scheduler, Any]:
    kind = getattr(diffusers, c["_class_name"])
    takes = inspect.signature(kind.__init__).parameters
    return Scheduler.from_diffusers(c), kind.from_config({k: v for k, v in c.items() if k in takes})


CASES = {
    f"{name}-{label(c)}": c for name in READERS for v in VARIANTS for c in [config(name, **own(name, v))]
}  # the same options once
EVERY = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())


@EVERY
def test_what_it_lists(c):
    ours, theirs = pair(c)
    tolerance = QUANTILES if c.get("use_beta_sigmas") else EXACT
    assert torch.equal(ours.init_noise_sigma, torch.as_tensor(theirs.init_noise_sigma, dtype=torch.float32))
    assert ours.order == theirs.order
    if theirs.timesteps is None:
        with pytest.raises(ConfigError, match=r"PNDM has no timesteps yet: call set_timesteps\(50\) first"):
            _ = ours.timesteps
    else:
        assert_close(ours.timesteps, theirs.timesteps, tolerance)
    if hasattr(theirs, "sigmas"):
        assert_close(ours.sigmas, theirs.sigmas)
    else:
        with pytest.raises(ConfigError, match="has no sigmas"):
            _ = ours.sigmas


@EVERY
def test_noise_that_training_adds(c):
    ours, theirs = pair(c)
    if not hasattr(theirs, "add_noise"):
        return
    total = len(ours.schedule)
    if theirs.timesteps is None:
        t = at = torch.tensor([total - 1, 3])
    else:
        t, at = (s.timesteps[[0, len(s.timesteps) // 2]] for s in (ours, theirs))
    if c["_class_name"] == "SASolverScheduler":  # can't take its own timesteps, which are fractions to it
        t = at = t.long()
    for dtype in DTYPES:
        x0, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for rows in (slice(1), slice(1, 2), slice(2)):
            assert_close(ours.add_noise(x0, noise, t[rows]), theirs.add_noise(x0, noise, at[rows]), where=str(at[rows]))


def walk(theirs: Any, c: dict[str, Any], times: torch.Tensor, x: torch.Tensor) -> list[Any]:
    """The reference's (x, seen, out, after) at ``times``; nothing where one of the steps fails or gives NaN."""
    options = {k: v for k, v in c.items() if k in STEP_OPTIONS and k != "order"}
    draws = "generator" in inspect.signature(theirs.step).parameters
    model, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    rows = []
    for t in times:
        seen = theirs.scale_model_input(x, t)
        out = output(c, seen, model)
        try:
            after = theirs.step(out, t, x, **options, **({"generator": noise} if draws else {})).prev_sample
        except (ValueError, TypeError):
            return []
        rows.append((x, seen, out, after))
        x = after
    return rows if x.isfinite().all() else []


@EVERY
def test_steps(c):
    """From the first row, from the middle, and from the last; or none, where diffusers has none or gives NaN."""
    for start in (0.0, 0.5, 1.0):
        ours, theirs = pair(c)
        if start > 0 and ours.order > 1:  # only the first row is known to begin an interval
            break
        times = torch.tensor([len(ours.schedule) - 1]) if theirs.timesteps is None else theirs.timesteps
        first = int(start * (len(times) - 1))
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
        rows = walk(theirs, c, times[first : first + 3], x)
        noise = torch.Generator().manual_seed(2)
        own = times if theirs.timesteps is None else ours.timesteps
        for (before, seen, out, after), t in zip(rows, own[first:], strict=False):
            assert_close(ours.scale_model_input(before, t), seen)
            assert_close(ours.step(out, t, before, generator=noise), after, where=f"t={t}")
        if not rows:
            assert_close(ours.scale_model_input(x, own[first]), pair(c)[1].scale_model_input(x, times[first]))
            with pytest.raises(ConfigError, match=r"call set_timesteps\(50\) first"):
                ours.step(x, own[first], x)
            break


def test_a_run_follows():
    c = config("EulerDiscreteScheduler", use_karras_sigmas=True)
    ours, theirs = pair(c)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert_close(ours.step(x, ours.timesteps[0], x), theirs.step(x, theirs.timesteps[0], x).prev_sample)
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    assert_close(ours.timesteps, theirs.timesteps)
    assert_close(ours.sigmas, theirs.sigmas)
