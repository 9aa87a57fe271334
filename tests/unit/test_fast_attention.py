"""The attention kernels of `minidiff/fast`: equal in result to torch's own, and used where they were chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff import fast
from minidiff.fast import logistic, machine, many_keys, onednn, trial
from minidiff.fast.blockwise import BlockKernel, at_once, in_float32
from minidiff.fast.logistic import LogisticKernel
from minidiff.fast.many_keys import RANGES, ByKeys, ManyKeys
from minidiff.models.attention import Attention, Kernel, attention
from tests.support.tiny import tiny_sd
from tests.tolerances import BATCH, BLOCKS, LOGISTIC, LOGISTIC_EXACT, NARROW_SCORES, NO_FARTHER, assert_close


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
@torch.no_grad()
def test_layers_at_full_width(
    dim: int, count: int, tokens: int, context: tuple[int, int] | None, dtype: torch.dtype
) -> None:
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
    for kernel in (BlockKernel(128), in_float32, at_once, LogisticKernel(128)):
        layer.kernel = kernel
        found = layer(x, seen)
        if dtype == torch.float32:  # oneDNN adds up in one go, torch's kernel in tiles
            assert off(found, plain) <= BLOCKS.relative
            assert off(found, exact) <= BLOCKS.relative
        elif isinstance(kernel, LogisticKernel):
            assert off(found, exact) <= LOGISTIC * off(plain, exact)
        elif kernel is not at_once:  # whose scores are narrow
            assert off(found, exact) <= NO_FARTHER * off(plain, exact), "no farther from the truth"


@pytest.mark.parametrize("kind", [BlockKernel, LogisticKernel])
@pytest.mark.parametrize("rows", [1, 3, 100])
@torch.no_grad()
def test_blocks_of_any_size(rows: int, kind: Callable[[int], Kernel]) -> None:
    """Those that do not come out even, too."""
    torch.manual_seed(0)
    kernel = kind(rows)
    for (pictures, length, seen), d in product(((2, 7, 5), (1, 1, 1), (3, 4, 7)), (8, 16, 20)):
        q, k, v = heads(pictures, 3, length, d), heads(pictures, 3, seen, d), heads(pictures, 3, seen, d)
        before = [t.clone() for t in (q, k, v)]
        found = kernel(q, k, v, False)
        assert off(found, attention(q.double(), k.double(), v.double(), False)) <= BLOCKS.relative
        assert found.transpose(1, 2).is_contiguous(), "joined to tokens again without a copy"
        assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@torch.no_grad()
def test_scores_in_float32_lose_nothing() -> None:
    """With values that tell one key from another, the result is as near as the softmax, rounded to 8 bits, allows."""
    torch.manual_seed(0)
    q, k = (3 * heads(1, 2, n, 96).bfloat16() for n in (70, 96))
    one_hot = torch.eye(96, dtype=torch.bfloat16).expand(1, 2, 96, 96)  # the result is the softmax itself
    weights = torch.softmax(q.double() @ k.double().transpose(2, 3) * 96**-0.5, dim=-1)
    found = BlockKernel(32)(q, k, one_hot, False)
    assert off(found, weights) <= NO_FARTHER * off(weights.bfloat16(), weights)


@torch.no_grad()
def test_the_logistic_function_takes_the_place_of_the_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel is not needed for scores as they are usual: the largest of a row between 4 and 60."""
    torch.manual_seed(0)
    monkeypatch.setattr(logistic, "attention", None)
    k, v = heads(1, 4, 300, 40), heads(1, 4, 300, 40)
    for dtype, largest in product(trial.DTYPES, (1, 2, 4)):
        q = (largest * heads(1, 4, 90, 40)).to(dtype)
        found = LogisticKernel(32)(q, k.to(dtype), v.to(dtype), False)
        exact = attention(q.double(), k.to(dtype).double(), v.to(dtype).double(), False)
        assert off(found, exact) <= (BLOCKS.relative if dtype == torch.float32 else LOGISTIC_EXACT[dtype])


