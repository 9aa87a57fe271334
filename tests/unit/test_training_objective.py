"""The training objective, its random numbers, the learning rate and the average, against their closed forms."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from minidiff.config import Prediction, ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.schedule import NoiseSchedule
from minidiff.training.curves import rate_at
from minidiff.training.draws import Draws
from minidiff.training.ema import EMA
from minidiff.training.objective import (
    draw_noise,
    draw_timesteps,
    drop_prompts,
    min_snr_weights,
    snr,
    target,
    weighted_mse,
)
from minidiff.training.settings import TrainConfig
from tests.tolerances import assert_close

T = torch.tensor([0, 500, 999])
SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
TERMINAL = NoiseSchedule.from_config(ScheduleConfig(zero_snr=True, prediction="v_prediction"))


def test_targets() -> None:
    x0, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    signal, sigma = SCHEDULE.rates(T, x0)
    wanted = {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - sigma * x0}
    for prediction, answer in wanted.items():
        assert_close(target(replace(SCHEDULE, prediction=prediction), x0, noise, T), answer)  # type: ignore[arg-type]


def test_signal_to_noise_ratio() -> None:
    schedule = NoiseSchedule.from_config(ScheduleConfig(steps=4, betas=(0.25, 0.5, 0.5, 1.0)))
    assert schedule.alphas_cumprod.tolist() == [0.75, 0.375, 0.1875, 0]
    assert_close(snr(schedule, torch.tensor([3, 0, 1])), torch.tensor([0.0, 3.0, 0.6]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction: Prediction) -> None:
    """Ratios whose quotients are exact, the cap on both sides, and both ends."""
    ratio = torch.tensor([0.0, 0.25, 1.0, 4.0, 7.0, 15.0, math.inf])
    wanted = {
        "epsilon": [1, 1, 1, 1, 4 / 7, 4 / 15, 0],
        "v_prediction": [0, 0.25 / 1.25, 0.5, 4 / 5, 4 / 8, 4 / 16, 0],
        "sample": [0, 0.25, 1, 4, 4, 4, 4],
    }
    assert_close(min_snr_weights(prediction, ratio, 4.0), torch.tensor(wanted[prediction]))


def test_min_snr_is_one_weight_of_x0_told_three_ways() -> None:
    """The weighted error of the same wrong answer is the same, whatever the question was."""
    x0, noise, wrong = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64).unbind()
    ratio = snr(SCHEDULE, T).double()
    signal, sigma = (ratio / (1 + ratio)).sqrt()[:, None, None, None], (1 / (1 + ratio)).sqrt()[:, None, None, None]
    x = signal * x0 + sigma * noise
    epsilon = (x - signal * wrong) / sigma
    outs = {"sample": (wrong, x0), "epsilon": (epsilon, noise)}
    outs["v_prediction"] = (signal * epsilon - sigma * wrong, signal * noise - sigma * x0)
    losses = [
        (min_snr_weights(name, ratio, 5.0) * (out - answer).square().flatten(1).mean(1)).sum()  # type: ignore[arg-type]
        for name, (out, answer) in outs.items()
    ]
    assert max(losses) - min(losses) < 1e-9 * max(losses)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_where_nothing_is_left_of_the_picture(prediction: Prediction) -> None:
    ratio = snr(TERMINAL, torch.tensor([999]))
    assert ratio.item() == 0
    assert min_snr_weights(prediction, ratio, 5.0).isfinite().all()


def test_loss() -> None:
    out, wanted = torch.randn(2, 3, 4, 8, 8).unbind()
    each = (out - wanted).square().mean(dim=(1, 2, 3))
    weights = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(weighted_mse(out, wanted), each.mean())
    torch.testing.assert_close(weighted_mse(out, wanted, weights), (each[1] + 2 * each[2]) / 3)
    assert weighted_mse(out.bfloat16(), wanted).dtype == torch.float32


def test_prompts_are_dropped_by_their_coins() -> None:
    ids, empty = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[9, 9]])
    dropped = drop_prompts(ids, empty, torch.tensor([0.05, 0.1, 0.5]), 0.1)
    assert dropped.tolist() == [[9, 9], [3, 4], [5, 6]]
    assert drop_prompts(ids, empty, torch.zeros(3), 0.0).equal(ids)


def test_draws_belong_to_the_example_not_to_the_batch() -> None:
    def draw(first: int, count: int) -> tuple[Any, ...]:
        draws = Draws(7, first, count)
        return draws.integers(1000), draws.normal((4, 8, 8)), draws.uniform()

    for whole, left, right in zip(draw(100, 5), draw(100, 2), draw(102, 3), strict=True):
        assert whole.equal(torch.cat([left, right]))
    assert not draw(100, 1)[1].equal(draw(101, 1)[1])
    assert not Draws(8, 100, 1).normal((4, 8, 8)).equal(draw(100, 1)[1])


def test_draws_have_their_distributions() -> None:
    """4,000 examples: each bound is more than five standard errors wide, and a seed is fixed."""
    draws = Draws(0, 0, 4000)
    t, noise, coins = draws.integers(1000), draws.normal((1, 4, 4)), draws.uniform()
    assert t.min() < 5
    assert t.max() > 994
    assert abs(t.float().mean() - 499.5) < 24
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((coins < 0.1).float().mean() - 0.1) < 0.025


def test_offset_noise() -> None:
    """The mean of a channel: variance 1/64 of plain noise, and the offset's square on top; one constant a channel."""
    plain, shifted = (draw_noise(Draws(0, 0, 2000), (2, 8, 8), offset) for offset in (0.0, 0.5))
    gap = shifted - plain
    assert gap.std(dim=(2, 3)).max() < 1e-6
    assert abs(gap[:, :, 0, 0].std() - 0.5) < 0.04
    assert abs(plain.mean(dim=(2, 3)).std() - 1 / 8) < 0.01


