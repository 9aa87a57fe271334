"""Approximations: no bit changes when they are off, and the picture changes by a bounded amount when they are on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from minidiff import cli, fast
from minidiff.errors import ConfigError
from minidiff.fast.deep import CachedUNet, Deep, later
from minidiff.fast.merge import Merge, finest, groups, merged, targets, unmerged
from minidiff.fast.switch import put_on
from minidiff.models.attention import Attention, SpatialTransformer
from minidiff.models.unet import UNet
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.png import read_recipe, save_png
from tests.support import tiny
from tests.tolerances import Tolerance, assert_close

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))  # at the end: see test_eval_shapes.py

import approximations

COPIES = Tolerance(1e-5, 1e-5, "softmax over each of 16 keys once, where the plain one sums over four copies of each")
ODD = {"height": 72, "width": 56}  # 9 x 7 latents


@pytest.fixture
def sd() -> Iterator[StableDiffusion]:
    pipe = tiny.tiny_sd()
    yield pipe
    fast.restore(pipe)


def drawn(sd: StableDiffusion, prompt: str = "a cat", seed: int = 3, **more: Any) -> Tensor:
    given: dict[str, Any] = {"steps": 4, "sampler": "ddim", "output": "latent", "progress": False, **more}
    found: Tensor = sd.generate(prompt, seed=seed, **given)
    return found


@contextmanager
def whole_calls(unet: UNet) -> Iterator[list[int]]:
    """One entry, the size of the batch, for every time that the whole UNet runs."""
    seen: list[int] = []
    handle = unet.mid.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


# --- exact where they should be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "heun"])
def test_nothing_left_out_changes_no_bit(sd: StableDiffusion, sampler: str) -> None:
    plain = [drawn(sd, sampler=sampler, num_images=n, **ODD) for n in (1, 2)]
    assert fast.approximate(sd, deep=1, merge=0) == {"deep": 1, "merge": 1}
    for n, want in zip((1, 2), plain, strict=True):
        assert torch.equal(drawn(sd, sampler=sampler, num_images=n, **ODD), want)


@pytest.mark.parametrize("given", [{"deep": 2}, {"merge": 0.5}, {"deep": 2, "merge": 0.5}], ids=str)
def test_on_and_off_again(sd: StableDiffusion, given: dict[str, Any]) -> None:
    plain = drawn(sd)
    fast.approximate(sd, **given)
    changed = drawn(sd)
    assert not torch.equal(changed, plain)
    assert torch.equal(drawn(sd), changed), "the same again"
    assert fast.approximate(sd, **given) == dict.fromkeys(given, 1)
    assert torch.equal(drawn(sd), changed), "twice is harmless"
    fast.restore(sd)
    assert torch.equal(drawn(sd), plain)
    fast.restore(sd)
    layers = list(sd.unet.modules())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in layers)


@pytest.mark.parametrize("first", ["optimize", "approximate"])
def test_beside_exact_switches(sd: StableDiffusion, first: str) -> None:
    plain = drawn(sd)
    fast.approximate(sd, deep=2, merge=0.5)
    want = drawn(sd)
    if first == "optimize":
        fast.restore(sd)
        fast.optimize(sd, ("inplace", "memory"))
        fast.approximate(sd, deep=2, merge=0.5)
    else:
        fast.optimize(sd, ("inplace", "memory"))
    assert torch.equal(drawn(sd), want)
    fast.restore(sd)
    assert torch.equal(drawn(sd), plain)


def test_optimize_never_approximates(sd: StableDiffusion) -> None:
    assert set(fast.optimize(sd)) == set(fast.SWITCHES)
    assert not {"deep", "merge"} & set(fast.SWITCHES)
    assert sd.approximations == {}


def test_another_value_takes_the_place_of_the_first(sd: StableDiffusion) -> None:
    want = {}
    for value in (2, 4):
        fast.approximate(sd, deep=value)
        want[value] = drawn(sd)
        fast.restore(sd)
    assert not torch.equal(want[2], want[4])
    for value in (2, 4, 2):
        fast.approximate(sd, deep=value)
        assert torch.equal(drawn(sd), want[value])


def test_what_stood_there_before_stays(sd: StableDiffusion) -> None:
    """A UNet whose forward another switch replaced is asked through that, and has it again."""
    asked: list[int] = []
    plain = sd.unet.forward

    def other(*args: Any) -> Tensor:
        asked.append(1)
        return plain(*args)

    sd.unet.forward = other  # type: ignore[method-assign]
    fast.approximate(sd, deep=2)
    drawn(sd)
    assert len(asked) == 2
    fast.restore(sd)
    assert sd.unet.forward is other


# --- deep features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 7), ("pndm", 8), ("heun", 13), ("dpmpp_2m", 7)])
def test_one_call_in_so_many_is_whole_and_every_run_begins_with_one(
    sd: StableDiffusion, sampler: str, calls: int
) -> None:
    fast.approximate(sd, deep=3)
    for prompt, more in (("a cat", {}), ("a cat", {}), ("a dog", {}), ("a dog", ODD), ("a dog", {"num_images": 2})):
        with whole_calls(sd.unet) as seen:
            found = drawn(sd, prompt, steps=7, sampler=sampler, **more)
        assert len(seen) == -(-calls // 3), (prompt, more)
        fast.restore(sd)
        fast.approximate(sd, deep=3)
        assert torch.equal(drawn(sd, prompt, steps=7, sampler=sampler, **more), found), "nothing of the run before"


def test_guidance_on_a_part_of_the_way_begins_anew_where_the_batch_changes(sd: StableDiffusion) -> None:
    fast.approximate(sd, deep=3)
    with whole_calls(sd.unet) as seen:
        drawn(sd, steps=10, guidance_interval=(0.2, 0.8))
    assert seen == [1, 2, 2, 1]  # rows 0 and 1; 2 to 7; 8 and 9


def test_runs_side_by_side_do_not_mix(sd: StableDiffusion) -> None:
    """Each call is another run's than the last, and every bit is that of one run after the other."""
    text: dict[str, Any] = {"prompt": "a cat", "steps": 4, "sampler": "ddim"}
    ddpm = tiny.tiny_ddpm()
    for pipe, common in ((sd, text), (ddpm, {"steps": 4, "sampler": "ddim"})):
        plain = [step.x for step in pipe.steps(**common, seed=1)]
        fast.approximate(pipe, deep=4)
        one, two = ([step.x for step in pipe.steps(**common, seed=seed)] for seed in (1, 2))
        assert not torch.equal(one[1], plain[1])
        both = zip(pipe.steps(**common, seed=1), pipe.steps(**common, seed=2), strict=True)
        found = [(a.x, b.x) for a, b in both]
        assert all(torch.equal(a, one[i]) and torch.equal(b, two[i]) for i, (a, b) in enumerate(found))


