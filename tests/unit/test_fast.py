"""Speed from outside: the same results, and the plain model whenever it is asked back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff import fast, lora
from minidiff.errors import ConfigError
from minidiff.fast.packed import PackedConvolutions
from minidiff.fast.remember import PromptMemory
from minidiff.fast.switch import put_on
from minidiff.lora import Adapter, Update
from minidiff.models.attention import TransformerBlock
from minidiff.pipeline import StableDiffusion
from tests.tolerances import PACKED, assert_close
from tests.unit.tiny import tiny_ddpm, tiny_sd

SAME_BITS = ("inplace", "memory")


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
    parts = put_on(PackedConvolutions(), [conv])
    assert parts == [conv]
    packed = conv(x)
    assert conv.weight.is_mkldnn
    assert_close(packed, plain, PACKED)
    exact = nn.functional.conv2d(
        x.double(), weight.double(), None if conv.bias is None else conv.bias.double(), conv.stride, conv.padding
    )
    assert (packed - exact).norm() <= 1.05 * (plain - exact).norm(), "no farther from the truth"
    # Another size than the one that it was packed for
    other = torch.randn(1, conv.in_channels, side + 4, side + 2)
    assert_close(conv(other), nn.functional.conv2d(other, weight, conv.bias, conv.stride, conv.padding), PACKED)
    PackedConvolutions().take_off(conv)
    assert torch.equal(conv.weight, weight)
    assert torch.equal(conv(x), plain)


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
    fast.optimize(sd)
    drawn(sd)
    fast.restore(sd)
    sd.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 16)).sum().backward()
    assert all(p.grad is not None for p in sd.unet.parameters())


def test_a_name_that_is_no_switch(sd: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match=r"'turbo' is no switch of fast\.optimize; there are packed, "):
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
    put_on(PromptMemory(), [block])
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
