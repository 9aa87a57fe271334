"""The panel of scales: its histograms and constants, against the run's own tensors."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import minidiff
from minidiff.explain import Seen, collect, explained
from minidiff.explain.panels import scales
from minidiff.pipeline.request import Request
from tests.support.tiny import tiny_ddpm, tiny_sd
from tests.unit.test_explain import PROMPT, Elements


@cache
def seen() -> Seen:
    return collect(minidiff.bundled(), Request(PROMPT, steps=3, seed=0, sampler="euler"), bundled=True)


@cache
def page() -> str:
    return explained(seen(), panels=["scales"])


def test_what_the_model_saw_is_measured() -> None:
    data = json.loads(Elements(page()).texts["data-scales"])
    assert data["factor"] == pytest.approx(float(seen().plan.init_noise_sigma))
    for frame, spread in zip(seen().frames, data["spread"], strict=True):
        assert spread["x"] == pytest.approx(float(frame.before.std()))
        assert spread["seen"] == pytest.approx(float(frame.shown.std()))
        assert spread["seen"] == pytest.approx(spread["x"] / (float(seen().plan.levels.here[frame.i]) ** 2 + 1) ** 0.5)
    assert data["spread"][0]["x"] > 10 > 2 > data["spread"][0]["seen"]


def test_the_constants_are_derived() -> None:
    data = json.loads(Elements(page()).texts["data-scales"])
    vae = minidiff.bundled().config.vae
    assert vae is not None
    assert data["scaling"] == vae.scaling_factor
    assert data["measured scaling"] == pytest.approx(vae.scaling_factor, rel=0.1)
    assert f"have a standard deviation of {1 / data['measured scaling']:.4g}" in page()
    last = float(minidiff.bundled().schedule.alphas_cumprod[-1])
    assert f"alpha_bar) = {((1 - last) / last) ** 0.5:.6g}" in page()
    assert f"= {14.6146}" in page()


def test_both_questions_have_their_anchors() -> None:
    ids = {attributes.get("id") for _, attributes in Elements(page()).found}
    assert {"q-init-noise-sigma", "q-scaling-factor"} <= ids


def test_a_histogram_counts_every_number() -> None:
    x = torch.tensor([-1.0, -0.99, 0.01, 0.01, 1.0])
    found = scales.histogram(x, 1.0)
    assert len(found) == scales.BINS
    assert sum(share for _, share in found) == pytest.approx(1)
    assert found[0][1] == pytest.approx(0.4)
    assert found[scales.BINS // 2] == (pytest.approx(1 / scales.BINS, abs=1e-6), pytest.approx(0.4))


def test_a_model_without_a_vae_says_so() -> None:
    panel = scales.build(collect(tiny_ddpm(), Request(None, steps=2, seed=0)))
    assert "it has no VAE and no such factor" in panel.body
    assert "scaling" not in panel.data


def test_a_run_from_a_picture_has_no_first_noise() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    panel = scales.build(collect(tiny_sd(), Request("a star", steps=4, seed=0, image=image, strength=0.5)))
    assert "the first x of this run" not in panel.body
    assert "this page does not have" in panel.body


def test_a_model_in_another_precision_has_its_scales() -> None:
    seen = collect(minidiff.bundled(dtype=torch.bfloat16), Request("a red star", steps=1, seed=0), bundled=True)
    panel = scales.build(seen)
    assert panel.data["measured scaling"] == pytest.approx(panel.data["scaling"], rel=0.1)
