"""The panel of training: losses that follow from what it shows, and optimiser steps on a model of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

import minidiff
from minidiff.explain import Seen, collect, explained, lesson
from minidiff.explain.page import LARGE
from minidiff.explain.panels import training
from minidiff.pipeline.request import Request
from minidiff.training.curves import rate_at
from minidiff.training.loop import Trainer
from tests.support.tiny import tiny_sd
from tests.tolerances import BATCH, assert_close
from tests.unit.test_explain import PROMPT, Elements


@cache
def seen() -> Seen:
    return collect(minidiff.bundled(), Request(PROMPT, steps=1, seed=0), bundled=True)


@cache
def page() -> str:
    return explained(seen(), panels=["training"])


def test_the_model_of_the_run_is_left_as_it_is() -> None:
    before = {name: p.clone() for name, p in seen().pipe.unet.named_parameters()}
    asked = {name: p.requires_grad for name, p in seen().pipe.unet.named_parameters()}
    page()
    for name, p in seen().pipe.unet.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad == asked[name]


def test_errors_of_one_answer_in_three_names_follow_from_each_other() -> None:
    """v's error is signal * that of epsilon + ...: with x given, one error is a multiple of any other."""
    data = json.loads(Elements(page()).texts["data-training"])
    one = data["picture"]
    assert data["prediction"] == "v_prediction"
    for k, (signal, noise) in enumerate(zip(data["signal"], data["noise"], strict=True)):
        assert one["v"][k] == pytest.approx(one["loss"][k], rel=1e-4)
        assert one["epsilon"][k] == pytest.approx(signal**2 * one["v"][k], rel=1e-3)
        assert one["x0"][k] == pytest.approx(noise**2 * one["v"][k], rel=1e-3)
    assert len(one["t"]) == lesson.LEVELS
    assert all(a > b for a, b in zip(data["nothing"], data["by t"]["loss"], strict=True))


def test_the_loss_is_that_of_training() -> None:
    """The answers against the task's own parts, on the same example."""
    pipe = minidiff.bundled()
    t = torch.tensor([500])
    found, captions = lesson.answered(pipe, 3, 1, t)
    assert captions == list(lesson.ShapesStream(lesson.SEED).batch(3, 1).captions or ())
    assert torch.equal(found.x, pipe.schedule.add_noise(found.x0, found.epsilon, t))
    context, _ = pipe.encode_prompt(captions)
    with torch.no_grad():
        out = pipe.unet(found.x, t, context)
    assert torch.equal(out, found.out)
    wanted = pipe.schedule.velocity(found.x0, found.epsilon, t)
    assert found.losses["loss"].item() == pytest.approx(torch.nn.functional.mse_loss(out, wanted).item())


def test_each_example_goes_with_its_own_caption_and_timesteps() -> None:
    pipe, t = minidiff.bundled(), torch.tensor([900, 300])
    both, captions = lesson.answered(pipe, 3, 2, t)
    second, caption = lesson.answered(pipe, 4, 1, t)
    assert captions[1:] == caption
    assert both.t.tolist() == [900, 300, 900, 300]
    assert_close(both.x[2:], second.x, BATCH)
    assert_close(both.out[2:], second.out, BATCH)


def test_optimiser_steps_are_real() -> None:
    data = json.loads(Elements(page()).texts["data-training"])
    assert len(data["steps"]) == lesson.CONFIG.steps
    for k, step in enumerate(data["steps"]):
        assert step["rate"] == rate_at(lesson.CONFIG, k)
        assert step["clipped"] == min(step["norm"], data["clip"])
        assert step["loss"] > 0


def test_every_line_of_the_loop_is_shown_with_its_place() -> None:
    for _, function, holding in training.CODE:
        known = training.line(function, holding)
        assert f"{known.file}:{known.number}" in page()
    ids = {attributes.get("id") for _, attributes in Elements(page()).found}
    assert {"q-loss-does-not-fall", "q-training-loop"} <= ids


def test_all_three_targets_are_shown() -> None:
    """The noise and the clean picture are the same at each timestep, v is not."""
    shown = page()
    section = shown[shown.index('<section id="training"') :]
    reels = re.findall(
        r'<div class="reel">.*?<p lang="en" class="name">(.*?)</p>.*?<div class="strip">(.*?)</div></div>', section
    )
    pictures = {title: re.findall(r'src="([^"]*)"', strip) for title, strip in reels}
    assert [len(each) for each in pictures.values()] == [lesson.LEVELS] * 6
    different = {title.partition(":")[0]: len(set(each)) for title, each in pictures.items()}
    assert different["what most models are asked for"] == 1
    assert different["what a few models are asked for"] == 1
    assert different["the target"] == lesson.LEVELS


def test_another_model_gets_it_on_demand_and_is_told_whose_training_it_is() -> None:
    other = collect(tiny_sd(), Request("a star", steps=1, seed=0))
    whole = explained(other)
    for name in LARGE:
        said = whole[whole.index(f'<section id="{name}" class="panel left">') :].partition("</section>")[0]
        assert f"--panels {name} makes it for this one." in said
        assert f"请使用 --panels {name}。" in said
    assert "training" in LARGE
    assert "This is not the training of the model above" in explained(other, panels=["training"])
    assert "This is the training of the model above" in page()


def test_the_clipping_shows() -> None:
    """The step whose numbers stand beside the loop is one whose gradient was shortened."""
    data = json.loads(Elements(page()).texts["data-training"])
    most = max(data["steps"], key=lambda step: step["norm"])
    assert most["clipped"] == data["clip"] < most["norm"]
    assert f"{most['norm']:.4f} before, {data['clip']:.4f} after" in page()
    assert "type: ignore" not in page()


def test_the_optimiser_written_out_is_torch_s() -> None:
    """The same losses, gradients and weights, to the last bit."""
    ours, theirs = minidiff.bundled(), minidiff.bundled()
    plain = list(Trainer(theirs, lesson.ShapesStream(lesson.SEED), lesson.CONFIG).steps())
    assert lesson.trained(ours) == plain
    before = minidiff.bundled().unet.state_dict()
    for (name, p), q in zip(ours.unet.named_parameters(), theirs.unet.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not torch.equal(p, before[name]), name


def test_a_page_does_not_load_torch_s_compiler() -> None:
    """It takes a second or two, and torch's optimisers load it."""
    code = (
        "import sys, minidiff; from minidiff.explain import lesson; "
        "lesson.trained(minidiff.bundled()); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
