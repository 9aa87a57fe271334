"""Tests that need a CUDA device: half precision, the device's own generators, and a loop without synchronisation.

``test_fake_cuda.py`` runs on a card as well; together they are ``pytest -m cuda``. Without a card these tests are
skipped, but for the rounding, which the CPU shows too: slowly, and in another order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff import noise
from minidiff.models.clip import CLIPText
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.samplers import SAMPLERS
from tests.support.cuda_guard import ON_A_CARD
from tests.support.tiny import tiny_ddpm, tiny_sd
from tests.tolerances import BFLOAT16_CUDA, FLOAT16_CUDA, Tolerance, assert_close
from tests.unit.test_fake_cuda import CLIP_TINY, UNETS, VAE_TINY

DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_CARD)]
HALF: dict[torch.dtype, Tolerance] = {torch.float16: FLOAT16_CUDA, torch.bfloat16: BFLOAT16_CUDA}
RUN: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "seed": 3}


def on_a_card(test: Callable[..., Any]) -> Callable[..., Any]:
    for mark in ON_A_CARD:
        test = mark(test)
    return test


# --- rounding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(model: nn.Module, seed: int = 1) -> None:
    """Weights that pass on what they get at about its size: prompt and time count for as much as the sample does."""
    g = torch.Generator().manual_seed(seed)
    for module in model.eval().modules():
        for name, p in module.named_parameters(recurse=False):
            random = torch.randn(p.shape, generator=g)
            if p.ndim > 1:
                p.copy_(random if isinstance(module, nn.Embedding) else random / p[0].numel() ** 0.5)
            else:
                norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and name == "weight"
                p.copy_(1 + 0.3 * random if norm else 0.1 * random)


def unet_case(kind: str) -> tuple[UNet, Callable[..., Tensor], list[Tensor]]:
    """A UNet, how to call it, and its inputs."""
    c = UNETS[kind]
    g = torch.Generator().manual_seed(1)
    extra: dict[str, Tensor] = {}
    if c.context_dim:
        extra["context"] = torch.randn(2, 5, c.context_dim, generator=g)
    if kind == "sdxl":
        extra |= {"pooled": torch.randn(2, 12, generator=g), "sizes": torch.full((2, 6), 512.0)}
    if c.guidance_dim:
        extra["guidance"] = torch.randn(2, c.guidance_dim, generator=g)

    def call(unet: UNet, x: Tensor, *values: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(extra, values, strict=True))
        if kind == "sdxl":
            named["added"] = named.pop("pooled"), named.pop("sizes")
        out: Tensor = unet(x, torch.tensor([981, 3], device=x.device), **named)
        return out

    return UNet(c), call, [torch.randn(2, c.in_channels, 8, 6, generator=g), *extra.values()]


def vae_case(part: str) -> tuple[VAE, Callable[..., Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    if part == "decode":
        return VAE(VAE_TINY), VAE.decode, [torch.randn(2, 4, 8, 6, generator=g)]
    return VAE(VAE_TINY), lambda vae, x: vae.encode(x).mean, [torch.randn(2, 3, 16, 12, generator=g)]


def clip_case(output: str) -> tuple[CLIPText, Callable[..., Tensor], list[Tensor]]:
    ids = torch.randint(0, 49407, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 40:] = 49407
    return CLIPText(CLIP_TINY), lambda clip, ids: getattr(clip(ids), output), [ids]


CASES: dict[str, Callable[[], tuple[Any, Callable[..., Tensor], list[Tensor]]]] = {
    **{f"unet {kind}": lambda kind=kind: unet_case(kind) for kind in UNETS},
    **{f"vae {part}": lambda part=part: vae_case(part) for part in ("encode", "decode")},
    **{f"clip {output}": lambda output=output: clip_case(output) for output in ("last", "penultimate", "pooled")},
}


def to(value: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def check_near(ours: Tensor, theirs: Tensor, dtype: torch.dtype, where: str) -> None:
    """``ours`` in ``dtype`` is the float32 ``theirs`` but for its rounding, in units of the latter's spread."""
    assert ours.dtype == dtype
    scale = theirs.std()
    assert_close(ours.float().cpu() / scale, theirs / scale, HALF[dtype], where)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_model_in_half_precision(case: str, device: str, dtype: torch.dtype) -> None:
    model, call, inputs = CASES[case]()
    draw(model)
    theirs = call(model, *inputs)
    model.to(device=device, dtype=dtype)
    check_near(call(model, *(to(v, device, dtype) for v in inputs)), theirs, dtype, case)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name, kind in SAMPLERS.items() if not kind.own_levels])
