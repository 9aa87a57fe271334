"""Options of samplers: names, JSON, diffusers' configs, ``Scheduler``, and errors in one clear line."""

from __future__ import annotations

import json

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError, MinidiffError, UnsupportedError
from minidiff.samplers import (
    CM,
    DDIM,
    DDPM,
    DPM2,
    DPMSDE,
    LMS,
    PNDM,
    SAMPLERS,
    DPM2Ancestral,
    DPMSolver,
    DPMSolver3MSDE,
    DPMSolverInverse,
    EDMEuler,
    Euler,
    EulerAncestral,
    Heun,
    Scheduler,
    UniPC,
    sampler_from_config,
    sampler_from_diffusers,
    sampler_to_config,
    schedule_from_diffusers,
)
from minidiff.samplers.diffusers.classes import READERS
from minidiff.samplers.diffusers.classes import SCHEDULE as SCHEDULE_FIELDS
from minidiff.schedule import NoiseSchedule
from tests.tolerances import assert_close

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
BRING_THEIR_OWN = [kind for kind in SAMPLERS.values() if kind.own_levels]  # sigmas: they need no schedule

# what the folders of well-known checkpoints hold
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
CAT = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def test_names():
    assert list(SAMPLERS)[:5] == ["ddpm", "ddim", "pndm", "euler", "euler_ancestral"]
    others = "heun lms dpm2 dpm2_ancestral lcm tcd edm_euler edm_dpmpp_2m cm ipndm"
    assert set(others.split()) <= set(SAMPLERS)
    assert sampler_from_config({"name": "pndm"}) == PNDM(spacing="leading", steps_offset=1, runge_kutta=False)


@pytest.mark.parametrize(
    "sampler",
    [
        *(kind() for kind in SAMPLERS.values()),
        DDPM(variance="learned", clip=2, threshold=0.9),
        DDIM(eta=0.5),
        PNDM(runge_kutta=True, like_diffusers=True),
        Euler(s_churn=2.0, s_tmax=3.5, sigma_min=0.1, sigma_spacing="beta", continuous=True),
    ],
    ids=repr,
)
def test_json_round_trip(sampler):
    text = json.dumps(sampler_to_config(sampler), allow_nan=False)
    back = sampler_from_config(json.loads(text))
    assert back == sampler
    assert hash(back) == hash(sampler)


def test_unknown_names_and_options_quote_the_known_ones():
    with pytest.raises(ConfigError, match="'dpm'; known are ddpm, ddim, pndm, euler, euler_ancestral"):
        sampler_from_config({"name": "dpm"})
    with pytest.raises(ConfigError, match="None; known are"):
        sampler_from_config({})
    with pytest.raises(ConfigError, match="pndm has no option 'eta'; it knows like_diffusers, spacing"):
        sampler_from_config({"name": "pndm", "eta": 1})
    with pytest.raises(ConfigError, match="spacing='middle' is none of leading"):
        sampler_from_config({"name": "pndm", "spacing": "middle"})
    with pytest.raises(ConfigError, match="none of the named samplers"):
        sampler_to_config(object())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DDIM, {"spacing": "middle"}, "DDIM.spacing='middle' is none of leading"),
        (DDIM, {"eta": -0.5}, "eta=-0.5 must not be negative"),
        (DDIM, {"eta": "1"}, "DDIM.eta: expected float, got '1'"),
        (DDIM, {"steps_offset": 1.5}, "steps_offset: expected int, got 1.5"),
        (DDIM, {"steps_offset": True}, "steps_offset: expected int, got True"),
        (DDIM, {"set_alpha_to_one": 1}, "set_alpha_to_one: expected bool, got 1"),
        (DDPM, {"clip": 0.0}, "clip=0.0 must be positive"),
        (DDPM, {"threshold": 99.5}, "threshold=99.5 is a fraction"),
        (DDPM, {"variance": "large"}, "variance='large' is none of fixed_small"),
        (Euler, {"s_churn": -1.0}, "s_churn=-1.0 must not be negative"),
        (Euler, {"sigma_min": 0.0}, "sigma_min=0.0 must be positive"),
        (Euler, {"last_alpha_bar": 0.0}, "last_alpha_bar=0.0 must lie"),
        (EulerAncestral, {"last_alpha_bar": 1.0}, "last_alpha_bar=1.0 must lie"),
        (UniPC, {"threshold": 0.9, "predict_x0": False}, "threshold=0.9 limits x0"),
        (DPMSolverInverse, {"final_sigma": "zero"}, "can't begin at sigma 0"),
    ],
)
def test_options_are_checked_when_given(kind, options, message):
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", SAMPLERS.values())
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", False])
def test_impossible_numbers_of_steps(kind, steps):
    with pytest.raises(ConfigError, match="steps="):
        kind().plan(SCHEDULE, steps)


