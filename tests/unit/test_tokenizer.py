"""The tokenizer without its reference: recorded ids, truncation and padding, files of other programs, damaged files."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import pickle
import random
import subprocess
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.config import TokenizerConfig
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.models.tokenizer import END, START, Tokenizer, clip_table
from minidiff.models.tokenizer_files import read_tokenizer_json, read_vocab_and_merges, tokenizer_config
from minidiff.models.unicode_tables import normalize, words

# What transformers 5.23 gives, without the two ends.
RECORDED = {
    "a photo of an astronaut riding a horse on mars": [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496],
    "": [],
    "  \t\n ": [],
    "It's 2024, they'RE here: WE'LL see!!": [
        585,
        568,
        273,
        271,
        273,
        275,
        267,
        889,
        982,
        763,
        281,
        649,
        1342,
        862,
        748,
    ],
    "na\xefve caf\xe9 \u2014 \xc5ngstr\xf6m": [1097, 35689, 563, 15304, 2005, 23176, 10352, 807, 7255, 332],
    "cafe\u0301": [15304],  # composed first
    "\u0130stanbul \u039f\u0394\u039f\u03a3": [328, 16384, 11231, 138, 123, 138, 112, 138, 123, 139, 481],
    "\u1112\u1161\u11ab\uae00": [15197, 250, 32495, 478],  # jamo
    "\U0001f469\u200d\U0001f680\U0001f1eb\U0001f1f7\u2764\ufe0f": [26304, 22400, 39109, 1752],
    "\0\x1f\x7f": [188, 219, 477],
    "x<|endoftext|>y <|EndOfText|>!": [343, 49407, 344, 27, 347, 40786, 4160, 91, 285, 256],
    # New in Unicode 13, 14 and 12: the reference's NFC knows neither of the first two, its lower case the last.
    "\U00011935\U00011930 \u0d3c\u093c \ua7c2": [
        *(172, 239, 97, 113, 172, 239, 97, 364, 15418, 120, 3124, 376, 166, 253, 481),
    ],
    "\ufb01 \xbd \xb2 \u2167 \u0663": [171, 105, 479, 33613, 41175, 158, 227, 371, 149, 352],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TokenizerConfig())


@pytest.mark.parametrize("text", RECORDED, ids=ascii)
def test_recorded_ids(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == RECORDED[text]


def test_the_public_table() -> None:
    vocab, merges = clip_table()
    assert (len(vocab), len(set(vocab)), len(merges)) == (49408, 49408, 48894)
    assert (vocab[0], vocab[256], vocab[512], vocab[49406:]) == ("!", "!</w>", "in", (START, END))
    assert "Copyright (c) 2021 OpenAI" in files("minidiff").joinpath("assets/LICENSE-CLIP").read_text("utf-8")
    assert len(files("minidiff").joinpath("assets/clip_merges.txt.gz").read_bytes()) < 220_000


def test_rows_are_framed_and_padded(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["a horse", ""])
    assert ids.shape == (2, 77)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [49406, 320, 4558] + 74 * [49407]
    assert ids[1].tolist() == [49406] + 76 * [49407]
    assert torch.equal(tokenizer("a horse"), ids[:1])
    assert tokenizer([]).shape == (0, 77)


def test_sd2_pads_with_an_exclamation_mark_and_reads_every_one_as_padding() -> None:
    """A trap: the reference makes the padding token special, so it is taken out of the prompt as well."""
    tokenizer = Tokenizer(TokenizerConfig(pad=0, length=8))
    assert tokenizer("wow! hi!!").tolist() == [[49406, 2781, 0, 1883, 0, 0, 49407, 0]]


def test_a_long_prompt_is_cut_with_one_warning_that_quotes_the_loss(tokenizer: Tokenizer) -> None:
    fits = "cat " * 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer(fits)[0, -1] == 49407
    with pytest.warns(
        UserWarning, match="79 tokens was cut to 75; this part of it was lost: on a blue sofa$"
    ) as caught:
        ids = tokenizer([fits + "on a Blue sofa", "short"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert ids[0].tolist() == [49406] + 75 * [2368] + [49407]


def test_decode_goes_back(tokenizer: Tokenizer) -> None:
    text = "a café in 東京 , 3 0 ° — 👩‍🚀 ! <|endoftext|> end"
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(" ! <|endoftext|> end", " ! <|endoftext|>end")
    assert tokenizer.decode(tokenizer("a horse")[0, :4]) == "<|startoftext|>a horse <|endoftext|>"
    assert tokenizer.decode([tokenizer.ids["ÿ"], 320]) == "\ufffda"  # the byte 0xFF alone
    with pytest.raises(ConfigError, match="id 49408 is beyond the vocabulary of 49408 tokens"):
        tokenizer.decode([320, 49408])


def test_surrogates(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_same_words_under_every_python() -> None:
    """Every code point with marks behind it and alone; recorded, as Python's own tables change with its version."""
    digest = hashlib.sha256()
    for first in (c for plane in (0, 1, 2, 3, 14) for c in range(plane << 16, plane + 1 << 16, 0x400)):
        if not 0xD800 <= first < 0xE000:
            text = " ".join(f"a{chr(c)}\u0334\u0300b {chr(c)}" for c in range(first, first + 0x400))
            digest.update("\n".join(words(normalize(text))).encode())
    assert digest.hexdigest() == "3a0e50fb1f30dd24d80c568a2ddf80001bf2631382536d14f46a2a1e6a5f87a4"


