"""CUDA's random numbers on the CPU: Philox against published values, their layout against values from real GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minidiff.philox import Card, CudaStream, philox4x32

PRINTED = 6e-5  # torch prints four decimals: half a unit, and the card's own error of log and sine

A100, H100 = Card(108, 2048), Card(132, 2048)
RTX_A4000, RTX_2070_SUPER = Card(48, 1536), Card(40, 1024)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123 1.14, tests/kat_vectors, "philox4x32 10": all zeros, all ones, the digits of pi
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    words = [int(word, 16) for word in counter.split()]
    first, second = (int(word, 16) for word in key.split())
    found = philox4x32(np.array(words, dtype=np.uint32)[:, None], (first, second))
    assert [f"{word:08x}" for word in found[:, 0]] == answer.split()


@pytest.mark.parametrize(
    ("seed", "printed"),
    [  # documentation of several projects that print torch.randn(..., device="cuda") after manual_seed
        (0, "-0.9247 -0.4253 -2.6438 0.1452 -0.1209 -0.5797 -0.6229 -0.3284 -1.0745 -0.3631 -1.6711 2.2655 0.3117"),
        (42, "0.1940 2.1614 -0.1721 0.8491 -1.9244 0.6530 -0.6494 -0.8175 0.5280 -1.2753"),
        (10, "-0.1029 1.6810 -0.2708"),  # pytorch issue 79496
    ],
    ids=["seed 0", "seed 42", "seed 10"],
)
def test_small_draws_of_real_cards(seed: int, printed: str) -> None:
    values = [float(number) for number in printed.split()]
    found = CudaStream(seed).randn((len(values),))
    assert found.dtype == torch.float32
    assert (found - torch.tensor(values)).abs().max() < PRINTED


def test_a_second_draw_goes_on() -> None:
    """pytorch's own tests print several small draws in a row after manual_seed(42): the counter grows by one a draw."""
    stream = CudaStream(42)
    draws = [stream.randn((4,)) for _ in range(6)]
    printed = [  # pytorch, a report on torch._foreach_sub; the two lists are the draws in turn
        (0.1940, 2.1614, -0.1721, 0.8491),
        (0.1391, -0.1082, -0.7174, 0.7566),
        (-0.5187, 1.2268, 0.6255, -0.9117),
        (-0.6974, -1.8688, -0.8832, -1.6627),
        (-1.2682, -0.0383, -0.1029, 1.4400),
        (1.4640, -0.3238, 0.7740, 1.5892),
    ]
    for draw, values in zip(draws, printed, strict=True):
        assert (draw - torch.tensor(values)).abs().max() < PRINTED


@pytest.mark.parametrize(
    ("card", "last"),
    [(H100, (-0.6970, -0.7780, 0.3267)), (A100, (0.1549, -0.6797, -0.1656))],
    ids=["H100", "A100"],
)
def test_above_the_limit_the_card_counts(card: Card, last: tuple[float, ...]) -> None:
    """pytorch issue 143086: the ends of one long draw of seed 1 on two cards."""
    count = 49 * 12 * 112 * 144
    stream = CudaStream(1, card)
    ends = stream.normals(count, np.array([0, 1, 2, count - 3, count - 2, count - 1]))
    assert np.abs(ends - np.array([-0.2963, 2.6764, -0.1408, *last])).max() < PRINTED


@pytest.mark.parametrize("card", [RTX_A4000, RTX_2070_SUPER])
def test_cards_of_fewer_threads(card: Card) -> None:
    """pytorch issue 97097: normal_(5, sqrt 5) of 1000 x 100 with seed 14, the corners that both cards agree on."""
    which = np.array([0, 1, 2, 97, 98, 99, 100, 101, 102, 197, 198, 199])
    found = 5 + 5**0.5 * CudaStream(14, card).normals(100_000, which)
    printed = [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319, 3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698]
    assert np.abs(found - np.array(printed)).max() < 5**0.5 * PRINTED


def test_below_the_limit_no_card_counts() -> None:
    """One 512 x 512 picture's latents are 64 blocks: from 11 multiprocessors of 1536 threads on, or 8 of 2048."""
    shape = (1, 4, 64, 64)
    draws = [CudaStream(7, card).randn(shape) for card in (A100, H100, RTX_A4000, Card(11, 1536), Card(8, 2048))]
    assert all(torch.equal(draws[0], draw) for draw in draws)
    assert not torch.equal(draws[0], CudaStream(7, Card(10, 1536)).randn(shape))


def test_three_pictures_in_one_draw_depend_on_an_rtx_3060() -> None:
    shape = (3, 4, 64, 64)
    wide, narrow = CudaStream(7, A100).randn(shape), CudaStream(7, Card(28, 1536)).randn(shape)
    assert torch.equal(wide[:2], narrow[:2])
    assert not torch.equal(wide[2], narrow[2])


def test_every_entry_of_a_long_draw_is_filled_once() -> None:
    """A card of one block: 256 threads, four numbers a call, so that 3000 numbers take three calls."""
    stream = CudaStream(3, Card(1, 256))
    draw = stream.randn((3000,))
    assert stream.offset == 12
    assert len(draw.unique()) == 3000
    assert abs(draw.mean().item()) < 0.06
    assert abs(draw.std().item() - 1) < 0.04
    assert not np.isin(stream.randn((256,)).numpy(), draw.numpy()).any()