@pytest.mark.parametrize("kind", SAMPLERS.values())
def test_exactly_one_of_steps_timesteps_and_sigmas(kind):
    for given in ({}, {"steps": 5, "timesteps": [3, 1]}, {"timesteps": [3, 1], "sigmas": [3.0, 0.0]}):
        with pytest.raises(ConfigError, match="exactly one of"):
            kind().plan(SCHEDULE, **given)
    if kind in BRING_THEIR_OWN:
        assert len(kind().plan(None, 5)) == 5
        return
    with pytest.raises(ConfigError, match="needs the model's noise schedule"):
        kind().plan(None, 5)


@pytest.mark.parametrize("kind", [DDIM, PNDM, EulerAncestral])
def test_the_reference_has_no_custom_timesteps(kind):
    with pytest.raises(ConfigError, match=r"can't take timesteps; give steps$"):
        kind(like_diffusers=True).plan(SCHEDULE, timesteps=[5, 3])


@pytest.mark.parametrize("kind", [DDIM, PNDM])
def test_methods_at_unit_variance_take_timesteps(kind):
    """Those of the plan for 20 steps, given by hand, make the same plan."""
    plan = kind().plan(SCHEDULE, 20)
    given = kind().plan(SCHEDULE, timesteps=plan.timesteps.unique().flip(0).tolist())
    for a, b in ((given.levels, plan.levels), (given.rows, plan.rows)):
        for name, row in b._asdict().items():
            if isinstance(row, torch.Tensor) and name != "landing":
                assert torch.equal(getattr(a, name), row), name
    before, after = given.levels.landing, plan.levels.landing
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert (before[-1] < 0) == (after[-1] < 0)
        assert torch.equal(before[:-1], after[:-1])


@pytest.mark.parametrize(
    "kind", [EulerAncestral, Heun, LMS, DPM2, DPM2Ancestral, DPMSDE, DPMSolver, DPMSolver3MSDE, UniPC], ids=str
)
def test_methods_in_sigma_and_lambda_take_sigmas(kind):
    """Those of a plan with Karras sigmas, given by hand, make the same plan but for rounding of the timesteps."""
    options = {} if kind is EulerAncestral else {"sigma_spacing": "karras"}
    plan = kind(**options).plan(SCHEDULE, 8)
    sigmas = [*plan.sigmas.unique().flip(0).tolist()]
    given = kind(**options).plan(SCHEDULE, sigmas=sigmas)
    assert len(given) == len(plan)
    for name, row in vars(plan).items():
        if isinstance(row, torch.Tensor):
            close = {"rtol": 1e-5, "atol": 1e-3} if name == "timesteps" else {"rtol": 2e-6, "atol": 1e-7}
            torch.testing.assert_close(getattr(given, name).float(), row.float(), **close, equal_nan=True)
    with pytest.raises(ConfigError, match="can't take sigmas"):
        kind(like_diffusers=True).plan(SCHEDULE, sigmas=sigmas)


