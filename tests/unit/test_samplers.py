"""Samplers as plan, state and pure step: identities that hold without a reference."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.samplers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    LMS,
    PNDM,
    SAMPLERS,
    TCD,
    DDIMInverse,
    DPM2Ancestral,
    DPMSolver,
    DPMSolver3MSDE,
    DPMSolverInverse,
    DPMSolverSinglestep,
    Euler,
    EulerAncestral,
    Heun,
    SASolver,
    UniPC,
)
from minidiff.schedule import NoiseSchedule, v_from_x0
from tests.support.cuda_guard import fake_card
from tests.tolerances import Tolerance, assert_close

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
SHAPE = (2, 4, 3, 5)
PERFECT = Tolerance(2e-4, 0.0, "rounding of float32 over the steps; x is divided by sqrt(alpha_bar) as small as 0.07")

ALL = [
    DDPM(),
    DDPM(variance="fixed_large_log"),
    DDPM(variance="learned_range", clip=1.0),
    DDIM(),
    DDIM(eta=1.0, use_clipped=True, threshold=0.9),
    PNDM(),
    PNDM(runge_kutta=True),
    Euler(),
    Euler(s_churn=3.0, sigma_spacing="karras"),
    Euler(sigma_spacing="beta", spacing="trailing"),
    EulerAncestral(),
    DPMSolver(),
    DPMSolver(algorithm="dpmsolver", solver_type="heun", final_sigma="sigma_min", threshold=0.99, threshold_max=9.0),
    DPMSolver(algorithm="sde-dpmsolver++", solver_order=3, sigma_spacing="karras"),
    DEIS(solver_order=3, spacing="leading"),
    UniPC(solver_order=3),
    UniPC(solver_type="bh1", sigma_spacing="beta", disable_corrector=(1,)),
    SASolver(predictor_order=3, corrector_order=4, spacing="leading"),
    SASolver(algorithm="noise_prediction"),
    DPMSolverSinglestep(solver_order=3),
    DPMSolverSinglestep(algorithm="sde-dpmsolver++"),
    DDIMInverse(),
    DPMSolverInverse(),
    Heun(),
    Heun(sigma_spacing="karras", clip=9.0),
    LMS(),
    LMS(solver_order=2, spacing="trailing"),
    DPM2(),
    DPM2Ancestral(sigma_spacing="exponential"),
    TCD(),
]
DETERMINISTIC = [
    DDIM(),
    DDIM(set_alpha_to_one=True, spacing="trailing"),
    PNDM(),
    PNDM(spacing="trailing"),
    PNDM(spacing="linspace"),
    PNDM(runge_kutta=True),
    PNDM(runge_kutta=True, spacing="trailing"),
    Euler(),
    Euler(sigma_spacing="karras", spacing="leading"),
    Euler(interpolation="log_linear"),
    DPMSolver(),
    DPMSolver(solver_type="heun", lower_order_final=False, sigma_spacing="lu"),
    DPMSolver(solver_order=3, spacing="trailing"),
    UniPC(),
    UniPC(solver_order=3, solver_type="bh1", spacing="leading"),
    DPMSolverSinglestep(),
    DPMSolverSinglestep(solver_order=3, solver_type="heun", spacing="leading"),
    Heun(),
    Heun(spacing="leading", sigma_spacing="exponential"),
    LMS(),
    LMS(solver_order=3, sigma_spacing="karras"),
    DPM2(),
    DPM2(sigma_spacing="beta"),
]


def randn(shape=SHAPE, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def output(sampler, x):
    """A model output that fits ``sampler``: twice the channels where it learned the variance."""
    learned = str(getattr(sampler, "variance", "")).startswith("learned")
    return torch.cat([x, x.abs()], dim=1) if learned else x


def run(sampler, plan, predict, x, first=0, draw=lambda like: torch.zeros_like(like)):
    state = sampler.start()
    for i in range(first, len(plan)):
        out = predict(i, x)
        x, state = sampler.step(plan, i, x, out, state, draw)
    return x


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_a_step_is_pure(sampler):
    """Same arguments, same result; nothing that was passed in has changed."""
    plan = sampler.plan(SCHEDULE, 6)
    x, state = randn() * plan.init_noise_sigma, sampler.start()
    for i in range(len(plan)):
        out = output(sampler, randn(seed=i))
        before = [x.clone(), out.clone(), *(t.clone() for t in rows(plan).values())]
        once, after = sampler.step(plan, i, x, out, state, lambda like: torch.ones_like(like))
        twice, _ = sampler.step(plan, i, x, out, state, lambda like: torch.ones_like(like))
        sampler.denoised(plan, i, x, out, state)
        assert_close(once, twice)
        for a, b in zip(before, [x, out, *rows(plan).values()], strict=True):
            assert_close(a, b)
        x, state = once, after
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_a_plan_is_made_of_ready_levels(sampler):
    """Whoever chose them: the same levels give the same plan, and a part of them the first of its rows."""
    plan = sampler.plan(SCHEDULE, 6)
    again = sampler.plan_at(plan.levels._replace(first=plan.levels.first * 2), plan.prediction)
    assert_close(again.init_noise_sigma, plan.init_noise_sigma * 2)
    assert str(again).splitlines()[1:] == str(plan).splitlines()[1:]
    fewer = sampler.plan_at(plan.levels.part(slice(4)), plan.prediction)
    assert len(fewer) == 4
    assert_close(fewer.levels.to, plan.levels.to[:4])


def rows(plan):
    """Every tensor of the plan by name."""
    named = {**plan.levels._asdict(), **plan.levels.beside, **plan.rows._asdict()}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_an_earlier_state_can_be_used_again(sampler):
    """No hidden counters: going back to row 3 with its state gives the same steps once more."""
    plan = sampler.plan(SCHEDULE, 8)
    x, state, seen = randn() * plan.init_noise_sigma, sampler.start(), []
    for i in range(len(plan)):
        seen.append((x, state))
        x, state = sampler.step(plan, i, x, output(sampler, randn(seed=i)), state, lambda like: torch.ones_like(like))
    y, state = seen[3]
    for i in range(3, len(plan)):
        y, state = sampler.step(plan, i, y, output(sampler, randn(seed=i)), state, lambda like: torch.ones_like(like))
    assert_close(x, y)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_a_perfect_model_gives_the_picture_from_every_row(sampler, prediction):
    """With the true noise at every step, each deterministic method lands on x0, wherever it starts: image to image."""
    schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
    plan = sampler.plan(schedule, 12)
    x0, epsilon = randn(seed=1), randn(seed=2)
    end = SCHEDULE.alphas_cumprod[0] if not getattr(sampler, "set_alpha_to_one", True) else torch.tensor(1.0)
    want = end**0.5 * x0 + (1 - end) ** 0.5 * epsilon
    starts = [i for i in range(len(plan)) if not (getattr(sampler, "runge_kutta", False) and i < 12) or i % 4 == 0]
    starts = [i for i in starts if i % sampler.order == 0]
    for first in starts:
        a = plan.alpha_bars

        def predict(i, x, a=a):
            return epsilon if prediction == "epsilon" else v_from_x0(x0, epsilon, a[i] ** 0.5, (1 - a[i]) ** 0.5)

        x = plan.add_noise(x0, epsilon, first)
        if prediction == "v_prediction" and isinstance(sampler, PNDM):
            continue  # it combines v of several rows, which is exact for epsilon only
        assert_close(run(sampler, plan, predict, x, first), want, PERFECT, f"from row {first}")


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_denoised_by_a_perfect_model_is_the_picture(sampler):
    plan = sampler.plan(SCHEDULE, 10)
    x0, epsilon = randn(seed=1).clamp(-1, 1), randn(seed=2)
    for i in range(len(plan)):
        x = plan.add_noise(x0, epsilon, i)
        ours = sampler.denoised(plan, i, x, output(sampler, epsilon), sampler.start())
        assert_close(ours, x0, PERFECT)


def test_ddim_with_eta_1_has_the_variance_of_ddpm():
    ddim, ddpm = DDIM(eta=1.0, steps_offset=0, set_alpha_to_one=True).plan(SCHEDULE, 20), DDPM().plan(SCHEDULE, 20)
    bound = Tolerance(1e-6, 1e-5, "the same variance, multiplied out in another order")
    assert_close(ddim.rows.std[:-1], ddpm.rows.std[:-1], bound)


def test_pndm_does_the_first_interval_twice():
    """Trap: PNDM's repeated timestep (981, 961, 961, 941 ...)."""
    assert PNDM().plan(SCHEDULE, 50).timesteps[:5].tolist() == [981, 961, 961, 941, 921]
    assert PNDM(runge_kutta=True).plan(SCHEDULE, 50).timesteps[:14].tolist() == [
        *(981, 971, 971, 961),
        *(961, 951, 951, 941),
        *(941, 931, 931, 921),
        *(921, 901),
    ]
    assert PNDM().plan(SCHEDULE, 1).timesteps.tolist() == [1]


