"""Samplers against diffusers: behaviour of single samplers that the table in ``sampler_cases.py`` does not cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchsde
from scipy import integrate

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import (
    CM,
    DDIM,
    DEIS,
    DPM2,
    DPMSDE,
    IPNDM,
    LMS,
    TCD,
    DDIMInverse,
    DPM2Ancestral,
    DPMSolver,
    DPMSolverInverse,
    DPMSolverSinglestep,
    EDMEuler,
    EDMMultistep,
    Heun,
    Scheduler,
    UniPC,
    sampler_from_diffusers,
    schedule_from_diffusers,
)  # fmt: skip
from minidiff.samplers.arithmetic import rates
from minidiff.samplers.brownian import BrownianTree
from minidiff.samplers.lms import NODES, adams_bashforth_coefs
from minidiff.schedule import NoiseSchedule, v_from_x0
from tests.support.parity.axes import SIGMAS, TO_MIN
from tests.support.parity.sampler_cases import (
    EDM_SOLVERS,
    KDPM2,
    ZERO_SNR,
    bare,
    cm,
    dpm,
    dpm_inverse,
    edm_multistep,
    heun,
    lms,
    sde,
    single,
)  # fmt: skip
from tests.support.parity.sampler_twins import SHAPE, compare, config, label, reference
from tests.tolerances import EXPANSION, WEIGHTS_SUM, Tolerance, assert_close

# --- DDPM, DDIM and its inverse -------------------------------------------------------------------------------------


def test_ddim_where_rounding_makes_the_reference_nan():
    """eta 1 at zero terminal SNR: 1 - alpha_bar_prev - std**2 is 0 but for rounding, which processors do otherwise.
    Where the reference gives NaN, and only there, the plan is refused."""
    c = config("DDIMScheduler", **ZERO_SNR, prediction_type="v_prediction", clip_sample=False, eta=1.0)
    ref, x = reference(c), torch.zeros(SHAPE)
    schedule = NoiseSchedule.from_config(schedule_from_diffusers(c))
    broken = []
    for n in range(2, 100):
        ref.set_timesteps(n)
        if ref.step(x, ref.timesteps[0], x, eta=1.0).prev_sample.isnan().any():
            broken.append(n)
            with pytest.raises(ConfigError, match="rows \\[0\\]"):
                sampler_from_diffusers(c).plan(schedule, n)
        else:
            sampler_from_diffusers(c).plan(schedule, n)
    assert broken, "rounding breaks the reference for no number of steps: choose others"
    compare(c, next(n for n in range(20, 100) if n not in broken))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_pure_noise_in_the_last_row_is_refused_before_the_first_call(name):
    """61 steps of trailing spacing end with a row too many, at timestep -1, which reads the table's last alpha_bar: 0.
    x is a picture by then, clamped to whole values, and where the model answers the same, x0 is 0 / 0."""
    c = config(name, **ZERO_SNR)
    ref = reference(c)
    ref.set_timesteps(61)
    x = torch.ones(SHAPE, dtype=torch.bfloat16)
    assert ref.timesteps[-1] == -1
    assert ref.step(x, ref.timesteps[-1], x).prev_sample.isnan().all()
    with pytest.raises(ConfigError, match=r"x0 is not finite at row 61, timestep -1, .*or another number of steps"):
        Scheduler.from_diffusers(c).set_timesteps(61)
    compare(c, 60)
    compare({**c, "prediction_type": "v_prediction"}, 61)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler"])
def test_an_answer_that_equals_pure_noise_is_an_error_and_not_nan(name):
    c = config(name, **ZERO_SNR, clip_sample=True)
    ref, ours = reference(c), Scheduler.from_diffusers(c)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    out = -x
    out[0, 0, 0, 0] = x[0, 0, 0, 0]
    for s in (ref, ours):
        s.set_timesteps(5)
    t = ref.timesteps[0]
    assert ref.step(out, t, x).prev_sample.isnan().sum() == 1
    with pytest.raises(ConfigError, match=r"x0 is 0 / 0 where the model's answer equals x, .*use a v_prediction model"):
        ours.step(out, t, x)
    assert ours.step(-x, t, x).isfinite().all()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_takes_back_what_its_inverse_does(spacing):
    """With one and the same epsilon at every step, and by name: there and back again."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    there, back = DDIMInverse(spacing=spacing), DDIM(spacing=spacing)
    plan, plan_back = there.plan(schedule, 7), back.plan(schedule, 7)
    assert plan.timesteps.tolist() == plan_back.timesteps.tolist()[::-1]
    start, epsilon = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x = start
    for i in range(7):
        x, _ = there.step(plan, i, x, epsilon, (), torch.zeros_like)
    for i in range(7):
        x, _ = back.step(plan_back, i, x, epsilon, (), torch.zeros_like)
    assert_close(x, start, Tolerance(2e-5, 0.0, "rounding, divided by sqrt(alpha_bar) as small as 0.07"))