@pytest.mark.parametrize("kind", [Heun, DPMSolver, UniPC, DPM2])
def test_given_sigmas_must_fall(kind):
    with pytest.raises(ConfigError, match="must fall strictly"):
        kind().plan(SCHEDULE, sigmas=[3.0, 5.0, 0.0])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (DDPM, {"timesteps": [3, 5]}, "must fall strictly"),
        (DDPM, {"timesteps": [5, 5]}, "must fall strictly"),
        (DDPM, {"timesteps": [1000, 5]}, "run from 1000 to 5, the model knows 0 to 999"),
        (DDPM, {"timesteps": [5, -1]}, "run from 5 to -1"),
        (DDPM, {"timesteps": [5.5, 1]}, "must be whole numbers"),
        (DDPM, {"timesteps": []}, "timesteps is empty"),
        (DDPM, {"sigmas": [3.0, 1.0]}, "can't take sigmas; give steps or timesteps"),
        (Euler, {"timesteps": [3, 5]}, "must fall strictly"),
        (Euler, {"timesteps": [float("nan")]}, "timesteps"),
        (Euler, {"sigmas": [1.0]}, "at least 2"),
        (Euler, {"sigmas": [1.0, 2.0]}, "must fall strictly"),
        (Euler, {"sigmas": [1.0, -2.0]}, "must fall strictly"),
        (Euler, {"sigmas": [float("inf"), 2.0]}, "must fall strictly"),
        (CM, {"timesteps": [5.5, 1]}, "must be whole numbers, 0 or above"),
    ],
)
def test_impossible_timesteps_and_sigmas(kind, given, message):
    with pytest.raises(ConfigError, match=message):
        kind().plan(SCHEDULE, **given)


def test_log_linear_sigmas_have_timesteps_of_their_own():
    """Given ones would be visited in name only."""
    with pytest.raises(ConfigError, match="interpolation='log_linear' has timesteps of its own"):
        Euler(interpolation="log_linear").plan(SCHEDULE, timesteps=[900, 500, 100])


def test_the_way_up_has_its_ends_in_order():
    with pytest.raises(ConfigError, match="sigma_min=10 is above sigma_max=1"):
        DPMSolverInverse(sigma_spacing="karras", sigma_min=10.0, sigma_max=1.0).plan(SCHEDULE, 3)


@pytest.mark.parametrize("last", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Heun, DPM2, DPM2Ancestral, DPMSDE])
def test_the_last_step_of_two_calls_each_lands_on_the_last_sigma(kind, last):
    """Also above 0: the straight step of the last interval goes all of its way."""
    plan = kind().plan(SCHEDULE, sigmas=[10.0, 5.0, 2.0, last])
    assert len(plan) == 5
    assert plan.rows.dt[-1] == last - 2.0


def test_first_noise_is_that_of_the_first_sigma_given():
    """Where a run begins below sigma_max, so does its noise; the reference has sigma_max nevertheless."""
    plan = EDMEuler().plan(None, sigmas=[10.0, 5.0, 0.0])
    assert plan.init_noise_sigma == pytest.approx(101**0.5)
    assert EDMEuler().plan(None, 3).init_noise_sigma == pytest.approx(6401**0.5)
    plan = CM().plan(None, timesteps=[30, 10])
    assert plan.init_noise_sigma == plan.sigmas[0] < 20
    assert CM(like_diffusers=True).plan(None, timesteps=[30, 10]).init_noise_sigma == 80
    assert CM().plan(None, 3).init_noise_sigma == 80


def test_noise_of_a_picture_in_the_middle_of_an_interval():
    """A picture gets the noise of the sample there, not that of an end: inpainting puts it back after every call."""
    x0, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for kind in (DPM2, DPMSDE):
        plan = kind().plan(SCHEDULE, 4)
        for i, sigma in enumerate(plan.columns()["sigma"]):
            assert torch.equal(plan.add_noise(x0, noise, i), noise * sigma)


TO_ZERO = ("euler", "euler_ancestral", "heun", "lms", "dpm2", "dpm2_ancestral", "dpmpp_sde")
TO_ZERO += ("dpmpp_2m", "dpmpp_2s", "unipc")
ABOVE_ZERO = ("deis", "sa_solver")


