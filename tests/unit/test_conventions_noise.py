"""Other programs' noise and guidance, through the pipeline: whose stream, in which order, and what the recipe says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.philox import Card, CudaStream
from minidiff.programs import Convention, read
from minidiff.programs.profiles import PROFILES
from minidiff.samplers import sampler_from_config, sampler_from_diffusers
from tests.tolerances import Tolerance, assert_close

SHAPE = (2, 4, 8, 8)
CPU = torch.device("cpu")
SD15 = {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
SCALED = Tolerance(1e-6, 1e-6, "the same noise, multiplied by the first sigma elsewhere")


def cpu(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(like: str | Convention, seed: int | list[int] = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The first noise of two pictures and that of two steps."""
    streams = read(like).streams(seed, 2)
    return [streams.first(SHAPE, dtype, CPU), *(streams.later(SHAPE, dtype, CPU) for _ in range(2))]


def test_one_cpu_generator_for_the_batch() -> None:
    """diffusers, where a CPU generator is passed: the whole batch at once, and on and on from the same generator."""
    g = torch.Generator().manual_seed(5)
    for ours in drawn("diffusers"):
        assert_close(ours, torch.randn(SHAPE, generator=g))
    g = torch.Generator().manual_seed(5)
    for ours in drawn("diffusers", dtype=torch.float16):  # drawn in the model's dtype: not rounded float32
        assert_close(ours, torch.randn(SHAPE, generator=g, dtype=torch.float16))


@pytest.mark.parametrize("like", ["ldm", "k-diffusion", "diffusers:gpu"])
def test_one_cuda_generator_for_the_batch(like: str) -> None:
    stream = CudaStream(5)
    for ours in drawn(like):
        assert_close(ours, stream.randn(SHAPE))


@pytest.mark.parametrize("like", ["a1111", "a1111:nv"])
def test_a_cuda_generator_for_each_picture(like: str) -> None:
    """a1111: seeds s and s + 1, and the noise of the steps from the same generators, continued."""
    streams = [CudaStream(5), CudaStream(6)]
    for ours in drawn(like):
        assert_close(ours, torch.stack([stream.randn(SHAPE[1:]) for stream in streams]))


def test_a_cpu_generator_for_each_picture() -> None:
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    for ours in drawn("a1111:cpu"):
        assert_close(ours, torch.stack([torch.randn(SHAPE[1:], generator=g) for g in generators]))


def test_comfyui_starts_a_new_generator_for_the_steps() -> None:
    """The first noise on the CPU; that of the steps on the card from the same seed, or on a CPU from the next one."""
    first, *steps = drawn("comfyui")
    assert_close(first, cpu(5, *SHAPE))
    stream = CudaStream(5)
    for ours in steps:
        assert_close(ours, stream.randn(SHAPE))
    first, *steps = drawn("comfyui:cpu")
    assert_close(first, cpu(5, *SHAPE))
    g = torch.Generator().manual_seed(6)
    for ours in steps:
        assert_close(ours, torch.randn(SHAPE, generator=g))


@pytest.mark.parametrize("like", ["diffusers", "ldm", "comfyui:cpu"])
def test_a_list_of_seeds_gives_each_picture_its_own(like: str) -> None:
    both, alone = drawn(like, [5, 9])[0], read(like).streams([9], 1)
    assert_close(both[1:], alone.first((1, *SHAPE[1:]), torch.float32, CPU))


def test_the_card_counts_where_a_draw_is_large() -> None:
    narrow = Convention(PROFILES["ldm"], card=Card(1, 256))
    big = (2, 4, 16, 16)
    wide, other = (c.streams(5, 2).first(big, torch.float32, CPU) for c in (read("ldm"), narrow))
    assert torch.equal(wide.flatten()[:256], other.flatten()[:256])
    assert not torch.equal(wide, other)
    nv = Convention(PROFILES["ldm"], device="nv", card=Card(1, 256))  # a1111's NV has no card
    assert torch.equal(nv.streams(5, 2).first(big, torch.float32, CPU), wide)


