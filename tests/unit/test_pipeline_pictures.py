"""Pipelines given pictures, masks and sizes: their results, and refusals in one line before the first model call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minidiff import MinidiffError, Sizes, StableDiffusion
from minidiff.config import ModelConfig
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.models.attention import Attention, attention
from minidiff.pipeline import from_parts, load, random_model
from minidiff.pipeline.denoise import Run
from minidiff.pipeline.image_files import to_eight_bits
from minidiff.pipeline.images import open_pictures
from minidiff.pipeline.png import read_recipe
from minidiff.pipeline.request import Request
from minidiff.pipeline.rows import choose_rows
from minidiff.precision import attention_in_float32, watched
from minidiff.programs.img2img import Entry
from minidiff.samplers import sampler_from_config
from minidiff.schedule import NoiseSchedule
from minidiff.training.settings import TrainConfig
from minidiff.training.task import make_task
from tests.support import tiny
from tests.support.tiny import rows_of
from tests.tolerances import assert_close
from tests.unit.test_pipeline import calls

QUIET: dict[str, Any] = {"progress": False, "steps": 3, "seed": 0}
SIDE = 64
REFINER = replace(
    tiny.XL,
    family="tiny refiner",
    unet=replace(tiny.XL.unet, context_dim=8, added_dim=4 + 5 * 2),
    text_encoder=None,
    tokenizer=None,
    zero_empty=False,
)
INPAINTING = replace(tiny.SD, family="tiny inpainting", unet=replace(tiny.UNET, in_channels=9))


def made(config: ModelConfig) -> StableDiffusion:
    model = random_model(config)
    for part in model.parts.values():
        tiny.redraw(part)
    return cast(StableDiffusion, model)


@pytest.fixture(scope="module")
def xl() -> StableDiffusion:
    return tiny.tiny_xl()


@pytest.fixture(scope="module")
def refiner() -> StableDiffusion:
    return made(REFINER)


def picture(width: int = SIDE, height: int = SIDE, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


NOISE = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": "no/such.png"}, "no/such.png: no such file; image names a picture"),
        ({"image": 5}, "image must be a path, a PIL image, a list of them, or a tensor (B, C, H, W), got int"),
        ({"image": []}, "image is an empty list"),
        ({"image": [picture(), picture(32, 32)]}, "images of one run must be of one size"),
        ({"image": picture(7, 64)}, "image of 7 x 64 pixels is too small; 8 x 8 is the least"),
        ({"image": NOISE[0]}, "image is a tensor of shape (3, 64, 64); (images, channels, height, width) is wanted"),
        ({"image": NOISE[:, :2]}, "image is a tensor of shape (1, 2, 64, 64); 3 channels are wanted"),
        ({"image": NOISE * 2 - 1}, "not in 0..1"),
        ({"image": NOISE * torch.nan}, "not in 0..1"),
        ({"image": (NOISE * 255).to(torch.uint8)}, "image is a tensor of torch.uint8; float values in 0..1"),
        ({"image": torch.zeros(1, 4, 0, 8)}, "image is a tensor of shape (1, 4, 0, 8), which holds nothing"),
        ({"image": torch.zeros(1, 4, 8, 8), "height": 32}, "height=32, but the image is latents of 64 pixels"),
        ({"image": [picture()] * 2, "num_images": 3}, "2 images for 3 pictures"),
        ({"image": picture(), "height": 60}, "height=60 is not divisible by 8; the nearest: 56 and 64"),
        ({"image": picture(), "strength": -0.1}, "strength=-0.1 must lie in 0..1"),
        ({"image": picture(), "strength": 1.01}, "strength=1.01 must lie in 0..1"),
        ({"image": picture(), "strength": float("nan")}, "strength=nan must be a finite number"),
        ({"image": picture(), "strength": "1"}, "strength='1'"),
        ({"image": picture(), "strength": 0.2}, "strength=0.2 of steps=3 leaves no step to do"),
        ({"image": picture(), "strength": 0}, "leaves no step"),
        ({"mask": picture(mode="L")}, "a mask needs an image"),
        ({"image": picture(), "mask": picture(32, 64)}, "mask is 32 x 64 pixels, the image 64 x 64"),
        ({"image": picture(), "mask": NOISE}, "mask is a tensor of shape (1, 3, 64, 64); 1 channels are wanted"),
        ({"image": picture(), "mask": "no/such.png"}, "no/such.png: no such file; mask names a picture"),
        ({"image": torch.zeros(1, 4, 8, 8), "mask": picture(32, 32)}, "mask is 32 x 32 pixels, the image 64 x 64"),
        ({"denoising_start": 0.5}, "denoising_start needs an image"),
        ({"denoising_end": 0}, "denoising_end=0 must lie between 0 and 1"),
        ({"denoising_end": 1.0}, "denoising_end=1.0 must lie between 0 and 1"),
        ({"denoising_end": "half"}, "denoising_end='half' must be a finite number"),
        ({"image": NOISE, "denoising_start": 0.8, "denoising_end": 0.8}, "is not before denoising_end=0.8"),
        ({"denoising_end": 0.001}, "denoising_end=0.001 of steps=3 leaves no step"),
        ({"sizes": Sizes()}, "sizes are given, and this UNet reads none"),
        ({"clip_skip": 2}, "clip_skip=2 must be a whole number in 0..1"),
        ({"clip_skip": -1}, "clip_skip=-1"),
        ({"clip_skip": 1.0}, "clip_skip=1.0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 must lie in 0..1"),
        ({"guidance_rescale": "some"}, "guidance_rescale='some' must be a finite number"),
        ({"prompt_2": "b"}, "a second prompt is given, and this tiny sd has one text encoder"),
        ({"negative_prompt_2": "b"}, "a second prompt is given, and this tiny sd has one text encoder"),
    ],
)
def test_what_cannot_work(sd: StableDiffusion, arguments: dict[str, Any], words: str) -> None:
    given = {"prompt": "a cat", "steps": 3} | arguments
    with calls(sd) as seen, pytest.raises(MinidiffError) as caught:
        sd.steps(**given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert seen == []


def test_second_prompts_that_cannot_work(xl: StableDiffusion, refiner: StableDiffusion) -> None:
    for model, given, words in (
        (xl, {"prompt": ["a", "b"], "prompt_2": ["c"] * 3}, "3 texts for the second encoder, and 2 for the first"),
        (xl, {"prompt": "a", "prompt_2": 5}, "prompt_2 must be text"),
        (xl, {"prompt": "a", "negative_prompt_2": "b"}, "negative_prompt_2 is given and negative_prompt is not"),
        (xl, {"prompt": None, "prompt_2": "a"}, "prompt is None"),
        (refiner, {"prompt": "a", "image": picture(), "prompt_2": "b"}, "this tiny refiner has one text encoder"),
    ):
        with calls(model) as seen, pytest.raises(ConfigError) as caught:
            model.steps(steps=3, **given)
        assert words in str(caught.value)
        assert seen == []


def test_a_unet_is_told_the_sizes_of_its_picture(xl: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[float]] = []
    forward = type(xl.unet).forward

    def watched(unet: Any, x: Any, t: Any, context: Any, added: Any = None, *rest: Any, **more: Any) -> Any:
        told.extend(added[1].tolist())
        return forward(unet, x, t, context, added, *rest, **more)

    monkeypatch.setattr(type(xl.unet), "forward", watched)
    size = (6 * xl.vae.config.factor, 4 * xl.vae.config.factor)
    xl.generate("a", steps=1, sampler="ddim", height=size[0], width=size[1], output="latent", progress=False)
    assert told == [[*size, 0, 0, *size]] * 2


def test_what_a_run_from_a_picture_begins_with(sd: StableDiffusion) -> None:
    """Scaled latents with as much noise as the first row expects; none is added to what another model hands over."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    given: dict[str, Any] = {"prompt": "a", "steps": 4, "sampler": "ddim", "seed": 5}
    clean = sd.vae.config.scaling_factor * sd.vae.encode(2.0 * NOISE - 1.0).sample(noise=noise)
    assert_close(begun(sd.steps(**given, image=NOISE, denoising_start=0.5)), clean)
    assert_close(begun(sd.steps(**given, image=clean, denoising_start=0.5)), clean)
    run = sd.steps(**given, image=clean, strength=0.5)
    signal = sd.schedule.alphas_cumprod[run.plan.timesteps[run.rows[0]]]
    assert_close(begun(run), signal**0.5 * clean + (1 - signal) ** 0.5 * noise)