def test_the_loop_of_ones_own(sd: StableDiffusion) -> None:
    """Timesteps that are numbers, or tensors of their own, tell a run by falling."""
    fast.approximate(sd, deep=8)
    x, prompt, other = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 5, 16)

    def whole(*calls: tuple[Any, Tensor, Tensor]) -> int:
        with whole_calls(sd.unet) as seen, torch.no_grad():
            for t, sample, context in calls:
                sd.unet(sample, t, context)
        return len(seen)

    assert whole((900, x, prompt), (800, x, prompt), (700.5, x, prompt)) == 1
    assert whole((700, x, prompt)) == 0
    assert whole((700, x, prompt)) == 1, "not below the last one"
    assert whole((710, x, prompt)) == 1, "above the last one"
    assert whole((600, x, other)) == 1, "another prompt"
    assert whole((500, x, other.clone())) == 1, "an equal prompt that is another tensor"
    assert whole((400, x, prompt), (300, x[..., :6], prompt), (200, x, prompt)) == 3, "another size"
    assert whole((torch.tensor([90, 90]), x, prompt), (torch.tensor([80, 70]), x, prompt)) == 1
    assert whole((torch.tensor([60, 70]), x, prompt)) == 1, "one of them is not below"
    assert whole((torch.tensor(50), x, prompt)) == 1, "of another shape"
    plan = torch.tensor([140, 130, 130, 120])
    assert whole(*((t, x, prompt) for t in plan)) == 1, "rows of a plan: twice at 130"
    assert whole((plan[0], x, prompt)) == 1, "back at its first row"
    assert whole((torch.tensor([120, 110])[1], x, prompt)) == 1, "another plan"


def test_when_a_timestep_is_later() -> None:
    plan = torch.tensor([981.0, 961.0, 961.0])
    assert later(plan[1], plan[0])
    assert later(plan[2], plan[1])
    assert not later(plan[1], plan[1])
    assert not later(plan[0], plan[2])
    assert not later(plan.clone()[1], plan[0])
    assert later(plan[1].expand(3), plan[0].expand(3))
    assert later(5, torch.tensor(6))
    assert not later(5, 5)