# --- iPNDM, consistency models --------------------------------------------------------------------------------------


def test_trained_betas_of_ipndm_are_refused():
    """In the reference they make as many rows as there are of them, whatever the number of steps."""
    c = {**bare("IPNDMScheduler"), "trained_betas": [0.9, 0.5, 0.1]}
    ref = reference(c)
    ref.set_timesteps(50)
    assert len(ref.timesteps) == 2
    with pytest.raises(ConfigError, match="trained_betas are the noise of every row"):
        Scheduler.from_diffusers(c)


def test_a_perfect_model_of_ipndm_gives_the_picture():
    sampler, plan = IPNDM(), IPNDM().plan(None, 12)
    x0, epsilon = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x, state = plan.rows.told_signal[0] * x0 + plan.rows.told_noise[0] * epsilon, sampler.start()
    for i in range(12):
        v = v_from_x0(x0, epsilon, plan.rows.told_signal[i], plan.rows.told_noise[i])
        if i:
            assert_close(sampler.denoised(plan, i, x, v, state), x0, Tolerance(1e-5, 0.0, "rounding of float32"))
        x, state = sampler.step(plan, i, x, v, state, torch.zeros_like)
        if i == 0:  # from pure noise nothing of the picture is known; the method takes it for 0
            x = plan.rows.to_signal[0] * x0 + plan.rows.to_noise[0] * epsilon
    assert_close(x, x0, Tolerance(1e-5, 0.0, "rounding of float32"))


def test_where_rounding_makes_the_last_step_of_the_reference_nan():
    """float32(sigma_min)**2 may lie below sigma_min**2, and the root of the difference is asked for."""
    bad = [v for v in np.linspace(0.001, 0.01, 37).tolist() if ends_in_nan(cm(sigma_min=v))]
    good = [v for v in np.linspace(0.001, 0.01, 37).tolist() if v not in bad]
    assert 5 <= len(bad) <= 32
    for v in bad:
        with pytest.raises(ConfigError, match=r"root of a negative number or NaN at rows \[2\]"):
            Scheduler.from_diffusers(cm(sigma_min=v)).set_timesteps(3)
        assert CM(sigma_min=v).plan(None, 3).rows.fresh[-1] == 0
    for v in good:
        compare(cm(sigma_min=v), 3)


def ends_in_nan(c):
    ref = reference(c)
    ref.set_timesteps(3)
    x = torch.ones(1, 4, 2, 2)
    for t in ref.timesteps:
        x = ref.step(x, t, x).prev_sample
    return not bool(x.isfinite().all())


@pytest.mark.parametrize("n", [1, 4, 50])
def test_tcd_over_all_timesteps_of_training(n):
    """Way of the reference when original_inference_steps is an argument, whatever its value."""
    ref, ours = reference(config("TCDScheduler")), TCD(original_steps=None)
    ref.set_timesteps(n, original_inference_steps=50)
    schedule = Scheduler.from_diffusers(config("TCDScheduler")).schedule
    assert_close(ours.plan(schedule, n).timesteps, ref.timesteps)


# --- Heun, DPM2, LMS ------------------------------------------------------------------------------------------------


def test_heun_by_name_refuses_to_start_inside_an_interval():
    ours = Scheduler.from_diffusers(heun())
    plan, x = Heun().plan(ours.schedule, 5), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match="can't start at row 3"):
        Heun().step(plan, 3, x, x, Heun().start(), torch.zeros_like)