def test_previous_timestep_below_0():
    """Trap: -19 after 1; set_alpha_to_one decides between 1 and alphas_cumprod[0]."""
    plan = DDIM().plan(SCHEDULE, 50)
    assert plan.levels.landing[-1] == -19
    assert_close(plan.rows.x0_coef[-1], SCHEDULE.alphas_cumprod[0] ** 0.5)
    assert DDIM(set_alpha_to_one=True).plan(SCHEDULE, 50).rows.x0_coef[-1] == 1


def test_named_samplers_land_on_the_next_row_and_diffusers_does_not():
    """With trailing spacing and 7 steps the rows are 142.86 apart; the reference steps by 142."""
    for kind in (DDIM, PNDM):
        plan = kind(spacing="trailing").plan(SCHEDULE, 7)
        assert plan.levels.landing[:-1].tolist() == plan.timesteps[1:].tolist()
        like = kind(spacing="trailing", like_diffusers=True).plan(SCHEDULE, 7)
        assert like.levels.landing.tolist() == (like.timesteps - 142).tolist()


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS.values() if kind is not DPMSolver3MSDE])
def test_like_diffusers_changes_nothing_where_the_reference_is_right(kind):
    leading = {"spacing": "leading"} if hasattr(kind, "spacing") else {}
    for n in (4, 20, 40):
        ours, theirs = (kind(**leading, like_diffusers=like).plan(SCHEDULE, n) for like in (False, True))
        for name, row in rows(ours).items():
            # read from other rows to the same effect, or not read at all where a row does its interval again
            if name not in ("landing", "before", "up", "half") and (kind, name) != (PNDM, "to"):
                assert_close(row, rows(theirs)[name].to(row.dtype), where=name)  # DPM++ SDE's timesteps are float64
        x = randn() * ours.init_noise_sigma
        a, b = (
            run(kind(like_diffusers=like), plan, lambda i, x: randn(seed=i), x)
            for like, plan in ((False, ours), (True, theirs))
        )
        assert_close(a, b)


