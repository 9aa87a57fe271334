"""Planted errors whose place the finder must name: ten that real reimplementations have made, and a few others.

Each is planted in a copy of minidiff's tiny model, which is then held against diffusers; what is asserted is the name
of the stage at which the two are said to part.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weights_convert
from minidiff.models.tokenizer import Tokenizer
from minidiff.parity.command import hold, pair
from minidiff.parity.engine import find
from minidiff.parity.ours import Asked, Ours, asked
from minidiff.parity.report import Report, outcome, reasons
from minidiff.parity.theirs import Theirs, renamed
from minidiff.pipeline import StableDiffusion, guidance
from scripts.make_parity_recording import reference, tiny_folder
from weights_convert.module_names import module_names

REQUEST = asked("a red fox", negative_prompt="blurry", steps=3, seed=5, width=32, height=24)


@dataclass
class Pair:
    """minidiff's model, diffusers' of the same weights, and which module is which."""

    ours: StableDiffusion
    theirs: Any
    names: dict[str, dict[str, str]]
    request: Asked = REQUEST

    def copy(self) -> StableDiffusion:
        """A copy of ours to plant a slip in."""
        return copy.deepcopy(self.ours)

    def find(
        self, planted: StableDiffusion, request: Asked | None = None, tolerance: float = 0.0, *, judge: bool = True
    ) -> Report:
        """The copy against diffusers; ``request`` is what the copy runs, if not the same."""
        a = Ours(planted, request or self.request, {part: {x: x for x in found} for part, found in self.names.items()})
        b = Theirs(self.theirs, self.request, renamed(self.names))
        rows, only_a, only_b = find(a, b, tolerance, judge=judge)
        return Report("planted", "diffusers", rows, tolerance, only_a, only_b)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    ours = weights_convert.load(folder, device="cpu")
    assert isinstance(ours, StableDiffusion)
    theirs, _ = reference(folder)
    return Pair(ours, theirs, pair(ours.parts, theirs, module_names(ours.config)))


def test_without_a_slip_every_stage_is_equal(sides: Pair) -> None:
    report = sides.find(sides.copy())
    assert report.first is None, outcome(report)
    assert report.equal
    assert all(row.chained.equal for row in report.rows)
    stages = [row.stage for row in report.rows]
    for stage in (
        "plan/timesteps",
        "prompt/ids",
        "prompt/text_encoder/layers.1.fc2",
        "negative/context",
        "start/x",
        "step.0/unet/down.0.attn.0.blocks.0.attn2.k",
        "step.0/unet/mid",  # blocks are paired by what they hold
        "step.0/prediction",
        "step.3/out",
        "step.3/x",
        "decode/vae/decoder.up.0.res.0.conv1:in",
        "decode/pixels",
    ):
        assert stage in stages
    assert stages.index("prompt/ids") < stages.index("step.0/input") < stages.index("step.0/x")


def wrong_eps(pipe: StableDiffusion) -> None:
    pipe.unet.mid.attn[0].norm.eps = 1e-5


def gelu(pipe: StableDiffusion) -> None:
    pipe.text_encoder.layers[0].gelu = F.gelu


def pad_token(pipe: StableDiffusion) -> None:
    assert pipe.config.tokenizer is not None
    pipe.tokenizer = Tokenizer(replace(pipe.config.tokenizer, pad=0))


def missing_bias(pipe: StableDiffusion) -> None:
    pipe.unet.down[0].res[0].conv1.bias = None


def transposed_weight(pipe: StableDiffusion) -> None:
    q = pipe.vae.decoder.mid.attn.attn.q
    q.weight.data = q.weight.data.t().contiguous()


def stale_skip(pipe: StableDiffusion) -> None:
    level = pipe.unet.up[1]
    forward = level.forward
    level.forward = lambda x, temb, context, skips: forward(x, temb, context, [skips[0], skips[0]])


def head_count(pipe: StableDiffusion) -> None:
    pipe.unet.mid.attn[0].blocks[0].attn1.heads = 2


def float16_somewhere(pipe: StableDiffusion) -> None:
    conv = pipe.unet.down[1].res[0].conv2
    forward = conv.forward
    conv.forward = lambda x: forward(x.half().to(x.dtype))


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (wrong_eps, "step.0/unet/mid.attn.0.norm"),
        (gelu, "prompt/text_encoder/layers.0.fc2:in"),
        (pad_token, "prompt/ids"),
        (missing_bias, "step.0/unet/down.0.res.0.conv1"),
        (transposed_weight, "decode/vae/decoder.mid.attn.attn.q"),
        (stale_skip, "step.0/unet/up.1.res.0:in"),
        (head_count, "step.0/unet/mid.attn.0.blocks.0.attn1.out:in"),
        (float16_somewhere, "step.0/unet/down.1.res.0.conv2"),
    ],
)
def test_a_slip_in_the_model_is_named(sides: Pair, plant: Callable[[StableDiffusion], None], stage: str) -> None:
    planted = sides.copy()
    plant(planted)
    report = sides.find(planted)
    assert report.first is not None
    assert report.first.stage == stage
    assert outcome(report) == f"first difference at {stage}"
    if plant is not pad_token:  # ids are no floats: float64 has no word on them
        assert report.first.judgement is not None
        assert not report.first.judgement.same_function
        assert reasons(report)["float64"].startswith("not rounding")
    assert "also" not in reasons(report), "one slip, one place"


def test_swapped_guidance_is_named(sides: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = guidance.guide
    monkeypatch.setattr(guidance, "guide", lambda u, c, scale: inner(c, u, scale))
    first = sides.find(sides.copy()).first
    assert first is not None
    assert first.stage == "step.0/out"


def test_a_swapped_guidance_batch_is_named(sides: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = guidance.Conditions.joined
    monkeypatch.setattr(guidance.Conditions, "joined", staticmethod(lambda each: inner(each[::-1])))
    first = sides.find(sides.copy()).first
    assert first is not None
    assert first.stage == "step.0/context"


def test_an_offset_is_named(sides: Pair) -> None:
    sampler: Any = sides.ours.sampler()
    report = sides.find(sides.copy(), replace(REQUEST, sampler=replace(sampler, steps_offset=0)))
    assert report.first is not None
    assert report.first.stage == "plan/timesteps"
    assert "steps_offset" in reasons(report)["where"]


def test_another_first_noise_is_named(sides: Pair) -> None:
    first = sides.find(sides.copy(), replace(REQUEST, seed=6)).first
    assert first is not None
    assert first.stage == "start/x"


class Slipping:
    """A sampler whose third step lands beside the right place."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Any) -> Any:
        x, state = self.inner.step(plan, i, x, out, state, draw)
        return (x * 1.001 if i == 2 else x), state


