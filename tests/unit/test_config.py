"""Configs: the round trip through JSON, and the errors for wrong or hostile ones."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from minidiff import config as c
from minidiff.config import from_json, to_json
from minidiff.errors import ConfigError
from minidiff.storage.checkpoint import build
from tests.support import tiny

PRESETS = {
    name: getattr(c, name)
    for name in ("SD15", "SD21", "SDXL", "DDPM_CAT256", "VAE_SD", "VAE_SDXL", "CLIP_L", "OPENCLIP_H", "OPENCLIP_BIGG")
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    preset = PRESETS[name]
    text = to_json(preset)
    assert "\n" not in text
    assert from_json(type(preset), text) == preset
    assert from_json(type(preset), json.loads(text)) == preset
    assert hash(from_json(type(preset), text)) == hash(preset)  # lists became tuples again


@pytest.mark.parametrize(
    "model",
    [
        tiny.SD,
        tiny.DDPM,
        replace(tiny.SD, sampler={"name": "euler", "s_tmax": float("inf"), "nested": [1, {"a": None}]}),
        replace(tiny.DDPM, schedule=c.ScheduleConfig(steps=3, betas=(0.1, 0.2, 1.0), zero_snr=True)),
        c.ModelConfig(
            family='"quotes", 日本語 😀 \ud800\n',
            unet=c.SDXL,
            schedule=c.ScheduleConfig(prediction="v_prediction"),
            vae=c.VAE_SDXL,
            text_encoder=c.CLIP_L,
            tokenizer=c.TokenizerConfig(),
            text_encoder_2=c.OPENCLIP_BIGG,
            tokenizer_2=c.TokenizerConfig(pad=0),
            text_layer="penultimate",
        ),
        replace(tiny.SD, tokenizer=c.TokenizerConfig(pad=0, vocab=("a", "b", "ab"), merges=(("a", "b"),))),
    ],
    ids=["sd", "ddpm", "sampler", "betas", "sdxl", "vocab"],
)
def test_every_model_config_survives_json(model: c.ModelConfig) -> None:
    assert from_json(c.ModelConfig, to_json(model)) == model


def test_fields_left_out_have_their_defaults() -> None:
    found = from_json(c.UNetConfig, {"levels": [{"channels": 32}], "mid": {"channels": 32}})
    assert found == c.UNetConfig(levels=(c.Level(channels=32),), mid=c.Level(channels=32))


def sd(path: str, value: Any) -> dict[str, Any]:
    """The tiny model's JSON with the field at ``path`` ("unet.levels.0.heads") set to ``value``."""
    data: Any = json.loads(to_json(tiny.SD))
    *way, last = path.split(".")
    place = data
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    return data  # type: ignore[no-any-return]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        # unknown, mistyped
        ("colour", "red", "unknown field 'colour'"),
        ("unet.colour", "red", "ModelConfig.unet: unknown field 'colour'"),
        ("unet", None, "ModelConfig.unet: expected an object, got None"),
        ("unet", [], "expected an object"),
        ("unet.levels", 5, "ModelConfig.unet.levels: expected a list, got 5"),
        ("unet.levels", {"0": {}}, "expected a list"),
        ("unet.levels.0", 5, "ModelConfig.unet.levels[0]: expected an object"),
        ("unet.levels.0.channels", "16", "expected int, got '16'"),
        ("unet.levels.0.channels", 16.0, "expected int, got 16.0"),
        ("unet.levels.0.channels", True, "expected int, got True"),
        ("unet.levels.0.attention", "cross", "'cross' is none of none, text, self"),
        ("unet.levels.0.attention", [], "is none of"),
        ("unet.levels.0.attention", {}, "is none of"),
        ("unet.linear_proj", 1, "expected bool, got 1"),
        ("unet.eps", "1e-5", "expected float, got '1e-5'"),
        ("unet.eps", True, "expected float, got True"),
        ("unet.context_dim", "16", "expected int"),
        ("family", 7, "expected str, got 7"),
        ("sampler", "pndm", "expected dict, got 'pndm'"),
        ("sampler", None, "expected dict"),
        ("vae.channels", [8, "8"], "ModelConfig.vae.channels[1]: expected int"),
        ("tokenizer.merges", [["a"]], "expected 2 entries, got 1"),
        ("tokenizer.merges", ["ab"], "expected a list, got 'ab'"),
        ("text_encoder.activation", "relu", "'relu' is none of quick_gelu, gelu"),
        ("text_layer", "first", "'first' is none of last, penultimate"),
        # NaN, infinite, huge, negative
        ("unet.eps", NAN, "eps=nan"),
        ("unet.eps", INF, "eps=inf"),
        ("unet.eps", -1e-5, "eps=-1e-05"),
        ("unet.eps", 10**400, "out of range"),
        ("vae.scaling_factor", NAN, "scaling_factor=nan"),
        ("vae.scaling_factor", INF, "scaling_factor=inf"),
        ("vae.scaling_factor", 0, "scaling_factor=0.0"),
        ("vae.scaling_factor", -0.18, "scaling_factor=-0.18"),
        ("text_encoder.eps", NAN, "eps=nan"),
        ("schedule.beta_start", NAN, "beta_start=nan"),
        ("schedule.beta_start", -0.1, "beta_start=-0.1"),
        ("schedule.beta_end", INF, "beta_end=inf"),
        ("schedule.beta_end", 1.5, "beta_end=1.5"),
        ("schedule.betas", [0.1, NAN], "betas=nan"),
        ("schedule.betas", [0.1, 0.2], "steps=1000 but 2 betas"),
        ("schedule.steps", 0, "steps=0"),
        ("schedule.steps", 10**12, "steps=1000000000000"),
        ("unet.levels.0.channels", -16, "channels=-16"),
        ("unet.levels.0.channels", 0, "channels=0"),
        ("unet.levels.0.channels", 10**9, "channels=1000000000"),
        ("unet.levels.0.channels", 10**400, "channels=10**60 or more"),
        ("unet.levels.0.heads", 0, "heads=0"),
        ("unet.levels.0.heads", -2, "heads=-2"),
        ("unet.levels.0.heads", 3, "heads=3 does not divide channels=16"),
        ("unet.levels.0.depth", 0, "depth=0"),
        ("unet.levels.0.depth", 10**9, "depth=1000000000"),
        ("unet.levels", [], "0 levels"),
        ("unet.levels", [{"channels": 16}] * 17, "17 entries; 16 is the most"),
        ("unet.layers", 0, "layers=0"),
        ("unet.layers", 10**9, "layers=1000000000"),
        ("unet.layers", 1000, "layers=1000"),
        ("unet.groups", 0, "groups=0"),
        ("unet.groups", -8, "groups=-8"),
        ("unet.groups", 5, "groups=5 does not divide channels=16"),
        ("unet.in_channels", 0, "in_channels=0"),
        ("unet.out_channels", 10**9, "out_channels=1000000000"),
        ("unet.context_dim", None, "needs context_dim"),
        ("unet.context_dim", 10**9, "context_dim=1000000000"),
        ("unet.context_dim", 24, "context_dim=24 of the UNet differs from the text encoder's width=16"),
        ("unet.added_dim", 0, "added_dim=0"),
        ("unet.added_dim", 1280, "no room for five sinusoids of 256"),
        ("unet.guidance_dim", -1, "guidance_dim=-1"),
        ("unet.freq_shift", 8, "freq_shift=8"),
        ("unet.freq_shift", -1, "freq_shift=-1"),
        ("unet.sample_size", 0, "sample_size=0"),
        ("unet.mid.channels", 48, "mid.channels=48 differs from the last level's 24"),
        ("vae.channels", [], "0 levels"),
        ("vae.channels", [8] * 17, "17 levels"),
        ("vae.channels", [8] * 10**5, "100000 levels"),
        ("vae.channels", [10**9], "channels=1000000000"),
        ("vae.channels", [12], "groups=8 does not divide channels=12"),
        ("vae.groups", 0, "groups=0"),
        ("vae.layers", 10**9, "layers=1000000000"),
        ("vae.layers", 0, "layers=0"),
        ("vae.latent_channels", 0, "latent_channels=0"),
        ("vae.image_channels", -3, "image_channels=-3"),
        ("text_encoder.width", 10**9, "width=1000000000"),
        ("text_encoder.width", 0, "width=0"),
        ("text_encoder.layers", 10**9, "layers=1000000000"),
        ("text_encoder.layers", 0, "layers=0"),
        ("text_encoder.layers", 513, "layers=513 must lie in 1..512"),
        ("text_encoder.heads", 0, "heads=0"),
        ("text_encoder.heads", 5, "heads=5 does not divide width=16"),
        ("text_encoder.mlp", 0, "mlp=0"),
        ("text_encoder.vocab", 10**12, "vocab=1000000000000"),
        ("text_encoder.vocab", 1000, "tokenizer has 49408 tokens, the text encoder vocab=1000"),
        ("text_encoder.positions", 10, "length=77 exceeds the encoder's positions=10"),
        ("text_encoder.positions", 10**9, "positions=1000000000"),
        ("text_encoder.projection", 0, "projection=0"),
        ("tokenizer.length", 1, "length=1"),
        ("tokenizer.length", 10**9, "length=1000000000"),
        ("tokenizer.pad", -1, "pad=-1"),
        ("tokenizer.vocab", ["a"], "vocab and merges must be given together"),
        # parts that need each other
        ("tokenizer", None, "tokenizer must be given together"),
        ("text_encoder", None, "tokenizer must be given together"),
        ("tokenizer_2", {}, "tokenizer must be given together"),
        ("vae", None, "needs a VAE"),
    ],
)
def test_bad_values_are_quoted_in_a_config_error(path: str, value: Any, words: str) -> None:
    data = sd(path, value)
    with pytest.raises(ConfigError) as caught:
        from_json(c.ModelConfig, data)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 250


