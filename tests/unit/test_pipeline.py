"""The pipelines from prompt to picture: every argument, the recipe, and refusals before the first model call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import minidiff
from minidiff.errors import ConfigError
from minidiff.pipeline import StableDiffusion, Unconditional, load, random_model
from minidiff.pipeline.guidance import guide
from minidiff.pipeline.png import read_recipe, save_png, to_pil
from minidiff.samplers import SAMPLERS, sampler_from_config, sampler_to_config
from tests.support import tiny
from tests.tolerances import BATCH, Tolerance, assert_close

QUIET: dict[str, Any] = {"progress": False, "steps": 3}
LATENT: dict[str, Any] = {**QUIET, "output": "latent"}
ROUNDING = Tolerance(1e-4, 0.0, "1 * (c - u) + u is c but for its rounding")


@pytest.fixture(params=sorted(SAMPLERS))
def sampler(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def calls(model: StableDiffusion | Unconditional) -> Iterator[list[int]]:
    """The batch size of every call of the UNet inside."""
    seen: list[int] = []
    handle = model.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def noise(seed: int, shape: tuple[int, ...] = (4, 8, 8)) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


# --- the way through -------------------------------------------------------------------------------------------------


def test_written_out_by_hand_it_is_the_same(sd: StableDiffusion, sampler: str) -> None:
    method: Any = sampler_from_config({"name": sampler})
    plan, state = method.plan(sd.schedule, 4), method.start()
    with torch.no_grad():
        both = torch.cat([sd.text_encoder(sd.tokenizer(["fog"])).last, sd.text_encoder(sd.tokenizer(["a cat"])).last])
        stream = torch.Generator().manual_seed(5)
        x = torch.randn((1, 4, 8, 8), generator=stream) * plan.init_noise_sigma

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=stream)

        for i, t in enumerate(plan.timesteps):
            scaled = method.scale_input(plan, i, x)
            u, c = sd.unet(torch.cat([scaled, scaled]), t, both).chunk(2)
            x, state = method.step(plan, i, x, u + 6.5 * (c - u), state, draw)
        pixels = (sd.vae.decode(x / 0.18215) / 2 + 0.5).clamp(0, 1)
    same: dict[str, Any] = {
        "negative_prompt": "fog",
        "steps": 4,
        "guidance_scale": 6.5,
        "sampler": sampler,
        "seed": 5,
        "progress": False,
    }
    assert_close(sd.generate("a cat", **same, output="latent"), x)
    assert_close(sd.generate("a cat", **same, output="tensor"), pixels)
    (image,) = sd.generate("a cat", **same)
    assert image.tobytes() == to_pil(pixels)[0].tobytes()


def test_output_kinds(sd: StableDiffusion) -> None:
    latents = sd.generate("a", num_images=2, seed=0, **LATENT)
    pixels = sd.generate("a", num_images=2, seed=0, **QUIET, output="tensor")
    images = sd.generate("a", num_images=2, seed=0, **QUIET)
    assert latents.shape == (2, 4, 8, 8)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert_close(sd.decode(latents), pixels)
    assert [type(i) for i in images] == [Image.Image] * 2
    assert [i.tobytes() for i in images] == [i.tobytes() for i in to_pil(pixels)]
    assert not latents.requires_grad
    assert not pixels.requires_grad


@pytest.mark.parametrize(("height", "width"), [(64, 64), (8, 24), (40, 72), (None, 32)])
def test_sizes(sd: StableDiffusion, height: int | None, width: int) -> None:
    pixels = sd.generate("a", steps=1, seed=0, height=height, width=width, output="tensor", progress=False)
    assert pixels.shape == (1, 3, height or 64, width)


def test_steps_is_the_loop_of_generate(sd: StableDiffusion) -> None:
    run = sd.steps("a cat", steps=4, seed=1, guidance_scale=5.0)
    with calls(sd) as seen:
        steps = list(run)
    assert len(run) == len(steps) == 5  # PNDM does its first interval twice
    assert seen == [2] * 5
    want = sd.generate("a cat", steps=4, seed=1, guidance_scale=5.0, progress=False, output="latent")
    assert_close(steps[-1].x, want)
    for step in steps:
        assert step.conditional is not None
        assert step.unconditional is not None
        assert step.x0 is not None
        assert_close(step.out, guide(step.unconditional, step.conditional, 5.0))
        assert step.x0.shape == step.x.shape


def test_progress(sd: StableDiffusion, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing where there is no terminal, unless it is asked for; see test_progress.py for terminals."""
    sd.generate("a", steps=2, seed=0)
    sd.generate("a", steps=2, seed=0, progress=False)
    assert capsys.readouterr() == ("", "")
    sd.generate("a", steps=2, seed=0, progress=True)
    assert "step 3 of 3" in capsys.readouterr().err
    seen: list[minidiff.Step] = []
    want = sd.generate("a", steps=2, seed=0, progress=seen.append, output="latent")
    assert [step.i for step in seen] == [0, 1, 2]
    assert seen[-1].x is want
    assert capsys.readouterr() == ("", "")
    for wrong in ("yes", 1, 0):
        with pytest.raises(ConfigError, match=f"progress={wrong!r} must be True, False, None"):
            sd.generate("a", steps=2, progress=wrong)


