"""Other programs' conventions: their plans against formulas written out here, in numpy and float64 where they are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.programs import Convention, read
from minidiff.programs.levels import noise_table
from minidiff.programs.profiles import FIELDS, PROFILES, Fact
from minidiff.programs.table import markdown, plans, side_by_side
from minidiff.samplers import sampler_from_config
from minidiff.schedule import NoiseSchedule
from tests.support import tiny
from tests.tolerances import (
    LOG_SIGMA,
    NOISE_TABLES,
    ONCE,
    PERFECT,
    PROGRAM_FLOAT32,
    SIGMA_POWERS,
    TOLD_TIMESTEP,
    assert_close,
)

SD = ScheduleConfig()

ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # CompVis, in float64
SIGMAS = ((1 - ALPHA_BAR) / ALPHA_BAR) ** 0.5
ROUNDED = ALPHA_BAR.astype(np.float32)  # what a checkpoint of CompVis holds
SIGMAS_OF_ROUNDED = ((1 - ROUNDED) / ROUNDED) ** 0.5


def at(t: NDArray[np.float64], table: NDArray[np.floating] = SIGMAS_OF_ROUNDED) -> NDArray[np.float64]:
    """k-diffusion's t_to_sigma: linear in log sigma."""
    return np.exp(np.interp(t, np.arange(1000), np.log(table.astype(np.float64))))


def planned(like: str, sampler: str, steps: int, **given: object) -> object:
    return read(like).sampler(SD, {"name": sampler, **given}).plan(None, steps)


def sigmas_of(plan: object) -> NDArray[np.float64]:
    return plan.columns()["sigma"].double().numpy()


