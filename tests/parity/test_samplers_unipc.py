"""UniPC, chained against diffusers: equal bits at every step."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler, UniPC
from minidiff.schedule import NoiseSchedule
from tests.parity.axes import BETAS, COSINE, PREDICTIONS, SIGMAS, SPACINGS, TO_MIN
from tests.parity.lambda_twins import chains, refuses_to_step, starts, turn
from tests.parity.sampler_twins import DTYPES, compare, config, label, reference, walk_reference

# bh1 and epsilon are NaN at sigma 0
SOLVERS = [
    *({"solver_order": n} for n in (1, 2, 3)),
    *({"solver_order": n, "solver_type": "bh1", **TO_MIN} for n in (1, 2, 3)),
    *({"solver_order": n, "predict_x0": False, **TO_MIN} for n in (1, 2, 3)),
    *({"solver_order": n, "solver_type": "bh1", "predict_x0": False, **TO_MIN} for n in (2, 3)),
]


def unipc(**options):
    return config("UniPCMultistepScheduler", **options)


ALL = [unipc(**s, prediction_type=turn(PREDICTIONS, i), **turn(SPACINGS, i)) for i, s in enumerate(SOLVERS)]
ALL += [unipc(**turn(SOLVERS, 2 * i), **g, prediction_type=p) for i, (g, p) in enumerate(product(SIGMAS, PREDICTIONS))]
ALL += [unipc(**s, disable_corrector=d) for s, d in product(SOLVERS[1:8:3], ([0], [0, 1, 2], [3, 7]))]
ALL += [unipc(**{**s, **TO_MIN}, lower_order_final=False) for s in SOLVERS[::2]]
ALL += [unipc(**g, **TO_MIN) for g in SIGMAS]
ALL += [unipc(**turn(SOLVERS, i), **turn(SPACINGS, i), thresholding=True, sample_max_value=1.5) for i in range(4)]
ALL += [unipc(**g, **COSINE) for g in SIGMAS]
ALL += [unipc(**g, sigma_min=0.05, sigma_max=20.0) for g in SIGMAS]
ALL += [unipc(rescale_betas_zero_snr=True, **s, prediction_type="v_prediction") for s in SPACINGS]
ALL += [unipc(trained_betas=BETAS), unipc(num_train_timesteps=400), {"_class_name": "UniPCMultistepScheduler"}]
ALL += [unipc(solver_type="midpoint", beta_schedule="linear")]


@pytest.mark.parametrize("c", ALL, ids=label)
def test_trajectories(c):
    chains(c)


@pytest.mark.parametrize("c", ALL[::2], ids=label)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", ALL[::7], ids=label)
def test_from_every_row(c):
    starts(c)


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_a_last_interval_without_length(solver, predict_x0):
    """Order 2 walks it, to no effect; order 3 is NaN there in the reference, and refused."""
    given = {"solver_type": solver, "predict_x0": predict_x0, "use_karras_sigmas": True, "lower_order_final": False}
    for n in (2, 3, 20):
        compare(unipc(solver_order=2, **given, **TO_MIN), n)
    with pytest.raises(ConfigError, match="no finite coefficients of order 3"):
        compare(unipc(solver_order=3, **given, **TO_MIN), 3)


def test_many_steps_and_the_row_too_many():
    compare(unipc(solver_order=3), 999)
    compare(unipc(timestep_spacing="trailing"), 61)


@pytest.mark.parametrize("dtypes", list(permutations(DTYPES, 2)), ids=str)
def test_sample_and_model_of_different_dtypes(dtypes):
    """In a step of order 3 the reference multiplies matrices of both, and raises."""
    refused = 0
    for prediction, solver in product(PREDICTIONS, SOLVERS):
        c = unipc(prediction_type=prediction, **solver)
        try:
            compare(c, 10, dtypes[0], out_dtype=dtypes[1])
        except ConfigError:
            with pytest.raises(RuntimeError, match="expected"):
                walk_reference(c, {"num_inference_steps": 10}, *dtypes)
            refused += 1
    assert 3 <= refused <= 12


def test_where_the_reference_gives_nan():
    """Trap: limits of the reference."""
    cases = [
        (unipc(timestep_spacing="leading", steps_offset=1), 999, "use fewer steps or steps_offset=0"),
        (unipc(solver_type="bh1"), 5, "solver_type='bh1' is NaN on the last step to sigma 0"),
        (unipc(predict_x0=False), 5, "no finite coefficients of order 1 at rows"),
        (unipc(lower_order_final=False), 5, "no finite coefficients of order 2 at rows"),
    ]
    for c, steps, message in cases:
        assert refuses_to_step(c, steps), label(c)
        with pytest.raises(ConfigError, match=message):
            Scheduler.from_diffusers(c).set_timesteps(steps)
    for spacing in SPACINGS[:2]:
        with pytest.raises(ConfigError, match=r"steps=1000 of spacing=.* visit a timestep twice"):
            Scheduler.from_diffusers(unipc(**spacing)).set_timesteps(1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_type": "odd"}, "solver_type='odd' is none of"),
        ({"shift_terminal": 0.1}, "shift_terminal belongs to flow matching"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
    ],
)
def test_what_neither_can_do(options, message):
    with pytest.raises((ValueError, NotImplementedError)):
        reference(unipc(**options))
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_diffusers(unipc(**options))


def test_another_scheduler_as_predictor_is_refused():
    with pytest.raises(ConfigError, match="solver_p is not supported"):
        Scheduler.from_diffusers(unipc(solver_p={"_class_name": "DDIMScheduler"}))


def test_bh1_by_name_reaches_sigma_0():
    """The term that is NaN in the reference counts for nothing in a step of order 1: the result is x0 itself."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    sampler = UniPC(solver_type="bh1")
    plan = sampler.plan(schedule, 5)
    x, out = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    after, _ = sampler.step(plan, 4, x, out, sampler.start(), torch.zeros_like)
    assert torch.equal(after, sampler.denoised(plan, 4, x, out, sampler.start()))