def test_an_edited_step_changes_the_picture(sd: StableDiffusion) -> None:
    plain = sd.generate("a", seed=0, sampler="ddim", **LATENT)
    for step in sd.steps("a", seed=0, sampler="ddim", steps=3):
        step.x = step.x * (1.1 if step.i == 1 else 1)
    assert not torch.allclose(step.x, plain, atol=1e-3)


# --- batches and noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_first_noise_of_image_k_is_that_of_seed_plus_k(sd: StableDiffusion, count: int) -> None:
    """Bit-equal in any batch: read from the first input of the UNet."""
    first: list[Tensor] = []
    handle = sd.unet.register_forward_pre_hook(lambda _, args: first.append(args[0]))
    next(sd.steps("a", num_images=count, seed=10, guidance_scale=1.0, steps=2))
    handle.remove()
    assert_close(first[0], torch.cat([noise(10 + k) for k in range(count)]))


def test_an_image_is_nearly_the_same_alone_and_in_a_batch(sd: StableDiffusion, sampler: str) -> None:
    batch = sd.generate("a cat", num_images=3, seed=4, sampler=sampler, **QUIET, output="tensor")
    for k in range(3):
        alone = sd.generate("a cat", seed=4 + k, sampler=sampler, **QUIET, output="tensor")
        assert_close(batch[k : k + 1], alone, BATCH)
        for other in range(3):
            if other != k:
                assert (batch[other] - alone[0]).abs().max() > 100 * BATCH.absolute


def test_prompts_times_images_run_prompt_by_prompt(sd: StableDiffusion) -> None:
    prompts = ["a cat", "two dogs"]
    with calls(sd) as seen:
        batch = sd.generate(prompts, num_images=2, seed=0, **LATENT)
    assert set(seen) == {8}
    order = [("a cat", 0), ("a cat", 1), ("two dogs", 2), ("two dogs", 3)]
    for k, (prompt, seed) in enumerate(order):
        assert_close(batch[k : k + 1], sd.generate(prompt, seed=seed, **LATENT), BATCH)
    recipes = [read_recipe(i) for i in sd.generate(prompts, num_images=2, seed=0, **QUIET)]
    assert [(r["prompt"], r["seed"]) for r in recipes] == order


def test_a_list_of_seeds(sd: StableDiffusion) -> None:
    batch = sd.generate("a", num_images=2, seed=[9, 3], **LATENT)
    assert_close(batch, sd.generate(["a", "a"], seed=(9, 3), **LATENT))
    swapped = sd.generate("a", num_images=2, seed=[3, 9], **LATENT)
    assert_close(batch, swapped.flip(0))


