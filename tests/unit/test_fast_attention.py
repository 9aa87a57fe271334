"""The attention kernel in blocks: equal in result to torch's own, and taken only where it is faster."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from minidiff import fast
from minidiff.fast import attention as trial
from minidiff.fast import blockwise as blocks
from minidiff.fast import many_keys, onednn
from minidiff.models.attention import Attention, Kernel, attention
from tests.support.tiny import tiny_sd
from tests.tolerances import BATCH, BLOCKS, NO_FARTHER, assert_close


@pytest.fixture(autouse=True)
def _nothing_chosen_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "chosen", {})


def answering(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[float]:
    """Every trial ends with ``gain``; the list has one entry for each."""
    asked: list[float] = []

    def speedup(plain: object, other: object) -> float:
        asked.append(gain)
        return gain

    monkeypatch.setattr(trial, "speedup", speedup)
    return asked


def heads(pictures: int, count: int, length: int, d: int) -> Tensor:
    """(B, heads, length, d) in memory as a model has it: the heads side by side."""
    return torch.randn(pictures, length, count * d).unflatten(2, (count, d)).transpose(1, 2)


def off(found: Tensor, truth: Tensor) -> float:
    """The distance of the two in parts of the truth's norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


# --- equal in result -------------------------------------------------------------------------------------------------

WIDTHS = [  # dim, heads, tokens of the picture, (tokens, width) of the context
    (320, 8, 300, None),
    (640, 8, 144, None),
    (1280, 8, 64, None),
    (1280, 20, 49, None),
    (320, 8, 225, (77, 768)),
    (1280, 8, 16, (77, 768)),
    (512, 1, 196, None),
]


