"""Classifier-free guidance and its rescale, against the formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from minidiff.models.unet import UNet
from minidiff.pipeline.guidance import Conditions, guide, predictor, rescale
from tests.tolerances import EXACT, Tolerance, assert_close

ROUNDING = Tolerance(1e-6, 1e-6, "one rounding more or less in float32")


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 6, 5, generator=g), 0.7 + 2 * torch.randn(2, 4, 6, 5, generator=g)


def test_guidance_walks_from_the_unconditional_through_the_conditional() -> None:
    u, c = pair()
    assert_close(guide(u, c, 0.0), u, EXACT)
    assert_close(guide(u, c, 1.0), c, ROUNDING)
    assert_close(guide(u, c, 7.5), u + 7.5 * (c - u), EXACT)  # this order of operations: the reference's
    assert_close(guide(u, c, -1.0), 2 * u - c, ROUNDING)
    assert_close(guide(c, c, 7.5), c, EXACT)
    assert not torch.equal(guide(u, c, 7.5), guide(c, u, 7.5))


def test_guidance_keeps_the_dtype() -> None:
    u, c = (t.half() for t in pair())
    assert guide(u, c, 7.5).dtype == torch.float16


@pytest.mark.parametrize("amount", [0.0, 0.7, 1.0])
def test_rescale_brings_back_the_spread_of_each_picture(amount: float) -> None:
    u, c = pair()
    guided = guide(u, c, 7.5)
    got = rescale(guided, c, amount)
    for k in range(2):  # picture by picture: each has its own spread
        scaled = guided[k] * (c[k].std() / guided[k].std())
        assert_close(got[k], amount * scaled + (1 - amount) * guided[k], ROUNDING)
    if amount == 0:
        assert_close(got, guided, EXACT)
    if amount == 1:
        assert_close(got.std(dim=(1, 2, 3)), c.std(dim=(1, 2, 3)), ROUNDING)


def test_nothing_is_rescaled_unless_asked() -> None:
    """A prediction without any spread, as of an untrained network, stays what it is."""

    class Flat:
        config = SimpleNamespace(guidance_dim=None)

        def __call__(self, x: torch.Tensor, *conditions: object) -> torch.Tensor:
            return torch.zeros_like(x)

    text = Conditions(torch.zeros(1, 2, 3))
    x, t = torch.ones(1, 4, 6, 5), torch.zeros(())
    for weights in (None, [[1.0]]):
        predict = predictor(cast(UNet, Flat()), [text], text, 7.5, weights=weights)
        assert_close(predict(x, t).out, torch.zeros(1, 4, 6, 5), EXACT)