def test_euler_starts_with_14_6146_and_scales_the_input():
    plan = Euler().plan(SCHEDULE, 20)
    assert f"{plan.init_noise_sigma:.4f}" == "14.6146"
    assert_close(Euler().scale_input(plan, 0, torch.ones(1)), 1 / (plan.sigmas[:1] ** 2 + 1) ** 0.5)
    assert f"{Euler(spacing='leading').plan(SCHEDULE, 1000).init_noise_sigma:.4f}" == "14.6488"  # sqrt(sigma**2 + 1)


def test_the_short_form_of_euler_is_not_what_we_do():
    """Trap: Euler written x + epsilon * (sigma_next - sigma) has other bits."""
    sampler, plan = Euler(), Euler().plan(SCHEDULE, 50)
    differ = 0
    for i in range(50):
        x, out = randn(seed=i) * plan.sigmas[i], randn(seed=100 + i)
        ours, _ = sampler.step(plan, i, x, out, (), torch.zeros_like)
        differ += not torch.equal(ours, x + out * (plan.sigmas[i + 1] - plan.sigmas[i]))
    assert differ >= 49  # the last step, to sigma 0, may agree


FLOAT32_TIMES = (
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "dpm2",
    "dpm2_ancestral",
    "edm_euler",
    "edm_dpmpp_2m",
    "ipndm",
)


def test_euler_timesteps_are_float32_and_the_others_int64():
    """So are those of the methods like it; consistency models alone have float64."""
    for name, kind in SAMPLERS.items():
        want = torch.float64 if name == "cm" else torch.float32 if name in FLOAT32_TIMES else torch.int64
        assert kind().plan(SCHEDULE, 5).timesteps.dtype == want


def test_zero_snr_floor_is_2_to_the_minus_24_where_sigma_would_be_infinite():
    """Trap: zero-terminal SNR's last row."""
    zero = NoiseSchedule.from_config(ScheduleConfig(zero_snr=True, prediction="v_prediction"))
    for kind in (Euler, EulerAncestral):
        # sqrt(2**24 - 1) lies next to the middle of two float32 numbers: processors round it up or down
        assert kind().plan(zero, 10).sigmas[0].item() in (4096, 4096 - 2**-12)
    for kind in (DDIM, DDPM):
        assert kind(spacing="trailing").plan(zero, 10).alpha_bars[0] == 0


