"""CUDA without a card: everything runs on torch's fake tensors that claim to be on one, under a guard.

The fake card raises where devices mix; ``cuda_guard.py`` adds what it lets through: mixed dtypes, values that the host
waits for, copies inside the loop. Noise is injected, since there is no CUDA generator without a card: what a sampler
draws comes from the (fake) card itself, so that the rest of the loop is shown to copy nothing. (Noise from seeds is
drawn on the host and moved, one copy a draw, by design: ``noise.py``; a test counts them.)

Where there is a card the same tests run on it as well: ``pytest -m cuda``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from minidiff import Control, ControlModel
from minidiff.config import (
    CLIPTextConfig,
    ControlConfig,
    ControlNetConfig,
    Level,
    ModelConfig,
    ScheduleConfig,
    T2IAdapterConfig,
    TokenizerConfig,
    UNetConfig,
    VAEConfig,
    text,
)
from minidiff.fast.deep import Deep
from minidiff.fast.merge import Merge
from minidiff.fast.switch import Switch, put_on
from minidiff.models.clip import CLIPText
from minidiff.models.control import ControlNet
from minidiff.models.t2i_adapter import T2IAdapter
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.pipeline import StableDiffusion, from_parts, images
from minidiff.pipeline import base as runner
from minidiff.pipeline.denoise import denoise
from minidiff.pipeline.job import Job, Prediction
from minidiff.pipeline.request import PROMPT_STYLES
from minidiff.samplers import DDIM, SAMPLERS, EulerAncestral, sampler_from_config
from minidiff.schedule import NoiseSchedule
from tests.support.cuda_guard import ON_A_CARD, CudaGuard, fake_card

DTYPES = [torch.float16, torch.bfloat16]

UNETS = {
    "sd1": UNetConfig(levels=(text(16, 2), Level(channels=32)), mid=text(32, 4), context_dim=24, layers=1, groups=8),
    "ddpm": UNetConfig(
        levels=(Level(channels=16), Level(channels=32, attention="self", heads=1)),
        mid=Level(channels=32, attention="self", heads=1),
        in_channels=3,
        out_channels=3,
        layers=1,
        groups=8,
        sin_first=True,
        freq_shift=1,
        asymmetric_down=True,
        sample_size=8,
    ),
}
UNETS["sdxl"] = replace(
    UNETS["sd1"], levels=(Level(channels=16), text(32, 4, 2)), linear_proj=True, added_dim=12 + 6 * 8, added_sinusoid=8
)
UNETS["lcm"] = replace(UNETS["sd1"], guidance_dim=16)
VAE_TINY = VAEConfig(channels=(16, 32), layers=1, groups=8)
CLIP_TINY = CLIPTextConfig(width=24, layers=2, heads=2, mlp=48)

# Every sampler with its defaults, and the options that take other ways through a step.
VARIANTS: list[dict[str, Any]] = [
    *({"name": name} for name in SAMPLERS),
    *({"name": "ddpm", "variance": v} for v in ("fixed_small_log", "fixed_large", "learned", "learned_range")),
    {"name": "ddpm", "clip": 1.0},
    {"name": "ddpm", "threshold": 0.995},
    {"name": "ddim", "eta": 1.0, "clip": 1.0, "use_clipped": True},
    {"name": "ddim", "like_diffusers": True},
    {"name": "pndm", "runge_kutta": True},
    {"name": "pndm", "like_diffusers": True, "runge_kutta": True},
    {"name": "euler", "s_churn": 40.0},
    {"name": "euler", "sigma_spacing": "karras"},
    {"name": "dpmpp_2m", "solver_order": 3, "threshold": 0.995, "sigma_spacing": "lu"},
    {"name": "dpmpp_2m", "algorithm": "dpmsolver", "solver_type": "heun", "final_sigma": "sigma_min"},
    {"name": "dpmpp_2s", "solver_order": 3, "solver_type": "heun"},
    {"name": "deis", "solver_order": 3},
    {"name": "unipc", "solver_order": 3},
    {"name": "unipc", "predict_x0": False, "final_sigma": "sigma_min", "solver_type": "bh1"},
    {"name": "sa_solver", "predictor_order": 3, "corrector_order": 4},
    {"name": "sa_solver", "algorithm": "noise_prediction"},
    {"name": "heun", "clip": 1.0},
    {"name": "lms", "like_diffusers": True},
    {"name": "lcm", "threshold": 0.995},
    {"name": "tcd", "eta": 0.0},
    {"name": "edm_euler", "s_churn": 40.0, "threshold": 0.995},
    {"name": "edm_dpmpp_2m", "solver_order": 3},
    {"name": "edm_dpmpp_2m", "sde": True, "heun": True},
]


def variant_id(options: dict[str, Any]) -> str:
    return "-".join(str(v) if k == "name" else f"{k}={v}" for k, v in options.items())


@pytest.fixture(params=["fake", pytest.param("card", marks=ON_A_CARD)])
def card(request: pytest.FixtureRequest) -> AbstractContextManager[Any]:
    """Context that provides a CUDA device: a fake one, or nothing where it is real."""
    return fake_card() if request.param == "fake" else nullcontext()


@contextmanager
def on_card(card: AbstractContextManager[Any], loop: bool = True) -> Iterator[CudaGuard]:
    """On the card, under the guard, without gradients."""
    with card, torch.no_grad(), CudaGuard(loop) as guard:
        yield guard


def build(card: AbstractContextManager[Any], cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A random model, made on the card in ``dtype`` outright: a fake one can't be converted."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with card, torch.device("cuda"):
            return cls(config).eval()
    finally:
        torch.set_default_dtype(before)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def check_result(result: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(result.shape), result.dtype, result.device.type) == (shape, dtype, "cuda")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", UNETS)
def test_unet(card: AbstractContextManager[Any], kind: str, dtype: torch.dtype) -> None:
    config = UNETS[kind]
    unet = build(card, UNet, config, dtype)
    with on_card(card) as guard:
        inputs: dict[str, Any] = {}
        if config.context_dim:
            inputs["context"] = randn(2, 5, config.context_dim, dtype=dtype)
        if kind == "sdxl":  # the sizes come as float32 or as whole numbers, whatever the model computes in
            inputs["added"] = randn(2, 12, dtype=dtype), torch.full((2, 6), 512.0, device="cuda")
        if config.guidance_dim:
            inputs["guidance"] = randn(2, config.guidance_dim, dtype=dtype)
        x = randn(2, config.in_channels, 8, 6, dtype=dtype)
        for t in (torch.full((), 981, device="cuda"), torch.full((2,), 98.5, device="cuda")):
            check_result(unet(x, t, **inputs), tuple(x.shape), dtype)
        assert guard.calls > 100


def test_unet_with_residuals(card: AbstractContextManager[Any]) -> None:
    unet = build(card, UNet, UNETS["sd1"], torch.float16)
    with on_card(card):
        shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
        skips = [randn(*shape, dtype=torch.float16) for shape in shapes]
        x, context = randn(2, 4, 8, 8, dtype=torch.float16), randn(2, 5, 24, dtype=torch.float16)
        out = unet(x, torch.full((), 981, device="cuda"), context, residuals=(skips, skips[-1]))
        check_result(out, (2, 4, 8, 8), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vae(card: AbstractContextManager[Any], dtype: torch.dtype) -> None:
    vae = build(card, VAE, VAE_TINY, dtype)
    with on_card(card):
        found = vae.encode(randn(2, 3, 16, 12, dtype=dtype))
        check_result(found.logvar, (2, 4, 8, 6), dtype)
        z = found.sample()
        check_result(z, (2, 4, 8, 6), dtype)
        check_result(vae.decode(z), (2, 3, 16, 12), dtype)
        check_result(vae(randn(1, 3, 16, 12, dtype=dtype)), (1, 3, 16, 12), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [CLIP_TINY, replace(CLIP_TINY, activation="gelu", projection=8)], ids=["l", "bigg"])
def test_text_encoder(card: AbstractContextManager[Any], config: CLIPTextConfig, dtype: torch.dtype) -> None:
    encoder = build(card, CLIPText, config, dtype)
    with on_card(card):
        out = encoder(torch.full((2, 77), 49407, device="cuda"))
        check_result(out.last, (2, 77, 24), dtype)
        check_result(out.penultimate, (2, 77, 24), dtype)
        check_result(out.pooled, (2, config.projection or 24), dtype)


@pytest.mark.parametrize("switch", [Deep(2), Merge(0.5)], ids=lambda s: type(s).__name__)
def test_approximations(card: AbstractContextManager[Any], switch: Switch) -> None:
    """A whole call and one that reuses it, of an odd size: no value is waited for, nothing is copied."""
    unet = build(card, UNet, UNETS["sd1"], torch.float16)
    put_on(switch, [unet])
    with on_card(card):
        plan = torch.arange(4, 0, -1, device="cuda")
        x, context = randn(2, 4, 7, 5, dtype=torch.float16), randn(2, 5, 24, dtype=torch.float16)
        for t in plan:
            check_result(unet(x, t, context), tuple(x.shape), torch.float16)
    switch.take_off(unet)


# --- samplers ---------------------------------------------------------------------------------------------------------


REFUSED = {("pndm", "sample")}  # PNDM combines epsilons

# What the model predicts changes few lines: the defaults of each sampler go through all three.
WAYS = [
    *((options, "epsilon") for options in VARIANTS),
    *(
        ({"name": name}, other)
        for name in SAMPLERS
        for other in ("v_prediction", "sample")
        if (name, other) not in REFUSED
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("options", "prediction"), WAYS, ids=lambda v: variant_id(v) if isinstance(v, dict) else str(v)
)
def test_sampler(
    card: AbstractContextManager[Any], options: dict[str, Any], prediction: Any, dtype: torch.dtype
) -> None:
    """Every row of a small plan, through the real loop: the model gets its dtype, and so does the caller."""
    sampler = sampler_from_config(options)
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig(prediction=prediction)), 5)
    learned = str(options.get("variance", "")).startswith("learned")

    def predict(x: Tensor, t: Tensor) -> Prediction:
        check_result(x, (2, 4, 4, 3), dtype)
        assert (t.ndim, t.device.type) == (0, "cuda")
        return Prediction(torch.cat([x, x], dim=1) if learned else 0.5 * x)

    with card:
        plan = plan.to("cuda")  # once, before the loop
    with on_card(card):
        x = randn(2, 4, 4, 3, dtype=dtype) * plan.init_noise_sigma
        steps = 0
        for step in denoise(Job(predict=predict, sampler=sampler, plan=plan, x=x, draw=torch.randn_like)):
            check_result(step.x, (2, 4, 4, 3), dtype)
            x0 = step.x0
            assert x0 is None or x0.device.type == "cuda"
            steps += 1
        assert steps == len(plan)


def test_every_sampler_is_among_the_variants() -> None:
    assert {options["name"] for options in VARIANTS} == set(SAMPLERS)


# --- pipelines --------------------------------------------------------------------------------------------------------


def sd1(card: AbstractContextManager[Any], dtype: torch.dtype) -> StableDiffusion:
    """Stable Diffusion 1 in small, on the card."""
    config = ModelConfig(
        family="sd1",
        unet=replace(UNETS["sd1"], levels=(Level(channels=16),), mid=text(16, 2), sample_size=4),
        schedule=ScheduleConfig(),
        sampler={"name": "pndm"},
        vae=VAE_TINY,
        text_encoder=CLIP_TINY,
        tokenizer=TokenizerConfig(),
    )
    return on_the_card(card, config, dtype)


def sdxl(card: AbstractContextManager[Any], dtype: torch.dtype) -> StableDiffusion:
    """SDXL in small: two text encoders, pooled text and sizes beside the timestep."""
    config = replace(
        sd1(card, dtype).config,
        family="sdxl",
        unet=replace(UNETS["sdxl"], context_dim=24 + 8, added_dim=4 + 6 * 2, added_sinusoid=2, sample_size=4),
        text_encoder_2=CLIPTextConfig(width=8, layers=2, heads=2, mlp=16, projection=4, activation="gelu"),
        tokenizer_2=TokenizerConfig(pad=0),
        text_layer="penultimate",
        zero_empty=True,
    )
    return on_the_card(card, config, dtype)


def lcm(card: AbstractContextManager[Any], dtype: torch.dtype) -> StableDiffusion:
    """A latent consistency model in small: the guidance scale goes into the UNet."""
    config = sd1(card, dtype).config
    return on_the_card(card, replace(config, unet=replace(config.unet, guidance_dim=16)), dtype)


def controls(card: AbstractContextManager[Any], sd: StableDiffusion) -> list[Control]:
    """A ControlNet in guess mode and a T2I-Adapter, each with a picture."""
    c = sd.config.unet
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    net = ControlNetConfig(**{**fields, "hint_widths": (4, 4)})
    adapter = T2IAdapterConfig(channels=(16,), layers=1, factor=sd.vae.config.factor)
    found = []
    kinds: tuple[tuple[Any, Any], ...] = ((net, ControlNet), (adapter, T2IAdapter))
    for config, kind in kinds:
        part = build(card, kind, config, sd.dtype)
        model = ControlModel(ControlConfig(family="sd1", control=config), {"control": part})
        model.source = "known"  # or its identity would be read from weights that are not there
        found.append(Control(model, torch.rand(1, 3, 8, 8), guess=config is net))
    return found


def on_the_card(card: AbstractContextManager[Any], config: ModelConfig, dtype: torch.dtype) -> StableDiffusion:
    kinds = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText, "text_encoder_2": CLIPText}
    wanted = {name: kind for name, kind in kinds.items() if getattr(config, name) is not None}
    made = from_parts(config, {name: build(card, kind, getattr(config, name), dtype) for name, kind in wanted.items()})
    assert isinstance(made, StableDiffusion)
    return made


def outside(plan: Callable[..., Any]) -> Callable[..., Any]:
    """A sampler's ``plan``, or what else comes before the loop, of real host tensors: a fake card has no values."""

    def made(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return plan(*args, **kwargs)

    return made


def watch_loop(monkeypatch: pytest.MonkeyPatch, kind: Any, guard: CudaGuard) -> None:
    """Plans of samplers of class ``kind`` are made off the card, and from their first row on no copy is allowed."""
    start = kind.start

    def started(self: Any) -> Any:
        guard.loop = True
        return start(self)

    monkeypatch.setattr(kind, "plan", outside(kind.plan))
    monkeypatch.setattr(kind, "start", started)


class NoiseOfTheCard:
    """In the place of a program's sources of noise: random numbers that are on the card already."""

    def __init__(self, *_: Any) -> None:
        self.shared = True

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def mark(self) -> list[Tensor]:
        return []


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the result is finite is looked at once, after the loop; a fake card has no values to look at."""
    monkeypatch.setattr(runner, "check_finite", lambda *_: None)


PIPELINES = [*((sd1, name, 3) for name in SAMPLERS), (sdxl, "euler", 5), (sdxl, "dpmpp_2m", 5), (lcm, "lcm", 3)]


@pytest.mark.usefixtures("unread")
def test_pipeline_with_controls(card: AbstractContextManager[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pictures go over before the loop, one copy each; within it nothing does."""
    sd = sd1(card, torch.float16)
    given = controls(card, sd)
    for name in ("opened", "numbers", "digest"):  # pictures are looked at on the host, before the loop
        monkeypatch.setattr(images, name, outside(getattr(images, name)))
    monkeypatch.setattr(import_module("minidiff.programs.streams"), "_source", NoiseOfTheCard)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, SAMPLERS["ddim"], guard)
        options: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0, "output": "tensor", "progress": False}
        pixels = sd.generate(["a cat", "a dog"], controls=given, **options)
        assert guard.loop
        assert len(guard.copies) == 3 + 2, guard.copies
        check_result(pixels, (2, 3, 8, 8), torch.float16)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "name", "copies"), PIPELINES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_pipeline(
    card: AbstractContextManager[Any],
    family: Any,
    name: str,
    copies: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompt to pixels with guidance. Before the loop the ids of both prompts and the timesteps go over, no more.

    SDXL has two encoders, asks neither about an empty prompt, and sends the sizes of both halves; a latent consistency
    model has one half, and its guidance scale goes over.
    """
    sd = family(card, dtype)
    monkeypatch.setattr(import_module("minidiff.programs.streams"), "_source", NoiseOfTheCard)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, SAMPLERS[name], guard)
        pixels = sd.generate(["a cat", "a dog"], steps=2, sampler=name, seed=0, output="tensor", progress=False)
        assert guard.loop
        assert len(guard.copies) == copies, guard.copies
        check_result(pixels, (2, 3, 8, 8), dtype)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting(card: AbstractContextManager[Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known part of the picture is put back after every step by what is on the card already."""
    sd = sd1(card, torch.float16)
    monkeypatch.setattr(import_module("minidiff.programs.streams"), "_source", NoiseOfTheCard)
    monkeypatch.setattr(images, "open_pictures", outside(images.open_pictures))
    monkeypatch.setattr(
        images.Opened, "resized", outside(images.Opened.resized)
    )  # pictures are looked at on the host, before the loop
    picture, mask = torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, SAMPLERS[name], guard)
        pixels = sd.generate(
            "a cat",
            image=picture,
            mask=mask,
            steps=4,
            strength=0.8,
            sampler=name,
            seed=0,
            output="tensor",
            progress=False,
        )
        assert guard.loop
        check_result(pixels, (1, 3, 8, 8), torch.float16)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", PROMPT_STYLES)