@pytest.mark.parametrize("dtype", trial.DTYPES, ids=str)
@torch.no_grad()
def test_a_wrong_guess_is_seen(dtype: torch.dtype) -> None:
    """Keys lie at both ends of an axis. A query along it has scores far above the guess, one across it far below."""
    torch.manual_seed(0)
    k, v = torch.zeros(1, 3, 6, 16), heads(1, 3, 6, 16)
    k[..., :3, 0], k[..., 3:, 0] = 20, -20
    along, across, usual = torch.eye(16)[[0, 1, 2]] * torch.tensor([[100], [100], [1]])
    q = torch.stack([along, across, usual]).repeat(5, 1, 1).transpose(0, 1)[None]  # each a head
    q, k, v = (t.to(dtype) for t in (q, k, v))
    found, plain = LogisticKernel(2)(q, k, v, False), attention(q, k, v, False)
    assert torch.equal(found[:, :2], plain[:, :2])
    prepared = logistic.asked(q[0], k[0], logistic.window(dtype, 6)), logistic.known(k[0]), logistic.carried(v[0])
    out = torch.empty(5, 16, dtype=dtype)
    assert [LogisticKernel(2).head(*(t[h] for t in prepared), out) for h in range(3)] == [False, False, True]
    k[0, 2, 0, 0] = float("nan")
    assert LogisticKernel(2)(q, k, v, False)[0, 2].isnan().all()


@pytest.mark.parametrize("dtype", trial.DTYPES, ids=str)
@torch.no_grad()
def test_the_logistic_function_is_not_used_where_it_is_no_exponential(dtype: torch.dtype) -> None:
    """From scores at the guess to some far above it, where three keys share the attention unequally."""
    torch.manual_seed(0)
    k, v = torch.zeros(1, 1, 6, 16), heads(1, 1, 6, 16)
    k[..., 0] = torch.tensor([20, 19.5, 19, -20, -20, -20])
    k, v = k.to(dtype), v.to(dtype)
    for strength in range(5, 26):
        q = strength * torch.eye(16, dtype=dtype)[None, None, :1]
        exact = attention(q.double(), k.double(), v.double(), False)
        assert off(LogisticKernel(1)(q, k, v, False), exact) <= LOGISTIC_EXACT[dtype], strength


@torch.no_grad()
def test_narrow_scores_move_a_trained_unet_no_farther() -> None:
    """A layer's error doubles; that of the bundled model's UNet does not, over the timesteps of a run."""
    sd = minidiff.bundled(device="cpu")
    context, _ = sd.encode_prompt(["a large red star on a blue background"])
    unet = copy.deepcopy(sd.unet).bfloat16()
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    torch.manual_seed(0)
    kernels: dict[str, Kernel] = {
        "plain": attention,
        "narrow": BlockKernel(64, narrow=True),
        "at once": at_once,
        "logistic": LogisticKernel(64),
    }
    errors = dict.fromkeys(kernels, 0.0)
    for t in (20, 500, 980):
        x = torch.randn(1, *(unet.config.in_channels, 16, 16))
        exact = sd.unet(x, torch.tensor(t), context)
        for name, kernel in kernels.items():
            for layer in layers:
                layer.kernel = kernel
            errors[name] += off(unet(x.bfloat16(), torch.tensor(t), context.bfloat16()), exact) ** 2
    for name in ("narrow", "at once", "logistic"):
        assert 0 < errors[name] ** 0.5 <= NARROW_SCORES * errors["plain"] ** 0.5


def test_what_they_are_not_for() -> None:
    """Later positions hidden, or gradients wanted: torch's own."""
    for kernel in (BlockKernel(2), at_once, LogisticKernel(2)):
        q, k, v = (heads(1, 2, 4, 8).requires_grad_() for _ in range(3))
        assert torch.equal(kernel(q, k, v, False), attention(q, k, v, False))
        kernel(q, k, v, False).sum().backward()
        assert q.grad is not None
        with torch.no_grad():
            assert torch.equal(kernel(q, k, v, True), attention(q, k, v, True))


