"""The panel that compares samplers: runs from the noise of the page's own, with distances that follow from its data."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import minidiff
from minidiff import fast
from minidiff.explain import Seen, collect, explained, together
from minidiff.explain.panel import Left, Panel
from minidiff.explain.panels import samplers, step
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.request import Request
from tests.support.tiny import DDPM, drawn, tiny_ddpm, tiny_sd
from tests.tolerances import SIDE_BY_SIDE, assert_close
from tests.unit.test_explain import Elements

pipe = cache(tiny_sd)
PROMPT, STEPS = "a red circle left of a blue star on a white background", samplers.STEPS


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "STEPS", 12)
    monkeypatch.setattr(samplers, "BUDGETS", (2, 4))


def run(model: StableDiffusion | None = None, **options: object) -> Seen:
    return collect(model or pipe(), Request("a star", **{"steps": 4, "seed": 5, "sampler": "ddim", **options}))  # type: ignore[arg-type]


def numbers(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def assert_alike(x: torch.Tensor, wanted: torch.Tensor) -> None:
    largest = wanted.abs().max()
    assert_close(x / largest, wanted / largest, SIDE_BY_SIDE)


def test_distances_follow_from_the_data() -> None:
    seen = run()
    data = json.loads(Elements(explained(seen, panels=["samplers"])).texts["data-samplers"])
    goal = numbers(data["reference"]["x"])
    assert {r["sampler"] for r in data["runs"]} == {*samplers.NAMES}
    for r in data["runs"]:
        assert r["distance"] == pytest.approx(np.sqrt(np.square(numbers(r["x"]) - goal).mean()), rel=1e-5)


def test_the_reference_stands_for_many_steps() -> None:
    """The reference is nearer to the limit than the best of the runs that are compared with it."""
    seen = collect(minidiff.bundled(), Request(PROMPT, steps=1, seed=0), bundled=True)
    choices = {("", STEPS): samplers.REFERENCE, ("", 200): samplers.REFERENCE, ("ddim", 20): "ddim"}
    found = samplers.results(seen, choices)
    goal, calls = found["", 200]
    assert calls == 200
    assert samplers.distance(found["", STEPS][0], goal) < 0.002
    assert samplers.distance(found["ddim", 20][0], goal) > 0.01


def test_every_run_begins_at_the_same_noise() -> None:
    """A result is that of a run by hand, with the seed of the page's run; that of the page's own is not made again."""
    seen = run(seed=None)
    names = {("euler", 4): "euler", ("ddim", 4): "ddim", ("ddpm", 4): "ddpm", ("dpmpp_2m", 7): "dpmpp_2m"}
    found = samplers.results(seen, names)
    for (name, steps), (x, calls) in found.items():
        plain = pipe().generate("a star", steps=steps, seed=seen.recipe["seed"], sampler=name, output="latent")
        assert_alike(x, plain)  # the calls of all runs are made in one batch
        assert calls == steps
    assert found["ddim", 4][0] is seen.frames[-1].after


@pytest.mark.parametrize(
    "options",
    [{"guidance_interval": (0.2, 0.8)}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"like": "a1111"}],
)
def test_runs_side_by_side_are_those_alone(options: dict[str, object]) -> None:
    seen = run(**options)
    asked = replace(seen.request, like=None, seed=3)
    requests = [replace(asked, sampler=name, steps=n) for name in ("heun", "ddpm", "pndm") for n in (2, 5)]
    for request, (x, calls) in zip(requests, together.results(pipe(), requests), strict=True):
        alone = pipe().run(request)
        wanted = alone.last().x
        assert_alike(x, wanted)
        assert calls == len(alone)
        ((one, _),) = together.results(pipe(), [request])
        assert torch.equal(one, wanted), "a batch of the same size"


def test_one_call_serves_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 2, 3 and 5 steps take five calls together, and each by itself where samples are large."""
    sizes: list[int] = []
    undo = pipe().unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    requests = [Request("a star", steps=n, seed=0, sampler="euler") for n in (2, 3, 5)]
    try:
        together.results(pipe(), requests)
        assert sizes == [6, 6, 4, 2, 2]
        sizes.clear()
        monkeypatch.setattr(together, "SMALL", 0)
        together.results(pipe(), requests)
        assert sizes == [2] * 10
    finally:
        undo.remove()


def test_an_approximated_run_is_compared_by_the_plain_model() -> None:
    """The page says so."""
    sd = tiny_sd()
    fast.approximate(sd, deep=2)
    seen = collect(sd, Request("a star", steps=4, seed=5, sampler="ddim"))
    x, _ = samplers.results(seen, {("ddim", 4): "ddim"})["ddim", 4]
    assert_alike(x, pipe().generate("a star", steps=4, seed=5, sampler="ddim", output="latent"))
    assert not torch.allclose(x, seen.frames[-1].after, atol=1e-3)


def test_the_sampler_of_the_run_is_among_them() -> None:
    panel = samplers.build(run(sampler="heun"))
    assert isinstance(panel, Panel)
    assert {r["sampler"]: r["calls"] for r in panel.data["runs"] if r["steps"] == 4} == {
        "ddim": 4,
        "heun": 7,
        "dpmpp_2m": 4,
        "ddpm": 4,
    }


def test_an_inversion_is_not_compared() -> None:
    """It does not end at a picture."""
    panel = samplers.build(run(sampler="ddim_inverse"))
    assert isinstance(panel, Panel)
    assert {r["sampler"] for r in panel.data["runs"]} == {*samplers.NAMES}


def test_a_run_from_a_picture_is_left_out() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    left = samplers.build(run(image=image, strength=0.5))
    assert isinstance(left, Left)
    assert "from a picture" in left.why.en


def test_a_model_that_predicts_a_variance_is_left_out() -> None:
    model = drawn(replace(DDPM, unet=replace(DDPM.unet, out_channels=6)))
    sampler = {"name": "ddpm", "variance": "learned_range"}
    seen = collect(model, Request(None, steps=2, seed=0, sampler=sampler))
    left = samplers.build(seen)
    assert isinstance(left, Left)
    assert "can't run this model" in left.why.en
    assert "The variance of this sampler's noise comes from the model" in step.build(seen).body


def test_a_model_without_text_and_another_program_have_the_panel() -> None:
    assert isinstance(samplers.build(collect(tiny_ddpm(), Request(None, steps=2, seed=0))), Panel)
    assert isinstance(samplers.build(run(like="a1111")), Panel)