def test_curves() -> None:
    config = TrainConfig(steps=110, warmup=10, rate=2.0)
    for curve, middle in (("constant", 2.0), ("linear", 1.0), ("cosine", 1.0)):
        run = replace(config, curve=curve)  # type: ignore[arg-type]
        assert [rate_at(run, n) for n in (0, 5, 10)] == [0.0, 1.0, 2.0]
        assert rate_at(run, 60) == pytest.approx(middle, rel=1e-12)
        assert rate_at(run, 110) == (2.0 if curve == "constant" else 0.0)
    assert rate_at(replace(config, curve="cosine"), 35) == pytest.approx(1 + math.cos(math.pi / 4))
    assert rate_at(TrainConfig(rate=3.0, warmup=0), 0) == 3.0


def test_ema_is_the_weighted_sum() -> None:
    weights = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(())}
    ema = EMA(weights, 0.5)
    wanted = 0.0
    for n in range(1, 30):
        weights["a"].fill_(n)
        decay = 0.0 if n == 1 else min(n / (n + 9), 0.5)
        wanted = decay * wanted + (1 - decay) * n
        ema.update(weights, n)
    assert ema.average["a"].dtype == torch.float32
    torch.testing.assert_close(ema.average["a"], torch.full((3,), wanted))


def test_ema_is_lent_and_given_back() -> None:
    weights = {"a": torch.ones(3)}
    ema = EMA(weights, 0.9)
    ema.average["a"].fill_(5)
    with suppress(RuntimeError), ema.applied(weights):
        assert weights["a"].tolist() == [5, 5, 5]
        raise RuntimeError("whatever happens inside")
    assert weights["a"].tolist() == [1, 1, 1]


def test_settings_that_have_no_option_or_another_default_there() -> None:
    c = TrainConfig()
    assert (c.betas, c.eps, c.warmup) == ((0.9, 0.999), 1e-8, 0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps=0"),
        ("batch", 0, "batch=0"),
        ("accumulate", 3, "does not divide"),
        ("rate", 0.0, "rate=0.0 must be above 0"),
        ("rate", math.nan, "rate=nan"),
        ("clip", -1.0, "clip=-1.0"),
        ("curve", "step", "constant, cosine, linear"),
        ("precision", "int8", "bfloat16"),
        ("ema", 1.0, "ema=1.0"),
        ("betas", (0.9, 1.0), "betas=1.0"),
        ("drop_prompt", 1.5, "drop_prompt=1.5"),
        ("min_snr", 0.0, "min_snr=0.0"),
        ("warmup", 2000, "longer than the whole run"),
        ("parts", ("clip",), "unet\\+text_encoder, vae"),
        ("seed", -1, "seed=-1"),
        ("save_every", 0, "save_every=0"),
    ],
)
def test_settings_are_checked_when_made(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**{field: value})


def test_timesteps_under_much_noise_are_drawn_more_often() -> None:
    """By density t ** (noisy - 1) the mean is noisy / (noisy + 1) of the way, and 1 changes nothing."""
    assert torch.equal(draw_timesteps(Draws(0, 0, 64), 1000), Draws(0, 0, 64).integers(1000))
    t = draw_timesteps(Draws(0, 0, 4000), 1000, noisy=3.0)
    assert t.dtype == torch.int64
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999
    assert 735 < float(t.double().mean()) < 765
    assert abs(float((t < 500).double().mean()) - 1 / 8) < 0.02
