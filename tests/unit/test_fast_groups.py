"""Large pictures of a batch, a few at a time: which rows are together, and the same results."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff import StableDiffusion, fast
from minidiff.fast.groups import GroupedUNet, Groups
from minidiff.pipeline import group_sizes
from tests.support.tiny import tiny_ddpm, tiny_sd, tiny_xl
from tests.tolerances import BATCH, assert_close


@pytest.fixture
def sd(monkeypatch: pytest.MonkeyPatch) -> Iterator[StableDiffusion]:
    """A model whose UNet takes two guided pictures at a time, or four without guidance."""
    found = tiny_sd()
    per_row = found.unet.config.levels[0].channels * 8 * 8 * 4
    monkeypatch.setattr(group_sizes, "LARGEST", 4 * per_row)
    yield found
    fast.restore(found)


def seen(sd: StableDiffusion) -> list[tuple[int, int]]:
    """Put the switch on, and return a list that will hold the rows and the id of the prompt of each plain call."""
    fast.optimize(sd, ("groups",))
    replaced = sd.unet.__dict__["forward"]
    shapes: list[tuple[int, int]] = []
    assert isinstance(replaced, GroupedUNet)
    plain = replaced.inner

    def watching(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append((len(x), id(args[1])))
        return plain(x, *args, **kwargs)

    replaced.inner = watching
    return shapes


def drawn(sd: StableDiffusion, count: int) -> Tensor:
    found: Tensor = sd.generate(
        "a horse", num_images=count, seed=3, steps=2, sampler="ddim", output="latent", progress=False
    )
    return found


def test_pictures_are_computed_two_at_a_time_with_both_predictions(sd: StableDiffusion) -> None:
    plain = drawn(sd, 5)
    shapes = seen(sd)
    found = drawn(sd, 5)
    assert [rows for rows, _ in shapes] == 2 * [4, 4, 2]
    assert_close(found, plain, BATCH)


def test_the_parts_of_a_prompt_are_the_same_tensors_at_every_step_and_go_with_the_run(sd: StableDiffusion) -> None:
    shapes = seen(sd)
    drawn(sd, 3)
    first, second, *later = [part for _, part in shapes]
    assert first != second
    assert later == [first, second]
    gc.collect()
    assert not sd.unet.__dict__["forward"].known


def test_halves_that_differ_are_cut_in_their_order(sd: StableDiffusion) -> None:
    torch.manual_seed(0)
    c = sd.unet.config
    x, context = torch.randn(10, c.in_channels, 8, 8), torch.randn(10, 77, c.context_dim or 1)
    t = torch.arange(10) * 90
    with torch.no_grad():
        plain = sd.unet(x, t, context)
        shapes = seen(sd)
        assert_close(sd.unet(x, t, context), plain, BATCH)
        assert [rows for rows, _ in shapes] == [4, 4, 2]
        other = x[:5].repeat(2, 1, 1, 1)  # halves that are equal: other rows are together
        assert_close(sd.unet(other, 500, context), sd.unet.__dict__["forward"].inner(other, 500, context), BATCH)
        context.mul_(2)  # written to since: the parts are cut anew
        again = sd.unet(x, t, context)
        fast.restore(sd)
        assert_close(again, sd.unet(x, t, context), BATCH)


def test_every_input_has_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's pooled text and sizes; controls are in test_combined.py."""
    sd = tiny_xl()
    monkeypatch.setattr(group_sizes, "LARGEST", 1)
    torch.manual_seed(0)
    c = sd.unet.config
    x, context = torch.randn(3, c.in_channels, 8, 8).repeat(2, 1, 1, 1), torch.randn(6, 77, c.context_dim or 1)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(6, 1) + torch.arange(6)[:, None]
    pooled = torch.randn(6, (c.added_dim or 0) - 6 * c.added_sinusoid)
    with torch.no_grad():
        plain = sd.unet(x, torch.tensor(500), context, (pooled, sizes))
        fast.optimize(sd, ("groups",))
        assert_close(sd.unet(x, torch.tensor(500), context, (pooled, sizes)), plain, BATCH)
    fast.restore(sd)


def test_an_unconditional_model_and_a_decoder(monkeypatch: pytest.MonkeyPatch, sd: StableDiffusion) -> None:
    monkeypatch.setattr(group_sizes, "LARGEST", 1)
    pixels = tiny_ddpm()
    torch.manual_seed(0)
    x, z = torch.randn(3, 3, 8, 8), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        plain, decoded = pixels.unet(x, 500), [sd.vae.decode(one) for one in z.split(1)]
        fast.optimize(pixels, ("groups",))
        fast.optimize(sd, ("groups",))
        assert_close(pixels.unet(x, 500), plain, BATCH)
        assert torch.equal(sd.vae.decode(z), torch.cat(decoded))
    fast.restore(pixels)


def test_a_batch_stays_whole_if_it_is_small_watched_or_trained(sd: StableDiffusion) -> None:
    c = sd.unet.config
    x, context = torch.randn(10, c.in_channels, 8, 8), torch.randn(10, 77, c.context_dim or 1)
    shapes = seen(sd)
    sd.unet.requires_grad_(True)(x, 500, context)
    with torch.no_grad():
        sd.unet(x[:4], 500, context[:4])
        hook = sd.unet.conv_in.register_forward_hook(lambda *of: None)
        sd.unet(x, 500, context)
        hook.remove()
    sd.unet.requires_grad_(False)
    assert [rows for rows, _ in shapes] == [10, 4, 10]


def test_a_model_of_small_pictures_is_left_together() -> None:
    unet = tiny_sd().unet
    switch = Groups()
    switch.put_on(unet)
    assert len(unet.__dict__["forward"].groups(torch.zeros(64, 4, 8, 8))) == 1
    switch.take_off(unet)
    assert "forward" not in unet.__dict__