def begun(run: Run) -> torch.Tensor:
    """The first sample of a run."""
    assert run.job is not None
    return run.job.x


def test_a_file_that_is_no_picture(sd: StableDiffusion, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(MinidiffError, match=r"a\.png: no readable picture"):
        sd.steps("a", image=tmp_path / "a.png")


def test_what_a_refiner_and_an_inpainting_model_need(refiner: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match="tiny refiner refines pictures: it needs an image"):
        refiner.steps("a")
    with pytest.raises(ConfigError, match="needs an image and a mask"):
        made(INPAINTING).steps("a", image=picture())
    with pytest.raises(ConfigError, match="image is latents; this model reads the masked picture"):
        made(INPAINTING).steps("a", image=torch.zeros(1, 4, 8, 8), mask=picture(mode="L"))


def test_sizes_that_make_no_sense(xl: StableDiffusion) -> None:
    for arguments, words in (
        ({"original": 5}, "original=5 must be two numbers"),
        ({"crop": (1, "2")}, "crop="),
        ({"target": (1, 2, 3)}, "target="),
        ({"score": "high"}, "score='high' must be a number"),
    ):
        with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
            Sizes(**arguments)
    with pytest.raises(ConfigError, match=r"score=6\.0 is given; only a refiner reads one"):
        xl.steps("a", sizes=Sizes(score=6.0))
    with pytest.raises(ConfigError, match="pooled_prompt_embeds"):
        xl.steps(None, prompt_embeds=torch.zeros(1, 77, 24))
    with pytest.raises(ConfigError, match=r"pooled_prompt_embeds has shape \(2, 4\)"):
        xl.steps(None, prompt_embeds=torch.zeros(1, 77, 24), pooled_prompt_embeds=torch.zeros(2, 4))


def test_parts_that_do_not_fit(xl: StableDiffusion) -> None:
    with pytest.raises(UnsupportedError, match="only mask and masked picture can come beside"):
        made(replace(tiny.SD, unet=replace(tiny.UNET, in_channels=8)))
    with pytest.raises(UnsupportedError, match=r"out_channels=5 of the UNet, latent_channels=4 of the VAE; only a"):
        made(replace(tiny.SD, unet=replace(tiny.UNET, out_channels=5)))
    for channels in ({"in_channels": 6}, {"out_channels": 5}):
        with pytest.raises(UnsupportedError, match=r"_channels=[56].*only a variance can be predicted"):
            tiny.drawn(replace(tiny.DDPM, unet=replace(tiny.DDPM.unet, **channels)))
    with pytest.raises(UnsupportedError, match="a second text encoder; one is missing"):
        from_parts(replace(tiny.SD, unet=replace(tiny.UNET, added_dim=16, added_sinusoid=2)), tiny.tiny_sd().parts)
    with pytest.raises(ConfigError, match="added_dim=20 of the UNet is not five or six sinusoids of 2"):
        replace(tiny.XL, unet=replace(tiny.XL.unet, added_dim=20))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("part", ["pixels", "unet", "vae"])
def test_training_reads_rgb(channels: int, part: str) -> None:
    config = replace(tiny.DDPM, unet=replace(tiny.DDPM.unet, in_channels=channels, out_channels=channels))
    if part != "pixels":
        assert tiny.SD.vae is not None
        config = replace(tiny.SD, vae=replace(tiny.SD.vae, image_channels=channels))
    parts = ("vae",) if part == "vae" else ("unet",)
    with pytest.raises(UnsupportedError, match=f"have {channels} channels, and training reads RGB"):
        make_task(tiny.drawn(config), TrainConfig(steps=1, parts=parts))


def test_training_does_not_know_what_else_a_unet_reads(xl: StableDiffusion) -> None:
    for model in (xl, made(INPAINTING), made(replace(tiny.SD, unet=replace(tiny.UNET, guidance_dim=8)))):
        with pytest.raises(UnsupportedError, match="UNet reads more than a prompt"):
            make_task(model, TrainConfig())
    make_task(xl, TrainConfig(parts=("vae",)))


def test_an_sdxl_keeps_its_ways_in_a_file(xl: StableDiffusion, refiner: StableDiffusion, tmp_path: Path) -> None:
    for model, more in ((xl, {}), (refiner, {"image": picture()})):
        want = model.generate("a cat", output="latent", **QUIET, **more)
        model.save(tmp_path / "a.safetensors")
        found = load(tmp_path / "a.safetensors", device="cpu")
        assert found.config == model.config
        assert_close(found.generate("a cat", output="latent", **QUIET, **more), want)


def test_a_second_prompt(xl: StableDiffusion) -> None:
    """It is read by the second encoder alone: its part of the context, and the pooled text."""
    (one, pooled), (two, pooled_2) = (xl.encode_prompt(text) for text in ("a cat", "a dog"))
    assert pooled is not None
    assert pooled_2 is not None
    context, summary = xl.encode_prompt("a cat", texts_2="a dog")
    assert summary is not None
    assert_close(context, torch.cat([one[..., :16], two[..., 16:]], dim=-1))
    assert_close(summary, pooled_2)
    assert not torch.equal(pooled, pooled_2)
    given: dict[str, Any] = {"negative_prompt": "x", "prompt_2": ["c", "d"], "negative_prompt_2": "y"}
    recipes = [read_recipe(image) for image in xl.generate(["a", "b"], num_images=2, **given, **QUIET)]
    assert [r["prompt_2"] for r in recipes] == ["c", "c", "d", "d"]
    assert {r["negative_prompt_2"] for r in recipes} == {"y"}
    assert "prompt_2" not in read_recipe(xl.generate("a", **QUIET)[0])


def test_the_recipe_says_what_it_began_from(sd: StableDiffusion, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    recipe = read_recipe(sd.generate("a", image=tmp_path / "a.png", strength=0.7, clip_skip=1, **QUIET)[0])
    assert (recipe["image"], recipe["strength"], recipe["clip_skip"]) == ("a.png", 0.7, 1)
    assert read_recipe(sd.generate("a", image=tmp_path / "a.png", **QUIET)[0])["strength"] == 0.8
    masked = sd.generate("a", image=tmp_path / "a.png", mask=tmp_path / "a.png", **QUIET)[0]
    assert read_recipe(masked)["strength"] == 1.0
    assert "mask" not in recipe
    recipe = read_recipe(sd.generate("a", image=picture(), mask=picture(mode="L"), denoising_end=0.9, **QUIET)[0])
    assert recipe["image"] is recipe["mask"] is None
    assert recipe["denoising_end"] == 0.9
    assert "image" not in read_recipe(sd.generate("a", **QUIET)[0])


def test_pictures_in_other_modes_are_made_rgb(sd: StableDiffusion) -> None:
    want = sd.generate("a", image=picture().quantize(16).convert("RGB"), output="latent", **QUIET)
    assert_close(sd.generate("a", image=picture().quantize(16), output="latent", **QUIET), want)
    clear = picture()
    clear.putalpha(200)  # what shines through is white
    want = sd.generate("a", image=to_eight_bits(clear), output="latent", **QUIET)
    assert_close(sd.generate("a", image=clear, output="latent", **QUIET), want)
    clear.putalpha(255)
    want = sd.generate("a", image=picture(), output="latent", **QUIET)
    assert_close(sd.generate("a", image=clear, output="latent", **QUIET), want)


def test_a_mask_is_cut_at_one_half() -> None:
    grey = torch.full((1, 1, SIDE, SIDE), 0.5)
    grey[..., : SIDE // 2] = 0.4999
    found = open_pictures(NOISE, grey, None, None, 8, 4).resized().mask
    assert found is not None
    assert_close(found, torch.cat([torch.zeros(1, 1, SIDE, SIDE // 2), torch.ones(1, 1, SIDE, SIDE // 2)], dim=3))


def test_clip_skip_reads_an_earlier_layer(sd: StableDiffusion) -> None:
    ids = sd.tokenizer(["a cat"])
    plain, skipped = sd.text_encoder(ids), sd.text_encoder(ids, 1)
    assert_close(skipped.last, sd.text_encoder.norm(plain.penultimate))
    assert_close(skipped.pooled, plain.pooled)
    assert_close(sd.encode_prompt("a cat", clip_skip=1)[0], skipped.last.detach())


def test_rows_of_a_plan() -> None:
    schedule = NoiseSchedule.from_config(tiny.SD.schedule)
    for name, steps, options, want in (
        ("ddim", 50, {}, range(50)),
        ("ddim", 50, {"strength": 0.8}, range(10, 50)),
        ("pndm", 10, {"strength": 1.0}, range(11)),
        ("pndm", 10, {"strength": 0.3}, range(7, 11)),
        ("heun", 10, {"strength": 0.3}, range(14, 19)),
        ("ddim", 10, {"end": 0.8}, range(8)),
        ("ddim", 10, {"start": 0.8}, range(8, 10)),
        ("heun", 10, {"start": 0.8}, range(14, 19)),  # of 222, 222, 111, 111, 0, 0 the second: where an interval begins
        ("ddim", 10, {"start": 0.5, "end": 0.8}, range(5, 8)),
    ):
        sampler: Any = sampler_from_config({"name": name})
        plan = sampler.plan(schedule, steps)
        assert rows_of(plan, steps, sampler, **options) == want, (name, steps, options)


def test_latents_keep_their_own_height_and_width() -> None:
    found = open_pictures(torch.zeros(1, 4, 3, 5), None, None, None, 8, 4, 3).resized()
    assert found is not None
    assert found.encoded
    assert found.pixels.shape == (1, 4, 3, 5)
    with pytest.raises(ConfigError, match="width=24, but the image is latents of 40 pixels"):
        open_pictures(torch.zeros(1, 4, 3, 5), None, 24, 24, 8, 4, 3).resized()
    with pytest.raises(ConfigError, match="height=40, but the image is latents of 24 pixels"):
        open_pictures(torch.zeros(1, 4, 3, 5), None, 40, 40, 8, 4, 3).resized()


def plan_of(*timesteps: int) -> Any:
    return SimpleNamespace(timesteps=torch.tensor(timesteps), alpha_bars=1 - torch.tensor(timesteps) / 1000)


@pytest.mark.parametrize(("place", "left"), [(0.1, 1), (0.499, 1), (0.5, 2), (0.501, 3), (0.899, 3)])
def test_two_models_share_a_way_without_a_gap_or_a_row_twice(place: float, left: int) -> None:
    """Also where a timestep is the very one at which they meet: it is the first model's."""
    plan, sampler = plan_of(900, 500, 499, 100), SimpleNamespace(order=1)
    assert rows_of(plan, 4, sampler, end=place) == range(left)
    assert rows_of(plan, 4, sampler, start=place) == range(left, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.0}, "strength=0.0 of steps=4 leaves no step to do; take more steps"),
        ({"strength": 0.2}, "strength=0.2 of steps=4 leaves no step"),
        ({"start": 0.9}, "denoising_start=0.9 of steps=4 leaves no step"),
        ({"end": 0.05}, "denoising_end=0.05 of steps=4 leaves no step"),
        ({"start": 0.2, "end": 0.45}, "denoising_start=0.2, denoising_end=0.45 of steps=4 leaves no step"),
    ],
)
def test_a_part_of_the_way_without_a_row_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rows_of(plan_of(900, 500, 499, 100), 4, SimpleNamespace(order=1), **options)


def test_a_program_whose_rule_leaves_no_row_is_refused() -> None:
    """And one that leaves the last row runs that, also with a sampler that says nothing of its order."""
    plan, request = plan_of(900, 500, 499, 100), Request(None, steps=4, image=torch.zeros(1, 3, 8, 8), strength=0.3)
    assert choose_rows(plan, 1, Entry(4, 3, 1, 3), request, 1000) == (range(3, 4), 3)
    with pytest.raises(ConfigError, match=r"strength=0\.3 of steps=4 leaves no step to do; take more steps"):
        choose_rows(plan, 1, Entry(4, 4, 0, 4), request, 1000)


# --- precision -------------------------------------------------------------------------------------------------------


def test_what_stays_in_float32() -> None:
    config = replace(
        tiny.SD, unet=replace(tiny.UNET, upcast_attention=True), vae=replace(cast(Any, tiny.SD.vae), upcast=True)
    )
    for policy, kernel, dtype in ((config, attention_in_float32, torch.float32), (tiny.SD, attention, torch.float16)):
        model = made(policy)
        model.to(dtype=torch.float16)
        kernels = {m.kernel for m in model.unet.modules() if isinstance(m, Attention)}
        assert kernels == {kernel}
        assert model.dtype == model.text_encoder.token.weight.dtype == torch.float16
        assert {p.dtype for p in model.vae.parameters()} == {dtype}
        model.to(dtype=torch.float32)
        assert {m.kernel for m in model.unet.modules() if isinstance(m, Attention)} == {attention}


def test_attention_in_float32_survives_what_float16_does_not() -> None:
    q = torch.full((1, 1, 2, 64), 250.0, dtype=torch.float16)
    v = torch.rand(1, 1, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    found = attention_in_float32(q, q, v, False)
    assert found.dtype == torch.float16
    assert_close(found[:, :, 0], ((v[:, :, 0].float() + v[:, :, 1].float()) / 2).half())


@pytest.mark.parametrize("seed", [0, None])
def test_the_first_module_with_a_nan_is_named(seed: int | None) -> None:
    model = tiny.tiny_sd()
    with torch.no_grad():
        model.unet.down[0].res[0].conv2.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index, operator]
    generator = None if seed is not None else torch.Generator().manual_seed(1)
    for output in ("pil", "tensor", "latent"):
        with pytest.raises(MinidiffError) as caught:
            model.generate(
                "a", steps=3, seed=seed, generator=generator, sampler="euler_ancestral", output=output, progress=False
            )
        assert "first from unet.down.0.res.0.conv2 (Conv2d, float32)" in str(caught.value)
        assert "--dtype float32" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for part in model.parts.values() for m in part.modules())


def test_a_nan_of_the_autoencoder_is_named_too() -> None:
    model = tiny.tiny_sd()
    with torch.no_grad():
        model.vae.decoder.mid.res1.norm1.bias[0] = float("inf")
    with pytest.raises(MinidiffError, match=r"first from vae\.decoder\.mid\.res1\.norm1 \(GroupNorm"):
        model.generate("a", **QUIET)
    assert model.generate("a", output="latent", **QUIET).isfinite().all()


def test_a_nan_among_several_outputs_is_seen() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x / 0

    part = Two()
    with (
        pytest.raises(MinidiffError, match=r"first from text_encoder \(Two, float32\)"),
        watched({"text_encoder": part}),
    ):
        part(torch.zeros(2))


def test_a_run_that_goes_well_is_not_watched(sd: StableDiffusion) -> None:
    with calls(sd) as seen:
        sd.generate("a", sampler="ddim", **QUIET)
    assert seen == [2, 2, 2]