@pytest.mark.parametrize("sampler", [DPM2(), DPM2Ancestral(like_diffusers=True)])
def test_dpm2_refuses_to_start_in_the_middle_of_an_interval(sampler):
    plan, x = sampler.plan(Scheduler.from_diffusers(config(KDPM2[0])).schedule, 5), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match="can't start at row 3"):
        sampler.step(plan, 3, x, x, sampler.start(), torch.zeros_like)


def test_karras_timesteps_of_dpm2_by_name_are_not_rounded():
    schedule = Scheduler.from_diffusers(config(KDPM2[0])).schedule
    ours, theirs = (DPM2(sigma_spacing="karras", like_diffusers=like).plan(schedule, 10) for like in (False, True))
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps[2::2].round(), theirs.timesteps[2::2].float())
    assert not torch.equal(ours.timesteps[2::2], theirs.timesteps[2::2].float())
    assert ours.timesteps.dtype == torch.float32


@pytest.mark.parametrize("name", KDPM2)
def test_the_noise_of_every_row_of_dpm2(name):
    """Latents that inpainting by an ordinary model puts around the hole after each call, within an interval too."""
    c = config(name)
    theirs = reference(c)
    theirs.set_timesteps(6)
    plan = sampler_from_diffusers(c).plan(NoiseSchedule.from_config(ScheduleConfig()), 6)
    x, noise = torch.randn(2, *SHAPE).unbind()
    for i, t in enumerate(theirs.timesteps):
        assert_close(plan.add_noise(x, noise, i), theirs.add_noise(x, noise, t.expand(len(x))), where=f"row {i}")


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


def test_the_order_of_lms_is_checked():
    with pytest.raises(ConfigError, match=r"solver_order=9 must lie in 1\.\.8"):
        LMS(solver_order=9)


# --- DPM++ SDE and its Brownian tree --------------------------------------------------------------------------------


def test_the_tree_draws_what_torchsde_draws():
    a, b = torch.rand(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torchsde.BrownianInterval(
        t0=0.03, t1=14.6, size=(2, 3), dtype=torch.float32, entropy=11, tol=1e-6, pool_size=24, halfway_tree=True
    )
    tree = BrownianTree(0.03, 14.6, 11)
    for low, high in (torch.stack([torch.minimum(a, b), torch.maximum(a, b)], dim=1) * 14 + 0.1).tolist():
        ours = tree.increment(low, high, torch.empty(2, 3))
        assert torch.equal(ours, theirs(low, high))
    assert torch.equal(tree.increment(5.0, 5.0, torch.empty(2, 3)), torch.zeros(2, 3))


def test_a_run_can_not_begin_in_the_middle_of_an_interval():
    """The reference gives NaN there."""
    ours, ref = Scheduler.from_diffusers(sde()), reference(sde())
    ours.set_timesteps(5)
    ref.set_timesteps(5)
    ref.set_begin_index(3)
    x = torch.ones(1, 4, 2, 2)
    assert not bool(ref.step(x, ref.timesteps[3], x).prev_sample.isfinite().any())
    with pytest.raises(ConfigError, match="can't start at row 3, in the middle"):
        ours.step(x, ours.timesteps[3], x)


def test_without_a_seed_both_draws_of_an_interval_lie_on_one_path():
    sampler = DPMSDE()
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 5)
    torch.testing.assert_close(plan.rows.first_part[1::2] ** 2 + plan.rows.second_part[1::2] ** 2, torch.ones(4))
    x, made = torch.zeros(1, 4, 64, 64), torch.Generator().manual_seed(0)

    def draw(like):
        return torch.randn(like.shape, generator=made)

    middle, state = sampler.step(plan, 0, x, x, sampler.start(), draw)
    first = state.noise
    end, _ = sampler.step(
        plan, 1, middle, middle / plan.levels.here[1], state, draw
    )  # an x0 of 0, as in the first call
    second = end / plan.rows.sigma_up[1]
    assert abs(float(second.std()) - 1) < 0.02
    share = (plan.levels.here[0] - plan.levels.here[1]) / (plan.levels.here[0] - plan.sigmas[1])
    assert abs(float((first * second).mean()) - float(share**0.5)) < 0.03


