"""Other people's tokenizer files as a :class:`TokenizerConfig`.

A tokenizer folder comes in two layouts: ``vocab.json`` and ``merges.txt`` (transformers before 5), or one
``tokenizer.json`` (transformers 5; it wins where both lie, as in the reference). What pads and how long a prompt may
be stand in ``tokenizer_config.json`` and, in older folders, in ``special_tokens_map.json``. Anything in them that
would give other ids than CLIP's own rules is refused by name rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minidiff.config import TokenizerConfig
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.models.tokenizer import END, END_OF_WORD, START, Merges, clip_table, rank_merges

LARGEST_FILE = 64 * 2**20  # the public table takes 3.6 MB in its most talkative form
LONGEST_PROMPT = 2**16  # beyond is no limit at all: transformers writes 1e30 for none
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")

_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPLITS = (_SPLIT, r"<\|startoftext\|>|<\|endoftext\|>|" + _SPLIT)  # transformers 4 and 5: the class adds the names

Table = tuple[tuple[str, ...], Merges]


def read_vocab_and_merges(vocab_json: Path, merges_txt: Path) -> Table:
    """Tokens in the order of their ids, and merges by rank, from the two files of the older layout.

    Raises CheckpointError, naming the file, for one that is missing, damaged or does not fit the other.
    """
    vocab = _tokens(_json_object(vocab_json), vocab_json)
    lines = _text(merges_txt).split("\n")
    merges = _pairs((line for line in lines if line and not line.startswith("#version")), merges_txt)
    return _fitting(vocab, merges, merges_txt)


def read_tokenizer_json(path: Path) -> Table:
    """The same from a ``tokenizer.json``.

    Raises CheckpointError for a damaged file, UnsupportedError for one whose text is not prepared as CLIP's is.
    """
    data = _json_object(path)
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: no byte-pair model with a vocabulary inside")
    _require_clip(data, model, path)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: the model has no list of merges")
    added = {token: i for token, i in _added(data.get("added_tokens"), path).items() if token in (START, END)}
    return _fitting(_tokens(model["vocab"] | added, path), _pairs(merges, path), path)


def tokenizer_config(folder: Path, *, pad: int | None = None, length: int | None = None) -> TokenizerConfig:
    """The config of a tokenizer folder in either layout; ``vocab`` and ``merges`` are None for the public table.

    ``pad`` (an id) and ``length`` replace what the folder says; where neither says anything, the end token pads and
    a row is 77 long. Raises CheckpointError for a folder without a table or with a damaged file, UnsupportedError for
    a tokenizer that is not CLIP's, or that has tokens added to it (their embeddings belong in a file of their own).

    One thing is not carried over: published folders mark the two ends ``normalized``, with which the reference finds
    them in a prompt in capitals too (``<|StartOfText|>``); minidiff knows their exact names only.
    """
    folder = Path(folder)
    whole, vocab_json, merges_txt = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        vocab, merges = read_tokenizer_json(whole)
    elif vocab_json.is_file() and merges_txt.is_file():
        vocab, merges = read_vocab_and_merges(vocab_json, merges_txt)
    else:
        raise CheckpointError(f"{folder}: neither tokenizer.json nor vocab.json and merges.txt")
    settings = _settings(folder)
    pad_name = _name(settings.get("pad_token"), folder) or END
    added = _added_names(folder, settings) - {START, END, pad_name}
    if added:
        raise UnsupportedError(f"{folder}: the tokenizer has added tokens, such as {min(added)!r}; remove them first")
    if pad_name not in vocab:
        raise CheckpointError(f"{folder}: the padding token {pad_name!r} is not in the vocabulary")
    public = (vocab, merges) == clip_table()
    return TokenizerConfig(
        pad=vocab.index(pad_name) if pad is None else pad,
        length=_length(settings, folder) if length is None else length,
        vocab=None if public else vocab,
        merges=None if public else merges,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, with the special tokens of the older file where the reference would read it too."""
    config, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = _json_object(config) if config.is_file() else {}
    if "added_tokens_decoder" not in settings and special.is_file():
        settings |= _json_object(special)
    if settings.get("tokenizer_class") not in (None, *CLASSES):
        raise UnsupportedError(f"{config}: tokenizer_class={settings['tokenizer_class']!r} is not CLIP's")
    for key, needed in (("bos_token", START), ("eos_token", END), ("unk_token", END)):
        name = _name(settings.get(key), folder)
        if name not in (None, needed):
            raise UnsupportedError(f"{folder}: {key}={name!r}, CLIP's tokenizer has {needed!r} there")
    return settings