@torch.no_grad()
def test_reused_features_are_nearer_than_none(sd: StableDiffusion) -> None:
    unet = sd.unet
    context = sd.encode_prompt(["a cat"])[0]
    x, noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4, 8, 8)
    near = x + 0.05 * noise
    want = unet(near, 480, context)
    put_on(Deep(2), [unet])
    reusing = unet.forward
    assert isinstance(reusing, CachedUNet)
    unet(x, 500, context)
    found = unet(near, 480, context)
    deep = reusing.kept().deep
    none = reusing.shallow(torch.zeros_like(deep), near, 480, context, None, None)
    unet(x.flip(3), 999, sd.encode_prompt(["a dog"])[0])
    foreign = reusing.shallow(reusing.kept().deep, near, 480, context, None, None)
    Deep(2).take_off(unet)
    error = (found - want).norm()
    assert error > 0
    assert error < 0.5 * (none - want).norm()
    assert error < 0.5 * (foreign - want).norm()


@torch.no_grad()
def test_a_sample_that_stays_is_answered_with_the_same_bits(sd: StableDiffusion) -> None:
    """The same sample at the same time: kept features are those that the whole UNet would make."""
    reusing = CachedUNet(sd.unet, 2)
    for more in ({}, ODD):
        x = torch.randn(2, 4, more.get("height", 64) // 8, more.get("width", 64) // 8)
        given = (x, 500, torch.randn(2, 5, 16), None, None)
        out, deep = reusing.whole(*given)
        assert torch.equal(out, reusing.shallow(deep, *given))


def test_sdxl_and_what_it_is_told() -> None:
    xl = tiny.tiny_xl()
    with whole_calls(xl.unet) as seen:
        plain = drawn(xl, steps=4)
        fast.approximate(xl, deep=4)
        approximate = drawn(xl, steps=4)
    assert len(seen) == 4 + 1
    assert not torch.equal(plain, approximate)
    context, (pooled, ids) = torch.randn(1, 5, 24), (torch.randn(1, 4), torch.ones(1, 6))
    x = torch.randn(1, 4, 8, 8)
    with whole_calls(xl.unet) as seen, torch.no_grad():
        for t, added in ((9, (pooled, ids)), (8, (pooled, ids)), (7, (pooled, ids.clone()))):
            xl.unet(x, t, context, added)
    assert len(seen) == 2


def test_gradients_and_residuals_get_the_plain_model(sd: StableDiffusion) -> None:
    fast.approximate(sd, deep=4)
    sd.unet.requires_grad_(True)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with whole_calls(sd.unet) as seen:
        for t in (900, 800):
            sd.unet(x, t, context).sum().backward()
        assert len(seen) == 2
        sizes = [(16, 8), (16, 8), (16, 4), (24, 4)]
        residuals = [torch.randn(1, c, side, side) for c, side in sizes], torch.randn(1, 24, 4, 4)
        with torch.no_grad():
            for t in (900, 800):
                sd.unet(x, t, context, residuals=residuals)
    assert len(seen) == 4


def test_after_a_call_that_failed_a_run_begins_anew(sd: StableDiffusion) -> None:
    fast.approximate(sd, deep=4)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)

    def fails(*_: Any) -> None:
        raise ValueError("no")

    with whole_calls(sd.unet) as seen, torch.no_grad():
        sd.unet(x, 900, context)
        handle = sd.unet.conv_out.register_forward_pre_hook(fails)
        with pytest.raises(ValueError, match="no"):
            sd.unet(x, 800, context)
        handle.remove()
        sd.unet(x, 700, context)
    assert len(seen) == 2


# --- merged tokens ---------------------------------------------------------------------------------------------------


def by_hand(tokens: Tensor, height: int, width: int, count: int) -> list[set[int]]:
    """The groups of one picture's ``tokens`` (L, C) that have more than one member."""
    target = [y * width + x for y in range(0, height, 2) for x in range(0, width, 2)]
    source = [i for i in range(height * width) if i not in target]
    likeness = {(s, t): float(torch.cosine_similarity(tokens[s], tokens[t], dim=0)) for s in source for t in target}
    best = {s: max(target, key=lambda t, s=s: likeness[s, t]) for s in source}  # type: ignore[misc]
    gone = sorted(source, key=lambda s: -likeness[s, best[s]])[:count]
    found = [{t} | {s for s in gone if best[s] == t} for t in target]
    return [group for group in found if len(group) > 1]