def test_fields_that_are_missing_are_named() -> None:
    data = sd("family", "x")
    del data["unet"], data["family"]
    with pytest.raises(ConfigError, match="ModelConfig: field family, unet is missing"):
        from_json(c.ModelConfig, data)
    with pytest.raises(ConfigError, match=r"ModelConfig.unet.levels\[0\]: field channels is missing"):
        from_json(c.ModelConfig, sd("unet.levels.0", {}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "5",
        '"SD15"',
        "NaN",
        "{}",
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"unet":' * 100_000,
        '{"family":"x","schedule":{},"unet":' + "[" * 900 + "]" * 900 + "}",
        '{"family":' + "[" * 500 + "]" * 500 + "}",
        '{"family":"x","unet":' + "9" * 5000 + "}",
        '{"' + "x" * 100_000 + '":1}',
        '{"family":"' + "x" * 100_000 + '"}',
    ],
    ids=lambda text: text[:20],
)
def test_hostile_json_is_one_short_config_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(c.ModelConfig, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_keys_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match="unknown field"):
        from_json(c.Level, {1: 2, "x": 3, None: 4})  # type: ignore[dict-item]


def test_a_list_of_levels_may_be_as_long_as_a_network() -> None:
    assert len(c.read_value(tuple[c.Level, ...], [{"channels": 16}] * c.MOST_LEVELS, "levels")) == c.MOST_LEVELS