def plain_merge(tokenizer: Tokenizer, word: str) -> list[int]:
    """Byte-pair encoding as the paper tells it: find the best pair, join its leftmost, start again."""
    ids = [tokenizer.ids[c] for c in (*word[:-1], word[-1] + "</w>")]
    while True:
        pairs = [(ids[i], ids[i + 1]) for i in range(len(ids) - 1)]
        ranked = [(tokenizer._ranks[pair], i) for i, pair in enumerate(pairs) if pair in tokenizer._ranks]
        if not ranked:
            return ids
        (_, joined), i = min(ranked)
        ids[i : i + 2] = [joined]


def test_the_heap_joins_what_the_plain_search_joins(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(300):
        word = "".join(draw.choice("aaabcdeeinorst") for _ in range(draw.randint(1, 90)))
        assert tokenizer.encode(word) == plain_merge(tokenizer, word)


def test_a_word_of_100000_letters_is_no_problem(tokenizer: Tokenizer) -> None:
    began = time.process_time()
    assert len(tokenizer.encode("ab" * 50_000)) == 50_000
    assert time.process_time() - began < 5  # 0.2 s here; the plain search would take hours


def test_copies(tokenizer: Tokenizer) -> None:
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert twin.encode("It's a horse") == tokenizer.encode("It's a horse")


def test_import_reads_no_table() -> None:
    code = "from minidiff.models import tokenizer as t, unicode_tables as u; import sys; "
    code += "sys.exit(t.clip_table.cache_info().currsize + u.unicode_tables.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(pad=49408), "pad=49408 is not an id of the vocabulary of 49408 tokens"),
        (TokenizerConfig(pad=0, vocab=("a", START), merges=()), "of 2 tokens has no <|endoftext|>"),
        (TokenizerConfig(pad=0, vocab=("a", "b", START, END), merges=(("a", "b"),)), "need the token 'ab'"),
    ],
)
def test_impossible_tables(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Tokenizer(config)
    assert message in str(caught.value)


def test_only_strings(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="a prompt must be a string, got int"):
        tokenizer(["a", 3])  # type: ignore[list-item]


# Other people's files

TINY = ("a", "b", "a</w>", "b</w>", "ab</w>", "!", START, END)
TINY_MERGES = (("a", "b</w>"),)
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_older(folder: Path, vocab: tuple[str, ...] = TINY, merges: Any = TINY_MERGES, **settings: Any) -> Path:
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def tokenizer_json(vocab: tuple[str, ...] = TINY, merges: Any = TINY_MERGES, split: str = SPLIT) -> dict[str, Any]:
    steps = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]
    cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Removed", "invert": True}
    return {
        "added_tokens": [{"content": t, "id": vocab.index(t)} for t in (START, END)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, {"type": "ByteLevel", "add_prefix_space": False}]},
        "model": {
            "type": "BPE",
            "unk_token": END,
            "end_of_word_suffix": "</w>",
            "vocab": {t: i for i, t in enumerate(vocab)},
            "merges": list(merges),
        },
    }