@pytest.mark.parametrize(("dim", "count", "tokens", "context"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pays", [True, False], ids=["onednn", "bmm"])
@torch.no_grad()
def test_layers_at_full_width(
    dim: int,
    count: int,
    tokens: int,
    context: tuple[int, int] | None,
    pays: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    torch.manual_seed(0)
    if dtype == torch.bfloat16:  # some processors take a second for each step of it
        tokens = min(tokens, 64)
    layer = Attention(dim, count, None if context is None else context[1])
    layer.q.weight.mul_(4)  # or all scores would be about 0, and every mean the same
    x = torch.randn(2, tokens, dim)
    seen = None if context is None else torch.randn(2, *context)
    exact = layer.double()(x.double(), None if seen is None else seen.double())
    layer, x, seen = layer.to(dtype), x.to(dtype), None if seen is None else seen.to(dtype)
    plain = layer(x, seen)
    layer.kernel = blocks.blockwise
    found = layer(x, seen)
    if dtype == torch.float32:
        assert off(found, plain) <= BLOCKS.relative
    if dtype == torch.float32 and pays:  # oneDNN adds up in one go, torch's kernel in tiles
        assert off(found, exact) <= BLOCKS.relative
    else:
        assert off(found, exact) <= NO_FARTHER * off(plain, exact), "no farther from the truth"


@pytest.mark.parametrize(("rows", "scores"), list(product((1, 3, 100), (1, 20, 10_000))))
@torch.no_grad()
def test_blocks_of_any_size(rows: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do not come out even, too; one head at a time, some, and all."""
    monkeypatch.setattr(blocks, "ROWS", rows)
    monkeypatch.setattr(blocks, "SCORES", scores)
    torch.manual_seed(0)
    for pictures, length, seen in ((2, 7, 5), (1, 1, 1), (3, 4, 7)):
        q, k, v = heads(pictures, 3, length, 8), heads(pictures, 3, seen, 8), heads(pictures, 3, seen, 8)
        before = [t.clone() for t in (q, k, v)]
        found = blocks.blockwise(q, k, v, False)
        assert off(found, attention(q.double(), k.double(), v.double(), False)) <= BLOCKS.relative
        assert found.transpose(1, 2).is_contiguous(), "joined to tokens again without a copy"
        assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


# --- which is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "kernel"), [(1.1, blocks.blockwise), (1.09, attention)])
@torch.no_grad()
def test_the_faster_one_is_taken(gain: float, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, gain)
    q, k, v = (heads(2, 2, 6, 8) for _ in range(3))
    for _ in range(3):
        assert torch.equal(trial.fastest(q, k, v, False), kernel(q, k, v, False))
    assert len(asked) == 1, "tried once"
    others = [(q[:1], k[:1], v[:1]), (q, k[:, :, :5], v[:, :, :5]), (q.double(), k.double(), v.double())]
    for n, given in enumerate(others):
        trial.fastest(*given, False)
        assert len(asked) == 2 + n, "every shape and dtype for itself"


@torch.no_grad()
def test_a_trial_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(blocks, "ROWS", 3)
    monkeypatch.setattr(blocks, "SCORES", 2 * 3 * 6)
    whole = blocks.blockwise

    def seen(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        shapes.append((*q.shape, k.shape[2]))
        return whole(q, k, v, causal)

    monkeypatch.setattr(trial, "blockwise", seen)
    assert trial.choose(*(heads(2, 4, 6, 8) for _ in range(3))) in (seen, attention)
    assert set(shapes) == {(1, 2, 3, 8, 6)}


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later positions hidden, or gradients wanted: torch's own, and no trial."""
    asked = answering(monkeypatch, 9.0)
    q, k, v = (heads(1, 2, 4, 8).requires_grad_() for _ in range(3))
    assert torch.equal(trial.fastest(q, k, v, False), attention(q, k, v, False))
    with torch.no_grad():
        assert torch.equal(trial.fastest(q, k, v, True), attention(q, k, v, True))
    assert asked == []


# --- bfloat16, by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False], ids=["few products", "many"])
@pytest.mark.parametrize("pays", [True, False], ids=["onednn", "bmm"])
@torch.no_grad()
def test_scores_of_bfloat16_lose_nothing(small: bool, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With values that tell one key from another, the result is as near as the softmax, rounded to 8 bits, allows."""
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    monkeypatch.setattr(blocks, "SMALL", 2**60 if small else 0)
    torch.manual_seed(0)
    q, k = (3 * heads(1, 2, n, 96).bfloat16() for n in (70, 96))
    one_hot = torch.eye(96, dtype=torch.bfloat16).expand(1, 2, 96, 96)  # the result is the softmax itself
    weights = torch.softmax(q.double() @ k.double().transpose(2, 3) * 96**-0.5, dim=-1)
    found = blocks.blockwise(q, k, one_hot, False)
    assert off(found, weights) <= NO_FARTHER * off(weights.bfloat16(), weights)


@pytest.mark.parametrize(
    ("amx", "dtype", "on"), [(False, torch.bfloat16, True), (True, torch.bfloat16, False), (True, torch.float32, True)]
)
def test_tiles_of_bfloat16_are_left_to_torch(
    amx: bool, dtype: torch.dtype, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor with AMX multiplies bfloat16 faster than float32, which torch's kernel makes use of."""
    monkeypatch.setattr(onednn, "pays", lambda *_: True)
    monkeypatch.setattr(onednn, "has_amx", lambda: amx)
    assert many_keys.ManyKeys().applies(Attention(16, 2).to(dtype)) == on


@pytest.mark.parametrize(("keys", "kernel"), [(64, blocks.blockwise), (63, attention)])
@torch.no_grad()
def test_many_keys_go_in_blocks(keys: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number alone: the same picture has the same bits on another day."""
    asked = answering(monkeypatch, 0.1)
    q, k, v = (heads(2, 2, n, 8).bfloat16() for n in (5, keys, keys))
    assert torch.equal(many_keys.by_keys(q, k, v, False), kernel(q, k, v, False))
    assert torch.equal(
        many_keys.by_keys(q, k[:, :, :5], v[:, :, :5], True), attention(q, k[:, :, :5], v[:, :, :5], True)
    )
    assert asked == []


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_on_by_itself(able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor gains by it in that dtype."""
    monkeypatch.setattr(onednn, "pays", lambda asked=torch.float32: able and asked == dtype)
    monkeypatch.setattr(onednn, "has_amx", lambda: False)
    sd = tiny_sd()
    sd.to(dtype=dtype)
    layers = [m for name in fast.PLACES for m in sd.parts[name].modules() if isinstance(m, Attention)]
    assert fast.optimize(sd)["many_keys"] == len(layers) * able
    assert {m.kernel for m in layers} == {many_keys.by_keys if able else attention}
    fast.restore(sd)
    assert {m.kernel for m in layers} == {attention}


def test_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name only; the text encoder keeps its kernel, and what has another one already is left alone."""
    asked = answering(monkeypatch, 9.0)
    sd = tiny_sd()
    plain = sd.generate("a horse", steps=1, seed=0, output="latent", progress=False)
    layers = {name: [m for m in part.modules() if isinstance(m, Attention)] for name, part in sd.parts.items()}
    special = layers["unet"][0]
    special.kernel = lambda q, k, v, causal: attention(q, k, v, causal)
    assert "attention" not in fast.optimize(sd)
    fast.restore(sd)
    on = fast.optimize(sd, ("attention",))
    assert on["attention"] == len(layers["unet"]) - 1 + len(layers["vae"])
    assert [m.kernel for m in layers["unet"][1:] + layers["vae"]] == [trial.fastest] * on["attention"]
    assert all(m.kernel is attention for m in layers["text_encoder"])
    found = sd.generate("a horse", steps=1, seed=0, output="latent", progress=False)
    assert len(asked) > 0
    assert_close(found, plain, BATCH)  # other kernels, as another size of batch picks
    kept = special.kernel
    fast.restore(sd)
    assert special.kernel is kept
    special.kernel = attention
    assert all(m.kernel is attention for part in layers.values() for m in part)
    assert torch.equal(sd.generate("a horse", steps=1, seed=0, output="latent", progress=False), plain)
