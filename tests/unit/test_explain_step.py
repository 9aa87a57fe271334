"""The panel of a step: its weights give the run's samples again, in all three spellings, from the page's data alone."""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from minidiff.explain import Seen, collect, explained
from minidiff.explain.arithmetic import replaced
from minidiff.explain.panels import step, step_answers
from minidiff.pipeline.request import Request
from minidiff.samplers import SAMPLERS
from tests.support.tiny import tiny_ddpm, tiny_sd, tiny_xl
from tests.unit.test_explain import PROMPT, Elements

ROUNDING = 3e-5  # of the largest number in the sample: the run computes in float32
LINEAR = (
    "ddim",
    "ddpm",
    "pndm",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "deis",
)


def numbers(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def values(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """The recorded values of a step, and x0 and epsilon as sums of them."""
    found = {name: numbers(text) for name, text in row["given"].items()}
    found["x0"] = weighed(row["x0"], found)
    if row["noise"]:
        found["epsilon"] = (found["x"] - row["signal"] * found["x0"]) / row["noise"]
    return found


def weighed(weights: dict[str, float], found: dict[str, np.ndarray]) -> Any:
    return sum(weight * found[name] for name, weight in weights.items())


def check(data: dict[str, Any]) -> None:
    for row in data["steps"]:
        found, wanted = values(row), numbers(row["next"])
        for block in step.BLOCKS:
            if row[block] is not None:
                gap = np.abs(weighed(row[block], found) - wanted).max()
                assert gap <= ROUNDING * max(1.0, np.abs(found["x"]).max()), (row["number"], block, gap)
        assert row["direct"] is not None


model = cache(tiny_sd)


def run(sampler: Any = None, pipe: Any = None, **options: Any) -> Seen:
    options = {"steps": 4, "seed": 0, **options}
    return collect(model() if pipe is None else pipe, Request("a star", sampler=sampler, **options))


@pytest.fixture(scope="module")
def page() -> str:
    seen = collect(minidiff.bundled(), Request(PROMPT, steps=4, seed=0), bundled=True)
    return explained(seen, panels=["step"])


def test_every_next_sample_follows_from_the_data_in_the_page(page: str) -> None:
    data = json.loads(Elements(page).texts["data-step"])
    assert [row["number"] for row in data["steps"]] == [1, 2, 3, 4]
    check(data)
    assert all(row["through"] and row["split"] for row in data["steps"])
    for now, later in zip(data["steps"], data["steps"][1:], strict=False):
        assert now["next"] == later["given"]["x"]
    noise = minidiff.bundled().steps(PROMPT, steps=1, seed=0)
    assert next(iter(noise)).x.shape[1:] == (4, 16, 16) == tuple(data["shape"])


def test_the_page_without_a_script_shows_one_pixel(page: str) -> None:
    data = json.loads(Elements(page).texts["data-step"])
    row, (c, y, x) = data["steps"][2], data["place"]
    at = (c * data["shape"][1] + y) * data["shape"][2] + x
    found = {name: value[at] for name, value in values(row).items()}
    for name in ("x", "out", "x0", "epsilon"):
        assert f"<td><code>{name}</code></td><td>{found[name]:.6g}</td>" in page
    assert page.count(f"<td>{numbers(row['next'])[at]:.6g}</td>") >= len(step.BLOCKS)


def test_every_question_has_its_anchor(page: str) -> None:
    ids = {attributes.get("id") for _, attributes in Elements(page).found}
    assert {*step_answers.ANCHORS.values()} <= ids


@pytest.mark.parametrize("name", LINEAR)
def test_other_samplers_are_sums_as_well(name: str) -> None:
    seen = run(name)
    panel = step.build(seen)
    check(panel.data)
    names = {value for row in panel.data["steps"] for value in row["direct"]}
    assert ("noise" in names) == any(frame.noise for frame in seen.frames)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_epsilon_is_what_the_model_answered(name: str) -> None:
    """The model predicts epsilon; x = signal * x0 + noise * epsilon holds at the scale of the sampler's own x."""
    seen = run(name)
    assert seen.plan.prediction == "epsilon"
    for row in step.build(seen).data["steps"]:
        found = values(row)
        assert np.abs(found["epsilon"] - found["out"]).max() <= ROUNDING * np.abs(found["x"]).max() / row["noise"]
        share = 1 if name == "euler" else row["signal"] ** 2 + row["noise"] ** 2
        assert share == pytest.approx(1)
        assert name != "euler" or row["signal"] == 1


def test_pure_noise_has_a_sigma_without_bound() -> None:
    page = explained(run("ipndm"), panels=["step"])
    assert "an error in epsilon counted ∞ times in x0 at the first call" in page
    assert " inf " not in page


def test_a_run_from_the_middle_has_the_weights_of_its_own_steps() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    panel = step.build(run("dpmpp_2m", image=image, strength=0.6))
    check(panel.data)
    assert panel.data["first"] is None
    assert "This run began from a picture" in panel.body


def test_a_sampler_that_clamps_has_no_weights_and_says_so() -> None:
    seen = collect(tiny_ddpm(), Request(None, steps=3, seed=0, sampler={"name": "ddpm", "clip": 1.0}))
    panel = step.build(seen)
    assert all(row["direct"] is None for row in panel.data["steps"])
    assert "clamps x0" in panel.body
    assert "no table of weights" in panel.body
    sums = [numbers(row["next"]) for row in panel.data["steps"]]
    assert np.array_equal(sums[-1], seen.frames[-1].after.flatten().double().numpy())


@pytest.mark.parametrize("seed", [0, 7])
def test_noise_of_its_own_is_named(seed: int) -> None:
    panel = step.build(run({"name": "dpmpp_sde", "noise_seed": seed}))
    assert all(row["direct"] is None for row in panel.data["steps"])
    assert "a Brownian path of its own" in panel.body


def test_what_a_mask_changes_afterwards_is_said() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    panel = step.build(run(image=image, mask=mask, strength=1.0))
    assert any(row["kept"] for row in panel.data["steps"])
    assert "the known part of the picture was put back" in panel.body


@pytest.mark.parametrize("like", ["a1111", "comfyui:karras", "diffusers"])
def test_other_programs_have_the_panel(like: str) -> None:
    check(step.build(run("euler", like=like)).data)


def test_sdxl_has_the_panel() -> None:
    check(step.build(run("euler", tiny_xl())).data)


def test_large_samples_and_long_runs_are_thinned_and_say_so() -> None:
    seen = run("ddim", steps=51, height=136, width=192)
    panel = step.build(seen)
    assert "The run has 51 steps; the numbers of 50 of them" in panel.body
    assert "17 x 24 places; 16 x 16 of them" in panel.body
    check(panel.data)
    at = panel.data["rows"].index(panel.data["rows"][3]), 5
    frame = seen.frames[panel.data["steps"][7]["number"] - 1]
    x = numbers(panel.data["steps"][7]["given"]["x"]).reshape(panel.data["shape"])
    assert x[2, at[0], at[1]] == float(frame.before[0, 2, panel.data["rows"][3], panel.data["columns"][5]])


def test_a_sum_is_written_in_other_values() -> None:
    assert replaced({"x": 2.0, "out": 3.0}, "out", {"x": -1.0, "x0": 0.5}) == {"x": -1.0, "x0": 1.5}
    assert replaced({"x": 3.0, "out": 3.0}, "out", {"x": -1.0, "x0": 0.5}) == {"x0": 1.5}


def test_both_forms_of_ddpm_and_its_variances_are_its_own(page: str) -> None:
    """The numbers in the answers, computed again from the schedule."""
    plan = SAMPLERS["ddpm"]().plan(minidiff.bundled().schedule, 4)
    a = minidiff.bundled().schedule.alphas_cumprod.double()
    here, to = a[plan.timesteps[2]], a[plan.timesteps[3]]
    beta = 1 - here / to
    posterior = ((1 - to) / (1 - here) * beta) ** 0.5
    assert f"standard deviation {posterior:.4g} from the posterior, {beta**0.5:.4g} from beta" in page
    assert (
        f"{(1 - beta) ** -0.5:.4g} for x and {-beta / (1 - here) ** 0.5 * (1 - beta) ** -0.5:.4g} for epsilon" in page
    )


@pytest.mark.parametrize(
    ("sampler", "course"),
    [("ddim", "picture grows"), ("euler", "keeps the picture at its own scale"), ("dpmpp_sde", "it is not so")],
)
def test_the_text_below_the_weights_is_true_of_them(sampler: str, course: str) -> None:
    seen = collect(minidiff.bundled(), Request(PROMPT, steps=5, seed=0, sampler=sampler))
    page = explained(seen, panels=["step"])
    told = ("picture grows", "keeps the picture at its own scale", "it is not so")
    assert [text for text in told if text in page] == [course]
    splits = [row["split"] for row in json.loads(Elements(page).texts["data-step"])["steps"]]
    picture = [split["x0"] for split in splits]
    assert (picture == pytest.approx(sorted(picture), abs=1e-5)) == (course != told[2])
    assert ("This sampler also remembers" in page) == (sampler == "dpmpp_sde")
