"""The panel of timesteps: every list in the page is that of the formula, of the run, and of the programs' own plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minidiff.explain import Seen, collect, explained
from minidiff.explain.panel import Left, Panel
from minidiff.explain.panels import timesteps
from minidiff.pipeline.request import Request
from minidiff.programs import read
from tests.support.tiny import SD, drawn, tiny_ddpm, tiny_sd, tiny_xl
from tests.unit.test_explain_guidance import data_of, floats, run

ANCHORS = (
    "q-first-timestep", "q-offset", "q-timestep-twice", "q-sigma-alpha-timestep", "q-beta-prod", "q-negative-timestep",
    "q-last-step", "q-programs-differ", "q-strength", "q-inversion", "q-ddpm-ddim",
)  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> Seen:
    return run(tiny_sd(), sampler="ddim", steps=5)


@pytest.fixture(scope="module")
def page(seen: Seen) -> str:
    return explained(seen, panels=["timesteps"])


def test_the_spacings_are_those_of_the_formulas(page: str) -> None:
    data = data_of(page, "timesteps")
    assert data["spacings"] == ["leading", "leading + 1", "trailing", "linspace"]
    assert data["steps"] == 5
    for key, found in data["grids"].items():
        n = int(key)
        leading = [k * (1000 // n) for k in reversed(range(n))]
        assert found[0] == leading
        assert found[1] == [t + 1 for t in leading]
        assert found[2][0] == 999
        assert all(abs(t - (999 - 1000 * k / n)) <= 0.5 for k, t in enumerate(found[2]))
        if n > 1:
            assert all(abs(t - 999 * (1 - k / (n - 1))) <= 0.500001 for k, t in enumerate(found[3]))
    assert data["grids"]["50"][0][0] == 980
    assert data["grids"]["50"][1][0] == 981


def test_the_run_and_its_levels_are_in_the_page(seen: Seen, page: str) -> None:
    data = data_of(page, "timesteps")
    assert data["visited"] == [801.0, 601.0, 401.0, 201.0, 1.0]
    table = floats(data["alpha_bar"], [1000])
    assert torch.equal(table, seen.pipe.schedule.alphas_cumprod)
    level = float(table[401])
    for value in (level, level**0.5, (1 - level) ** 0.5, ((1 - level) / level) ** 0.5):
        assert f"<td>{value:.5f}</td>" in page
    assert data["pndm"] == [801.0, 601.0, 601.0, 401.0, 201.0, 1.0]
    for anchor in ANCHORS:
        assert f'id="{anchor}"' in page
    assert "<td>-199</td>" in page


def test_programs_and_strengths_are_their_own(seen: Seen, page: str) -> None:
    data = data_of(page, "timesteps")
    config = seen.pipe.config.schedule
    for name in ("diffusers", "a1111", "comfyui"):
        program = read(name)
        plan = program.sampler(config, "ddim").plan(None, 5)
        assert data["programs"][name]["timesteps"] == [float(t) for t in plan.timesteps]
        entry = program.entry("ddim", 5, 0.6)
        sampler = program.sampler(config, "ddim")
        entered = sampler.plan(None, entry.steps)
        rows, _ = entry.rows(entered, 1)
        assert data["strengths"][name][2] == [len(rows), float(entered.timesteps[rows[0]])]
    assert data["strengths"]["diffusers"][2] == [3, 401.0]
    assert data["programs"]["k-diffusion"]["timesteps"] == []
    assert "k-diffusion" not in data["strengths"]


def test_a_step_of_offset_zero_goes_nowhere(seen: Seen, page: str) -> None:
    first, second = (f"{float(seen.pipe.schedule.alphas_cumprod[t]):.6g}" for t in (0, 1))
    assert f"is at t = 0, from alpha_bar {first}" in page
    assert f"it lands on alpha_bar {first}" in page
    assert f"is at t = 1, and goes from {second} to {first}" in page


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("pndm", "planned 6 model calls"),
        ("euler", "set to linspace with offset 0"),
        ("heun", "planned 9 model calls"),
        ({"name": "dpmpp_2m", "sigma_spacing": "karras"}, "along a curve in sigma (karras)"),
        ("lcm", "began at t = "),
    ],
)
def test_other_samplers(sampler: Any, said: str) -> None:
    assert said in explained(run(tiny_sd(), sampler=sampler, steps=5), panels=["timesteps"])


def test_another_program_above() -> None:
    found = explained(run(tiny_sd(), sampler="euler", like="a1111"), panels=["timesteps"])
    assert "took the levels that a1111 takes" in found
    assert data_of(found, "timesteps")["visited"] == [999.0, 666.0, 333.0, 0.0]


def test_other_families_and_parts_of_a_run() -> None:
    for seen in (run(tiny_xl()), collect(tiny_ddpm(), Request(None, steps=2, seed=0))):
        assert isinstance(timesteps.build(seen), Panel)
    begun = run(tiny_sd(), image=torch.zeros(1, 3, 64, 64), strength=0.5, sampler="ddim")
    panel = timesteps.build(begun)
    assert isinstance(panel, Panel)
    assert "Pale marks" in panel.body
    assert "at strength 0.5, made 2 of the 4 calls of its plan, from t = 251" in panel.body
    assert panel.data["visited"] == [251.0, 1.0]
    own = timesteps.build(run(tiny_sd(), sampler="edm_euler"))
    assert isinstance(own, Left)
    assert "levels of its own" in own.why.en
    one = timesteps.build(run(tiny_sd(), sampler="ddim", steps=1))
    assert isinstance(one, Panel)


def test_a_schedule_that_ends_in_pure_noise() -> None:
    schedule = replace(SD.schedule, prediction="v_prediction", zero_snr=True)
    seen = run(drawn(replace(SD, schedule=schedule)), sampler={"name": "ddim", "spacing": "trailing"})
    page = explained(seen, panels=["guidance", "timesteps"])
    assert seen.frames[0].t == 999
    assert data_of(page, "timesteps")["programs"]["minidiff"]["sigmas"][0] is None
    assert "is at t = 0" in page


def test_the_step_past_the_end_is_told_as_the_sampler_has_it() -> None:
    """DDIM lands one interval lower, DDPM on the next row, and past the last one on -1."""
    ddim = explained(run(tiny_sd(), sampler="ddim", steps=4), panels=["timesteps"])
    assert "lands one interval (250 timesteps)" in ddim
    assert "The last call is at 1, so the place where it lands is -249." in ddim
    ddpm = explained(run(tiny_sd(), sampler="ddpm", steps=3), panels=["timesteps"])
    assert "lands on the timestep of the row below it" in ddpm
    assert "there is no row below: -1 is no timestep" in ddpm
    assert "lands one interval" not in ddpm


def test_one_call_is_one_call() -> None:
    page = explained(run(tiny_sd(), sampler="ddim", steps=3), panels=["timesteps"])
    assert "1 call from t = " in page
    assert "1 calls" not in page
    assert "3 steps become 4 calls, at 667, 334, 334, 1: 334 is there twice" in page
