"""The switches of ``minidiff.fast``: equal results, and the plain model again after ``restore``."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff import fast
from minidiff.adapters import lora
from minidiff.adapters.lora import Adapter, Update
from minidiff.errors import ConfigError
from minidiff.fast import blocks, onednn, winograd
from minidiff.fast.blocks import Blocks
from minidiff.fast.many_keys import ManyKeys
from minidiff.fast.memory import Memory
from minidiff.fast.packed import Packed
from minidiff.fast.switch import put_on
from minidiff.fast.winograd import Winograd
from minidiff.models.attention import FeedForward, TransformerBlock
from minidiff.pipeline import StableDiffusion
from tests.support.tiny import tiny_ddpm, tiny_sd
from tests.tolerances import (
    BLOCKS,
    NO_FARTHER,
    PACKED,
    PACKED_TRUTH,
    PARTWISE,
    WINOGRAD,
    WINOGRAD_ONEDNN,
    WINOGRAD_TRUTH,
    assert_close,
)

SAME_BITS = ("blocks", "inplace", "memory")


@pytest.fixture(autouse=True)
def _pack_even_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.fast.packed.SMALLEST", 1)


@pytest.fixture
def sd() -> Iterator[StableDiffusion]:
    pipe = tiny_sd()
    yield pipe
    fast.restore(pipe)


def weights(pipe: StableDiffusion) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.clone() for n, part in pipe.parts.items() for k, t in part.state_dict().items()}


def drawn(pipe: StableDiffusion, prompt: str = "a horse", output: str = "tensor", steps: int = 3) -> Tensor:
    found: Tensor = pipe.generate(prompt, seed=1, steps=steps, output=output, progress=False)  # type: ignore[arg-type]
    return found


def test_a_switch_is_the_class_of_its_name_in_the_file_of_its_name() -> None:
    assert type(fast.ALL["attention"]) is ManyKeys, "the same, tried at once"
    for name in fast.ALL.keys() - {"attention"}:
        kind = type(fast.ALL[name])
        assert (kind.__module__, kind.__name__) == (f"minidiff.fast.{name}", name.title().replace("_", ""))


# --- equal in result -------------------------------------------------------------------------------------------------


def test_switches_that_keep_every_bit(sd: StableDiffusion) -> None:
    plain = drawn(sd)
    on = fast.optimize(sd, SAME_BITS)
    assert min(on.values()) > 0
    assert torch.equal(drawn(sd), plain)


def test_an_unconditional_model() -> None:
    pipe = tiny_ddpm()
    plain = pipe.generate(steps=3, seed=0, output="tensor", progress=False)
    fast.optimize(pipe, SAME_BITS)
    assert torch.equal(pipe.generate(steps=3, seed=0, output="tensor", progress=False), plain)


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (lambda: nn.Conv2d(1280, 1280, 3, padding=1), 8),
        (lambda: nn.Conv2d(320, 640, 3, stride=2, padding=1), 16),
        (lambda: nn.Conv2d(640, 320, 3), 16),
        (lambda: nn.Conv2d(512, 512, 3, stride=2, bias=False), 17),
    ],
)
@torch.no_grad()
def test_packed_convolutions_at_full_width(layer: Callable[[], nn.Conv2d], side: int) -> None:
    torch.manual_seed(0)
    conv = layer()
    x = torch.randn(2, conv.in_channels, side, side)
    plain, weight = conv(x), conv.weight.detach().clone()
    parts = put_on(Packed(), [conv])
    assert parts == [conv]
    packed = conv(x)
    assert conv.weight.is_mkldnn
    assert_close(packed, plain, PACKED)
    exact = nn.functional.conv2d(
        x.double(), weight.double(), None if conv.bias is None else conv.bias.double(), conv.stride, conv.padding
    )
    assert (packed - exact).norm() <= PACKED_TRUTH.relative * exact.norm()
    near_plain = (packed - plain).norm() <= BLOCKS.relative * exact.norm()
    assert near_plain or (packed - exact).norm() <= NO_FARTHER * (plain - exact).norm()
    # Another size than the one that it was packed for
    other = torch.randn(1, conv.in_channels, side + 4, side + 2)
    assert_close(conv(other), nn.functional.conv2d(other, weight, conv.bias, conv.stride, conv.padding), PACKED)
    Packed().take_off(conv)
    assert torch.equal(conv.weight, weight)
    assert torch.equal(conv(x), plain)


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="oneDNN has no bfloat16 on this processor")
@torch.no_grad()
def test_packed_convolutions_in_bfloat16() -> None:
    """No farther from the truth than plain ones; both are a rounding to 8 bits away from it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(320, 640, 3, padding=1).bfloat16()
    x = torch.randn(1, 320, 8, 8).bfloat16()
    exact = copy.deepcopy(conv).double()(x.double())
    plain = (conv(x) - exact).norm()
    assert put_on(Packed(), [conv]) == [conv]
    assert (conv(x) - exact).norm() <= NO_FARTHER * plain
    assert conv.weight.is_mkldnn