def test_a_step_of_the_sampler_is_named(sides: Pair) -> None:
    report = sides.find(sides.copy(), replace(REQUEST, sampler=Slipping(sides.ours.sampler())))
    assert report.first is not None
    assert report.first.stage == "step.2/x"
    assert "step.2/out" in [row.stage for row in report.rows if row.chained.equal]


def test_two_slips_are_both_named(sides: Pair) -> None:
    planted = sides.copy()
    missing_bias(planted)
    transposed_weight(planted)
    report = sides.find(planted)
    assert [row.stage for row in report.causes if "/unet/" in row.stage or "/vae/" in row.stage] == [
        "step.0/unet/down.0.res.0.conv1",
        "decode/vae/decoder.mid.attn.attn.q",
    ]
    assert "decode/vae/decoder.mid.attn.attn.q" in reasons(report)["also"]


def test_a_slip_of_a_later_step_is_looked_for_there(sides: Pair) -> None:
    planted = sides.copy()
    norm = planted.unet.mid.res1.norm1
    planted.unet.register_forward_pre_hook(lambda m, args: setattr(norm, "eps", 1e-5 if int(args[1]) > 600 else 1e-2))
    said: list[str] = []
    report = hold(planted, sides.theirs, REQUEST, sides.names, Namespace(tolerance=0.0, judge=False), said.append)
    assert report.first is not None
    assert report.first.stage == "step.1/unet/mid.res1.norm1"
    assert any("the UNet of step.1" in line for line in said)


def test_rounding_is_told_from_a_slip(sides: Pair) -> None:
    """One convolution summed in float64: the same function, and nearer to the truth."""
    planted = sides.copy()
    conv = planted.unet.mid.res2.conv1
    conv.forward = lambda x: F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1).to(x.dtype)
    report = sides.find(planted)
    assert report.first is not None
    assert report.first.stage == "step.0/unet/mid.res2.conv1"
    assert report.first.judgement is not None
    assert report.first.judgement.same_function
    assert report.first.judgement.nearer == "A"
    assert reasons(report)["float64"].startswith("rounding")
    assert sides.find(planted, tolerance=1e-4).equal, "rounding is within a tolerance"


def test_a_nan_is_named(sides: Pair) -> None:
    planted = sides.copy()
    with torch.no_grad():
        planted.unet.down[0].res[0].norm2.weight[3] = torch.nan
    report = sides.find(planted)
    assert report.first is not None
    assert report.first.stage == "step.0/unet/down.0.res.0.norm2"
    assert reasons(report)["how far"].startswith("not finite: ")