@pytest.mark.parametrize("name", [*TO_ZERO, *ABOVE_ZERO])
def test_sigmas_of_ones_own_are_those_of_the_plan(name):
    """The sigmas of a plan by timesteps, given, are the same plan; any others are visited as they stand."""
    sampler = SAMPLERS[name]()
    given = [12.5, 7.0, 3.25, 1.5, 0.5, 0.125, 0.0 if name in TO_ZERO else 0.03125]
    plan = sampler.plan(SCHEDULE, sigmas=given)
    seen = plan.columns()["sigma"]
    ends = seen[:: sampler.order] if sampler.order > 1 else seen
    assert ends.tolist() == pytest.approx(given[:-1])
    assert plan.sigmas[-1] == given[-1]
    table = SCHEDULE.sigmas
    below = plan.timesteps.double().floor().long()
    assert bool((table[below] <= seen * 1.00001).all())
    assert bool((table[below + 1] >= seen * 0.99999).all())
    by_steps = sampler.plan(SCHEDULE, 6)
    levels = by_steps.sigmas if sampler.order == 1 else torch.cat([by_steps.sigmas[::2], by_steps.sigmas[-1:]])
    again = sampler.plan(SCHEDULE, sigmas=levels.unique().flip(0).tolist())
    assert torch.equal(again.sigmas, by_steps.sigmas)
    assert torch.allclose(again.timesteps.double(), by_steps.timesteps.double(), atol=0.01)


@pytest.mark.parametrize("kind", [DDIM, PNDM, DDPM])
def test_thousand_steps_with_offset_1_have_no_index_1000(kind):
    """Trap: 1000 steps with offset 1 (DF #10003)."""
    with pytest.raises(
        ConfigError, match="run from 1000 to 1, the model knows 0 to 999; use fewer steps or steps_offs"
    ):
        kind(steps_offset=1).plan(SCHEDULE, 1000)
    assert len(kind(steps_offset=0).plan(SCHEDULE, 1000)) in (1000, 1001)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_runge_kutta_needs_4_steps(n):
    with pytest.raises(ConfigError, match=f"steps={n}: PNDM's Runge-Kutta warm-up needs at least 4"):
        PNDM(runge_kutta=True).plan(SCHEDULE, n)


def test_pndm_can_not_start_inside_a_runge_kutta_interval():
    sampler = PNDM(runge_kutta=True)
    plan = sampler.plan(SCHEDULE, 20)
    with pytest.raises(ConfigError, match="can't start at row 5"):
        sampler.step(plan, 5, torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), sampler.start(), torch.zeros_like)


def test_epsilon_model_at_zero_terminal_snr():
    """Trap: an epsilon model rescaled goes black (DF PR #3664)."""
    zero = NoiseSchedule.from_config(ScheduleConfig(zero_snr=True))
    for kind in (DDIM, DDPM, PNDM):
        with pytest.raises(ConfigError, match="zero_snr"):
            kind(spacing="trailing").plan(zero, 10)
        assert len(kind().plan(zero, 10)) in (10, 11)


def test_learned_variance_needs_twice_the_channels():
    sampler = DDPM(variance="learned")
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match="variance='learned' needs 8 output channels, got 4"):
        sampler.step(sampler.plan(SCHEDULE, 5), 0, x, x, (), torch.zeros_like)


def test_eta_too_large_for_the_variance():
    with pytest.raises(ConfigError, match=r"with eta=3\.0, .* at rows \[0"):
        DDIM(eta=3.0).plan(SCHEDULE, 10)


def test_rounding_below_0_counts_as_0_for_a_sampler_by_name():
    zero = NoiseSchedule.from_config(ScheduleConfig(zero_snr=True, prediction="v_prediction"))
    plan = DDIM(eta=1.0, spacing="trailing").plan(zero, 50)
    # the root of a difference of numbers near 1, each rounded to 2**-24: processors differ in the last bit of them
    assert 0 <= plan.rows.direction[0] <= (2 * 2**-24) ** 0.5
    assert bool(plan.rows.direction.isfinite().all())