# --- CompVis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50, 500])
def test_ldm_timesteps(steps: int) -> None:
    want = [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
    ddim, plms = planned("ldm", "ddim", steps), planned("ldm", "pndm", steps)
    assert ddim.timesteps.tolist() == want
    assert plms.timesteps.tolist() == [*want[:2], *want[1:]]  # the first interval takes two calls
    assert ddim.init_noise_sigma == plms.init_noise_sigma == 1
    for plan in (ddim, plms):
        rows = np.array([want[i] for i in range(len(want))])
        assert_close(plan.alpha_bars.unique(), torch.tensor(ALPHA_BAR[rows]).float().unique(), PROGRAM_FLOAT32)
    assert_close(ddim.rows.x0_coef[-1], torch.tensor(ALPHA_BAR[0]).float().sqrt(), PROGRAM_FLOAT32)
    assert_close(plms.levels.to[-1], torch.tensor(ALPHA_BAR[0]).float(), PROGRAM_FLOAT32)


def test_30_steps_are_31_rows() -> None:
    """1000 // 30 is 33, and 0, 33, ..., 990 are 31 numbers; diffusers stops at 30."""
    assert [len(planned(like, "ddim", 30)) for like in ("ldm", "diffusers")] == [31, 30]


def test_ldm_has_no_timestep_1000() -> None:
    for steps in (3, 9, 27, 333, 501):  # every 333rd from 0 reaches 999, ..., and every one
        with pytest.raises(ConfigError, match="timesteps run from 1000 to 1"):
            planned("ldm", "ddim", steps)
    assert planned("a1111", "ddim", 3).timesteps.tolist() == [999, 667, 334]
    with pytest.raises(ConfigError, match="must fall strictly"):  # it visits 999 twice
        planned("a1111", "ddim", 501)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Some function of both that is no straight line."""
    return torch.sin(x * (1 + t / 700)) + 0.3 * x


def run(like: str, sampler: str, steps: int, x: Tensor) -> Tensor:
    chosen = read(like).sampler(SD, sampler)
    plan, state = chosen.plan(None, steps), chosen.inner.start()
    for i in range(len(plan)):
        out = model(chosen.inner.scale_input(plan, i, x), plan.timesteps[i])
        x, state = chosen.inner.step(plan, i, x, out, state, torch.zeros_like)
    return x


def ldm_step(x: Tensor, epsilon: Tensor, a: float, a_prev: float) -> Tensor:
    x0 = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
    return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * epsilon


def test_ddim_walks_as_compvis_does() -> None:
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x, rows = start.double(), list(range(1, 1000, 142))
    for t, below in zip(rows[::-1], [*rows[-2::-1], 0], strict=True):
        x = ldm_step(x, model(x, torch.tensor(t)), ALPHA_BAR[t], ALPHA_BAR[below])
    assert_close(run("ldm", "ddim", 7, start), x.float(), PERFECT)


def test_plms_walks_as_compvis_does() -> None:
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    x, old, rows = start.double(), [], list(range(1, 1000, 142))
    weights = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    for t, below in zip(rows[::-1], [*rows[-2::-1], 0], strict=True):
        a, a_prev = ALPHA_BAR[t], ALPHA_BAR[below]
        epsilon = model(x, torch.tensor(t))
        if not old:
            seen = model(ldm_step(x, epsilon, a, a_prev), torch.tensor(below))
            mixed = (epsilon + seen) / 2
        else:
            mixed = sum(w * e for w, e in zip(weights[len(old)], [epsilon, *old], strict=True))
        old = [epsilon, *old][:3]
        x = ldm_step(x, mixed, a, a_prev)
    assert_close(run("ldm", "pndm", 7, start), x.float(), PERFECT)


# --- k-diffusion and a1111 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("like", ["k-diffusion", "a1111"])
@pytest.mark.parametrize("steps", [1, 2, 20, 999])
def test_uniform_is_linear_in_log_sigma(like: str, steps: int) -> None:
    plan = planned(like, "euler", steps)
    t = np.linspace(999, 0, steps)
    np.testing.assert_allclose(sigmas_of(plan), at(t), rtol=LOG_SIGMA.relative)
    np.testing.assert_allclose(
        plan.timesteps.numpy(), t, atol=TOLD_TIMESTEP.absolute, rtol=0
    )  # read back from sigma: what the model gets
    assert plan.sigmas[-1] == 0
    assert plan.init_noise_sigma == plan.sigmas[0]
    assert f"{plan.init_noise_sigma:.4f}" == "14.6146"


@pytest.mark.parametrize("like", ["k-diffusion", "a1111", "comfyui"])
def test_karras_and_exponential(like: str) -> None:
    table = SIGMAS if like == "comfyui" else SIGMAS_OF_ROUNDED.astype(np.float64)
    low, high, ramp = table[0], table[-1], np.linspace(0, 1, 12)
    karras = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigmas_of(planned(f"{like}:karras", "euler", 12)), karras, rtol=SIGMA_POWERS.relative)
    exponential = np.exp(np.log(high) + ramp * (np.log(low) - np.log(high)))
    np.testing.assert_allclose(
        sigmas_of(planned(f"{like}:exponential", "lms", 12)), exponential, rtol=SIGMA_POWERS.relative
    )


def test_trap_dpmpp_with_karras() -> None:
    """Trap: DPM++ with Karras. Before diffusers' PR 6477 the last sigma stood twice, and the last step did nothing."""
    for plan in (
        planned("diffusers", "dpmpp_2m", 10, sigma_spacing="karras"),
        planned("a1111:karras", "dpmpp_2m", 10),
        planned("comfyui:karras", "dpmpp_2m", 10),
    ):
        assert len(plan) == 10
        assert plan.sigmas[-1] == 0
        assert bool((plan.sigmas[:-1] > plan.sigmas[1:]).all())
    ours, theirs = planned("a1111:karras", "dpmpp_2m", 10), planned("diffusers", "dpmpp_2m", 10, sigma_spacing="karras")
    np.testing.assert_allclose(sigmas_of(ours), sigmas_of(theirs), rtol=SIGMA_POWERS.relative)
    assert ours.timesteps.dtype == torch.float32  # k-diffusion tells the model fractions, diffusers rounds
    assert theirs.timesteps.tolist() == ours.timesteps.round().tolist()


@pytest.mark.parametrize(("like", "scale"), [("k-diffusion", "sigma"), ("a1111", "sigma"), ("comfyui", "root")])
def test_first_noise_of_the_methods_at_unit_variance(like: str, scale: str) -> None:
    """They hold the same sample divided by sqrt(sigma ** 2 + 1), the first noise too."""
    top = SIGMAS[-1]
    want = 1.0 if scale == "root" else top / (top**2 + 1) ** 0.5
    assert planned(like, "dpmpp_2m", 8).init_noise_sigma.item() == pytest.approx(want, rel=1e-6)


def test_dpmpp_2m_keeps_its_order_as_in_k_diffusion() -> None:
    assert planned("k-diffusion", "dpmpp_3m_sde", 8).rows.order == (1, 2, 3, 3, 3, 3, 3, 1)
    assert planned("diffusers", "dpmpp_3m_sde", 8).rows.order == (1, 2, 3, 3, 3, 3, 2, 1)


@pytest.mark.parametrize("sampler", ["dpm2", "dpm2_ancestral", "dpmpp_3m_sde"])
def test_a1111_discards_the_last_but_one_sigma(sampler: str) -> None:
    plan = planned("a1111", sampler, 9)
    step = 2 if sampler.startswith("dpm2") else 1
    np.testing.assert_allclose(sigmas_of(plan)[::step], at(np.linspace(999, 0, 10))[:-1], rtol=LOG_SIGMA.relative)
    kept = planned("k-diffusion", sampler, 9)
    np.testing.assert_allclose(sigmas_of(kept)[::step], at(np.linspace(999, 0, 9)), rtol=LOG_SIGMA.relative)


def test_a1111_leaves_out_the_step_of_timestep_1() -> None:
    """Its DDIM and PLMS loop over one timestep less than there are; the sample stays at the noise of timestep 1."""
    ddim, plms = planned("a1111", "ddim", 20), planned("a1111", "pndm", 20)
    assert ddim.timesteps.tolist() == list(range(951, 50, -50))
    assert plms.timesteps.tolist() == [951, 901, *range(901, 50, -50)]
    assert_close(ddim.rows.x0_coef[-1], torch.tensor(ALPHA_BAR[1]).float().sqrt(), PROGRAM_FLOAT32)
    with pytest.raises(ConfigError, match="with one step nothing remains"):
        planned("a1111", "ddim", 1)


# --- ComfyUI ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 20, 30])
def test_comfyui_schedulers(steps: int) -> None:
    apart = 1000 / steps
    simple = [SIGMAS[-(1 + int(i * apart))] for i in range(steps)]
    np.testing.assert_allclose(sigmas_of(planned("comfyui", "euler", steps)), simple, rtol=ONCE.relative)
    normal = at(np.linspace(999, 0, steps), SIGMAS)
    np.testing.assert_allclose(sigmas_of(planned("comfyui:normal", "euler", steps)), normal, rtol=LOG_SIGMA.relative)
    sgm = at(np.linspace(999, 0, steps + 1)[:-1], SIGMAS)
    np.testing.assert_allclose(sigmas_of(planned("comfyui:sgm_uniform", "euler", steps)), sgm, rtol=LOG_SIGMA.relative)
    ddim = [SIGMAS[k] for k in range(1, 1000, 1000 // steps)][::-1]
    np.testing.assert_allclose(sigmas_of(planned("comfyui:ddim_uniform", "ddim", steps)), ddim, rtol=ONCE.relative)


def test_comfyui_beta_scheduler() -> None:
    """Quantiles of Beta(0.6, 0.6), which is symmetric."""
    plan = planned("comfyui:beta", "euler", 4)
    t = plan.timesteps.tolist()
    assert (t[0], t[2]) == (999, 500)  # the quantiles of 1 and 1/2: scipy's median lies a bit above 1/2
    assert t[1] + t[3] == 999
    assert 790 < t[1] < 850


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2", "dpmpp_sde", "dpmpp_2m", "unipc"])
def test_comfyui_tells_whole_timesteps(sampler: str) -> None:
    plan = planned("comfyui:karras", sampler, 8)
    distance = np.abs(np.log(sigmas_of(plan))[:, None] - np.log(SIGMAS)[None])
    assert plan.timesteps.tolist() == distance.argmin(axis=1).tolist()
    assert plan.timesteps.dtype == torch.float32


def test_comfyui_scales_the_first_noise_by_the_root_only_from_the_top() -> None:
    top = planned("comfyui:normal", "euler", 10).init_noise_sigma
    assert f"{top:.4f}" == "14.6488"
    lower = planned("comfyui:ddim_uniform", "euler", 10)
    assert lower.init_noise_sigma == lower.sigmas[0] < 14


def test_trap_dpm2_and_unipc_in_comfyui() -> None:
    """Trap: DPM2 and UniPC in ComfyUI. One step more is scheduled, and the last sigma above the end left out."""
    full = [SIGMAS[-(1 + int(i * 100))] for i in range(10)]
    for sampler in ("dpm2", "dpm2_ancestral"):
        np.testing.assert_allclose(sigmas_of(planned("comfyui", sampler, 9))[::2], full[:-1], rtol=ONCE.relative)
    unipc = planned("comfyui", "unipc", 9)
    np.testing.assert_allclose(unipc.sigmas.double().numpy(), [*full[:-1], 0.001], rtol=ONCE.relative)
    assert unipc.rows.order == (1, 2, 3, 3, 3, 3, 3, 2, 1)
    assert planned("comfyui", "unipc", 3).rows.order == (1, 2, 1)
    np.testing.assert_allclose(sigmas_of(planned("comfyui", "euler", 10)), full, rtol=ONCE.relative)


def test_a_schedule_that_would_not_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="a1111 gives ddim no 'karras'"):
        planned("a1111:karras", "ddim", 10)
    with pytest.raises(ConfigError, match="spacing would replace the sigmas of comfyui:karras"):
        planned("comfyui:karras", "euler", 10, spacing="trailing")


@pytest.mark.parametrize("scheduler", ["uniform", "karras", "exponential"])
def test_plans_do_not_heed_the_default_dtype(scheduler: str) -> None:
    want = planned(f"k-diffusion:{scheduler}", "euler", 5)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(planned(f"k-diffusion:{scheduler}", "euler", 5).sigmas, want.sigmas)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ddim_in_comfyui_is_euler() -> None:
    ddim, euler = planned("comfyui", "ddim", 10), planned("comfyui", "euler", 10)
    assert type(ddim) is type(euler)
    assert_close(ddim.sigmas, euler.sigmas)


# --- tables -------------------------------------------------------------------------------------------------------


def test_tables_differ_in_their_last_bits() -> None:
    """float32 throughout, alpha_bar in float64 rounded, sigma in float64 rounded."""
    kinds = {kind: noise_table(kind, SD) for kind in ("float32", "rounded", "float64")}
    assert_close(kinds["float32"].schedule.alphas_cumprod, NoiseSchedule.from_config(SD).alphas_cumprod)
    exact = torch.tensor(ALPHA_BAR)
    assert (kinds["rounded"].schedule.alphas_cumprod != exact.float()).sum() <= 2  # torch's linspace, numpy's
    assert (kinds["float64"].sigmas != torch.tensor(SIGMAS).float()).sum() <= 2
    assert (kinds["float32"].schedule.alphas_cumprod != exact.float()).sum() > 900
    assert (kinds["rounded"].sigmas != kinds["float64"].sigmas).sum() > 100
    for other in kinds.values():
        np.testing.assert_allclose(other.sigmas.numpy(), SIGMAS, rtol=NOISE_TABLES.relative)


def test_curved_and_zero_snr_schedules_keep_our_table() -> None:
    for config in (ScheduleConfig(beta_schedule="squaredcos_cap_v2"), ScheduleConfig(zero_snr=True)):
        ours = NoiseSchedule.from_config(config).alphas_cumprod
        assert_close(noise_table("float64", config).schedule.alphas_cumprod, ours)


# --- image to image, guidance -------------------------------------------------------------------------------------


def test_trap_img2img_start() -> None:
    """Trap: img2img start. 50 steps, strength 0.75."""
    at_75 = {like: read(like).entry("ddim", 50, 0.75) for like in ("diffusers", "ldm", "a1111", "comfyui")}
    assert at_75["diffusers"] == (50, 13, 37, 13, True)
    assert at_75["ldm"] == (50, 13, 37, 12, False)  # the same steps, from one row's more noise
    assert at_75["a1111"] == (50, 13, 36, 12, False)  # and without the last of them
    assert at_75["comfyui"] == (66, 16, 50, 16, False)  # as many steps as were asked for
    assert read("a1111").entry("euler", 50, 0.75) == (50, 12, 38, 12, False)
    times = planned("ldm", "ddim", 50).timesteps
    assert (times[at_75["ldm"].first], times[at_75["ldm"].noised]) == (721, 741)  # denoises from t, noises at t + 20


def begun(like: str, sampler: str, steps: int, strength: float) -> tuple[list[float], float]:
    """The sigmas that are run, and the one whose noise the picture gets."""
    convention = read(like)
    chosen, start = convention.sampler(SD, sampler), convention.entry(sampler, steps, strength)
    plan = chosen.plan(None, start.steps)
    rows, noised = start.rows(plan, getattr(chosen.inner, "order", 1))
    seen = plan.columns()["sigma"].tolist()
    return [seen[i] for i in rows], seen[noised]


def test_pndm_of_diffusers_begins_at_the_row_of_its_list_and_goes_on_to_the_end() -> None:
    """timesteps[t_start:], of a list with one timestep twice: one step more than strength asks for."""
    plan = planned("diffusers", "pndm", 50)
    ran, noised = begun("diffusers", "pndm", 50, 0.75)
    assert ran == plan.columns()["sigma"].tolist()[13:]
    assert noised == ran[0]


@pytest.mark.parametrize("like", ["ldm", "a1111"])
def test_plms_begins_where_ddim_does(like: str) -> None:
    for strength in (0.3, 0.75):
        assert begun(like, "pndm", 20, strength) == begun(like, "ddim", 20, strength)


@pytest.mark.parametrize("scheduler", ["simple", "karras", "ddim_uniform", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_comfyui_begins_that_many_sigmas_before_the_end(scheduler: str, sampler: str) -> None:
    """sigmas[-(steps + 1):]; ddim_uniform has more of them than steps, beta fewer."""
    order = 2 if sampler == "heun" else 1
    for steps, strength in ((20, 0.6), (11, 0.5), (30, 1.0), (400, 0.5)):
        like, planning = f"comfyui:{scheduler}", int(steps / strength)
        full = planned(like, sampler, planning).columns()["sigma"].tolist()
        want = full if strength == 1 else full[-(steps * order - (order - 1)) :]
        assert begun(like, sampler, steps, strength) == (want, want[0])


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50])
@pytest.mark.parametrize("strength", [0.0, 0.02, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("like", ["diffusers", "ldm", "a1111", "comfyui"])
def test_starts_stay_within_their_plan(like: str, strength: float, steps: int) -> None:
    """Against the programs' slices, taken from a list of that many timesteps."""
    convention, rising = read(like), list(range(0, 1000, 1000 // steps))
    if like == "comfyui" and strength > 0 and steps / strength > 1000:
        with pytest.raises(ConfigError, match="comfyui plans"):
            convention.entry("euler", steps, strength)
        return
    if like == "ldm":
        runs = int(strength * steps)
        if runs == len(rising):
            with pytest.raises(ConfigError, match="as one row above the first"):
                convention.entry("ddim", steps, strength)
            return
        want, falling = rising[:runs][::-1], rising[::-1]
        start = convention.entry("ddim", steps, strength)
        assert falling[start.noised] == rising[runs]
    elif like == "a1111":
        falling = list(range(steps + 1))
        want = falling[steps - int(min(strength, 0.999) * steps) - 1 : -1]
        start = convention.entry("euler", steps, strength)
    elif like == "comfyui":
        new = steps if strength > 0.9999 else int(steps / strength) if strength else steps
        falling = list(range(new + 1))
        want = falling[-(steps + 1) : -1] if strength else []
        start = convention.entry("euler", steps, strength)
        assert start.steps == new
    else:
        falling = list(range(steps))
        want = falling[max(steps - min(int(steps * strength), steps), 0) :]
        start = convention.entry("euler", steps, strength)
    assert falling[start.first : start.first + start.runs] == want


def test_starts_that_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match="no image to image of its own"):
        read("k-diffusion").entry("euler", 20, 0.5)
    for steps, strength in ((0, 0.5), (20, 1.5), (20, -0.1), (1001, 0.5)):
        with pytest.raises(ConfigError):
            read("diffusers").entry("euler", steps, strength)


def test_trap_guidance_scale_0() -> None:
    """Trap: guidance_scale 0. By the formula the prompt drops out; diffusers asks for it alone at 1 and below."""
    asked = {like: [read(like).guided(scale) for scale in (0, 0.5, 1, 1 + 1e-12, 7.5)] for like in PROFILES}
    assert asked["diffusers"] == [False, False, False, True, True]
    assert asked["ldm"] == asked["k-diffusion"] == [True, True, False, True, True]
    assert asked["comfyui"] == [True, True, False, False, True]
    assert asked["a1111"] == [True] * 5


# --- the data, the names, the pictures of both -------------------------------------------------------------------


def test_every_fact_has_a_source_or_says_that_it_has_none() -> None:
    assert list(PROFILES) == ["minidiff", "diffusers", "ldm", "k-diffusion", "a1111", "comfyui"]
    for profile in PROFILES.values():
        facts = {f.name for f in dataclasses.fields(profile) if isinstance(getattr(profile, f.name), Fact)}
        assert facts == set(FIELDS)
        for field in FIELDS:
            fact = getattr(profile, field)
            if fact.source is None:
                assert str(fact) == f"{fact.says} (unverified)"
                continue
            assert str(fact) == fact.says
            where, version = fact.source
            pinned = version.split()[0]
            assert where.endswith(".py")
            assert version in ("this package", "diffusers 0.42.1", "k-diffusion 0.1.1.post1") or (
                len(pinned) == 40 and int(pinned, 16) >= 0
            )
    assert PROFILES["a1111"].table.source is None  # in float16 it rounds the table; how far was not read


def test_the_markdown_names_what_is_unverified_and_lists_its_sources() -> None:
    lines = markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(FIELDS)
    assert {row.count("|") for row in rows} == {len(PROFILES) + 3}
    assert sum("*(unverified)*" in row for row in rows) == 1
    listed = [line for line in lines if line[:1].isdigit()]
    cited = {int(part.split("]")[0]) for row in rows for part in row.split("[")[1:] if part.split("]")[0].isdigit()}
    assert cited == set(range(1, len(listed) + 1))


def test_plans_side_by_side() -> None:
    text = plans(["a1111", "diffusers", "comfyui"], SD, {"name": "euler"}, 20)
    heads, names, rows = text.splitlines()[:3], text.splitlines()[3], text.splitlines()[4:]
    assert heads[0] == "a1111: 20 model calls, x starts as noise * 14.6146"
    assert heads[2].endswith("noise * 14.6488")
    assert names.split()[:4] == ["row", "t", "a1111", "t"]
    assert len(rows) == 20
    assert rows[0].split() == ["0", "999", "999", "999", "14.6146", "14.6146", "14.6146", "~"]
    assert all(row.endswith("*") for row in rows[1:])
    ends = {row.rindex(row.split()[-2]) + len(row.split()[-2]) for row in rows}
    assert len(ends) == 1  # columns are aligned at their right


def test_plans_of_other_lengths_and_equal_ones() -> None:
    text = plans(["ldm", "diffusers"], SD, {"name": "ddim"}, 30)
    assert len(text.splitlines()) == 2 + 1 + 31
    plan = planned("ldm", "ddim", 5)
    assert not any(line.endswith(("*", "~")) for line in side_by_side({"a": plan, "b": plan}).splitlines()[3:])
    assert plans(["ldm"], SD, {"name": "ddim"}, 5) == str(plan)


def test_what_is_given_wins() -> None:
    own = planned("a1111", "euler", 20, spacing="leading", steps_offset=1)
    want = sampler_from_config({"name": "euler", "spacing": "leading", "steps_offset": 1})
    assert_close(own.sigmas, want.plan(noise_table("rounded", SD).schedule, 20).sigmas)
    assert bool((planned("k-diffusion", "euler", 8, s_churn=2.0).rows.churn > 0).all())
    assert planned("comfyui", "unipc", 9, solver_order=1).rows.order == (1,) * 9
    sampler = read("a1111").sampler(SD, "euler")
    assert sampler.plan(None, timesteps=[900, 5]).timesteps.tolist() == [900, 5]
    np.testing.assert_allclose(sampler.plan(None, sigmas=[5.0, 1.0, 0.0]).sigmas, [5, 1, 0])


def test_names_and_choices() -> None:
    assert str(read("comfyui:karras:gpu")) == "comfyui:karras:gpu"
    assert str(read("a1111:nv")) == "a1111:nv"
    assert read(read("ldm")) == Convention(PROFILES["ldm"])
    with pytest.raises(ConfigError, match="no program is called 'invoke'; known are minidiff, diffusers, ldm"):
        read("invoke")
    with pytest.raises(ConfigError, match="a1111 has no 'normal'; known are uniform, karras, exponential, cpu"):
        read("a1111:normal")
    with pytest.raises(ConfigError, match="ldm has no sampler 'euler'; choose one of ddim, pndm"):
        planned("ldm", "euler", 20)
    with pytest.raises(ConfigError, match="euler has no option 'eta'"):
        planned("a1111", "euler", 20, eta=1.0)
    for steps in (0, 1001, 2.5):
        with pytest.raises(ConfigError, match="steps="):
            planned("a1111", "euler", steps)
    assert math.isclose(float(planned("comfyui", "euler", 1000).sigmas[-2]), SIGMAS[0], rel_tol=ONCE.relative)


def test_the_readmes_table_is_made_from_the_data() -> None:
    """Held by a test; ``python -c "from minidiff.programs.table import markdown; print(markdown())"`` prints it."""
    page = Path(__file__).resolve().parents[2] / "minidiff" / "programs" / "README.md"
    text = page.read_text(encoding="utf-8")
    start, end = "<!-- programs: made by minidiff/programs/table.py -->\n", "\n\n<!-- programs: end -->"
    assert text.count(start) == text.count(end) == 1
    assert text.split(start)[1].split(end)[0] == markdown()


@pytest.mark.parametrize(("like", "calls"), [("diffusers", 2), ("a1111", 3), ("comfyui", 4), ("ldm", 2)])
def test_image_to_image_begins_where_the_program_does(like: str, calls: int) -> None:
    """Half the strength of four steps is two calls, one more in a1111, and all four in ComfyUI."""
    sd = tiny.tiny_sd()
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = sd.steps(
        "a fox", steps=4, image=picture, strength=0.5, sampler="ddim" if like == "ldm" else "euler", seed=1, like=like
    )
    assert len(run) == calls
    first = next(run)
    assert int(first.t) == int(run.plan.timesteps[len(run.plan.timesteps) - calls])
    assert run.recipes[0]["like"] == like
    assert torch.isfinite(run.last().x).all()
    with pytest.raises(ConfigError, match="strength=2"):
        sd.steps("a fox", steps=4, image=picture, strength=2, sampler="ddim", like=like)