def test_run_in_half_precision(name: str, device: str, dtype: torch.dtype) -> None:
    """Prompt to latents, and every guided prediction on the way. A seed's noise is the same on every device.

    Every step begins with the sample of float32: rounding is to be compared, not how a run amplifies it.

    Not with the samplers that bring noise levels of their own: a model of another schedule takes those for times it
    was not made for, and what it answers leads far away, with bfloat16's rounding even farther."""
    sd = tiny_sd()
    for part in sd.parts.values():
        draw(part)
    theirs = list(sd.steps("a cat", sampler=name, **RUN))
    sd.to(device, dtype)
    for step, wanted in zip(sd.steps("a cat", sampler=name, **RUN), theirs, strict=True):
        check_near(step.out, wanted.out, dtype, f"{name}, row {step.i}, out")
        check_near(step.x, wanted.x, dtype, f"{name}, row {step.i}, x")
        step.x = wanted.x.to(step.x)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wrong", ["timestep", "context"])
@torch.no_grad()
def test_the_bounds_can_be_missed(wrong: str, dtype: torch.dtype) -> None:
    """A timestep that is off by one interval of fifty, or another prompt, is further away than any rounding."""
    unet, call, (x, context) = unet_case("sd1")
    draw(unet)
    theirs = call(unet, x, context)
    ours = unet(x, torch.tensor([961, 23]), context) if wrong == "timestep" else call(unet, x, context.flip(0))
    with pytest.raises(AssertionError, match="entries differ"):
        check_near(ours.to(dtype), theirs, dtype, wrong)


@on_a_card
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_pictures_of_a_card(dtype: torch.dtype) -> None:
    """Whole pictures: finite, in range, as PIL images."""
    sd = tiny_sd()
    sd.to("cuda", dtype)
    pixels = sd.generate("a cat", steps=3, seed=0, output="tensor", progress=False)
    assert pixels.device.type == "cuda"
    assert bool(((pixels >= 0) & (pixels <= 1)).all())
    assert sd.generate("a cat", steps=2, seed=0, progress=False)[0].size == (64, 64)
    ddpm = tiny_ddpm()
    ddpm.to("cuda", dtype)
    assert bool(ddpm.generate(2, steps=3, seed=0, output="tensor", progress=False).isfinite().all())


# --- noise ------------------------------------------------------------------------------------------------------------

SHAPE = (2, 4, 8, 8)
CUDA = torch.device("cuda")


def cuda_generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


@on_a_card
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_seed_gives_the_same_bits_on_a_card(dtype: torch.dtype) -> None:
    on_card, on_host = noise.source(2, 7, None), noise.source(2, 7, None)
    for _ in range(3):
        ours = on_card(SHAPE, dtype, CUDA)
        assert ours.device.type == "cuda"
        assert_close(ours.cpu(), on_host(SHAPE, dtype, torch.device("cpu")))


@on_a_card
def test_a_generator_of_the_card_draws_on_it() -> None:
    ours = noise.source(2, None, cuda_generator(7))(SHAPE, torch.float16, CUDA)
    assert_close(ours, torch.randn(SHAPE, generator=cuda_generator(7), device="cuda", dtype=torch.float16))


@on_a_card
def test_generators_of_the_card_are_streams_of_their_own() -> None:
    both = noise.source(2, None, [cuda_generator(7), cuda_generator(8)])
    alone = noise.source(1, None, [cuda_generator(8)])
    for _ in range(3):
        assert_close(both(SHAPE, torch.float16, CUDA)[1:], alone((1, *SHAPE[1:]), torch.float16, CUDA))


@on_a_card
def test_a_generator_of_the_host_serves_a_card() -> None:
    ours = noise.source(2, None, torch.Generator().manual_seed(7))(SHAPE, torch.float32, CUDA)
    assert_close(ours.cpu(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)))


# --- waiting ----------------------------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operator that makes the host wait for the card raises a RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_card
def test_waiting_is_noticed() -> None:
    x = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@on_a_card
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_never_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first row to the last, with noise from the card's own generator."""
    kind: Any = SAMPLERS[name]
    start, sd = kind.start, tiny_sd()
    sd.to("cuda", torch.float16)
    run = sd.steps("a cat", steps=4, sampler=name, generator=cuda_generator(0))
    started: list[bool] = []

    def watched(self: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")  # the timesteps have been moved by now
        started.append(True)
        return start(self)

    monkeypatch.setattr(kind, "start", watched)
    try:
        for step in run:
            assert step.x0 is None or step.x0.device.type == "cuda"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started


# --- loading ----------------------------------------------------------------------------------------------------------


@on_a_card
def test_a_file_is_loaded_onto_the_card_as_it_is(tmp_path: Path) -> None:
    sd = tiny_sd()
    sd.to(dtype=torch.float16)
    sd.save(tmp_path / "model.safetensors")
    found = minidiff.load(tmp_path / "model.safetensors")
    assert (found.device.type, found.dtype) == ("cuda", torch.float16)
    assert_close(found.unet.conv_in.weight.cpu(), sd.unet.conv_in.weight)