def test_a_generator_draws_the_batch_at_once(sd: StableDiffusion, sampler: str) -> None:
    def g(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    whole = sd.generate("a", num_images=2, generator=g(1), sampler=sampler, **LATENT)
    assert_close(whole, sd.generate("a", num_images=2, generator=g(1), sampler=sampler, **LATENT))
    separate = sd.generate("a", num_images=2, generator=[g(1), g(2)], sampler=sampler, **LATENT)
    assert_close(separate, sd.generate("a", num_images=2, seed=1, sampler=sampler, **LATENT))
    assert not torch.equal(whole, separate)
    if sampler in ("ddim", "pndm", "euler"):  # no noise beyond the first
        given = torch.randn((2, 4, 8, 8), generator=g(1))
        assert_close(whole, sd.generate("a", num_images=2, latents=given, sampler=sampler, **LATENT))


def test_latents_are_the_first_noise(sd: StableDiffusion, sampler: str) -> None:
    given = noise(3)
    before = given.clone()
    same = sd.generate("a", latents=given, seed=8, sampler=sampler, **LATENT)
    assert_close(given, before)
    assert_close(same, sd.generate("a", latents=given, seed=8, sampler=sampler, **LATENT))
    if sampler in ("ddim", "pndm", "euler"):
        assert_close(same, sd.generate("a", seed=3, sampler=sampler, **LATENT))
    assert_close(sd.generate("a", latents=given.double(), seed=8, sampler=sampler, **LATENT), same)


def test_without_a_seed_every_picture_is_another(sd: StableDiffusion) -> None:
    torch.manual_seed(0)
    (one,), (other,) = (sd.generate("a", **QUIET) for _ in range(2))
    assert one.tobytes() != other.tobytes()
    seed = read_recipe(one)["seed"]
    assert sd.generate("a", seed=seed, **QUIET)[0].tobytes() == one.tobytes()


def test_the_global_generator_is_left_alone(sd: StableDiffusion, sampler: str) -> None:
    state = torch.random.get_rng_state()
    sd.generate("a", seed=0, sampler=sampler, **LATENT)
    random_model(tiny.DDPM)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- prompts and guidance --------------------------------------------------------------------------------------------


def test_the_prompt_and_the_negative_prompt_count(sd: StableDiffusion) -> None:
    plain = sd.generate("a cat", seed=0, **LATENT)
    assert not torch.equal(plain, sd.generate("a dog", seed=0, **LATENT))
    assert not torch.equal(plain, sd.generate("a cat", "fog", seed=0, **LATENT))
    for empty in ("", None, [""]):
        assert_close(sd.generate("a cat", empty, seed=0, **LATENT), plain)


def test_negative_prompts_one_for_all_or_one_for_each(sd: StableDiffusion) -> None:
    prompts = ["a cat", "a dog"]
    same = sd.generate(prompts, "fog", seed=0, **LATENT)
    assert_close(same, sd.generate(prompts, ["fog", "fog"], seed=0, **LATENT))
    mixed = sd.generate(prompts, ["fog", "rain"], seed=0, **LATENT)
    assert_close(mixed[:1], same[:1])
    assert not torch.equal(mixed[1:], same[1:])
    images = sd.generate(prompts, ["fog", "rain"], num_images=2, seed=0, **QUIET)
    assert [read_recipe(i)["negative_prompt"] for i in images] == ["fog", "fog", "rain", "rain"]
    images = sd.generate(prompts, "fog", num_images=2, seed=0, **QUIET)
    assert [read_recipe(i)["negative_prompt"] for i in images] == ["fog"] * 4


def test_guidance_1_asks_the_unet_once(sd: StableDiffusion) -> None:
    with calls(sd) as seen:
        one = sd.generate("a cat", "fog", guidance_scale=1.0, num_images=2, seed=0, **LATENT)
    assert seen == [2] * 4
    with calls(sd) as seen:
        near = sd.generate("a cat", "fog", guidance_scale=1.0 + 1e-9, num_images=2, seed=0, **LATENT)
    assert seen == [4] * 4
    assert_close(one, near, ROUNDING)
    assert_close(one, sd.generate("a cat", "other", guidance_scale=1, num_images=2, seed=0, **LATENT))
    step = next(sd.steps("a cat", guidance_scale=1, seed=0, steps=2))
    assert step.conditional is step.unconditional is None


def test_guidance_0_is_unconditional(sd: StableDiffusion) -> None:
    """By the formula, not as in diffusers, where anything up to 1 means conditional only (TRAPS)."""
    zero = sd.generate("a cat", "fog", guidance_scale=0.0, seed=0, **LATENT)
    assert_close(zero, sd.generate("a dog", "fog", guidance_scale=0.0, seed=0, **LATENT))
    assert_close(zero, sd.generate("fog", guidance_scale=1.0, seed=0, **LATENT), BATCH)
    assert not torch.allclose(zero, sd.generate("a cat", guidance_scale=1.0, seed=0, **LATENT), atol=1e-2)


def test_prompt_embeds_are_the_prompt(sd: StableDiffusion) -> None:
    context, pooled = sd.encode_prompt(["a cat", "a dog"])
    assert pooled is None
    assert context.shape == (2, 77, 16)
    assert not context.requires_grad
    negative, _ = sd.encode_prompt("fog")
    assert negative.shape == (1, 77, 16)
    want = sd.generate(["a cat", "a dog"], "fog", num_images=2, seed=0, **LATENT)
    for given in (
        {"prompt": None, "prompt_embeds": context, "negative_prompt": "fog"},
        {"prompt": ["a cat", "a dog"], "negative_prompt_embeds": negative},
        {"prompt": None, "prompt_embeds": context, "negative_prompt_embeds": negative},
        {"prompt": None, "prompt_embeds": context, "negative_prompt_embeds": negative, "negative_prompt": None},
        {"prompt": None, "prompt_embeds": context, "negative_prompt_embeds": negative.repeat(2, 1, 1)},
        {"prompt": None, "prompt_embeds": context.double(), "negative_prompt": "fog"},
    ):
        assert_close(sd.generate(**given, num_images=2, seed=0, **LATENT), want)
    short = sd.generate(None, prompt_embeds=context[:, :5], guidance_scale=1, seed=0, **LATENT)
    assert short.shape == (2, 4, 8, 8)
    recipe = read_recipe(sd.generate(None, prompt_embeds=context, seed=0, **QUIET)[0])
    assert recipe["prompt"] is None


def test_encode_prompt_reads_the_layer_that_the_config_names() -> None:
    config = replace(tiny.SD, text_layer="penultimate")
    model = random_model(config)
    assert isinstance(model, StableDiffusion)
    out = model.text_encoder(model.tokenizer(["a cat"]))
    assert_close(model.encode_prompt("a cat")[0], out.penultimate.detach())
    assert not torch.equal(out.penultimate, out.last)


# --- what is refused -------------------------------------------------------------------------------------------------

WIDTH = 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 100}, "height=100 is not divisible by 8; the nearest: 96 and 104"),
        ({"width": 100}, "width=100 is not divisible by 8; the nearest: 96 and 104"),
        ({"height": 0}, "height=0 is not divisible by 8; the nearest: 8"),
        ({"height": -64}, "height=-64"),
        ({"height": 3}, "height=3 is not divisible by 8; the nearest: 8"),
        ({"height": 64.0}, "height=64.0 must be a whole number"),
        ({"width": "64"}, "width='64' must be a whole number"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1001}, "steps=1001"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"steps": "5"}, "steps='5'"),
        ({"steps": None}, "steps"),
        ({"num_images": 0}, "num_images=0"),
        ({"num_images": -1}, "num_images=-1"),
        ({"num_images": 1.5}, "num_images=1.5"),
        ({"num_images": None}, "num_images=None"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": "7"}, "guidance_scale='7'"),
        ({"sampler": "magic"}, "'magic'; known are"),
        ({"sampler": ""}, "no sampler is called ''"),
        ({"sampler": 5}, "sampler=5 is neither a name nor a Sampler"),
        ({"prompt": None}, "prompt is None and prompt_embeds is not given"),
        ({"prompt": []}, "empty list"),
        ({"prompt": 5}, "must be text or a list of texts, got 5"),
        ({"prompt": b"a cat"}, "must be text"),
        ({"prompt": ["a", 5]}, "must be text, got 5"),
        ({"prompt": ["a", None]}, "must be text, got None"),
        ({"prompt": [["a"]]}, "must be text, got ['a']"),
        ({"negative_prompt": 5}, "must be text or a list of texts, got 5"),
        ({"negative_prompt": []}, "empty list"),
        ({"negative_prompt": ["a", "b"]}, "differ in shape"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 1}, "2 negative prompts for 1 prompts"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["a", "b"]}, "differ in shape"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"seed": [1, 2], "num_images": 3}, "2 seeds for 3 images"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": "1"}, "seed='1'"),
        ({"seed": 2**64}, "64 bits"),
        ({"seed": 1, "generator": torch.Generator()}, "both given"),
        ({"seed": [1], "generator": torch.Generator(), "num_images": 2}, "both given"),
        ({"generator": [torch.Generator()], "num_images": 2}, "1 generators for 2 images"),
        ({"generator": 5}, "generator=5"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, "latents of shape (1, 4, 8, 9) do not fit; (1, 4, 8, 8) is wanted"),
        ({"latents": torch.zeros(4, 8, 8)}, "(1, 4, 8, 8) is wanted"),
        ({"latents": torch.zeros(1, 4, 8, 8), "num_images": 2}, "(2, 4, 8, 8) is wanted"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 32}, "(1, 4, 4, 8) is wanted"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor, got ndarray"),
        ({"latents": torch.zeros(2, 4, 8, 8), "num_images": 2, "seed": [1]}, "1 seeds for 2 images"),
        ({"prompt": None, "prompt_embeds": torch.zeros(77, WIDTH)}, "prompt_embeds has shape (77, 16)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 77, 99)}, "(prompts, tokens, 16) is wanted"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 77, WIDTH)}, "prompt_embeds has shape (0, 77, 16)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 0, WIDTH)}, "prompt_embeds has shape (1, 0, 16)"),
        ({"prompt": None, "prompt_embeds": [[1.0]]}, "prompt_embeds must be a tensor, got list"),
        ({"negative_prompt_embeds": torch.zeros(3, 77, WIDTH)}, "differ in shape"),
        ({"negative_prompt_embeds": torch.zeros(1, 5, WIDTH)}, "differ in shape"),
        ({"negative_prompt_embeds": torch.zeros(1, 77, 3)}, "negative_prompt_embeds has shape (1, 77, 3)"),
        ({"output": "jpeg"}, "output='jpeg' is none of pil, tensor, latent"),
        ({"output": None}, "output=None"),
    ],
)
def test_what_cannot_work_is_refused_before_the_unet_is_asked(
    sd: StableDiffusion, arguments: dict[str, Any], words: str
) -> None:
    given = {"prompt": "a cat", "steps": 3} | arguments
    ways = [lambda: sd.generate(**given, progress=False)]
    if "output" not in arguments:
        ways.append(lambda: sd.steps(**given))  # at the call, not at the first step
    with calls(sd) as seen:
        for way in ways:
            with pytest.raises(ConfigError) as caught:
                way()
            assert words in str(caught.value)
            assert "\n" not in str(caught.value)
    assert seen == []