def test_a_long_list_of_levels_is_refused_before_it_is_read() -> None:
    data = sd("unet.levels", [{"channels": 32}] * 10**6)
    start = time.process_time()
    with pytest.raises(ConfigError, match="1000000 entries"):
        from_json(c.ModelConfig, data)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "model",
    [
        replace(
            tiny.DDPM,
            unet=c.UNetConfig(
                levels=(c.Level(channels=c.WIDEST),) * 3,
                mid=c.Level(channels=c.WIDEST),
                in_channels=c.WIDEST,
                out_channels=c.WIDEST,
            ),
        ),
        replace(
            tiny.DDPM,
            unet=c.UNetConfig(
                levels=(c.text(32, 4, depth=c.MOST_BLOCKS // 3 - 4),), mid=c.text(32, 4), context_dim=16, layers=1
            ),
        ),
        replace(
            tiny.DDPM,
            vae=c.VAEConfig(channels=(c.WIDEST,) * c.MOST_LEVELS, layers=c.MOST_BLOCKS // (2 * c.MOST_LEVELS)),
        ),
    ],
    ids=["wide", "deep", "vae"],
)
def test_the_largest_config_that_is_let_through_builds_in_seconds(model: c.ModelConfig) -> None:
    start = time.process_time()
    build(model)
    assert time.process_time() - start < 30


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("blocks", [], "0 levels"),
        ("blocks", [1] * 17, "17 levels"),
        ("blocks", [16, 17], "blocks=17"),
        ("blocks", [0, -1], "blocks=-1"),
        ("width", 0, "width=0"),
        ("image_channels", 10**9, "image_channels=1000000000"),
        ("latent_channels", 0, "latent_channels=0"),
        ("scaling_factor", 0, "scaling_factor=0.0"),
    ],
)
def test_a_tiny_autoencoder_has_bounds_too(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_json(c.TAESDConfig, {field: value})


def test_plain_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="heads=7 does not divide channels=320"):
        c.text(320, 7)
    with pytest.raises(ConfigError, match="differs from the last level's 1280"):
        replace(c.SD15, mid=c.text(640, 8))
    with pytest.raises(ConfigError, match="must be even"):
        c.UNetConfig(levels=(c.Level(channels=3),), mid=c.Level(channels=3), groups=1)
    c.Level(channels=320, heads=7)  # without attention nobody asks
