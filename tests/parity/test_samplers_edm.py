"""EDM Euler and EDM DPM-Solver++, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import EDMEuler, EDMMultistep, Scheduler
from tests.parity.axes import CHURN
from tests.parity.sampler_twins import compare, compare_all, compare_some, compare_starts, label, reference

PREDICTIONS = ("epsilon", "v_prediction")
SIGMAS = (
    {},
    {"sigma_schedule": "exponential"},
    {"rho": 3.0, "sigma_min": 0.01, "sigma_max": 50.0},
    {"sigma_data": 1.0, "sigma_schedule": "exponential", "sigma_max": 500.0},
)
FINAL = ({}, {"final_sigmas_type": "sigma_min"})
ORDERS = tuple({"solver_order": o} for o in (1, 2, 3))
KINDS = tuple(
    {"algorithm_type": a, "solver_type": t} for a in ("dpmsolver++", "sde-dpmsolver++") for t in ("midpoint", "heun")
)
ENDS = ({}, {"lower_order_final": False}, {"euler_at_final": True, "lower_order_final": False})
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}


def euler(**options):
    return {"_class_name": "EDMEulerScheduler", **options}


def multistep(**options):
    return {"_class_name": "EDMDPMSolverMultistepScheduler", **options}


EULER = [
    euler(**s, **c, prediction_type=p)
    for (i, s), (j, c) in product(enumerate(SIGMAS), enumerate(CHURN))
    for p in (PREDICTIONS[(i + j) % 2],)
]
EULER += [euler(**s, **FINAL[1], prediction_type=p) for s, p in zip(SIGMAS, PREDICTIONS * 2, strict=True)]
PLAIN = [(o, k) for o, k in product(ORDERS, KINDS) if not (o["solver_order"] == 3 and "sde" in k["algorithm_type"])]
MULTI = [
    multistep(**o, **k, **e, **SIGMAS[(i + j) % 4], prediction_type=PREDICTIONS[(i + j // 2) % 2])
    for (i, (o, k)), (j, e) in product(enumerate(PLAIN), enumerate(ENDS))
]
MULTI += [multistep(**THRESHOLD, **o) for o in ORDERS]
MULTI += [multistep(algorithm_type="deis", solver_type=t, **FINAL[1]) for t in ("logrho", "bh1", "bh2")]
ALL = [*EULER, *MULTI]


def title(c):
    return f"{'Euler' if 'Euler' in c['_class_name'] else 'Multi'}-{label(c)}"


@pytest.mark.parametrize(("turn", "c"), enumerate(ALL), ids=lambda v: title(v) if isinstance(v, dict) else "")
def test_trajectories(turn, c):
    compare_some(c, turn, (1, 2, 3, 5, 20, 50))


@pytest.mark.parametrize("c", ALL[::8], ids=title)
def test_every_length_in_every_dtype(c):
    compare_all(c, (1, 2, 3, 5, 20, 50))


@pytest.mark.parametrize("c", ALL[::5], ids=title)
def test_from_every_row(c):
    compare_starts(c)


@pytest.mark.parametrize("c", [multistep(**FINAL[1], **o, **k) for o, k in PLAIN], ids=title)
def test_landing_on_sigma_min(c):
    """The last step then goes from (nearly) sigma_min to sigma_min, which not every method survives: NaN, refused."""
    ran = 0
    for n in (1, 2, 3, 5, 14, 15, 20, 30):
        ref = reference(c)
        ref.set_timesteps(n)
        finite, x = True, torch.ones(1, 4, 2, 2)
        for i, t in enumerate(ref.timesteps):
            x = ref.step(x * 0 + i % 3, t, x).prev_sample
            finite = finite and bool(x.isfinite().all())
        if finite:
            compare(c, n)
            ran += 1
        else:
            with pytest.raises(ConfigError, match=r"no finite coefficients of order . at rows"):
                Scheduler.from_diffusers(c).set_timesteps(n)
    assert ran >= 4


@pytest.mark.parametrize("make", [euler, multistep])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(make, dtypes):
    compare(make(), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("make", [euler, multistep])
def test_999_steps(make):
    compare(make(), 999)


@pytest.mark.parametrize("options", [{}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min"}])
@pytest.mark.parametrize("places", [[0.0, 0.25, 0.5, 1.0], [0.1, 0.11, 0.9]])
def test_given_sigmas_are_places_in_the_reference(options, places):
    compare(euler(**options), None, sigmas=torch.tensor(places, dtype=torch.float64))


def test_by_name_given_sigmas_are_sigmas_and_sigma_min_is_where_it_lands():
    plan = EDMEuler().plan(None, sigmas=[10.0, 3.0, 0.5, 0.0])
    assert plan.sigmas.tolist() == [10.0, 3.0, 0.5, 0.0]
    for kind in (EDMEuler, EDMMultistep):
        plan = kind(final_sigma="sigma_min").plan(None, 5)
        assert len(plan) == 5
        assert plan.sigmas[-1] == pytest.approx(0.002, rel=1e-5)
        assert bool((plan.sigmas[:-1] > 1.5 * plan.sigmas[1:]).all())
        theirs = kind(final_sigma="sigma_min", like_diffusers=True).plan(None, 5)
        assert theirs.sigmas[-1] == pytest.approx(float(theirs.sigmas[-2]), rel=1e-5)


def test_what_the_reference_can_not_do():
    c = multistep(solver_order=3, algorithm_type="sde-dpmsolver++")
    ref = reference(c)
    ref.set_timesteps(20)
    x = torch.ones(1, 4, 2, 2)
    for t in ref.timesteps[:2]:
        ref.step(x, t, x)
    with pytest.raises(UnboundLocalError):
        ref.step(x, ref.timesteps[2], x)
    with pytest.raises(ConfigError, match="solver_order=3 does not go with sde"):
        Scheduler.from_diffusers(c)
    for make in (euler, multistep):
        with pytest.raises(ConfigError, match="prediction_type='sample'"):
            Scheduler.from_diffusers(make(prediction_type="sample"))
    with pytest.raises(ValueError, match="not supported"):
        reference(multistep(algorithm_type="deis"))
    with pytest.raises(ConfigError, match="needs final_sigmas_type='sigma_min'"):
        Scheduler.from_diffusers(multistep(algorithm_type="deis"))
    with pytest.raises(ConfigError, match="solver_type='rk' is none of"):
        Scheduler.from_diffusers(multistep(solver_type="rk"))
    with pytest.raises(ConfigError, match="must rise from above 0"):
        Scheduler.from_diffusers(euler(sigma_min=90.0))


@pytest.mark.parametrize("make", [euler, multistep])
def test_the_familiar_loop(make):
    ours, theirs = Scheduler.from_diffusers(make()), reference(make())
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    x = y = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x * ours.init_noise_sigma, x * theirs.init_noise_sigma)
    t = ours.timesteps[3:4]
    assert torch.equal(ours.add_noise(x, x + 1, t), theirs.add_noise(x, x + 1, t))
    for t in ours.timesteps:
        seen = ours.scale_model_input(x, t)
        assert torch.equal(seen, theirs.scale_model_input(y, t))
        x, y = ours.step(torch.sin(seen), t, x), theirs.step(torch.sin(seen), t, y).prev_sample
        assert torch.equal(x, y)