def test_values_of_other_kinds_that_do_work(sd: StableDiffusion) -> None:
    want = sd.generate("a", seed=3, guidance_scale=7.0, **LATENT)
    assert_close(sd.generate(("a",), seed=3, guidance_scale=7, **LATENT), want)
    images = sd.generate(
        "a",
        seed=np.int64(3),
        guidance_scale=np.float32(7),
        steps=np.int64(3),
        progress=False,  # type: ignore[arg-type]
    )
    recipe = read_recipe(images[0])
    assert (recipe["seed"], recipe["guidance_scale"], recipe["steps"]) == (3, 7.0, 3)


# --- samplers --------------------------------------------------------------------------------------------------------


def test_a_sampler_by_name_ready_made_or_the_checkpoints_own(sd: StableDiffusion) -> None:
    own = sd.generate("a", seed=0, **LATENT)
    assert_close(own, sd.generate("a", seed=0, sampler="pndm", **LATENT))
    ready = sampler_from_config({"name": "ddim", "eta": 0.5})
    other = sd.generate("a", seed=0, sampler=ready, **LATENT)
    assert not torch.equal(other, own)
    assert not torch.equal(other, sd.generate("a", seed=0, sampler="ddim", **LATENT))
    recipe = read_recipe(sd.generate("a", seed=0, sampler=ready, **QUIET)[0])
    assert sampler_from_config(recipe["sampler"]) == ready