# --- in lambda ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_a_learned_variance_is_left_out(algorithm):
    """The reference keeps 3 channels, whatever the sample has."""
    for kind in ("learned", "learned_range"):
        c = dpm(algorithm_type=algorithm, variance_type=kind, final_sigmas_type="sigma_min")
        compare(c, 7, shape=(2, 3, 4, 5))
        with pytest.raises(ConfigError, match="goes with prediction_type='epsilon'"):
            Scheduler.from_diffusers({**c, "prediction_type": "v_prediction"})


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


def test_dpm_solver_by_name_lands_on_the_smallest_sigma_with_its_last_step():
    """In the reference karras is there before, and the last step does nothing."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    options = {"sigma_spacing": "karras", "final_sigma": "sigma_min"}
    ours, theirs = (DPMSolver(**options, like_diffusers=like).plan(schedule, 10) for like in (False, True))
    assert ours.levels.h[-1] > 0.1 > 1e-4 > theirs.levels.h[-1].abs()
    assert ours.sigmas[-1] == pytest.approx(float(theirs.sigmas[-1]))


def test_noise_is_added_as_in_the_reference():
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


def test_a_learned_variance_is_left_out_of_singlesteps():
    compare(single(variance_type="learned_range"), 7, shape=(2, 3, 4, 5))


def test_third_order_sde_of_singlesteps_has_the_right_sign_unless_like_diffusers():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    options = {"algorithm": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}
    ours, theirs = (DPMSolverSinglestep(**options, like_diffusers=like).plan(schedule, 31) for like in (False, True))
    third = [i for i, order in enumerate(ours.rows.order) if order == 3]
    assert torch.allclose((ours.rows.d2 - theirs.rows.d2)[third, 2], rates(ours.levels.to)[0][third])
    assert bool((ours.rows.d2[third, 2] > 0).all())


def test_dpm_inverse_drops_timesteps_but_not_sigmas_in_the_reference():
    c = dpm_inverse(use_karras_sigmas=True)
    compare(c, 50)
    ours = Scheduler.from_diffusers(c)
    ours.set_timesteps(50)
    assert len(ours.timesteps) < 50 == len(ours.sigmas) - 1


def test_a_perfect_model_takes_the_picture_to_its_noise_and_back():
    """With one epsilon, from the smallest sigma to the largest, and by name."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    there = DPMSolverInverse(algorithm="dpmsolver", final_sigma="sigma_min", sigma_spacing="karras")
    back = DPMSolver(algorithm="dpmsolver", final_sigma="sigma_min", sigma_spacing="karras")
    start, epsilon = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x = start
    for sampler in (there, back):
        plan, state = sampler.plan(schedule, 7), sampler.start()
        for i in range(7):
            x, state = sampler.step(plan, i, x, epsilon, state, torch.zeros_like)
    assert_close(x, start, Tolerance(2e-5, 0.0, "rounding, divided by sqrt(alpha_bar) as small as 0.07"))


def test_deis_by_name_lands_on_the_smallest_sigma_with_its_last_step():
    """In the reference karras is there before, and the last step does nothing."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    ours, theirs = (DEIS(sigma_spacing="karras", like_diffusers=like).plan(schedule, 10) for like in (False, True))
    assert ours.levels.h[-1] > 0.1 > theirs.levels.h[-1] == 0
    assert torch.allclose(ours.sigmas[-1], theirs.sigmas[-1])


def test_bh1_by_name_reaches_sigma_0():
    """The term that is NaN in the reference counts for nothing in a step of order 1: the result is x0 itself."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    sampler = UniPC(solver_type="bh1")
    plan = sampler.plan(schedule, 5)
    x, out = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    after, _ = sampler.step(plan, 4, x, out, sampler.start(), torch.zeros_like)
    assert torch.equal(after, sampler.denoised(plan, 4, x, out, sampler.start()))


# --- EDM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [edm_multistep(**TO_MIN, **o) for o in EDM_SOLVERS], ids=label)
def test_edm_landing_on_sigma_min(c):
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
