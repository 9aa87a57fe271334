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
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline.dialects import DIALECTS
from minidiff.pipeline.dialects.a1111 import A1111
from minidiff.pipeline.dialects.compel_grammar import clauses
from minidiff.pipeline.dialects.dialect import Part
from minidiff.pipeline.dialects.emphasis import fragments
from minidiff.pipeline.dialects.schedule import schedule
from minidiff.pipeline.guidance import compose
from tests.support.dialects import CALLS, PAIRS, TEXTS, kept, models, packed, pairs, print_of, spoken
from tests.tolerances import DIALECT, assert_close

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TOLD: dict[str, Any] = json.loads((FIXTURES / "dialects.json").read_text(encoding="utf-8"))
TENSORS = load_file(FIXTURES / "dialects.safetensors")
TOKENIZERS = {"sd1": Tokenizer(), "sd2": Tokenizer(TokenizerConfig(pad=0))}


def cases(name: str) -> Any:
    """Every text of a program for both kinds of padding."""
    found = [(kind, fact) for kind in TOKENIZERS for fact in TOLD[name][kind]]
    return pytest.mark.parametrize(("kind", "fact"), found, ids=[f"{kind} {fact['text'][:40]}" for kind, fact in found])


def folded(chunks: Any) -> list[Any]:
    return [[packed(chunk.ids), packed([round(w, 6) for w in chunk.weights])] for chunk in chunks]


def rounded(chunks: Any) -> list[Any]:
    """Recorded chunks with weights of six places: compel keeps them in float32."""
    return [
        [ids, [[round(w[0], 6), w[1]] if isinstance(w, list) else round(w, 6) for w in weights]]
        for ids, weights in chunks
    ]


@cases("a1111")
def test_a1111_reads_texts_as_the_web_ui_does(kind: str, fact: dict[str, Any]) -> None:
    text, dialect = fact["text"], A1111()
    assert [list(one) for one in fragments(text)] == fact["fragments"]
    found = dialect.conditionals(text, negative=False)
    assert len(found) == len(fact["conditionals"])
    for (one, weight), (theirs, ways, read, chunks) in zip(found, fact["conditionals"], strict=True):
        assert weight == theirs
        assert [list(way) for way in schedule(one, CALLS)] == ways
        part: Any = Part(weight, tuple((end, i) for i, (end, _) in enumerate(ways)))  # type: ignore[arg-type]
        assert [part.at(call) for call in range(CALLS)] == read
        assert [folded(dialect.chunks(way, TOKENIZERS[kind])) for _, way in ways] == [rounded(c) for c in chunks]


@cases("comfyui")
def test_comfyui_reads_texts_as_the_program_does(kind: str, fact: dict[str, Any]) -> None:
    assert folded(DIALECTS["comfyui"].chunks(fact["text"], TOKENIZERS[kind])) == rounded(fact["chunks"])


@cases("sd_embed")
def test_sd_embed_reads_texts_as_the_package_does(kind: str, fact: dict[str, Any]) -> None:
    assert folded(DIALECTS["sd_embed"].chunks(fact["text"], TOKENIZERS[kind])) == rounded(fact["chunks"])


@cases("compel")
def test_compel_reads_texts_as_the_package_does(kind: str, fact: dict[str, Any]) -> None:
    found = clauses(fact["text"])
    readings = iter(DIALECTS["compel"].readings(fact["text"], TOKENIZERS[kind], CALLS))
    assert len(found) == len(fact["clauses"])
    for clause, (prompts, shares, normalize, blended, weight, chunks) in zip(found, fact["clauses"], strict=True):
        assert [[list(one) for one in own] for own in clause.prompts] == prompts
        assert (list(clause.shares), clause.normalize, clause.blended) == (shares, normalize, blended)
        assert clause.weight == weight
        for own in chunks:
            assert folded(next(readings).chunks) == rounded(own)


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