def test_a_sampler_of_ones_own(sd: StableDiffusion) -> None:
    """Anything with the methods of a Sampler will do; the recipe says what it was called."""

    @dataclass
    class Mine:
        inner: Any

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    mine: Any = Mine(sampler_from_config({"name": "ddim"}))
    (image,) = sd.generate("a", seed=0, sampler=mine, **QUIET)
    assert image.tobytes() == sd.generate("a", seed=0, sampler="ddim", **QUIET)[0].tobytes()
    assert read_recipe(image)["sampler"]["name"] == "Mine"


# --- recipes ---------------------------------------------------------------------------------------------------------


def again(model: StableDiffusion, recipe: dict[str, Any]) -> Image.Image:
    (image,) = model.generate(
        recipe["prompt"],
        recipe["negative_prompt"],
        steps=recipe["steps"],
        guidance_scale=recipe["guidance_scale"],
        sampler=sampler_from_config(recipe["sampler"]),
        seed=recipe["seed"],
        height=recipe["height"],
        width=recipe["width"],
        progress=False,
    )
    return image


def test_a_recipe_makes_the_picture_again(sd: StableDiffusion, tmp_path: Path, sampler: str) -> None:
    (image,) = sd.generate(
        'a "cat" 😀', "fog", steps=3, guidance_scale=4.5, sampler=sampler, height=40, width=72, progress=False
    )
    save_png(image, tmp_path / "a.png")
    recipe = read_recipe(tmp_path / "a.png")
    assert again(sd, recipe).tobytes() == image.tobytes()
    assert recipe["prompt"] == 'a "cat" 😀'
    assert (recipe["height"], recipe["width"]) == (40, 72) == image.size[::-1]
    assert recipe["sampler"] == sampler_to_config(sampler_from_config({"name": sampler}))
    assert (recipe["model"], recipe["dtype"], recipe["device"]) == ("tiny sd", "float32", "cpu")
    assert (recipe["minidiff"], recipe["torch"]) == (minidiff.__version__, str(torch.__version__))