def test_both_layouts_give_the_same_table(tmp_path: Path) -> None:
    write_older(tmp_path)
    assert read_vocab_and_merges(tmp_path / "vocab.json", tmp_path / "merges.txt") == (TINY, TINY_MERGES)
    for merges in (["a b</w>"], [["a", "b</w>"]]):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tokenizer_json(merges=merges)), "utf-8")
        assert read_tokenizer_json(path) == (TINY, TINY_MERGES)
    assert tokenizer_config(tmp_path) == TokenizerConfig(pad=7, vocab=TINY, merges=TINY_MERGES)
    assert tokenizer_config(tmp_path, pad=5, length=9).pad == 5


def test_the_public_table_is_recognised(tmp_path: Path) -> None:
    assert tokenizer_config(write_older(tmp_path, *clip_table(), model_max_length=77)) == TokenizerConfig()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(*clip_table())), "utf-8")
    assert tokenizer_config(tmp_path, length=5) == TokenizerConfig(length=5)


def test_what_pads_and_how_long(tmp_path: Path) -> None:
    """The older file of special tokens wins, unless the newer one lists its tokens with their ids."""
    write_older(tmp_path, pad_token={"content": END}, model_max_length=16)
    assert (tokenizer_config(tmp_path).pad, tokenizer_config(tmp_path).length) == (7, 16)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert tokenizer_config(tmp_path).pad == 5
    write_older(tmp_path, pad_token=END, model_max_length=int(1e30), added_tokens_decoder={"7": {"content": END}})
    assert (tokenizer_config(tmp_path).pad, tokenizer_config(tmp_path).length) == (7, 77)


def test_a_tiny_table_reads_the_unknown_as_the_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_config(write_older(tmp_path), length=8))
    assert tokenizer("ab ba x").tolist() == [[6, 4, 1, 2, 7, 7, 7, 7]]


DAMAGED = {
    "vocab.json": {
        "Expecting property name": "{",
        "JSON object": "[1]",
        "not valid JSON": "[" * 100_000,
        "each once": '{"a": 0, "b": 0}',
        "are not 0 to": '{"a": "0"}',
        "has no <|endoftext|>": json.dumps({"a": 0, START: 1}),
    },
    "merges.txt": {
        "merge 1 is no pair": "a b</w>\na b c",
        "need the token 'ba</w>'": "b a</w>",
        "must be text in UTF-8": b"\xff",
    },
    "tokenizer_config.json": {"model_max_length=1 is no": '{"model_max_length": 1}', "not valid JSON": "nope"},
    "special_tokens_map.json": {
        "'<pad>' is not in the vocabulary": '{"pad_token": "<pad>"}',
        "no name of a token": '{"pad_token": 3}',
        "not a list of tokens": '{"additional_special_tokens": 3}',
    },
    "tokenizer.json": {
        "no byte-pair model": "{}",
        "added_tokens is not a list": json.dumps(tokenizer_json() | {"added_tokens": [3]}),
        "no list of merges": json.dumps(tokenizer_json() | {"model": tokenizer_json()["model"] | {"merges": None}}),
        "merge 0 is no pair": json.dumps(tokenizer_json(merges=[["a", 3]])),
    },
}


