"""Dialects against what the programs themselves make of the same texts: tests/fixtures/dialects.json and .safetensors.

``scripts/record_dialects.py`` writes both, from compel's package and from copies of the other programs' sources; none
of them is needed here. What they do not show, errors and what belongs to minidiff, stands in test_dialects_beside.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minidiff.config import TokenizerConfig
from minidiff.errors import ConfigError
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline.dialects import DIALECTS
from minidiff.pipeline.dialects.schedule import schedule
from minidiff.pipeline.guidance import compose
from tests.support.dialects import PAIRS, TEXTS, facts, kept, models, pairs, print_of, spoken
from tests.support.tiny import tiny_sd
from tests.tolerances import DIALECT, assert_close

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TOLD: dict[str, Any] = json.loads((FIXTURES / "dialects.json").read_text(encoding="utf-8"))
TENSORS = load_file(FIXTURES / "dialects.safetensors")
TOKENIZERS = {"sd1": Tokenizer(), "sd2": Tokenizer(TokenizerConfig(pad=0))}


CASES = [(name, kind, fact) for name in DIALECTS for kind in TOKENIZERS for fact in TOLD[name][kind]]


@pytest.mark.parametrize(("name", "kind", "fact"), CASES, ids=[f"{n} {k} {f['text'][:40]}" for n, k, f in CASES])
def test_texts_become_the_chunks_of_the_program(name: str, kind: str, fact: dict[str, Any]) -> None:
    assert {"text": fact["text"], **facts(name, fact["text"], TOKENIZERS[kind])} == fact


@pytest.mark.parametrize("name", DIALECTS)
def test_encodings_are_those_of_the_program(name: str) -> None:
    compared = 0
    for kind, sd in models().items():
        for n, (prompt, negative) in enumerate(pairs(name)):
            stem = f"{name}.{kind}.{n}."
            theirs = {k.removeprefix(stem): v for k, v in TENSORS.items() if k.startswith(stem)}
            if "error" in theirs:  # compel has none for SDXL's weighted .and
                continue
            ours = spoken(sd, name, prompt, negative)
            assert {k for k in ours if kept(k, n, len(TEXTS[name]))} == theirs.keys()
            for k, recorded in theirs.items():
                assert_close(print_of(ours[k]), recorded, DIALECT)
                compared += 1
    assert compared > 3 * len(TEXTS[name])


def test_sd_embed_encodes_for_the_refiner_as_the_package_does() -> None:
    for n, (prompt, negative) in enumerate(PAIRS):
        ours = spoken(models()["sdxl"], "sd_embed", prompt, negative, refiner=True)
        for k, z in ours.items():
            assert_close(print_of(z), TENSORS[f"sd_embed.refiner.{n}.{k}"], DIALECT)


def test_conditionals_are_put_together_as_the_web_ui_does() -> None:
    told = TOLD["composed"]
    x = torch.tensor(told["x"]).reshape(6, 1, 2, 3)
    # two pictures: the first has three conditionals, the second one
    layers = [x[[0, 3]], x[[1, 3]], x[[2, 3]]]
    weights = [[1.0, 1.5], [0.6, 0.0], [-0.5, 0.0]]
    predict = compose(lambda _, t: [x[4:], *layers], weights, told["scale"], guided=True)
    assert_close(predict(x[4:], x).out.flatten(), torch.tensor(told["out"]), DIALECT)


@pytest.mark.parametrize("steps", [10_001, 10**11])
def test_a_prompt_is_not_read_at_more_steps_than_any_plan_has(steps: int) -> None:
    """Before the plan refuses so many: a text for each would fill the memory."""
    with pytest.raises(ConfigError, match=rf"at each of {steps} steps; 10000 are the most"):
        schedule("[a|b]", steps)
    with pytest.raises(ConfigError, match=r"steps; 10000 are the most"):
        tiny_sd().generate("[a|b]", steps=steps, prompt_style="a1111")
    assert schedule("[a:b:3]", steps) == [(3, "a"), (steps, "b")]