@pytest.mark.parametrize("like", ["diffusers", "ldm", "a1111", "a1111:cpu"])
def test_streams_can_be_rewound(like: str) -> None:
    source = read(like).streams(5, 2).later
    source(SHAPE, torch.float32, CPU)
    mark, first = source.mark(), source(SHAPE, torch.float32, CPU)
    source.rewind(mark)
    assert_close(source(SHAPE, torch.float32, CPU), first)
    assert not torch.equal(source(SHAPE, torch.float32, CPU), first)


# --- through the pipeline ---------------------------------------------------------------------------------------------


def test_like_diffusers_is_diffusers_sampler_with_one_generator(sd) -> None:
    for name, kind in (("euler_ancestral", "EulerAncestralDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistep")):
        kind = kind if kind.endswith("Scheduler") else f"{kind}Scheduler"
        common = {"steps": 3, "num_images": 2, "output": "latent", "progress": False}
        ours = sd.generate("a fox", sampler=name, seed=3, like="diffusers", **common)
        reference = sampler_from_diffusers({"_class_name": kind, **SD15})
        theirs = sd.generate("a fox", sampler=reference, generator=torch.Generator().manual_seed(3), **common)
        assert_close(ours, theirs)


def test_the_first_x_is_the_programs_noise_at_its_scale(sd) -> None:
    """comfyui: sqrt(sigma ** 2 + 1), in the sample that Euler holds; ComfyUI's first noise of a batch, on the CPU."""
    seen: list[Tensor] = []
    unet = sd.unet.forward

    def watch(x, *args, **kwargs):
        seen.append(x.clone())
        return unet(x, *args, **kwargs)

    sd.unet.forward = watch
    try:
        next(sd.steps("a fox", sampler="euler", steps=4, num_images=2, seed=3, guidance_scale=1, like="comfyui"))
    finally:
        del sd.unet.forward
    assert_close(seen[0], cpu(3, *SHAPE), SCALED)  # scaled by sqrt(sigma ** 2 + 1), divided by it for the model


def test_the_noise_of_the_steps_is_the_programs(sd) -> None:
    """comfyui's first step of Euler ancestral, taken by hand with the first numbers of a new CUDA generator."""
    run = sd.steps("a fox", sampler="euler_ancestral", steps=3, seed=3, guidance_scale=1, like="comfyui")
    step = next(run)
    x = cpu(3, 1, *SHAPE[1:]) * run.plan.init_noise_sigma
    sampler = read("comfyui").sampler(sd.config.schedule, "euler_ancestral")
    want, _ = sampler.inner.step(run.plan, 0, x, step.out, (), lambda like: CudaStream(3).randn(tuple(like.shape)))
    assert_close(step.x, want)


def test_trap_guidance_scale_0_through_the_pipeline(sd) -> None:
    common = {"steps": 2, "seed": 1, "output": "latent", "progress": False, "sampler": "ddim"}
    prompt = sd.generate("a fox", guidance_scale=1, like="diffusers", **common)
    empty = sd.generate("", guidance_scale=1, like="diffusers", **common)
    assert not torch.allclose(prompt, empty, atol=1e-3)
    assert_close(sd.generate("a fox", guidance_scale=0, like="diffusers", **common), prompt)
    by_formula = sd.generate("a fox", guidance_scale=0, like="ldm:cpu", **common)
    assert_close(
        by_formula, sd.generate("", guidance_scale=1, like="ldm:cpu", **common), Tolerance(1e-4, 1e-4, "batch")
    )


def test_calls_of_the_unet(sd) -> None:
    """At scale 1 a1111 asks both prompts all the same."""
    for like, batch in (("ldm", 1), ("a1111", 2), ("diffusers", 1)):
        step = next(sd.steps("a fox", steps=2, sampler="ddim", seed=1, guidance_scale=1, like=like))
        assert (step.unconditional is None) == (batch == 1)