def test_diffusers_configs_of_known_checkpoints():
    assert sampler_from_diffusers(SD15) == PNDM(like_diffusers=True)
    assert schedule_from_diffusers(SD15) == ScheduleConfig()
    assert sampler_from_diffusers(SDXL) == Euler(spacing="leading", steps_offset=1, like_diffusers=True)
    cat = DDPM(variance="fixed_large", clip=1.0, like_diffusers=True)
    assert sampler_from_diffusers(CAT) == cat
    assert schedule_from_diffusers(CAT) == ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)


def test_missing_fields_have_the_defaults_of_their_class():
    bare = {name: sampler_from_diffusers({"_class_name": name}) for name in (
        "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    )}  # fmt: skip
    assert list(bare.values()) == [
        DDPM(clip=1.0, like_diffusers=True),
        DDIM(clip=1.0, steps_offset=0, set_alpha_to_one=True, like_diffusers=True),
        PNDM(steps_offset=0, runge_kutta=True, like_diffusers=True),
        Euler(like_diffusers=True),
        EulerAncestral(like_diffusers=True),
    ]


def test_options_of_step_may_stand_in_the_config():
    c = {"_class_name": "EulerDiscreteScheduler", "s_churn": 1.0, "s_tmin": 0.1, "s_tmax": float("inf"), "s_noise": 2}
    assert sampler_from_diffusers(c) == Euler(s_churn=1.0, s_tmin=0.1, s_noise=2, like_diffusers=True)
    c = {"_class_name": "DDIMScheduler", "eta": 0.3, "use_clipped_model_output": True, "clip_sample": False}
    ours = sampler_from_diffusers(c)
    assert (ours.eta, ours.use_clipped, ours.clip) == (0.3, True, None)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ConfigError, "no _class_name"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, UnsupportedError, "'FlowMatch.*known are DDPMScheduler, "),
        ({**SDXL, "prediction_type": "flow_prediction"}, UnsupportedError, "flow"),
        ({**SDXL, "use_flow_sigmas": True}, UnsupportedError, "flow"),
        ({**SDXL, "use_karras_sigmas": True, "use_beta_sigmas": True}, ConfigError, "exclude each other"),
        ({**SDXL, "timestep_type": "odd"}, ConfigError, "timestep_type='odd' is none of discrete, continuous"),
        ({**SDXL, "timestep_spacing": "odd"}, ConfigError, "spacing='odd' is none of"),
        ({**SDXL, "steps_offset": None}, ConfigError, "steps_offset=None should be a number"),
        ({**SD15, "prediction_type": "sample"}, ConfigError, "'sample' is none of epsilon, v_prediction"),
        ({**CAT, "variance_type": "fixed_large_log"}, ConfigError, "NaN in diffusers"),
    ],
)
def test_what_a_diffusers_config_can_not_say(config, error, message):
    with pytest.raises(error, match=message):
        sampler_from_diffusers(config)


def test_schedule_of_a_diffusers_config_is_checked():
    with pytest.raises(
        ConfigError, match="beta_schedule='sigmoid' is none of linear, scaled_linear, squaredcos_cap_v2"
    ):
        schedule_from_diffusers({**SD15, "beta_schedule": "sigmoid"})
    with pytest.raises(ConfigError, match="2 betas are given"):
        schedule_from_diffusers({**SD15, "trained_betas": [0.1, 0.2]})
    with pytest.raises(ConfigError, match="betas: expected a list, got 'abc'"):
        schedule_from_diffusers({**SD15, "trained_betas": "abc"})
    assert schedule_from_diffusers({**SDXL, "rescale_betas_zero_snr": True}).zero_snr
    assert schedule_from_diffusers({**SDXL, "prediction_type": "original_sample"}).prediction == "sample"


def test_the_familiar_loop_equals_plan_and_step():
    s = Scheduler.from_diffusers(SD15)
    s.set_timesteps(7)
    sampler = s.sampler
    plan, state = sampler.plan(s.schedule, 7), sampler.start()
    x = y = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * s.init_noise_sigma
    for i, t in enumerate(s.timesteps):
        out = torch.sin(3 * s.scale_model_input(x, t))
        x = s.step(out, t, x)
        want = sampler.denoised(plan, i, y, out, state)
        y, state = sampler.step(plan, i, y, out, state, torch.zeros_like)
        assert_close(x, y)
        assert_close(s.last_x0, want)