@pytest.mark.parametrize(("height", "width", "count"), [(4, 6, 9), (5, 3, 7), (1, 5, 2), (7, 7, 33)])
def test_those_that_are_most_alike_are_grouped(height: int, width: int, count: int) -> None:
    tokens = torch.randn(2, height * width, 8, generator=torch.Generator().manual_seed(height))
    group = groups(tokens, height, width, count)
    total = height * width - count
    for k in range(2):
        members = [set((group[k] == g).nonzero().flatten().tolist()) for g in range(total)]
        assert all(members), "no group is empty"
        several = sorted(map(sorted, (m for m in members if len(m) > 1)))
        assert several == sorted(map(sorted, by_hand(tokens[k], height, width, count)))
        means = merged(tokens, group, total)
        for g, member in enumerate(members):
            assert_close(means[k, g], tokens[k, sorted(member)].mean(0), COPIES)
    assert torch.equal(unmerged(means, group)[1], means[1][group[1]])


def test_targets_are_the_upper_left_of_every_four() -> None:
    assert targets(3, 4, torch.device("cpu")).tolist() == [0, 2, 8, 10]


@torch.no_grad()
def test_equal_tokens_merge_without_loss(sd: StableDiffusion) -> None:
    """Where all four of every 2 x 2 are equal, merging three of them changes nothing but rounding."""
    (transformer, *_) = finest(sd.unet)
    coarse = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    x, context = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), torch.randn(2, 5, 16)
    want = transformer(x, context)
    switch = Merge(0.75)
    put_on(switch, [sd.unet])
    assert_close(transformer(x, context), want, COPIES)
    other = torch.randn(2, 16, 8, 8)
    found = transformer(other, context)
    switch.take_off(sd.unet)
    assert not torch.allclose(found, transformer(other, context), atol=1e-3)


@torch.no_grad()
def test_merged_attention_is_nearer_than_none_and_than_mixed_up(sd: StableDiffusion) -> None:
    (transformer, *_) = finest(sd.unet)
    attn = transformer.blocks[0].attn1
    smooth = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(2))
    picture = nn.functional.interpolate(smooth, size=(9, 7), mode="bilinear")
    tokens = picture.flatten(2).transpose(1, 2)
    want = attn(tokens)
    group = groups(tokens, 9, 7, 31)
    answers = attn(merged(tokens, group, 32))
    error = (unmerged(answers, group) - want).norm()
    assert 0 < error < 0.5 * want.norm()
    assert error < 0.5 * (unmerged(answers, group.flip(1)) - want).norm()