def test_the_recipes_of_a_batch_make_each_picture_again(sd: StableDiffusion) -> None:
    images = sd.generate(["a cat", "a dog"], num_images=2, seed=[5, 2, 9, 7], **QUIET)
    for image in images:
        ours, theirs = (np.asarray(i).astype(int) for i in (again(sd, read_recipe(image)), image))
        assert np.abs(ours - theirs).max() <= 1  # BATCH, rounded to levels
    assert [read_recipe(i)["seed"] for i in images] == [5, 2, 9, 7]


def test_a_recipe_does_not_name_a_seed_that_says_too_little(sd: StableDiffusion) -> None:
    for arguments in ({"generator": torch.Generator()}, {"latents": noise(0)}, {"latents": noise(0), "seed": 3}):
        assert read_recipe(sd.generate("a", **arguments, **QUIET)[0])["seed"] is None  # type: ignore[arg-type]


def test_the_recipe_of_a_run_is_that_of_its_pictures(sd: StableDiffusion) -> None:
    run = sd.steps("a", num_images=2, seed=3, steps=3)
    images = sd.generate("a", num_images=2, seed=3, **QUIET)
    assert json.loads(json.dumps(run.recipes)) == [read_recipe(i) for i in images]


# --- saving and moving -----------------------------------------------------------------------------------------------


def test_save_and_load_generate_the_same(tmp_path: Path) -> None:
    for model, arguments in ((tiny.tiny_sd(), ("a cat",)), (tiny.tiny_ddpm(), (2,))):
        assert model.hash == ""
        want = model.generate(*arguments, seed=0, **LATENT)  # type: ignore[arg-type]
        told = model.save(tmp_path / "a")
        found = load(str(tmp_path / "a"), device="cpu")
        assert_close(found.generate(*arguments, seed=0, **LATENT), want)  # type: ignore[arg-type]
        assert read_recipe(found.generate(*arguments, seed=0, **QUIET)[0])["model_hash"] == model.identity  # type: ignore[arg-type]
        assert (found.hash, found.identity) == (told, model.identity)


def test_to_moves_every_part() -> None:
    model = tiny.tiny_sd()
    assert model.to(dtype=torch.float64) is model
    assert model.dtype == torch.float64
    assert all(p.dtype == torch.float64 for part in model.parts.values() for p in part.parameters())
    found = model.generate("a", seed=0, **QUIET, output="tensor")
    assert found.dtype == torch.float64
    full = tiny.tiny_sd().generate("a", seed=0, **QUIET, output="tensor")
    assert_close(found.float(), full, Tolerance(1e-3, 0, "float32 rounds in every layer"))
    model.to("meta")
    assert model.device == torch.device("meta")


def test_half_precision_runs(sd: StableDiffusion) -> None:
    model = tiny.tiny_sd()
    model.to(dtype=torch.bfloat16)
    found = model.generate("a", seed=0, **QUIET, output="tensor")
    assert found.dtype == torch.bfloat16
    assert read_recipe(model.generate("a", seed=0, **QUIET)[0])["dtype"] == "bfloat16"
    assert_close(
        found.float(),
        sd.generate("a", seed=0, **QUIET, output="tensor"),
        Tolerance(0.3, 0, "bfloat16 has 8 bits, and guidance enlarges what they lack"),
    )


