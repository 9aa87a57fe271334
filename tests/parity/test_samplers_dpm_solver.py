"""DPM-Solver and DPM-Solver++, multistep, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import DPMSolver, Scheduler
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, COSINE, PREDICTIONS, SIGMAS_AND_LU, SPACINGS
from tests.parity.lambda_twins import chains, refuses_to_step, starts, turn
from tests.parity.sampler_twins import SHAPE, compare, config, label, reference
from tests.tolerances import EXPANSION, assert_close

# what each algorithm can do: epsilon can't reach sigma 0, and sde-dpmsolver has no order 3
SOLVERS = [
    *({"algorithm_type": a, "solver_order": n} for a in ("dpmsolver++", "sde-dpmsolver++") for n in (1, 2, 3)),
    *({"algorithm_type": "dpmsolver", "solver_order": n, "final_sigmas_type": "sigma_min"} for n in (1, 2, 3)),
    *({"algorithm_type": "sde-dpmsolver", "solver_order": n, "final_sigmas_type": "sigma_min"} for n in (1, 2)),
]
KINDS = ("midpoint", "heun")
ENDS = (
    {},
    {"lower_order_final": False},
    {"euler_at_final": True},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
)


def dpm(**options):
    return config("DPMSolverMultistepScheduler", **options)


ALL = [
    dpm(**a, solver_type=k, prediction_type=turn(PREDICTIONS, i), **turn(SPACINGS, i))
    for i, (a, k) in enumerate(product(SOLVERS, KINDS))
]
ALL += [
    dpm(**{**turn(ENDS, i), **turn(SOLVERS, i)}, **s, prediction_type=p)
    for i, (s, p) in enumerate(product(SIGMAS_AND_LU, PREDICTIONS))
]
ALL += [dpm(**e, solver_order=n) for e, n in product(ENDS, (2, 3))]
ALL += [dpm(**turn(SOLVERS, i + 4), **s, thresholding=True, sample_max_value=1.5) for i, s in enumerate(SPACINGS)]
ALL += [
    dpm(**a, thresholding=True, dynamic_thresholding_ratio=0.9, prediction_type=p)
    for a, p in product((SOLVERS[1], SOLVERS[7]), PREDICTIONS)
]
ALL += [dpm(**turn(SIGMAS_AND_LU, i), **COSINE, lambda_min_clipped=-5.1, **s) for i, s in enumerate(SPACINGS)]
ALL += [dpm(**COSINE, **s) for s in SIGMAS_AND_LU[1:]]
ALL += [dpm(lambda_min_clipped=-2.0, **s) for s in SPACINGS]
ALL += [dpm(rescale_betas_zero_snr=True, **s, prediction_type="v_prediction") for s in SPACINGS]
ALL += [dpm(rescale_betas_zero_snr=True, algorithm_type="sde-dpmsolver++", solver_order=3)]
ALL += [
    dpm(**s, sigma_min=0.05, sigma_max=20.0) for s in SIGMAS_AND_LU
]  # a sibling's options, which it heeds all the same
ALL += [dpm(trained_betas=BETAS), dpm(num_train_timesteps=400), {"_class_name": "DPMSolverMultistepScheduler"}]
ALL += [
    dpm(beta_schedule="linear"),
    dpm(algorithm_type="deis", solver_type="logrho", final_sigmas_type="sigma_min"),
    dpm(solver_type="bh2"),
]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    chains(c)


@pytest.mark.parametrize("c", ALL[::3], ids=label)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", ALL[::10], ids=label)
def test_from_every_row(c):
    starts(c)


@pytest.mark.parametrize(
    "c", [dpm(), dpm(solver_order=3, timestep_spacing="trailing"), dpm(use_karras_sigmas=True)], ids=label
)
def test_999_steps(c):
    compare(c, 999)


def test_trailing_row_too_many_of_the_reference():
    compare(dpm(timestep_spacing="trailing"), 61)
    compare(dpm(timestep_spacing="trailing", final_sigmas_type="sigma_min"), 61)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(algorithm, dtypes):
    for prediction in PREDICTIONS:
        c = dpm(algorithm_type=algorithm, solver_order=3, prediction_type=prediction)
        compare(c, 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("timesteps", [[999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500], [998, 17, 0]], ids=len)
def test_custom_timesteps(timesteps):
    for options in ({}, {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {"solver_order": 3}):
        if timesteps[-1] or "final_sigmas_type" not in options:  # else the last sigma is there twice
            compare(dpm(**options), None, timesteps=timesteps)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_learned_variance_is_left_out(algorithm):
    """The reference keeps 3 channels, whatever the sample has."""
    for kind in ("learned", "learned_range"):
        c = dpm(algorithm_type=algorithm, variance_type=kind, final_sigmas_type="sigma_min")
        compare(c, 7, shape=(2, 3, 4, 5))
        with pytest.raises(ConfigError, match="goes with prediction_type='epsilon'"):
            Scheduler.from_diffusers({**c, "prediction_type": "v_prediction"})


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 1000, "steps=1000 of spacing='linspace' visit a timestep twice"),
        ({"timestep_spacing": "leading"}, 1000, "steps=1000 of spacing='leading' visit a timestep twice"),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 999, "use fewer steps or steps_offset=0"),
        ({"timestep_spacing": "trailing", "solver_order": 3, "final_sigmas_type": "sigma_min"}, 61, "order 3 at rows"),
    ],
)
def test_where_the_reference_gives_nan(options, steps, message):
    """Trap: limits of the reference."""
    if steps < 1000:  # there the reference takes its repeated timesteps for the last, and runs out of the table
        assert refuses_to_step(dpm(**options), steps)
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_diffusers(dpm(**options)).set_timesteps(steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm_type": "dpmsolver"}, "needs final_sigma='sigma_min'"),
        ({"algorithm_type": "deis"}, "needs final_sigmas_type='sigma_min'"),
        ({"algorithm_type": "odd"}, "algorithm='odd' is none of"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
    ],
)
def test_what_neither_can_do(options, message):
    with pytest.raises((ValueError, NotImplementedError)):
        reference(dpm(**options))
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_diffusers(dpm(**options))


def test_sde_dpmsolver_has_no_third_order():
    c = dpm(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")
    with pytest.raises(UnboundLocalError):
        refuses_to_step(c, 20)
    with pytest.raises(ConfigError, match="has no order 3"):
        Scheduler.from_diffusers(c)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_timesteps_with_a_sigma_spacing_raise_in_both(option):
    with pytest.raises(ValueError, match="Cannot"):
        reference(dpm(**{option: True})).set_timesteps(timesteps=[900, 3])
    with pytest.raises(ConfigError, match="timesteps can't be given with sigma_spacing"):
        Scheduler.from_diffusers(dpm(**{option: True})).set_timesteps(timesteps=[900, 3])


def test_third_order_sde_has_the_right_sign_unless_like_diffusers():
    """The expansion of the exponential has (1 - exp(-2h) - 2h) / (2h)**2 + 1/2, which falls to 0 with h."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    options = {"algorithm": "sde-dpmsolver++", "solver_order": 3}
    ours, theirs = (DPMSolver(**options, like_diffusers=like).plan(schedule, 50) for like in (False, True))
    assert bool((ours.rows.d2[2:-1] > 0).all())
    gap = ours.rows.d2 - theirs.rows.d2
    assert torch.allclose(gap[2:-1], ours.signal[3:])
    phi = ours.rows.d2[2:-1].double() / ours.signal[3:].double()
    h = 2 * ours.levels.h[2:-1].double()
    assert_close(phi, (-torch.expm1(-h) - h) / h**2 + 0.5, EXPANSION)


