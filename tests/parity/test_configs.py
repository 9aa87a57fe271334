"""A short run of scripts/parity_configs.py: random configurations, each the same bits as the reference's or refused."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from typing import Any

import pytest
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig

from minidiff.errors import ConfigError
from tests.support.parity import configs
from weights_convert import configs_diffusers

CASES = {"unet": 16, "vae": 12, "text": 16, "tokenizer": 6, "pipeline": 5}


@pytest.mark.parametrize("kind", CASES)
def test_random_configurations(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = {n: configs.try_case(kind, n) for n in range(CASES[kind])}
    assert not {n: end for n, end in ends.items() if end.startswith(configs.FAULTS)}
    assert Counter(ends.values())["equal"] >= CASES[kind] / 4


@pytest.mark.parametrize(
    ("cls", "options", "beside"),
    [
        (UNet2DConditionModel, configs.UNET, {"down_block_types", "up_block_types"}),
        (UNet2DModel, configs.PLAIN, {"down_block_types", "up_block_types"}),
        (AutoencoderKL, configs.VAE, set()),
        (AutoencoderTiny, configs.TINY, set()),
        (CLIPTextConfig, configs.TEXT, set()),
    ],
)
def test_every_argument_of_a_constructor_is_drawn(cls: Any, options: configs.Options, beside: set[str]) -> None:
    arguments = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    shared = set(inspect.signature(CLIPTextConfig.__mro__[1].__init__).parameters) if cls is CLIPTextConfig else set()
    assert arguments - shared == set(options) | beside


def test_a_setting_that_is_passed_over_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a reader that ignores a setting gives another output, and that is a fault."""
    monkeypatch.setitem(configs_diffusers.UNET_ONLY, "center_input_sample", (False, True))
    monkeypatch.setattr(configs, "draw", lambda rng, options, most: {k: v[0] for k, v in options.items()} | CENTRED)
    monkeypatch.setattr(configs, "spoil", lambda rng, file: False)
    assert configs.try_case("unet", 1) == "different"


CENTRED = {"center_input_sample": True}


def test_how_a_case_ends() -> None:
    """The harness itself: refused when it is read or when it is run, in one line; anything else is a fault."""

    def fails(error: Exception) -> Any:
        def run(*_: Any) -> Any:
            raise error

        return run

    refused, broken = ConfigError("step 3 divides by zero; use v-prediction"), RuntimeError("an index is too large")
    assert configs.judge(lambda: [1], lambda: None, lambda _: [1]) == "equal"
    assert configs.judge(lambda: [1], lambda: None, lambda _: [2]) == "different"
    assert configs.judge(lambda: [1], lambda: None, lambda _: []) == "different"
    assert configs.judge(lambda: [1], fails(refused), lambda _: [1]) == "refused"
    assert configs.judge(lambda: [1], lambda: None, fails(refused)) == "refused"
    assert configs.judge(fails(broken), fails(refused), fails(broken)) == "both refuse"
    assert configs.judge(fails(broken), lambda: None, fails(broken)) == "the reference refuses"
    for end in (
        configs.judge(lambda: [1], fails(broken), lambda _: [1]),
        configs.judge(lambda: [1], lambda: None, fails(broken)),
        configs.judge(lambda: [1], lambda: None, fails(ConfigError("two\nlines"))),
    ):
        assert end.startswith("raw error")