def _added_names(folder: Path, settings: dict[str, Any]) -> set[str]:
    """Every token that the folder's files add to the table, or take out of the text before it is cut into words."""
    whole, older = folder / "tokenizer.json", folder / "added_tokens.json"
    names: set[str | None] = set()
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        tokens = settings.get(key) or []
        if not isinstance(tokens, (list, dict)):
            raise CheckpointError(f"{folder}: {key} is no list of tokens")
        names |= {_name(token, folder) for token in (tokens.values() if isinstance(tokens, dict) else tokens)}
    if whole.is_file():
        names |= _added(_json_object(whole).get("added_tokens"), whole).keys()
    elif older.is_file():
        names |= _json_object(older).keys()
    return {name for name in names if name is not None}


def _name(token: Any, where: Path) -> str | None:
    """A special token, written as a string or as an object with its ``content``."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{where}: {str(name)[:60]!r} is no name of a token")
    return name


def _length(settings: dict[str, Any], folder: Path) -> int:
    value = settings.get("model_max_length", LONGEST_PROMPT + 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 2:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: model_max_length={str(value)[:60]} is no length")
    return int(value) if value <= LONGEST_PROMPT else TokenizerConfig.length


def _require_clip(data: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Refuse a file whose steps before byte-pair encoding, or whose way of doing it, differ from CLIP's."""
    normal = [(s.get("type"), s.get("pattern"), s.get("content")) for s in _steps(data.get("normalizer"))]
    wanted = [("NFC", None, None), ("Replace", {"Regex": r"\s+"}, " "), ("Lowercase", None, None)]
    if normal != wanted:
        raise UnsupportedError(f"{path}: its normalizer is not CLIP's (NFC, white space, lower case)")
    cut = [
        (s.get("type"), s.get("pattern"), s.get("behavior"), s.get("invert"), s.get("add_prefix_space"))
        for s in _steps(data.get("pre_tokenizer"))
    ]
    tail = ("ByteLevel", None, None, None, False)
    if cut not in [[("Split", {"Regex": split}, "Removed", True, None), tail] for split in _SPLITS]:
        raise UnsupportedError(f"{path}: its pre_tokenizer is not CLIP's (words by regular expression, then bytes)")
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "fuse_unk", "byte_fallback"))
    clip = model.get("end_of_word_suffix") == END_OF_WORD and not model.get("ignore_merges")
    if model.get("type", "BPE") != "BPE" or not plain or not clip or model.get("unk_token") not in (None, END):
        raise UnsupportedError(f"{path}: its model is not CLIP's byte-pair encoding ({END_OF_WORD} ends a word)")


def _steps(sequence: Any) -> list[dict[str, Any]]:
    steps = sequence.get("normalizers") or sequence.get("pretokenizers") if isinstance(sequence, dict) else None
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _added(tokens: Any, path: Path) -> dict[str, int]:
    """``added_tokens`` of a tokenizer.json as name -> id."""
    try:
        return {str(token["content"]): token["id"] for token in tokens or ()}
    except (TypeError, KeyError):
        raise CheckpointError(f"{path}: added_tokens is no list of tokens with their ids") from None


def _tokens(ids: dict[str, Any], path: Path) -> tuple[str, ...]:
    """A vocabulary as its tokens in the order of their ids: 0, 1, 2, ... without a gap, both ends among them."""
    if any(type(i) is not int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(f"{path}: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    missing = {START, END}.difference(ids)
    if missing:
        raise CheckpointError(f"{path}: the vocabulary of {len(ids)} tokens has no {min(missing)}")
    return tuple(sorted(ids, key=ids.__getitem__))


def _pairs(rows: Iterable[Any], path: Path) -> Merges:
    """Merges, each a pair or one string with a space between the two."""
    merges = []
    for rank, row in enumerate(rows):
        pair = row.split(" ") if isinstance(row, str) else row
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise CheckpointError(f"{path}: merge {rank} is no pair of tokens: {str(row)[:60]!r}")
        merges.append((pair[0], pair[1]))
    return tuple(merges)


def _fitting(vocab: tuple[str, ...], merges: Merges, path: Path) -> Table:
    """The two together, if the vocabulary has whatever the merges take and make."""
    try:
        rank_merges({token: i for i, token in enumerate(vocab)}, merges)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from None
    return vocab, merges


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(data).__name__}")
    return data


def _text(path: Path) -> str:
    """The contents of a text file in UTF-8, if it is of a size that a tokenizer's file can have."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CheckpointError(f"{path}: {size} bytes are too many for a tokenizer's file (at most {LARGEST_FILE})")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path}: not UTF-8 ({e.reason} at byte {e.start})") from None
