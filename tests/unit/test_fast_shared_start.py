"""The start of a guided UNet call, computed once for both halves of the batch: where, and how near the plain result."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import fast, precision
from minidiff.fast.shared_start import ComputedOnce, SharedStart, start_of
from minidiff.fast.switch import put_on
from minidiff.models.unet import UNet
from minidiff.parity.taps import Probe
from tests.support.tiny import tiny_ddpm, tiny_sd, tiny_xl
from tests.tolerances import BATCH, assert_close


@pytest.fixture
def unet() -> Iterator[UNet]:
    yield (found := tiny_sd().unet)
    SharedStart().take_off(found)


def sizes(unet: UNet, names: dict[str, nn.Module], *given: Any, **named: Any) -> tuple[dict[str, int], Tensor]:
    """The batch that the kernels of each layer see in one call, without a hook; and the call's result."""
    seen: dict[str, int] = {}

    def watch(name: str, plain: Any) -> Any:
        def forward(*args: Any) -> Any:
            seen[name] = len(args[0])
            return plain(*args)

        return forward

    replaced = {name: m.__dict__["forward"] for name, m in names.items()}
    plain = {name: r.inner for name, r in replaced.items()}
    for name, r in replaced.items():
        r.inner = watch(name, r.inner)
    with torch.no_grad():
        out = unet(*given, **named)
    for name, r in replaced.items():
        r.inner = plain[name]
    return seen, out


def inputs(unet: UNet, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    c = unet.config
    x = torch.randn(batch, c.in_channels, 8, 8)
    return torch.cat([x, x]), torch.tensor(500), torch.randn(2 * batch, 77, c.context_dim or 1)


def test_what_another_thread_watches_is_computed_as_ever(unet: UNet) -> None:
    """Its run with NaN is looked into, or it records: the bits here are those without it."""
    given, held, done = inputs(unet), threading.Event(), threading.Event()
    put_on(SharedStart(), [unet])
    start = dict(zip(("conv_in", "res", "norm", "proj_in", "norm1", "attn1"), start_of(unet), strict=True))
    wanted = sizes(unet, start, *given)[1]
    probe = Probe(lambda stage, value: value)

    def look() -> None:
        with precision.watched({"unet": unet}), probe.watch(unet, {"conv_in": "conv_in", "down.0": "down.0"}):
            held.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(look)
        held.wait()
        try:
            seen, out = sizes(unet, start, *given)
        finally:
            done.set()
        other.result()
    assert seen == dict.fromkeys(start, 1)
    assert torch.equal(out, wanted)
    assert not probe.seen, "nor is this a part of what it records"


@pytest.mark.parametrize("batch", [1, 2])
def test_equal_halves_are_computed_once(unet: UNet, batch: int) -> None:
    given = inputs(unet, batch)
    with torch.no_grad():
        plain = unet(*given)
    layers = put_on(SharedStart(), [unet])
    assert layers == [unet]
    start = dict(zip(("conv_in", "res", "norm", "proj_in", "norm1", "attn1"), start_of(unet), strict=True))
    seen, out = sizes(unet, start, *given)
    assert seen == dict.fromkeys(start, batch)
    assert_close(out, plain, BATCH)
    SharedStart().take_off(unet)
    with torch.no_grad():
        assert torch.equal(unet(*given), plain)


def test_what_differs_is_computed_whole(unet: UNet) -> None:
    x, t, context = inputs(unet)
    put_on(SharedStart(), [unet])
    start = dict(zip(("conv_in", "res", "norm", "proj_in", "norm1", "attn1"), start_of(unet), strict=True))
    other = x.clone()
    other[1, 0, 0, 0] += 1
    cases = {
        "pictures": (sizes(unet, start, other, t, context), 2),
        "timesteps": (sizes(unet, start, x, torch.tensor([500, 501]), context), 2),
        "one picture": (sizes(unet, start, x[:1], t, context[:1]), 1),
        "three": (sizes(unet, start, x[:1].expand(3, -1, -1, -1), t, context[:1].expand(3, -1, -1)), 3),
    }
    for name, ((seen, out), whole) in cases.items():
        halved = {"conv_in"} if name == "timesteps" else set()
        assert seen == {layer: 1 if layer in halved else whole for layer in start}, name
        assert out.isfinite().all()


def test_sdxl_shares_only_the_first_convolution() -> None:
    """Its pooled text enters the first ResBlock."""
    unet = tiny_xl().unet
    c = unet.config
    x, t, context = inputs(unet)
    pooled = torch.randn(2, (c.added_dim or 0) - 6 * (c.added_sinusoid or 0))
    added = (pooled, torch.ones(2, 6))
    with torch.no_grad():
        plain = unet(x, t, context, added)
    put_on(SharedStart(), [unet])
    start = {str(i): m for i, m in enumerate(start_of(unet))}
    seen, out = sizes(unet, start, x, t, context, added)
    assert seen == {name: 1 if name == "0" else 2 for name in start}
    assert_close(out, plain, BATCH)


def test_who_watches_sees_the_whole_batch(unet: UNet) -> None:
    """Recorders and controls that are put on later get the shapes of the plain model."""
    given = inputs(unet)
    put_on(SharedStart(), [unet])
    shapes: list[int] = []
    inside = unet.down[0].res[0].conv1  # type: ignore[union-attr,index]
    handle = inside.register_forward_hook(lambda _, args, out: shapes.append(len(out)))  # type: ignore[union-attr]
    with torch.no_grad():
        unet(*given)
        handle.remove()
        unet(*given)
    assert shapes == [2]


def test_gradients_take_the_plain_way(unet: UNet) -> None:
    x, t, context = inputs(unet)
    put_on(SharedStart(), [unet])
    unet(x.requires_grad_(), t, context).sum().backward()
    assert x.grad is not None
    assert x.grad[0].norm() > 0
    assert x.grad[1].norm() > 0


def test_it_is_on_by_itself() -> None:
    sd = tiny_sd()
    plain = sd.generate("a fox", steps=2, seed=0, output="latent")
    fast.optimize(sd, ("shared_start",))
    assert sd.fast == ("shared_start",)
    assert isinstance(sd.unet.conv_in.__dict__["forward"], ComputedOnce)
    assert_close(sd.generate("a fox", steps=2, seed=0, output="latent"), plain, BATCH)
    fast.restore(sd)
    assert "forward" not in sd.unet.conv_in.__dict__
    assert fast.optimize(tiny_ddpm())["shared_start"] == 0, "no prompt, no guidance"