def test_how_many_tokens_attention_sees(sd: StableDiffusion) -> None:
    seen: list[tuple[int, int]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return nn.functional.scaled_dot_product_attention(q, k, v)

    for module in sd.unet.modules():
        if isinstance(module, Attention):
            module.kernel = kernel
    fast.approximate(sd, merge=0.5)
    drawn(sd, steps=1, **ODD)
    prompt = sd.encode_prompt("")[0].shape[1]
    whole, half = 9 * 7, 9 * 7 - 31
    finest_of_all = [(half, half), (whole, prompt)]
    middle = [(5 * 4, 5 * 4), (5 * 4, prompt)]
    assert seen == finest_of_all + middle + 2 * finest_of_all
    fast.approximate(sd, merge=0.75)
    seen.clear()
    drawn(sd, steps=1, **ODD)
    assert seen[0] == (whole - 43, whole - 43), "of 9 x 7 no more than 43 are no targets"
    seen.clear()
    fast.approximate(sd, merge=0.001)
    drawn(sd, steps=1, **ODD)
    assert seen[0] == (whole, whole)


def test_the_finest_resolution_with_transformers() -> None:
    from minidiff.config import SD15, SDXL

    with torch.device("meta"):
        sd15, sdxl = UNet(SD15), UNet(SDXL)
    assert [id(m) for m in finest(sd15)] == [id(m) for m in (*sd15.down[0].attn, *sd15.up[-1].attn)]
    assert [id(m) for m in finest(sdxl)] == [id(m) for m in (*sdxl.down[1].attn, *sdxl.up[-2].attn)]
    assert all(isinstance(m, SpatialTransformer) for m in finest(sdxl))


# --- what is said of them --------------------------------------------------------------------------------------------


def test_the_recipe_says_so(
    sd: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sd.save("sd.safetensors")
    given: dict[str, Any] = {"seed": 1, "steps": 2, "progress": False}
    save_png(sd.generate("a cat", **given)[0], "plain.png")
    assert "approximate" not in read_recipe("plain.png")
    fast.approximate(sd, deep=3)
    fast.approximate(sd, merge=0.5)
    save_png(sd.generate("a cat", **given)[0], "fast.png")
    assert read_recipe("fast.png")["approximate"] == {"deep": 3, "merge": 0.5}
    assert cli.main(["generate", "--model", "sd.safetensors", "--recipe", "fast.png", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was made with deep, merge, which only Python has" in line
    fast.restore(sd)
    save_png(sd.generate("a cat", **given)[0], "again.png")
    assert read_recipe("again.png") == read_recipe("plain.png")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "nothing to approximate; give deep=3, merge=0.5 or both"),
        ({"deep": 0}, "deep=0 must be a whole number, 1 or more"),
        ({"deep": 2.5}, "deep=2.5 must be a whole number"),
        ({"deep": True}, "deep=True must be a whole number"),
        ({"merge": 0.8}, "merge=0.8 must lie in 0..0.75"),
        ({"merge": -0.1}, "merge=-0.1 must lie in 0..0.75"),
        ({"merge": float("nan")}, "merge=nan must be a finite number"),
        ({"merge": "half"}, "merge='half' must be a finite number"),
        ({"deep": 2, "merge": 2}, "merge=2 must lie in"),
    ],
)
def test_what_cannot_be_approximated(sd: StableDiffusion, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fast.approximate(sd, **given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sd.approximations == {}
    assert "forward" not in sd.unet.__dict__, "nothing is put on by halves"


def test_a_model_without_transformers() -> None:
    ddpm = tiny.tiny_ddpm()
    with pytest.raises(
        ConfigError, match=r"merge=0\.5 needs a UNet with transformers, and the tiny ddpm UNet has none"
    ):
        fast.approximate(ddpm, deep=2, merge=0.5)
    plain = ddpm.generate(steps=4, seed=0, sampler="ddim", output="tensor", progress=False)
    fast.approximate(ddpm, deep=2)
    with whole_calls(ddpm.unet) as seen:
        found = ddpm.generate(steps=4, seed=0, sampler="ddim", output="tensor", progress=False)
    assert len(seen) == 2
    assert not torch.equal(found, plain)


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_script_prints_a_row_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.tiny_sd().save(tmp_path / "m.safetensors")
    small = ["--prompts", "2", "--rounds", "2", "--steps", "4", "--fewer", "2"]
    given = ["--model", str(tmp_path / "m.safetensors"), *small, "--taesd", str(tmp_path / "m.safetensors")]
    given += ["--json", str(tmp_path / "a.json"), "--keep", str(tmp_path / "kept")]
    assert approximations.main(given) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.split("|")[1].strip() for line in lines]
    assert names == [
        *("exact, 4 steps", "guidance from 0 to 0.8", "guidance from 0.2 to 0.8"),
        *(f"deep features at every {n}. step" for n in (2, 3, 5)),
        *("tokens merged, 50%", "dpmpp_2m, 2 steps", "unipc, 2 steps", "bfloat16", "TAESD decodes"),
    ]
    distances = [line.split("|")[4].strip() for line in lines]
    assert distances[0] == "same"
    assert distances[-1] == "same", "the decoder that it was given is its own"
    assert all(text.endswith(" dB") for text in distances[1:-1]), "every approximation was on"
    table = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert table[0]["speed"] == 1
    assert [row["name"] for row in table] == names
    assert len(list((tmp_path / "kept").glob("*/*.png"))) == 2 * len(names)


def test_decibels_between_folders(tmp_path: Path) -> None:
    for name, level in (("a", 100), ("b", 110)):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("RGB", (4, 4), (level, level, 100)).save(tmp_path / name / f"{k}.png")
    assert approximations.psnr(tmp_path / "a", tmp_path / "a") is None
    found = approximations.psnr(tmp_path / "a", tmp_path / "b")
    assert found == pytest.approx(10 * math.log10(255**2 / (200 / 3)))


def test_the_script_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert approximations.main(["--model", str(tmp_path / "none.safetensors")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.safetensors" in line
    for given, words in ((["--prompts", "0"], "--prompts 0"), (["--taesd", "x"], "--taesd needs --model")):
        with pytest.raises(SystemExit):
            approximations.main(given)
        assert words in capsys.readouterr().err
