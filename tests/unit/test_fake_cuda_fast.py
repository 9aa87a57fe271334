"""The switches of ``minidiff.fast`` on a fake CUDA device: the loop still never synchronises.

The same guard as ``test_fake_cuda.py``, all samplers again, with guidance and without, and every switch that a card can
have at once (but for compiling: there is nothing to compile for). Where there is a card, ``pytest -m cuda`` runs these
on it as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import fast
from minidiff.fast.channels_last import ChannelsLastConvolution
from minidiff.fast.halves import SplitUNet
from minidiff.fast.offload import Offloaded
from minidiff.models.clip import CLIPText
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.pipeline import StableDiffusion, from_parts
from minidiff.samplers import DDIM, SAMPLERS
from tests.support.cuda_guard import CARD, GuardError, fake_card
from tests.unit import test_fake_cuda
from tests.unit.test_fake_cuda import NoiseOfTheCard, check_result, on_card, randn, sd1, watch_loop

ON_A_CARD_AT_ONCE = (*fast.SWITCHES, "channels_last", "halves", "vae_slices")
FOR_CPUS = {"packed", "winograd", "blocks", "linear", "tokens", "shared_start", "many_keys", "groups"}
Card = AbstractContextManager[Any]
card, unread = test_fake_cuda.card, test_fake_cuda.unread  # fixtures


def optimized(sd: StableDiffusion) -> StableDiffusion:
    on = fast.optimize(sd, ON_A_CARD_AT_ONCE)
    assert {name for name, count in on.items() if count == 0} == FOR_CPUS & on.keys()
    return sd


@pytest.fixture
def drawn_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("minidiff.programs.streams"), "_source", NoiseOfTheCard)


@pytest.mark.usefixtures("unread", "drawn_there")
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_waits_for_nobody(card: Card, name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sd = optimized(sd1(card, torch.float16))
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, SAMPLERS[name], guard)
        pixels = sd.generate(
            "a cat", steps=3, guidance_scale=scale, sampler=name, seed=0, output="tensor", progress=False
        )
        assert guard.loop
        assert len(guard.copies) == (3 if scale != 1 else 2), "the ids of the prompts, and the timesteps"
        check_result(pixels, (1, 3, 8, 8), torch.float16)


@pytest.mark.usefixtures("unread", "drawn_there")
@pytest.mark.parametrize(
    "options",
    [{"guidance_rescale": 0.7}, {"num_images": 2}, {"latents": (1, 4, 4, 4)}],
    ids=["guidance_rescale", "two pictures", "given noise"],
)
def test_other_ways_through_the_loop(card: Card, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sd = optimized(sd1(card, torch.float16))
    with on_card(card, loop=False) as guard:
        if "latents" in options:
            options = {"latents": randn(*options["latents"], dtype=torch.float16)}
        watch_loop(monkeypatch, DDIM, guard)
        sd.generate("a cat", steps=2, sampler="ddim", seed=0, output="latent", progress=False, **options)
        assert guard.loop


# --- planted ----------------------------------------------------------------------------------------------------------


class Waiting(DDIM):
    """Looks at the largest value of every sample."""

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Any) -> Any:
        return super().step(plan, i, x / x.abs().max().item(), out, state, draw)


def test_a_sampler_that_waits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_card()
    sd = optimized(sd1(fake, torch.float16))
    with on_card(fake, loop=False) as guard:
        watch_loop(monkeypatch, Waiting, guard)
        with pytest.raises(GuardError, match="the host waits: _local_scalar_dense"):
            next(sd.steps("a cat", steps=2, sampler=Waiting(), seed=0))


def waiting_conv(self: ChannelsLastConvolution, x: Tensor) -> Any:
    return self.inner(x if bool(x.isfinite().all()) else x.nan_to_num())


def copying_unet(self: SplitUNet, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.inner(x.cpu().cuda(), *args, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "planted", "message"),
    [(ChannelsLastConvolution, waiting_conv, "the host waits"), (SplitUNet, copying_unet, "copy inside the loop")],
)
def test_a_switch_that_waits_is_caught(kind: Any, planted: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "__call__", planted)
    fake = fake_card()
    sd = optimized(sd1(fake, torch.float16))
    with on_card(fake, loop=False) as guard:
        watch_loop(monkeypatch, DDIM, guard)
        with pytest.raises(GuardError, match=message):
            next(sd.steps("a cat", steps=2, sampler="ddim", seed=0))


# --- parts that take turns on the card --------------------------------------------------------------------------------


def on_the_host(card: Card, dtype: torch.dtype) -> StableDiffusion:
    """The model of ``sd1``, waiting on the host."""
    config = sd1(card, dtype).config
    kinds = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with card, torch.device("cpu"):
            parts = {name: kind(getattr(config, name)).eval() for name, kind in kinds.items()}
    finally:
        torch.set_default_dtype(before)
    made = from_parts(config, parts)
    assert isinstance(made, StableDiffusion)
    return made


def resting(part: nn.Module) -> bool:
    return all(p.stride() == (0,) * p.ndim for p in part.parameters())


@pytest.mark.usefixtures("unread", "drawn_there")
def test_offloaded_parts_come_once_and_the_steps_copy_nothing(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    sd = on_the_host(card, torch.float16)
    with on_card(card, loop=False) as guard:
        fast.offload(sd, "cuda")
        fast.offload(sd, "cuda")  # twice does no harm
        optimized(sd)
        watch_loop(monkeypatch, DDIM, guard)
        monkeypatch.setattr(DDIM, "start", lambda self: ())  # the UNet is copied between the start and the first step
        assert sd.device.type == "cuda"
        run = sd.steps("a cat", steps=3, sampler="ddim", seed=0)
        assert [name for name, part in sd.parts.items() if not resting(part)] == ["text_encoder"]
        before = len(guard.copies)
        next(run)
        count = len(list(sd.unet.parameters()))
        assert len(guard.copies) == before + count + 1, "every weight of the UNet, and the timesteps"
        guard.loop = True
        for step in run:
            check_result(step.x, (1, 4, 4, 4), torch.float16)
        assert resting(sd.text_encoder)
        assert not resting(sd.unet)
        guard.loop = False
        check_result(sd.decode(step.x), (1, 3, 8, 8), torch.float16)
        assert resting(sd.unet)
        assert {p.device.type for part in sd.parts.values() for p in part.parameters()} == {"cuda"}
        fast.restore(sd)
        assert {p.device.type for part in sd.parts.values() for p in part.parameters()} == {"cpu"}
        assert sd.low_memory is None


def test_a_part_that_comes_at_every_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the UNet is put away after each call."""
    load = Offloaded.load

    def forgetful(self: Offloaded, group: str) -> None:
        self.free()
        load(self, group)

    monkeypatch.setattr(Offloaded, "load", forgetful)
    fake = fake_card()
    sd = on_the_host(fake, torch.float16)
    with on_card(fake, loop=False) as guard:
        fast.offload(sd, "cuda")
        watch_loop(monkeypatch, DDIM, guard)
        monkeypatch.setattr(DDIM, "start", lambda self: ())
        run = sd.steps("a cat", steps=3, sampler="ddim", seed=0)
        next(run)
        guard.loop = True
        with pytest.raises(GuardError, match="copy inside the loop"):
            next(run)


# --- each switch by itself --------------------------------------------------------------------------------------------


def test_channels_last_is_a_layout_and_no_other_number(card: Card) -> None:
    sd = sd1(card, torch.float16)
    with on_card(card):
        convolutions = [m for m in sd.unet.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        assert fast.optimize(sd, ("channels_last",))["channels_last"] > len(convolutions)
        x, context = randn(2, 4, 8, 8, dtype=torch.float16), randn(2, 5, 24, dtype=torch.float16)
        check_result(sd.unet(x, torch.full((), 981, device=CARD), context), (2, 4, 8, 8), torch.float16)
        assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
        fast.restore(sd)
        assert all(c.weight.is_contiguous() for c in convolutions)
        assert not any("forward" in c.__dict__ for c in convolutions)


def test_tiles_on_a_card(card: Card) -> None:
    sd = sd1(card, torch.float16)
    with on_card(card):
        fast.tiled(sd, side=4)
        check_result(sd.vae.decode(randn(1, 4, 7, 5, dtype=torch.float16)), (1, 3, 14, 10), torch.float16)