def test_pipeline_in_a_dialect(name: str, card: AbstractContextManager[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, chunks and several conditionals: what changes on the way is on the card before the loop."""
    # compel hides words by a mask, which torch's attention adds in float32
    dtype = torch.float32 if name == "compel" else torch.float16
    sd = sdxl(card, dtype)
    monkeypatch.setattr(import_module("minidiff.programs.streams"), "_source", NoiseOfTheCard)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, SAMPLERS["euler"], guard)
        prompts = ["a (cat:1.2) [one|two] AND a (dog)0.8, :0.5", "a bird, " * 40]
        options: dict[str, Any] = {"steps": 3, "sampler": "euler", "seed": 0, "output": "tensor", "progress": False}
        pixels = sd.generate(prompts, "(bad)1.2", prompt_style=name, **options)
        assert guard.loop
        check_result(pixels, (2, 3, 8, 8), dtype)


@pytest.mark.usefixtures("unread")
def test_pipeline_without_guidance(card: AbstractContextManager[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sd = sd1(card, torch.float16)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, DDIM, guard)
        given = randn(1, 4, 4, 4, dtype=torch.float16)
        latents = sd.generate(
            "a cat", steps=2, guidance_scale=1, sampler="ddim", latents=given, seed=0, output="latent", progress=False
        )
        assert guard.loop
        check_result(latents, (1, 4, 4, 4), torch.float16)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unconditional_pipeline(
    card: AbstractContextManager[Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(family="ddpm", unet=UNETS["ddpm"], schedule=ScheduleConfig(), sampler={"name": "ddpm"})
    model = from_parts(config, {"unet": build(card, UNet, config.unet, dtype)})
    monkeypatch.setattr(import_module("minidiff.programs.streams"), "_source", NoiseOfTheCard)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, SAMPLERS["ddpm"], guard)
        pixels = model.generate(2, steps=2, seed=0, output="tensor", progress=False)
        assert guard.loop
        check_result(pixels, (2, 3, 8, 8), dtype)


def test_noise_from_seeds_costs_one_copy_a_draw(
    card: AbstractContextManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn on the host, so that it has the same bits everywhere; nothing else in the loop is copied."""
    sd = sd1(card, torch.float16)
    with on_card(card, loop=False) as guard:
        monkeypatch.setattr(EulerAncestral, "plan", outside(EulerAncestral.plan))
        run = sd.steps("a cat", steps=3, sampler="euler_ancestral", seed=0)
        before = len(guard.copies)
        next(run)
        assert len(guard.copies) == before + 2, "the timesteps, and the noise of the first step"
        for copied, _ in enumerate(run, 1):
            assert len(guard.copies) == before + 2 + copied
        assert copied == 2
