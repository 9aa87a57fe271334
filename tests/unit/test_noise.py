"""Noise: image k has the same bits in any batch, and generators are used as diffusers uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.noise import seeds_of, source
from tests.tolerances import assert_close

CPU = torch.device("cpu")
SHAPE = (3, 5, 7)


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(seed: int, draws: int) -> list[Tensor]:
    g = stream(seed)
    return [torch.randn((1, *SHAPE), generator=g) for _ in range(draws)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_image_k_has_its_own_noise_in_any_batch(count: int) -> None:
    """The first draw and every later one: no image feels how many others there are."""
    draw = source(count, 100, None)
    found = [draw((count, *SHAPE), torch.float32, CPU) for _ in range(3)]
    for k in range(count):
        for got, want in zip(found, by_hand(100 + k, 3), strict=True):
            assert_close(got[k : k + 1], want)


def test_a_list_of_seeds_is_taken_as_it_is() -> None:
    seeds = [7, 7, 0, 2**63, -1]
    for given in (seeds, tuple(seeds)):
        got = source(5, given, None)((5, *SHAPE), torch.float32, CPU)
        assert_close(got, torch.cat([by_hand(s, 1)[0] for s in seeds]))
        assert torch.equal(got[0], got[1])
        assert not torch.equal(got[0], got[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_seed_means_the_same_noise_in_every_dtype(dtype: torch.dtype) -> None:
    full, other = source(2, 3, None), source(2, 3, None)
    for _ in range(2):
        want = full((2, *SHAPE), torch.float32, CPU).to(dtype)
        got = other((2, *SHAPE), dtype, CPU)
        assert got.dtype == dtype
        assert_close(got, want)


def test_a_draw_may_have_another_shape() -> None:
    draw = source(2, 0, None)
    g = stream(1)
    first, second = draw((2, 4), torch.float32, CPU), draw((2, 2, 2), torch.float32, CPU)
    assert_close(first[1:], torch.randn((1, 4), generator=g))
    assert_close(second[1:], torch.randn((1, 2, 2), generator=g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_generator_draws_the_whole_batch(dtype: torch.dtype) -> None:
    draw, g = source(3, None, stream(5)), stream(5)
    for _ in range(2):
        want = torch.randn((3, *SHAPE), generator=g, dtype=dtype)
        assert_close(draw((3, *SHAPE), dtype, CPU), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_list_of_generators_draws_image_by_image(dtype: torch.dtype) -> None:
    draw, own = source(3, None, [stream(k) for k in range(3)]), [stream(k) for k in range(3)]
    for _ in range(2):
        want = torch.cat([torch.randn((1, *SHAPE), generator=g, dtype=dtype) for g in own])
        assert_close(draw((3, *SHAPE), dtype, CPU), want)


def test_one_generator_and_a_list_are_two_things() -> None:
    """A batch drawn at once differs from its images drawn one by one, but for the first; diffusers has both."""
    whole = source(2, None, stream(0))((2, *SHAPE), torch.float32, CPU)
    single = source(2, None, [stream(0), stream(1)])((2, *SHAPE), torch.float32, CPU)
    assert not torch.equal(whole, single)


def test_half_precision_generators_differ_from_half_precision_seeds() -> None:
    """Where this fails, torch draws float16 by rounding float32, and the two ways may become one."""
    g = source(1, None, [stream(0)])((1, 1000), torch.float64, CPU)
    s = source(1, 0, None)((1, 1000), torch.float64, CPU)
    assert not torch.equal(g, s)


def test_without_a_seed_torch_decides() -> None:
    torch.manual_seed(1)
    first = source(2, None, None)((2, *SHAPE), torch.float32, CPU)
    again = source(2, None, None)((2, *SHAPE), torch.float32, CPU)
    torch.manual_seed(1)
    seeds = seeds_of(2, None)
    assert seeds[1] == seeds[0] + 1
    assert 0 <= seeds[0] < 2**31
    assert not torch.equal(first, again)
    assert_close(first, source(2, seeds, None)((2, *SHAPE), torch.float32, CPU))


def test_a_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    source(2, 5, None)((2, *SHAPE), torch.float32, CPU)
    source(2, None, stream(5))((2, *SHAPE), torch.float32, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_whole_numbers_of_every_kind() -> None:
    import numpy as np

    assert seeds_of(2, 5) == seeds_of(2, np.int64(5)) == seeds_of(2, [5, np.uint8(6)]) == [5, 6]  # type: ignore[arg-type]
    assert seeds_of(1, torch.tensor(5)) == [5]  # type: ignore[arg-type]
    assert seeds_of(2, -1) == [-1, 0]
    assert seeds_of(1, 2**64 - 1) == [2**64 - 1]
    for s in (-(2**63), 2**64 - 1):
        source(1, s, None)((1, 2), torch.float32, CPU)  # torch takes the ends of the range, too


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (1.5, "seed=1.5 is no whole number"),
        ("7", "seed='7' is no whole number"),
        ("12", "is no whole number"),
        ([1, 2.0], "is no whole number"),
        ([1, None], "is no whole number"),
        ({1, 2}, "is no whole number"),
        ([1], "1 seeds for 2 images"),
        ([1, 2, 3], "3 seeds for 2 images"),
        ([], "0 seeds for 2 images"),
        (2**64, "does not fit into 64 bits"),
        (2**64 - 1, f"seed={2**64} does not fit"),
        ([0, -(2**63) - 1], "does not fit into 64 bits"),
    ],
)
def test_seeds_that_are_none(seed: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source(2, seed, None)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("seed", "generator", "words"),
    [
        (1, stream(0), "both given"),
        ([1, 2], [stream(0), stream(1)], "both given"),
        (None, [stream(0)], "1 generators for 2 images"),
        (None, [], "0 generators for 2 images"),
        (None, 5, "is no torch.Generator"),
        (None, [stream(0), 5], "is no torch.Generator"),
        (None, "seed", "is no torch.Generator"),
    ],
)
def test_generators_that_do_not_fit(seed: Any, generator: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        source(2, seed, generator)
