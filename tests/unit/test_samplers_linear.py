"""Plans as tables of weights: replayed, they give the sampler's own samples; what is not linear is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.config import ScheduleConfig
from minidiff.errors import UnsupportedError
from minidiff.samplers import (
    CM,
    DDIM,
    DDPM,
    DPMSDE,
    PNDM,
    SAMPLERS,
    DPM2Ancestral,
    DPMSolver,
    DPMSolverSinglestep,
    Euler,
    Heun,
    SASolver,
    Scheduler,
    UniPC,
)
from minidiff.samplers.linear import table
from minidiff.schedule import NoiseSchedule
from tests.support.command import Run, one_error
from tests.tolerances import LINEAR, SMALL_SIGNAL, assert_close

OPTIONS = [
    DDPM(variance="fixed_large_log"),
    DDIM(eta=0.7, use_clipped=True),
    PNDM(runge_kutta=True),
    Euler(s_churn=3.0, sigma_spacing="karras"),
    DPMSolver(algorithm="dpmsolver", solver_type="heun", final_sigma="sigma_min"),
    DPMSolver(algorithm="sde-dpmsolver++", solver_order=3, sigma_spacing="karras"),
    UniPC(solver_order=3),
    UniPC(solver_type="bh1", sigma_spacing="beta", disable_corrector=(1,)),
    SASolver(predictor_order=3, corrector_order=4, spacing="leading"),
    SASolver(algorithm="noise_prediction"),
    DPMSolverSinglestep(algorithm="sde-dpmsolver++", solver_order=3),
    DPM2Ancestral(sigma_spacing="exponential"),
    Heun(like_diffusers=True),
    CM(clip=None),
]
NAMES = [name for name in SAMPLERS if name != "cm"]
EVERY = [*(SAMPLERS[name]() for name in NAMES), *OPTIONS]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = [
    pytest.param(s, p, id=f"{k}-{type(s).__name__}-{p}")
    for k, s in enumerate(EVERY)
    for p in PREDICTIONS
    if (type(s), p) != (PNDM, "sample")
]
SHAPE = (2, 3, 4, 5)


def made_up(x: Tensor, t: Any) -> Tensor:
    """A model that is not linear, neither in the sample nor in the timestep."""
    return torch.tanh(x.roll(1, dims=1) + 0.5 * x) + 0.2 * torch.sin(torch.as_tensor(t, dtype=x.dtype) / 100)


def noises(n: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(1)
    return iter([torch.randn(SHAPE, generator=g).to(dtype) for _ in range(n)])


def by_the_sampler(sampler: Any, plan: Any, x: Tensor, draw: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    state = sampler.start()
    for i in range(len(plan)):
        out = made_up(sampler.scale_input(plan, i, x), plan.timesteps[i])
        x, state = sampler.step(plan, i, x, out, state, draw)
        yield x


@pytest.mark.parametrize(("sampler", "prediction"), CASES)
@pytest.mark.parametrize("steps", [1, 6])
def test_the_table_gives_the_samplers_samples(sampler: Any, prediction: Any, steps: int) -> None:
    """In float64, with the same noise drawn in the same rows."""
    if steps == 1 and getattr(sampler, "runge_kutta", False):
        steps = 4
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig(prediction=prediction)), steps)
    made = table(sampler, plan)
    assert len(made.rows) == len(plan)
    ours, theirs = noises(len(plan)), noises(len(plan), torch.float64)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * plan.init_noise_sigma
    samples = by_the_sampler(sampler, plan, x, lambda like: next(ours))
    for i, (want, got) in enumerate(
        zip(samples, made.run(x.double(), made_up, lambda like: next(theirs)), strict=True)
    ):
        gap = (got - want).abs().max() / max(want.abs().max(), x.abs().max(), 1)
        assert gap <= LINEAR.relative, f"row {i}: {gap:.3g}"
        x = want
    assert len(list(ours)) == len(list(theirs))


def test_x0_is_the_picture_that_the_sampler_sees() -> None:
    sampler = UniPC(solver_order=3)
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 5)
    for i, row in enumerate(table(sampler, plan).rows):
        x, out = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(i))
        x0 = sampler.denoised(plan, i, x, out, sampler.start())
        assert_close(row.x0["x"] * x + row.x0["out"] * out, x0, SMALL_SIGNAL)


def test_ddims_weights_are_those_of_the_paper() -> None:
    """Equation 12 of Song et al. 2021 with x0 and epsilon put in."""
    sampler = DDIM()
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 5)
    for i, row in enumerate(table(sampler, plan).rows):
        here, to = plan.levels.here[i].item(), plan.levels.to[i].item()
        assert row.x["x"] == pytest.approx((to / here) ** 0.5, rel=1e-6)
        assert row.x["out"] == pytest.approx((1 - to) ** 0.5 - (to / here * (1 - here)) ** 0.5, rel=1e-5)
        assert (row.scale, row.timestep, row.draws, row.remember) == (1, plan.timesteps[i].item(), False, {})


def test_only_what_is_needed_later_is_remembered() -> None:
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    sampler = DPMSolver()  # keeps two outputs, of which a step needs the new one and the one before
    made = table(sampler, sampler.plan(schedule, 4))
    assert made.remembered == ("outputs[-1]",)
    assert [list(row.remember) for row in made.rows] == [["outputs[-1]"], ["outputs[-1]"], [], []]  # the last: order 1
    assert table(SASolver(), SASolver().plan(schedule, 4)).remembered == ("outputs[-1]", "base", "noise[-1]")


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (CM(), r"CM with clip=1.0 clamps x0, .* use clip=None or another sampler"),
        (DDIM(threshold=0.995), "DDIM with threshold=0.995 divides x0 by a quantile of it"),
        (DDPM(variance="learned_range"), "DDPM with variance='learned_range' takes its variance from"),
        (DPMSolver(learned_variance=True), "DPMSolver with learned_variance=True takes half"),
        (DPMSDE(noise_seed=3), "DPMSDE with noise_seed=3 takes its noise from a path of its own"),
    ],
)
def test_what_is_not_linear_is_refused(sampler: Any, words: str) -> None:
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 4)
    with pytest.raises(UnsupportedError, match=words):
        table(sampler, plan)


class Bent:
    """A sampler that somebody wrote: no option tells that it is not linear."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.bend = Euler(), bend
        self.start, self.scale_input, self.denoised = self.inner.start, self.inner.scale_input, self.inner.denoised

    def step(self, *given: Any) -> Any:
        after, state = self.inner.step(*given)
        return self.bend(after), state


