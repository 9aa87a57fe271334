"""Guidance in an interval of the steps: the skipped model calls, equal cases, and the distance of the picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff import cli, fast
from minidiff.errors import ConfigError
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.guidance import guide
from minidiff.pipeline.png import read_recipe
from minidiff.pipeline.rows import rows_outside
from minidiff.samplers import SAMPLERS, sampler_from_config
from minidiff.schedule import NoiseSchedule
from tests.support import tiny
from tests.support.tiny import rows_of

TOLD_BY_TIMESTEPS = sorted(name for name, kind in SAMPLERS.items() if not kind.own_levels)
MODEL: dict[str, Any] = {"seed": 3, "output": "latent", "progress": False}


@contextmanager
def calls(sd: StableDiffusion) -> Iterator[list[int]]:
    """The batch size of every call of the UNet inside."""
    seen: list[int] = []
    handle = sd.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", TOLD_BY_TIMESTEPS)
def test_an_interval_of_all_the_way_changes_no_bit(sd: StableDiffusion, name: str) -> None:
    given = {**MODEL, "sampler": name, "steps": 4, "num_images": 2}
    with calls(sd) as seen:
        found = sd.generate("a cat", guidance_interval=(0, 1), **given)
    assert set(seen) == {4}
    assert torch.equal(found, sd.generate("a cat", **given))


def test_outside_the_interval_the_prompt_alone_is_asked(sd: StableDiffusion) -> None:
    """Batches of one size in the middle of the way and of half of it around, and the very bits of the loop by hand."""
    with calls(sd) as seen:
        found = sd.generate("a cat", steps=10, sampler="ddim", guidance_interval=(0.3, 0.8), num_images=2, **MODEL)
    assert seen == [2] * 3 + [4] * 5 + [2] * 2
    method: Any = SAMPLERS["ddim"]()
    plan, state = method.plan(sd.schedule, 10), method.start()
    context = sd.encode_prompt(["a cat"])[0].expand(2, -1, -1)
    both = torch.cat([sd.encode_prompt([""])[0].expand(2, -1, -1), context])
    x = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    with torch.no_grad():
        for i, t in enumerate(plan.timesteps):
            inside = 3 <= i < 8
            out = guide(*sd.unet(torch.cat([x, x]), t, both).chunk(2), 7.5) if inside else sd.unet(x, t, context)
            x, state = method.step(plan, i, x, out, state, torch.randn_like)
    assert torch.equal(found, x)


def test_the_picture_is_nearer_than_without_guidance(sd: StableDiffusion) -> None:
    def made(**more: Any) -> Tensor:
        found: Tensor = sd.generate("a cat", steps=20, sampler="ddim", **MODEL, **more)
        return found

    exact = made()
    error = {interval: float((made(guidance_interval=interval) - exact).norm()) for interval in ((0.2, 0.9), (0, 0.9))}
    none = float((made(guidance_scale=1) - exact).norm())
    assert 0 < error[0, 0.9] < none
    assert 0 < error[0.2, 0.9] < none


@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "euler"])
def test_it_is_told_as_a_part_of_the_way_is(name: str) -> None:
    sampler: Any = sampler_from_config({"name": name})
    plan = sampler.plan(NoiseSchedule.from_config(tiny.SD.schedule), 12)
    rows = range(len(plan.timesteps))
    for low, high in ((0.0, 0.6), (0.25, 1.0), (0.25, 0.6)):
        if low > 0 and sampler.order == 2:
            continue  # a run is entered at a whole step only
        part = rows_of(plan, 12, sampler, start=low or None, end=high if high < 1 else None)
        assert set(rows) - set(rows_outside(plan, rows, low, high, 1000)) == set(part), (low, high)
    assert rows_outside(plan, range(4, 6), 0.0, 0.01, 1000) == [4, 5]
    meets = SimpleNamespace(timesteps=torch.tensor([900, 500, 499, 100]))  # as choose_rows: the meeting row is before
    assert rows_outside(meets, range(4), 0.5, 1.0, 1000) == [0, 1]
    assert rows_outside(meets, range(4), 0.0, 0.5, 1000) == [2, 3]


def test_it_goes_with_a_part_of_the_way(sd: StableDiffusion) -> None:
    with calls(sd) as seen:
        sd.generate("a cat", steps=10, sampler="ddim", denoising_end=0.6, guidance_interval=(0.3, 0.8), **MODEL)
    assert seen == [1] * 3 + [2] * 3
    with calls(sd) as seen:  # without guidance there is nothing to leave out
        sd.generate("a cat", steps=3, guidance_scale=1, guidance_interval=(0.3, 0.8), **MODEL)
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.8, 0.2), "guidance_interval=(0.8, 0.2) must be (low, high) with 0 <= low < high <= 1"),
        ((0.5, 0.5), "with 0 <= low < high <= 1"),
        ((-0.1, 0.5), "with 0 <= low < high <= 1"),
        ((0.1, 1.5), "with 0 <= low < high <= 1"),
        (0.5, "guidance_interval=0.5 must be two numbers"),
        ((0.1, 0.2, 0.3), "must be two numbers"),
        ((float("nan"), 1), "guidance_interval=nan must be a finite number"),
        (("a", "b"), "guidance_interval='a' must be a finite number"),
    ],
)
def test_what_is_no_interval(sd: StableDiffusion, interval: Any, words: str) -> None:
    with calls(sd) as seen, pytest.raises(ConfigError) as caught:
        sd.generate("a cat", steps=3, guidance_interval=interval)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert seen == []


def test_where_no_timestep_tells_it(sd: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match="told by timesteps, and EDMEuler has levels of its own"):
        sd.generate("a cat", steps=3, sampler="edm_euler", guidance_interval=(0.2, 0.8))
    with pytest.raises(ConfigError, match=r"guidance_interval= is given, .* reads no text"):
        tiny.tiny_ddpm().generate(steps=2, guidance_interval=(0.2, 0.8))


def test_the_command_and_the_recipe(
    sd: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sd.save("sd.safetensors")
    made = ["generate", "a fox", "--model", "sd.safetensors", "--steps", "4", "--seed", "7", "--quiet", "--out"]
    assert cli.main([*made, "a.png", "--guidance-interval", "0.3,0.8"]) == 0
    fast.optimize(sd)  # as the command does
    (want,) = sd.generate("a fox", steps=4, seed=7, guidance_interval=(0.3, 0.8), progress=False)
    pixels = np.asarray(Image.open("a.png"))
    assert np.array_equal(pixels, np.asarray(want))
    assert read_recipe("a.png")["guidance_interval"] == [0.3, 0.8]
    again = ["generate", "--model", "sd.safetensors", "--recipe", "a.png", "--quiet", "--out"]
    assert cli.main([*again, "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("b.png")), pixels)
    assert cli.main([*again, "c.png", "--guidance-interval", "0,1"]) == 0
    assert not np.array_equal(np.asarray(Image.open("c.png")), pixels)
    capsys.readouterr()
    for given, words in (("0.5", "should be LOW,HIGH"), ("a,b", "should be a number"), ("0.9,0.1", "low < high")):
        assert cli.main([*made, "d.png", "--guidance-interval", given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