AVX2_ONLY = """
import torch
from minidiff import fast
from minidiff.fast import packed
from tests.support.tiny import tiny_sd

packed.SMALLEST = 1
for dtype in (torch.float32, torch.bfloat16):
    sd = tiny_sd()
    sd.to(dtype=dtype)
    on = fast.optimize(sd)
    assert sd.generate("a horse", steps=1, seed=0, output="tensor").isfinite().all()
    print(dtype, on["packed"] > 0)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of processors with AVX2")
def test_a_processor_with_avx2_only() -> None:
    """There oneDNN refuses to pack weights in bfloat16."""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", AVX2_ONLY], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.float32 True", "torch.bfloat16 False"]


@pytest.fixture
def _no_picture_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16 x 16 on at the most, Winograd's method is used."""
    monkeypatch.setattr(winograd, "POSITIONS", 8 * 8)


@pytest.mark.usefixtures("_no_picture_too_small")
@pytest.mark.parametrize("size", [(32, 32), (33, 32), (32, 33), (47, 31), (8, 200), (70, 96)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_winograds_convolutions_at_every_kind_of_size(
    size: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is done in four bands, of which the last is smaller."""
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 256, 3, padding=1, bias=bias)
    x = torch.randn(2, 128, *size)
    plain = conv(x)
    assert put_on(Winograd(), [conv]) == [conv]
    assert_close(conv(x), plain, WINOGRAD)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv(x.contiguous(memory_format=torch.channels_last)), conv(x)), "whatever the layout of x"
    assert torch.equal(conv(x[1:]), conv(x)[1:]), "a picture's bits do not depend on the batch it is in"
    Winograd().take_off(conv)
    assert torch.equal(conv(x), plain)


@pytest.mark.usefixtures("_no_picture_too_small")
@pytest.mark.parametrize(("width", "out"), [(320, 320), (1280, 640)])
@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_winograds_convolutions_are_near_the_truth(
    width: int, out: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With oneDNN's products, and with torch's, where a build has no oneDNN."""
    torch.manual_seed(0)
    if not packs:
        monkeypatch.setattr(onednn, "available", lambda *_: False)
    conv = nn.Conv2d(width, out, 3, padding=1)
    x = torch.randn(1, width, 32, 32)
    exact = copy.deepcopy(conv).double()(x.double())
    put_on(Winograd(), [conv])
    assert {matrix.is_mkldnn for matrix in winograd.filters(conv.weight)} == {packs and onednn.available()}
    bound = WINOGRAD_ONEDNN if packs else WINOGRAD_TRUTH
    assert (conv(x) - exact).norm() <= bound.relative * exact.norm()


@pytest.mark.parametrize(("width", "choice", "on"), [(640, "off", 0), (256, "on", 1), (64, "on", 0)])
def test_where_winograds_convolutions_pay(width: int, choice: str, on: int) -> None:
    conv = nn.Conv2d(width, 640, 3, padding=1)
    switch = Winograd().fit({"winograd": choice})
    assert ([] if switch is None else put_on(switch, [conv])) == [conv] * on


@pytest.mark.parametrize(("pays", "side"), [(False, 32), (True, 64)])
@torch.no_grad()
def test_small_pictures_go_to_the_packed_convolution(pays: bool, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    conv = nn.Conv2d(256, 256, 3, padding=1)
    small, large = torch.randn(1, 256, side, side - 1), torch.randn(1, 256, side, side)
    switches = Packed(), Winograd()
    put_on(switches[0], [conv])
    packed = conv(small)
    calls: list[Tensor] = []
    band = winograd.band
    monkeypatch.setattr(winograd, "band", lambda u, b, x, *args: (calls.append(x), band(u, b, x, *args)))
    put_on(switches[1], [conv])
    assert torch.equal(conv(small), packed)
    assert not calls
    assert conv(large).shape == (1, 256, side, side)
    assert calls
    for switch in reversed(switches):
        switch.take_off(conv)
    assert "forward" not in conv.__dict__


@torch.no_grad()
def test_feed_forwards_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", 7)
    torch.manual_seed(0)
    layer = FeedForward(32)
    x = torch.randn(2, 11, 32)
    kept, plain = x.clone(), layer(x)
    put_on(Blocks(), [layer])
    assert_close(layer(x), plain, PACKED)
    assert torch.equal(x, kept)
    lying = x.transpose(0, 1).contiguous().transpose(0, 1)  # the same tokens, in another order in memory
    assert_close(layer(lying), plain, PACKED)


def test_switches_stand_in_their_order(sd: StableDiffusion) -> None:
    """Put on one by one, last first, they end as if they had been put on together."""
    together = list(fast.optimize(sd))
    fast.restore(sd)
    for name in reversed(together):
        fast.optimize(sd, (name,))
    assert list(fast.optimize(sd, ())) == together == list(fast.SWITCHES)


def test_the_recipe_says_what_was_on(sd: StableDiffusion) -> None:
    def recipe() -> dict[str, object]:
        return sd.steps("a horse", seed=1, steps=1).recipes[0]

    assert "fast" not in recipe()
    on = fast.optimize(sd)
    assert recipe()["fast"] == [name for name, layers in on.items() if layers]
    fast.restore(sd)
    assert "fast" not in recipe()


def test_all_switches_together(sd: StableDiffusion) -> None:
    plain = drawn(sd, output="latent", steps=1)
    fast.optimize(sd)
    assert_close(drawn(sd, output="latent", steps=1), plain, PACKED)


def test_nothing_that_is_given_is_written_over(sd: StableDiffusion) -> None:
    fast.optimize(sd)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    kept = x.clone(), context.clone()
    with torch.no_grad():
        sd.unet(x, 1, context)
        sd.vae.decode(x)
    assert torch.equal(x, kept[0])
    assert torch.equal(context, kept[1])


# --- back again ------------------------------------------------------------------------------------------------------


def test_twice_is_harmless_and_restore_gives_the_plain_model_back(sd: StableDiffusion, tmp_path: Path) -> None:
    before, plain = weights(sd), drawn(sd)
    first = fast.optimize(sd)
    drawn(sd)
    assert fast.optimize(sd) == first
    drawn(sd)
    assert any(p.is_mkldnn for p in sd.unet.parameters())
    during = weights(sd)
    sd.save(tmp_path / "fast.safetensors")
    fast.restore(sd)
    fast.restore(sd)
    for found in (during, weights(sd)):
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
    layers = [m for part in sd.parts.values() for m in part.modules()]
    assert not any("forward" in m.__dict__ or m._state_dict_hooks for m in layers)
    assert torch.equal(drawn(sd), plain)
    loaded = minidiff.load(tmp_path / "fast.safetensors")
    assert isinstance(loaded, StableDiffusion)
    assert torch.equal(drawn(loaded), plain)


def test_a_restored_model_learns_again(sd: StableDiffusion) -> None:
    sd.unet.requires_grad_(True)
    fast.optimize(sd)
    drawn(sd)
    fast.restore(sd)
    sd.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 16)).sum().backward()
    assert all(p.grad is not None for p in sd.unet.parameters())


def test_a_name_that_is_no_switch(sd: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match=r"'turbo' is not a switch of fast\.optimize; those are packed, winograd"):
        fast.optimize(sd, ("turbo",))


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_keys_and_values_are_computed_once_a_prompt(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    plain = nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(self)
        return plain(self, x)

    fast.optimize(sd, ("memory",))
    monkeypatch.setattr(nn.Linear, "forward", counting)
    drawn(sd, steps=4)
    keys = [b.attn2.k for b in sd.unet.modules() if isinstance(b, TransformerBlock)]
    assert [calls.count(k) for k in keys] == [1] * len(keys)
    drawn(sd, "another horse", steps=4)
    assert [calls.count(k) for k in keys] == [2] * len(keys)


@torch.no_grad()
def test_what_has_changed_is_computed_anew() -> None:
    block = TransformerBlock(16, 2, 16)
    put_on(Memory(), [block])
    k, context = block.attn2.k, torch.randn(1, 5, 16)

    def fresh() -> Tensor:
        return nn.functional.linear(context, k.weight)

    assert torch.equal(k(context), fresh())
    context.mul_(2)
    assert torch.equal(k(context), fresh())
    k.weight.add_(1)
    assert torch.equal(k(context), fresh())
    k.weight = nn.Parameter(torch.randn(16, 16))
    assert torch.equal(k(context), fresh())
    with torch.enable_grad():
        assert k(context).requires_grad


def test_live_adapters_stay_on(sd: StableDiffusion) -> None:
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    name = "unet.down.0.attn.0.blocks.0.attn2.k"
    without = drawn(sd)
    applied = lora.apply(sd.parts, [(Adapter("a", {name: Update(down, up)}), 1.0)], live=True)
    plain = drawn(sd)
    assert not torch.equal(plain, without)
    fast.optimize(sd, SAME_BITS)
    assert torch.equal(drawn(sd), plain)
    applied.remove()
    assert torch.equal(drawn(sd), without)


def test_feed_forwards_in_blocks_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the plain layer; parts of one tensor that are written one by one would have none."""
    monkeypatch.setattr(blocks, "ROWS", 7)
    torch.manual_seed(0)
    layer, x = FeedForward(16), torch.randn(2, 11, 16, requires_grad=True)
    layer(x).square().sum().backward()
    plain, own = x.grad, layer.gate.weight.grad
    x.grad = layer.gate.weight.grad = None
    put_on(Blocks(), [layer])
    layer(x).square().sum().backward()
    assert plain is not None
    assert own is not None
    assert x.grad is not None
    assert layer.gate.weight.grad is not None
    assert_close(x.grad, plain, PARTWISE)
    assert_close(layer.gate.weight.grad, own, PARTWISE)