def test_timesteps_of_karras_are_fractions_unless_like_diffusers():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    ours, theirs = (DPMSolver(sigma_spacing="karras", like_diffusers=k).plan(schedule, 20) for k in (False, True))
    assert ours.timesteps.dtype == torch.float32
    assert theirs.timesteps.tolist() == ours.timesteps.round().tolist()


def test_a_plan_by_name_lands_on_the_smallest_sigma_with_its_last_step():
    """In the reference karras is there before, and the last step does nothing."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    options = {"sigma_spacing": "karras", "final_sigma": "sigma_min"}
    ours, theirs = (DPMSolver(**options, like_diffusers=like).plan(schedule, 10) for like in (False, True))
    assert ours.levels.h[-1] > 0.1 > 1e-4 > theirs.levels.h[-1].abs()
    assert ours.sigmas[-1] == pytest.approx(float(theirs.sigmas[-1]))


def test_add_noise():
    ours, theirs = Scheduler.from_diffusers(dpm()), reference(dpm())
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x0, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for row in range(20):
            want = theirs.add_noise(x0, noise, theirs.timesteps[row : row + 1])
            assert torch.equal(ours.add_noise(x0, noise, ours.timesteps[row : row + 1]), want)
            assert torch.equal(ours.plan.add_noise(x0, noise, row), want)
        both = theirs.timesteps[[3, 9]]
        assert torch.equal(ours.add_noise(x0, noise, both), theirs.add_noise(x0, noise, both))