@pytest.mark.parametrize(
    ("sampler", "draws"),
    [
        (DDPM(), 9),  # not at t = 0
        (DDPM(steps_offset=1), 10),
        (DDIM(), 0),
        (DDIM(eta=0.5), 10),
        (PNDM(), 0),
        (Euler(), 0),
        (Euler(s_churn=2.0, s_tmin=1.0), 5),
        (EulerAncestral(), 10),  # the last too
    ],
    ids=repr,
)
def test_noise_is_drawn_only_when_the_reference_draws_it(sampler, draws):
    plan, count = sampler.plan(SCHEDULE, 10), 0

    def draw(like):
        nonlocal count
        count += 1
        return torch.zeros_like(like)

    run(sampler, plan, lambda i, x: x, randn(), draw=draw)
    if isinstance(sampler, Euler) and sampler.s_churn:
        draws = int((plan.sigmas[:-1] >= sampler.s_tmin).sum())
    assert count == draws


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_half_precision_stays_half(sampler, dtype):
    plan = sampler.plan(SCHEDULE, 5)
    x, state = randn(dtype=dtype), sampler.start()
    for i in range(len(plan)):
        after, state = sampler.step(plan, i, x, output(sampler, x), state, torch.zeros_like)
        assert after.dtype == dtype
        assert sampler.scale_input(plan, i, x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_on_a_fake_cuda_device(sampler, dtype):
    """No card is needed: a host tensor of rank 1 that meets a device tensor raises here, and so does .item()."""
    plan = sampler.plan(SCHEDULE, 6)
    with fake_card():
        moved = plan.to("cuda")
        assert moved.timesteps.device.type == "cuda"
        x, state = torch.empty(SHAPE, dtype=dtype, device="cuda"), sampler.start()
        for i in range(len(plan)):
            seen = sampler.scale_input(moved, i, x)
            out = output(sampler, torch.empty_like(seen))
            x0 = sampler.denoised(moved, i, x, out, state)
            x, state = sampler.step(moved, i, x, out, state, torch.empty_like)
            assert x.device.type == seen.device.type == x0.device.type == "cuda"
            assert x.dtype == seen.dtype == dtype


def test_plans_do_not_depend_on_the_default_device_and_dtype():
    for sampler in ALL:
        want = sampler.plan(SCHEDULE, 6)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                plan = sampler.plan(SCHEDULE, 6)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, row in rows(want).items():
            assert_close(rows(plan)[name], row, where=name)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_a_printed_plan_is_a_table_of_every_row(sampler):
    plan = sampler.plan(SCHEDULE, 6)
    head, names, *lines = str(plan).splitlines()
    assert head.startswith(f"{sampler.name}: {len(plan)} model calls, prediction epsilon, x starts as noise *")
    assert names.split()[:4] == ["row", "timestep", "sigma", "alpha_bar"]
    assert len(lines) == len(plan)
    assert len({len(line) for line in [names, *lines]}) == 1
    assert [int(line.split()[0]) for line in lines] == list(range(len(plan)))
    assert [float(line.split()[1]) for line in lines] == pytest.approx(plan.timesteps.tolist(), rel=1e-5)


def test_printed_plan_of_fifty_leading_steps():
    lines = str(DDIM(steps_offset=0).plan(SCHEDULE, 50)).splitlines()[2:]
    assert [int(line.split()[1]) for line in lines] == list(range(980, -1, -20))
    assert "first again" in str(PNDM().plan(SCHEDULE, 5))


def test_methods_leave_the_choice_of_levels_to_the_grids() -> None:
    """Choices of diffusers stand in diffusers/grid.py: nothing that builds levels asks whom to follow."""
    steps = {"step", "rows", "_coefficients", "multistep_rows", "root"}  # mathematics of a step, and its coefficients
    allowed = {"grid", "plan", "__post_init__", *steps}
    found = set()
    for path in sorted((ROOT / "minidiff" / "samplers").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                names = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                found |= {(path.name, function.name)} if "like_diffusers" in names else set()
    assert {name for _, name in found} <= allowed, found
    assert ("method.py", "grid") in found