def test_random_models() -> None:
    one, same, other = (random_model(tiny.DDPM, seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(
        one.unet.named_parameters(), same.unet.parameters(), other.unet.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert "norm" in name or not torch.equal(a, c), name
    assert not one.unet.training


# --- unconditional ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddpm", "ddim", "pndm"])
def test_unconditional_pictures(ddpm: Unconditional, method: str) -> None:
    with calls(ddpm) as seen:
        pixels = ddpm.generate(2, sampler=method, seed=0, **QUIET, output="tensor")
    assert set(seen) == {2}
    assert pixels.shape == (2, 3, 8, 8)
    assert 0 <= pixels.min() < pixels.max() <= 1
    latents = ddpm.generate(2, sampler=method, seed=0, **LATENT)
    assert_close(pixels, (latents / 2 + 0.5).clamp(0, 1))
    images = ddpm.generate(2, sampler=method, seed=0, **QUIET)
    assert [i.tobytes() for i in images] == [i.tobytes() for i in to_pil(pixels)]
    for k in range(2):
        alone = ddpm.generate(1, sampler=method, seed=k, **QUIET, output="tensor")
        assert_close(pixels[k : k + 1], alone, BATCH)
    assert [read_recipe(i)["seed"] for i in images] == [0, 1]
    assert all(read_recipe(i)["width"] == read_recipe(i)["height"] == 8 for i in images)
    assert_close(
        ddpm.generate(seed=1, **LATENT), ddpm.generate(1, generator=[torch.Generator().manual_seed(1)], **LATENT)
    )


def test_unconditional_steps_by_default(ddpm: Unconditional) -> None:
    assert len(ddpm.steps()) == 1000
    assert len(ddpm.steps(sampler="ddim")) == 50
    assert len(ddpm.steps(sampler="ddim", steps=7)) == 7


def test_unconditional_latents(ddpm: Unconditional) -> None:
    given = noise(3, (3, 8, 8))
    found = ddpm.generate(latents=given, sampler="ddim", **LATENT)
    assert_close(found, ddpm.generate(seed=3, sampler="ddim", **LATENT))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"sampler": "magic"}, "magic"),
        ({"seed": [1]}, "1 seeds for 2 images"),
        ({"seed": 1, "generator": torch.Generator()}, "both given"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "(2, 3, 8, 8) is wanted"),
        ({"output": "png"}, "output='png'"),
        ({"image": torch.zeros(1, 3, 8, 8)}, "image= is given, and a tiny ddpm model begins from noise alone"),
        ({"prompt": "a fox"}, "prompt= is given, and a tiny ddpm model begins from noise alone, and reads no text"),
        ({"stepz": 3}, "stepz= is given, and a tiny ddpm model has no such argument"),
    ],
)
def test_unconditional_refusals(ddpm: Unconditional, arguments: dict[str, Any], words: str) -> None:
    with calls(ddpm) as seen, pytest.raises(ConfigError) as caught:
        ddpm.generate(**{"batch_size": 2, "steps": 3, "progress": False} | arguments)
    assert words in str(caught.value)
    assert seen == []


def test_a_model_without_text_makes_one_picture_unless_asked_for_more(ddpm: Unconditional) -> None:
    assert len(ddpm.generate(steps=1, seed=0, output="latent", progress=False)) == 1
    assert len(ddpm.generate(3, steps=1, seed=0, output="latent", progress=False)) == 3


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "dpmpp_2m", "unipc", "pndm"])
def test_a_variance_that_the_sampler_does_not_read_is_refused(name: str) -> None:
    model = tiny.drawn(replace(tiny.DDPM, unet=replace(tiny.DDPM.unet, out_channels=6)))
    with pytest.raises(ConfigError, match="output has 6 channels for a sample of 3, so it holds a variance as well"):
        model.generate(steps=2, seed=0, sampler=name)
    for reads in ({"name": "ddpm", "variance": "learned_range"}, {"name": "dpmpp_2m", "learned_variance": True}):
        assert model.generate(steps=2, seed=0, sampler=reads, output="tensor").shape == (1, 3, 8, 8)