def test_a_second_run_from_the_middle_begins_an_interval_too():
    """Of two equal timesteps a run begins with the later one, also where set_timesteps is not called in between."""
    s = Scheduler(Heun(), SCHEDULE)
    s.set_timesteps(4)
    x = torch.ones(1, 1, 2, 2)

    def run():
        y = x
        for t in s.timesteps[2:]:
            y = s.step(torch.sin(s.scale_model_input(y, t)), t, y)
        return y

    assert torch.equal(run(), run())


def test_shell_refusals():
    s = Scheduler.from_diffusers(SDXL)
    assert s.last_x0 is None
    s.set_timesteps(5)
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ConfigError, match="t=3 is none of the scheduler's timesteps"):
        s.step(x, 3, x)
    ancestral = Scheduler(EulerAncestral(), SCHEDULE)
    ancestral.set_timesteps(5)
    with pytest.raises(ConfigError, match="3 generators for 2 images"):
        ancestral.step(x, ancestral.timesteps[0], x, generator=[torch.Generator()] * 3)
    ddim = Scheduler(DDIM(), SCHEDULE)
    assert_close(ddim.add_noise(x, x + 1, 999), SCHEDULE.add_noise(x, x + 1, 999))  # as training loops do
    ddim.set_timesteps(5)
    with pytest.raises(ConfigError, match="DDIM has no sigmas"):
        ddim.sigmas  # noqa: B018


ODD = (10**400, 10**30, -(10**30), 1e300, -1.0, 0, 1e-320, float("nan"), float("inf"), -float("inf"), True, None, "1")
ODD += ("x" * 500, [], [1], [None], [[0.1]], [float("nan")] * 3, {"a": 1}, b"x", 1j)  # type: ignore[assignment]


@pytest.mark.parametrize("name", READERS)
def test_settings_of_strangers_end_in_one_line_or_in_finite_samples(name):
    """Every field of every class, each with a third of the odd values."""
    for k, field in enumerate(SCHEDULE_FIELDS | READERS[name].fields):
        for value in ODD[k % 3 :: 3]:
            said = two_steps({"_class_name": name, field: value})
            assert len(said.splitlines()) <= 1, (field, value)
            assert len(said) < 500, (field, value)


def two_steps(config) -> str:
    """Outcome of two steps of the scheduler of ``config``: an error's message, or finite samples."""
    x = torch.ones(1, 2, 2, 2)
    try:
        s = Scheduler.from_diffusers(config)
        s.set_timesteps(2)
        for t in s.timesteps:
            assert s.step(x, t, x, noise=x).isfinite().all(), config
    except MinidiffError as e:
        return str(e)
    return ""


def test_numbers_that_float32_can_not_work_with_are_refused_by_name():
    for sampler, options, words in (
        (DDIM, {"eta": 10**30}, r"DDIM\.eta=1000.* must lie in -1000000000\.0\.\.1000000000\.0"),
        (DDIM, {"clip": float("nan")}, r"DDIM\.clip=nan must lie in"),
        (CM, {"s_noise": float("inf")}, r"CM\.s_noise=inf must lie in"),
        (DDIM, {"steps_offset": 2**63}, r"DDIM\.steps_offset=9223372036854775808 must lie in"),
        (DDIM, {"eta": "x" * 500}, r"DDIM\.eta: expected float, got 'x{40,60}\.\.\."),
    ):
        with pytest.raises(ConfigError, match=words):
            sampler(**options)


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_schedule_without_noise_or_without_a_picture_is_refused(name):
    with pytest.raises(ConfigError, match=r"alpha_bar is 1 at row|no picture there, or no noise"):
        Scheduler.from_diffusers({"_class_name": name, "beta_start": 0.0}).set_timesteps(4)
    with pytest.raises(ConfigError, match=r"alpha_bar is 0 there|no picture there, or no noise"):
        Scheduler.from_diffusers({"_class_name": name, "beta_end": 1.0}).set_timesteps(4)