@pytest.mark.parametrize(("name", "message"), [(name, m) for name, cases in DAMAGED.items() for m in cases])
def test_damaged_files_are_named(tmp_path: Path, name: str, message: str) -> None:
    content = DAMAGED[name][message]
    write_older(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        tokenizer_config(tmp_path)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert (name if name != "special_tokens_map.json" else str(tmp_path)) in text


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor vocab.json"):
        tokenizer_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"vocab.json: no such file"):
        read_vocab_and_merges(tmp_path / "vocab.json", tmp_path / "merges.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": None}, "normalizer is not CLIP's"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is not CLIP's"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer is not CLIP's"),
        ({"pre_tokenizer": tokenizer_json(split=r"\w+")["pre_tokenizer"]}, "pre_tokenizer is not CLIP's"),
        ({"model": tokenizer_json()["model"] | {"end_of_word_suffix": None}}, "byte-pair encoding"),
        ({"model": tokenizer_json()["model"] | {"type": "WordPiece"}}, "byte-pair encoding"),
        ({"added_tokens": [{"content": "<cat-toy>", "id": 9}]}, "added token '<cat-toy>', and its id is 9, not 8"),
        ({"added_tokens": [{"content": "<a>", "id": 8, "special": True}]}, "'<a>', and it is matched by other rules"),
        (
            {"added_tokens": [{"content": "<a>", "id": 8, "normalized": False}]},
            "'<a>', and it is matched by other rules",
        ),
        (
            {"added_tokens": [{"content": "<a>", "id": 8, "single_word": True}]},
            "'<a>', and it is matched by other rules",
        ),
        ({"added_tokens": [{"content": "two words", "id": 8}]}, "'two words' must be one word"),
        ({"padding": {"direction": "Left"}}, "padding_side='left' is not supported"),
        ({"truncation": {"direction": "Left"}}, "truncation_side='left' is not supported"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json() | change), "utf-8")
    with pytest.raises(UnsupportedError) as caught:
        tokenizer_config(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class='T5Tokenizer' is not CLIP's"),
        ({"bos_token": "<s>"}, "bos_token='<s>'"),
        ({"added_tokens_decoder": {"9": {"content": "<cat-toy>"}}}, "added token '<cat-toy>', and its id is 9, not 8"),
        ({"additional_special_tokens": ["<a>"]}, "added tokens, such as '<a>'"),
        ({"extra_special_tokens": {"image_token": "<a>"}}, "added tokens, such as '<a>'"),
        ({"mask_token": "a"}, "added tokens, such as 'a'"),
        ({"padding_side": "left"}, "padding_side='left' is not supported"),
        ({"truncation_side": "left"}, "truncation_side='left' is not supported"),
        ({"split_special_tokens": True}, "split_special_tokens=True is not supported"),
        ({"init_inputs": [{"a": 0}]}, "init_inputs=[{'a': 0}] is not supported"),
        ({"tokenizer_truncation": {"a": 0}}, "tokenizer_truncation={'a': 0} is not supported"),
    ],
)
def test_settings_of_other_tokenizers_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        tokenizer_config(write_older(tmp_path, **settings))
    assert message in str(caught.value)


def test_tokens_behind_the_table_are_learned_words(tmp_path: Path) -> None:
    """In each place where versions of transformers keep them; further vectors of a word have a number."""
    names = ["<a>", "<a>_1", "<a>_2", "<B>"]
    for place in ("listed", "older"):
        (tmp_path / place).mkdir()
    decoder = {str(8 + i): {"content": name} for i, name in enumerate(names)}
    config = tokenizer_config(write_older(tmp_path / "listed", added_tokens_decoder=decoder))
    assert config.added == (("<a>", 3), ("<B>", 1))
    older = write_older(tmp_path / "older")
    (older / "added_tokens.json").write_text(json.dumps({name: 8 + i for i, name in enumerate(names)}))
    assert tokenizer_config(older) == config
    (older / "tokenizer.json").write_text(
        json.dumps(tokenizer_json() | {"added_tokens": [{"content": n, "id": 8 + i} for i, n in enumerate(names)]})
    )
    (older / "added_tokens.json").unlink()
    assert tokenizer_config(older) == config
    tokenizer = Tokenizer(config)
    assert tokenizer.encode("a<A>b <b>") == [*tokenizer.encode("a"), 8, 9, 10, *tokenizer.encode("b"), 11]
    assert tokenizer.encode("<a>_2") == [10], "a further vector may stand by itself, as in the reference"
    assert tokenizer.size == 12
    assert tokenizer.decode([8, 9, 10, 11]) == "<a> <b>"


def test_the_merges_are_packed_without_a_date() -> None:
    packed = files("minidiff").joinpath("assets/clip_merges.txt.gz").read_bytes()
    assert packed[4:8] == b"\0\0\0\0"  # gzip's time stamp: the same table gives the same file
    assert gzip.decompress(packed).startswith(b"i n\nt h\n")


KEPT = set(Tokenizer().encode("a large red star on a blue background"))


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a large red star on a blue background", []),
        ("A Large RED star, on a blue background!", []),
        ("", []),
        ("a crimson dragon on a blue background, a dragon", ["crimson", "dragon"]),
        ("a red-hot star", ["hot"]),
        ("ein roter star \U0001f31f \u661f", ["ein", "roter", "\u661f"]),
    ],
)
def test_words_that_a_small_vocabulary_lacks_are_named(prompt: str, unknown: list[str]) -> None:
    assert Tokenizer().unknown(prompt, KEPT) == unknown
