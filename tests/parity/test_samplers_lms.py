"""LMS, chained against diffusers and its quadrature by scipy: equal bits at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy import integrate

from minidiff.errors import ConfigError
from minidiff.samplers import LMS, Scheduler
from minidiff.samplers.lms import NODES, adams_bashforth_coefs
from tests.parity.axes import BETAS, PREDICTIONS, SIGMAS, SPACINGS
from tests.parity.sampler_twins import compare, compare_all, compare_some, compare_starts, config, label, reference
from tests.tolerances import WEIGHTS_SUM, assert_close


def lms(**options):
    return config("LMSDiscreteScheduler", **options)


ALL = [{**lms(**s, **g), "prediction_type": PREDICTIONS[i % 3]} for i, (s, g) in enumerate(product(SPACINGS, SIGMAS))]
ALL += [lms(order=o, **g) for o, g in zip((1, 2, 3, 8), SIGMAS, strict=True)]
ALL += [lms(beta_schedule=b, beta_start=0.0001, beta_end=0.02) for b in ("linear", "squaredcos_cap_v2")]
ALL += [lms(trained_betas=BETAS), lms(num_train_timesteps=400), {"_class_name": "LMSDiscreteScheduler"}]


@pytest.mark.parametrize(("turn", "c"), enumerate(ALL), ids=lambda v: label(v) if isinstance(v, dict) else "")
def test_trajectories(turn, c):
    compare_some(c, turn)


@pytest.mark.parametrize("c", ALL[::9], ids=label)
def test_every_length_in_every_dtype(c):
    compare_all(c, (1, 2, 3, 5, 20))


@pytest.mark.parametrize("c", ALL[::6], ids=label)
def test_50_steps(c):
    compare(c, 50)


@pytest.mark.parametrize("c", ALL[2::14], ids=label)
def test_from_every_row(c):
    compare_starts(c)


def test_trailing_row_too_many_of_the_reference():
    compare(lms(timestep_spacing="trailing"), 61)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_sample_and_model_of_different_dtypes(dtypes):
    compare(lms(prediction_type="v_prediction"), 10, dtypes[0], out_dtype=dtypes[1])


@pytest.mark.parametrize("option", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
@pytest.mark.parametrize("n", [30, 200])
def test_coefficients_are_those_of_scipy(option, n):
    ref = reference(lms(**option))
    ref.set_timesteps(n)
    ours = adams_bashforth_coefs(ref.sigmas, 8)
    for i in range(7, n, n // 8):
        for order in (2, 3, 4, 6, 8):
            theirs = [ref.get_lms_coefficient(order, i, k) for k in range(order)]
            assert torch.equal(ours[i, order - 1, :order], torch.tensor(theirs, dtype=torch.float32)), (i, order)


def test_the_rule_is_quadpacks():
    total, _ = integrate.quad(lambda v: v**20 + v**3 + 1, -1, 1)
    ours = sum(w * (2 * x**20 + 2 if x else 1) for x, w in NODES)
    assert ours == pytest.approx(total, rel=1e-14)


@pytest.mark.parametrize("option", SIGMAS)
def test_all_weights_add_up_to_the_interval(option):
    """Whatever the order: a constant slope is integrated exactly, up to float32."""
    plan = Scheduler.from_diffusers(lms(**option))
    plan.set_timesteps(12)
    dt = (plan.sigmas[1:] - plan.sigmas[:-1])[3:]
    sums = plan.plan.rows.coefs[3:].sum(dim=2)
    assert_close(sums, dt[:, None].expand(-1, 4), WEIGHTS_SUM)


def test_order_is_checked():
    with pytest.raises(ConfigError, match=r"solver_order=9 must lie in 1\.\.8"):
        LMS(solver_order=9)
    with pytest.raises(ConfigError, match="solver_order=0 must lie"):
        Scheduler.from_diffusers(lms(order=0))


def test_two_equal_sigmas_are_not_finite_in_the_reference_and_refused():
    """1000 steps with offset 1 visit timesteps 1000 and 999, whose sigmas are the same: its weights divide by 0."""
    c = lms(timestep_spacing="leading", steps_offset=1)
    ref = reference(c)
    ref.set_timesteps(1000)
    x = torch.ones(1, 1, 2, 2)
    for t in ref.timesteps[:2]:
        x = ref.step(x, t, ref.scale_model_input(x, t)).prev_sample
    assert not x.isfinite().any()
    with pytest.raises(
        ConfigError, match=r"LMS: no finite coefficients at rows \[1.*use fewer steps or steps_offset=0"
    ):
        Scheduler.from_diffusers(c).set_timesteps(1000)
    Scheduler.from_diffusers(c).set_timesteps(999)
