"""The panel of guidance: its numbers give the run's own, and runs without two predictions say why they have none."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.explain import Seen, collect, explained, pictures
from minidiff.explain.colours import Colours, around
from minidiff.explain.panel import Left, Panel
from minidiff.explain.panels import guidance
from minidiff.pipeline.guidance import guide
from minidiff.pipeline.request import Request
from tests.support.tiny import SD, drawn, tiny_ddpm, tiny_sd, tiny_xl
from tests.tolerances import FITTED, REMIXED, assert_close


def data_of(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page)
    assert found is not None
    return json.loads(found.group(1))


def floats(text: str, shape: list[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy()).reshape(shape)


def run(pipe: Any, **options: Any) -> Seen:
    return collect(pipe, Request(**{"prompt": "a cat", "steps": 4, "seed": 0, **options}))


@pytest.fixture(scope="module")
def seen() -> Seen:
    return run(tiny_sd(), guidance_scale=3.0, sampler="ddim")


def test_the_guided_prediction_follows_from_the_page(seen: Seen) -> None:
    data = data_of(explained(seen, panels=["guidance"]), "guidance")
    assert [step["t"] for step in data["steps"]] == [frame.t for frame in seen.frames]
    for step, frame in zip(data["steps"], seen.frames, strict=True):
        u, c, out, x0_u, x0_c = (floats(step[k], data["shape"]) for k in ("u", "c", "out", "x0_u", "x0_c"))
        assert torch.equal(guide(u, c, data["scale"]), out)
        assert torch.equal(out, frame.out[0])
        assert frame.x0 is not None
        gap = (guide(x0_u, x0_c, data["scale"]) - frame.x0[0]).abs().max()
        assert gap <= REMIXED.relative * frame.x0.abs().max()
        assert not torch.equal(u, c)


def test_the_table_shows_where_the_predictions_differ_most(seen: Seen) -> None:
    page = explained(seen, panels=["guidance"])
    data = data_of(page, "guidance")
    step = data["steps"][data["begin"]]
    u, c = (floats(step[k], data["shape"]) for k in ("u", "c"))
    place = tuple(data["place"])
    assert (c - u).abs()[place] == (c - u).abs().max()
    numbers = f"<td>{u[place]:.6f}</td><td>{c[place]:.6f}</td>"
    assert numbers in page
    assert f"<td>{float(u[place]) + 3 * (float(c[place]) - float(u[place])):.6f}</td>" in page


def test_scale_zero_is_the_prediction_without_the_prompt() -> None:
    panel = guidance.build(run(tiny_sd(), guidance_scale=0.0))
    assert isinstance(panel, Panel)
    for step in panel.data["steps"]:
        assert step["u"] == step["out"]


def test_what_is_not_linear_is_said(seen: Seen) -> None:
    assert "is linear in the model" in explained(seen, panels=["guidance"])
    limited = run(tiny_sd(), guidance_scale=3.0, sampler={"name": "ddim", "clip": 0.5})
    assert "limited or rescaled" in explained(limited, panels=["guidance"])
    rescaled = explained(run(tiny_sd(), guidance_scale=3.0, guidance_rescale=0.7), panels=["guidance"])
    assert "limited or rescaled" in rescaled
    assert "guidance_rescale = 0.7" in rescaled


def test_the_negative_prompt_is_named(seen: Seen) -> None:
    assert "u read the empty text" in explained(seen, panels=["guidance"])
    against = run(tiny_sd(), guidance_scale=3.0, negative_prompt="<b>a dog</b>")
    assert "u read: &lt;b&gt;a dog&lt;/b&gt;" in explained(against, panels=["guidance"])


def test_steps_outside_the_interval_are_left_out() -> None:
    panel = guidance.build(run(tiny_sd(), guidance_scale=3.0, guidance_interval=(0, 0.6), sampler="ddim"))
    assert isinstance(panel, Panel)
    assert [step["t"] for step in panel.data["steps"]] == [751.0, 501.0]
    assert "Of 4 model calls, 2 made both" in panel.body


def test_other_families() -> None:
    page = explained(run(tiny_xl(), guidance_scale=3.0), panels=["guidance"])
    assert "reads zeros instead" in page
    left = guidance.build(collect(tiny_ddpm(), Request(None, steps=2, seed=0)))
    assert isinstance(left, Left)
    assert "knows no prompt" in left.why.en
    off = guidance.build(run(tiny_sd(), guidance_scale=1.0))
    assert isinstance(off, Left)
    assert "guidance was off" in off.why.en
    v = drawn(replace(SD, schedule=replace(SD.schedule, prediction="v_prediction")))
    assert isinstance(guidance.build(run(v)), Panel)
    paints = drawn(replace(SD, unet=replace(SD.unet, in_channels=9)))
    hole = {"image": torch.zeros(1, 3, 64, 64), "mask": torch.ones(1, 1, 64, 64), "strength": 1.0}
    assert isinstance(guidance.build(run(paints, **hole)), Panel)
    taught = drawn(replace(SD, unet=replace(SD.unet, guidance_dim=8)))
    distilled = guidance.build(run(taught, sampler="lcm"))
    assert isinstance(distilled, Left)
    assert "distilled" in distilled.why.en


def test_a_large_vae_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "EXACT", 0)
    monkeypatch.setattr(guidance, "SMALL", 0)
    monkeypatch.setattr(guidance, "SHOWN", 2)
    seen = run(tiny_sd(), guidance_scale=3.0)
    painter, decoded = seen.painter, []
    monkeypatch.setattr(type(seen.pipe), "decode", lambda *args: decoded.append(args))
    panel = guidance.build(seen)
    assert not painter.exact
    assert decoded == []
    assert isinstance(panel, Panel)
    assert (panel.data["colours"]["side"], panel.data["colours"]["block"], len(panel.data["steps"])) == (1, 1, 2)
    assert "the numbers of 2 are in the page" in panel.body


def test_colours_of_a_linear_picture_are_found() -> None:
    g = torch.Generator().manual_seed(0)
    samples = [torch.randn(1, 4, 6, 6, generator=g) for _ in range(4)]
    true = torch.randn(4 * 9 + 1, 3 * 16, generator=g)
    painted = [torch.nn.functional.pixel_shuffle((around(s, 3) @ true).t().reshape(1, 48, 6, 6), 4)[0] for s in samples]
    found = Colours.fitted(samples, painted)
    assert (found.side, found.block) == (3, 4)
    assert_close(found.map, true, FITTED)
    small = Colours.fitted(samples, [torch.rand(3, 6, 6, generator=g) for _ in samples])
    assert (small.side, small.block, tuple(small.map.shape)) == (1, 1, (5, 3))
