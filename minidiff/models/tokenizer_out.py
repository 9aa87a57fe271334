"""Export of a tokenizer's folder for transformers: the two files that every version reads, and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minidiff.config import TokenizerConfig
from minidiff.models.tokenizer import END, START, Tokenizer, clip_table


def tokenizer_files(config: TokenizerConfig) -> Iterator[tuple[str, Any]]:
    """Return (name, content) of each file; content that is not a text is to be written as JSON."""
    tokenizer = Tokenizer(config)
    merges = clip_table()[1] if config.merges is None else config.merges
    special = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": tokenizer.vocab[tokenizer.pad],
        "unk_token": END,
    }
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": config.length,
        "tokenizer_class": "CLIPTokenizer",
    }
    yield "vocab.json", tokenizer.ids
    yield "merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""])
    yield "special_tokens_map.json", special
    yield "tokenizer_config.json", settings | special