@pytest.mark.parametrize(
    "bend",
    [
        lambda x: x.clamp(-50, 50),
        lambda x: x + 1e-3,
        lambda x: x * x.abs(),
        lambda x: x / x.norm().clamp(min=1e3) * 1e3,
        lambda x: x.where(x.abs() < 1e2, float("nan")),
        lambda x: x - x.mean(),
    ],
)
def test_a_sampler_that_bends_is_found_out(bend: Any) -> None:
    plan = Euler().plan(NoiseSchedule.from_config(ScheduleConfig()), 4)
    assert len(table(Bent(lambda x: 2 * x), plan).rows) == 4
    with pytest.raises(UnsupportedError, match="Euler is not linear in row 0"):
        table(Bent(bend), plan)


def test_the_command_writes_the_table(run: Run) -> None:
    ended = run("plan", "--sampler", "euler_ancestral", "--steps", "3", "--json")
    assert (ended.status, ended.err) == (0, [])
    found = json.loads("\n".join(ended.out))
    sampler = SAMPLERS["euler_ancestral"]()
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 3)
    assert found["format"] == "minidiff plan 1"
    assert found["sampler"]["name"] == "euler_ancestral"
    assert found["schedule"]["beta_end"] == 0.012
    assert found["first"] == plan.init_noise_sigma.item()
    assert found["rows"] == table(sampler, plan).to_json()["rows"]
    assert [row["draws"] for row in found["rows"]] == [True, True, True]
    told = json.loads("\n".join(run("plan", "--sampler", "euler", "--steps", 3, "--json", "--like", "a1111").out))
    assert told["rows"][0]["timestep"] == pytest.approx(999, abs=0.1)
    one_error(run("plan", "--json", "--like", "a1111,ldm"), "--json writes one plan", "--like a1111,ldm")
    one_error(run("plan", "--json", "--sampler", "cm", "--steps", 2), "CM with clip=1.0 clamps x0")


def test_a_sampler_of_a_diffusers_config() -> None:
    told = {"_class_name": "DDPMScheduler", "clip_sample": False}
    sampler = Scheduler.from_diffusers(told).sampler
    assert sampler.like_diffusers
    made = table(sampler, sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 3))
    assert [row.draws for row in made.rows] == [True, True, False]
    assert replace(made, method="") != made