# --- which is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", trial.DTYPES, ids=str)
def test_candidates_fit_the_cache(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: True)
    for size in (2**19, 2**21):
        monkeypatch.setattr(machine, "private_cache", lambda size=size: size)
        found = many_keys.kernels(4096, dtype)
        assert next(iter(found)) == many_keys.PLAIN
        assert found[many_keys.PLAIN] is attention
        rows = size // (4096 * 4)
        assert found[f"blocks of {rows}"] == BlockKernel(rows)
        assert found[f"blocks of {4 * rows}"] == BlockKernel(4 * rows)
        assert (found.get(f"narrow blocks of {2 * rows}") == BlockKernel(2 * rows, True)) == (dtype == torch.bfloat16)
        assert ("float32" in found) == (dtype == torch.bfloat16)
        most = 4 * rows * (2 if dtype == torch.bfloat16 else 1)
        assert found[f"logistic blocks of {most}"] == LogisticKernel(most)
    monkeypatch.setattr(onednn, "pays", lambda *_: False)
    assert list(many_keys.kernels(4096, dtype)) == [many_keys.PLAIN]


@torch.no_grad()
def test_each_number_of_keys_has_its_kernel() -> None:
    """By their number alone, so that the same picture has the same bits on another day."""
    kernel = ByKeys(((6, BlockKernel(3)), (4, in_float32)))
    q = heads(1, 2, 5, 8).bfloat16()
    for keys, other in ((7, BlockKernel(3)), (6, BlockKernel(3)), (5, in_float32), (4, in_float32), (3, attention)):
        k, v = heads(1, 2, keys, 8).bfloat16(), heads(1, 2, keys, 8).bfloat16()
        assert torch.equal(kernel(q, k, v, False), other(q, k, v, False))


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let every range of keys have the kernel called ``way`` by the cache of this machine."""
    found = {name: trial.Result(way, {way: 1.0}) for name in RANGES}
    monkeypatch.setattr(trial, "results", lambda dtype, measure=False: found)


@pytest.mark.parametrize("dtype", trial.DTYPES, ids=str)
def test_on_where_it_was_chosen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: True)
    monkeypatch.setattr(machine, "private_cache", lambda: 2**21)
    sd = tiny_sd()
    sd.to(dtype=dtype)
    layers = [
        m for name in fast.PLACES if name in sd.parts for m in sd.parts[name].modules() if isinstance(m, Attention)
    ]
    assert fast.optimize(sd)["many_keys"] == 0, "untried, torch's own stays"
    assert sd.kernels == {}
    fast.restore(sd)
    choose(monkeypatch, "blocks of 1024")  # a name that the first range does not have
    assert fast.optimize(sd)["many_keys"] == len(layers)
    want = ByKeys(((2048, attention), (256, BlockKernel(1024)), (64, BlockKernel(1024))))
    assert {m.kernel for m in layers} == {want}
    assert sd.kernels == dict.fromkeys(RANGES, "blocks of 1024")
    assert sd.generate("a fox", steps=1, seed=0)[0].info["minidiff"].count("blocks of 1024") == 3, "the recipe has it"
    fast.restore(sd)
    assert sd.kernels == {}
    assert {m.kernel for m in layers} == {attention}


def test_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder keeps its kernel, and what has another one already is left alone."""
    monkeypatch.setattr(onednn, "pays", lambda *_: True)
    choose(monkeypatch, "blocks of 1024")
    sd = tiny_sd()
    plain = sd.generate("a horse", steps=1, seed=0, output="latent", progress=False)
    layers = {name: [m for m in part.modules() if isinstance(m, Attention)] for name, part in sd.parts.items()}
    special = layers["unet"][0]
    kept: Kernel = lambda q, k, v, causal: attention(q, k, v, causal)  # noqa: E731
    special.kernel = kept
    assert "attention" not in fast.optimize(sd)
    fast.restore(sd)
    on = fast.optimize(sd, ("attention",))
    assert on["attention"] == len(layers["unet"]) - 1 + len(layers["vae"])
    assert all(isinstance(m.kernel, ByKeys) for m in layers["unet"][1:] + layers["vae"])
    assert all(m.kernel is attention for m in layers["text_encoder"])
    found = sd.generate("a horse", steps=1, seed=0, output="latent", progress=False)
    assert_close(found, plain, BATCH)  # other kernels, as another size of batch picks
    fast.restore(sd)
    assert special.kernel is kept
    assert not ManyKeys().applies(special)