@pytest.mark.parametrize("like", ["diffusers", "ldm", "a1111", "comfyui:karras", "k-diffusion:exponential"])
def test_a_recipe_leads_back(sd, like: str) -> None:
    sampler = {"name": "ddim" if like == "ldm" else "euler"}
    chosen = {**sampler, "s_churn": 1.0} if sampler["name"] == "euler" else {**sampler, "eta": 0.5}
    image = sd.generate("a fox", steps=4, seed=4, sampler=chosen, like=like, progress=False)[0]
    recipe = json.loads(image.info["minidiff"])
    assert recipe["like"] == like
    assert recipe["sampler"] == chosen
    assert recipe["seed"] == 4
    keys = ("steps", "seed", "sampler", "like", "guidance_scale")
    again = sd.generate(recipe["prompt"], progress=False, **{key: recipe[key] for key in keys})[0]
    assert again.tobytes() == image.tobytes()


def test_a_picture_of_a_shared_stream_says_its_place(sd) -> None:
    images = sd.generate("a fox", steps=2, seed=4, num_images=2, sampler="ddim", like="ldm", progress=False)
    recipes = [json.loads(image.info["minidiff"]) for image in images]
    assert [(r["seed"], r["place"], r["places"]) for r in recipes] == [(4, 0, 2), (4, 1, 2)]
    images = sd.generate("a fox", steps=2, seed=4, num_images=2, sampler="ddim", like="a1111", progress=False)
    recipes = [json.loads(image.info["minidiff"]) for image in images]
    assert [r["seed"] for r in recipes] == [4, 5]
    assert all("image" not in r for r in recipes)


def test_what_is_given_wins(sd) -> None:
    common = {"steps": 4, "output": "latent", "progress": False}
    choice = {"name": "euler", "spacing": "trailing"}
    run = sd.steps("a fox", sampler=choice, seed=1, like="comfyui", steps=3)
    own = sampler_from_config(choice)
    assert_close(run.plan.sigmas, own.plan(sd.schedule, 3).sigmas, Tolerance(0, 1e-4, "alpha_bar in float64"))
    with pytest.raises(ConfigError, match="Euler is ready as it is; with like= give"):
        sd.steps("a fox", sampler=own, seed=1, like="comfyui", steps=3)
    given = cpu(8, 1, *SHAPE[1:])
    a = sd.generate("a fox", sampler="ddim", like="ldm", generator=torch.Generator().manual_seed(8), **common)
    assert_close(a, sd.generate("a fox", sampler="ddim", like="ldm", latents=given, **common))
    c = sd.generate("a fox", sampler="ddim", like="ldm", seed=1, latents=given, **common)
    d = sd.generate("a fox", sampler="ddim", like="a1111:cpu", seed=2, latents=given, **common)
    assert not torch.equal(c, d)  # a1111 leaves out the last step


def test_the_checkpoints_own_sampler_is_meant_by_name(sd) -> None:
    run = sd.steps("a fox", steps=20, seed=1, like="ldm")
    assert run.plan.timesteps.tolist() == [951, 901, *range(901, 0, -50)]
    with pytest.raises(ConfigError, match="comfyui has no sampler 'pndm'; choose one of ddim, euler"):
        sd.steps("a fox", steps=20, seed=1, like="comfyui")


def test_brownian_trees_are_seeded_where_the_program_seeds_them(sd) -> None:
    common = {"steps": 3, "seed": 7, "sampler": "dpmpp_sde"}
    plan = sd.steps("a fox", like="comfyui", num_images=2, **common).plan
    own = read("comfyui").sampler(sd.config.schedule, {"name": "dpmpp_sde", "noise_seed": 7}).plan(None, 3)
    assert plan.rows.path[0][0] == own.rows.path[0][0]
    assert (
        sd.steps("a fox", like="a1111:cpu", **common).plan.rows.path[0][0].seed == own.rows.path[0][0].seed
    )  # over other sigmas
    assert sd.steps("a fox", like="k-diffusion", **common).plan.rows.path[0] is None
    with pytest.raises(ConfigError, match="a Brownian tree; make them one by one"):
        sd.steps("a fox", like="a1111", num_images=2, **common)
