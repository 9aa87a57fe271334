"""Conversion of other projects' tokenizer files to a :class:`TokenizerConfig`.

There are two layouts of a tokenizer folder: ``vocab.json`` and ``merges.txt`` (transformers before 5), or a single
``tokenizer.json`` (transformers 5; it takes precedence if both exist, as in the reference). The padding token and the
maximum length are in ``tokenizer_config.json`` and, in older folders, in ``special_tokens_map.json``. Tokens added
after the table are learned words. Anything else that would give other ids than CLIP's own rules is refused by name
rather than ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minidiff.config import TokenizerConfig, quote
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.models.tokenizer import END, END_OF_WORD, START, Merges, clip_table, rank_merges
from minidiff.models.unicode_tables import normalize
from minidiff.storage.reading import read_object, read_text

LONGEST_PROMPT = 2**16  # larger values mean no limit: transformers writes 1e30
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# Settings with their supported values, the default first.
ONLY: dict[str, tuple[Any, ...]] = {
    "padding_side": ("right",),
    "truncation_side": ("right",),
    "split_special_tokens": (False, None),
    "init_inputs": ([], None),
    **dict.fromkeys(("vocab", "merges", "tokenizer_object", "post_processor"), (None,)),
    **{f"tokenizer_{key}": (None,) for key in ("padding", "truncation")},
}

_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPLITS = (_SPLIT, r"<\|startoftext\|>|<\|endoftext\|>|" + _SPLIT)  # transformers 4 and 5: the class adds the names

Table = tuple[tuple[str, ...], Merges]


def read_vocab_and_merges(vocab_json: Path, merges_txt: Path) -> Table:
    """Read the tokens in the order of their ids, and the merges by rank, from the two files of the older layout.

    Raises CheckpointError, naming the file, if one is missing or damaged, or if the two do not match.
    """
    vocab = _tokens(read_object(vocab_json), vocab_json)
    lines = read_text(merges_txt).split("\n")
    merges = _pairs((line for line in lines if line and not line.startswith("#version")), merges_txt)
    return _fitting(vocab, merges, merges_txt)


def read_tokenizer_json(path: Path) -> Table:
    """Read the same from a ``tokenizer.json``.

    Raises CheckpointError for a damaged file, and UnsupportedError if it prepares text differently from CLIP.
    """
    return _table_of(read_object(path), path)


def _table_of(data: dict[str, Any], path: Path) -> Table:
    """Return the table of a parsed ``tokenizer.json``; errors as in :func:`read_tokenizer_json`."""
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: contains no byte-pair model with a vocabulary")
    _require_clip(data, model, path)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: the model has no list of merges")
    added = {token: i for i, (token, _) in _added(data, path).items() if token in (START, END)}
    return _fitting(_tokens(model["vocab"] | added, path), _pairs(merges, path), path)


def tokenizer_config(folder: Path, *, pad: int | None = None, length: int | None = None) -> TokenizerConfig:
    """Return the config of a tokenizer folder in either layout; ``vocab`` and ``merges`` are None for the public table.

    ``pad`` (an id) and ``length`` override the folder's values; the defaults are the end token and 77. Tokens after the
    table are learned words: "<cat>", "<cat>_1", "<cat>_2" are one word of three vectors, as textual inversion adds
    them. Raises CheckpointError for a folder without a table or with a damaged file, and UnsupportedError for a
    tokenizer that is not CLIP's, or that has other tokens added to it.

    One setting is not carried over: published folders mark the start and end tokens as ``normalized``, so that the
    reference also recognizes them in a prompt in capitals (``<|StartOfText|>``); minidiff knows only the exact names.
    """
    folder = Path(folder)
    whole, vocab_json, merges_txt = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    data = read_object(whole) if whole.exists() else {}
    if whole.exists():
        vocab, merges = _table_of(data, whole)
    elif vocab_json.exists() and merges_txt.exists():
        vocab, merges = read_vocab_and_merges(vocab_json, merges_txt)
    else:
        raise CheckpointError(f"{folder}: neither tokenizer.json nor vocab.json and merges.txt")
    settings = _settings(folder, data)
    pad_name = _name(settings.get("pad_token"), folder) or END
    known = {START, END, pad_name}
    special = _special_names(folder, settings) - known
    if special:
        raise UnsupportedError(f"{folder}: the tokenizer has added tokens, such as {quote(min(special))}; remove them")
    words = _words(_all_added(folder, settings, data), known, len(vocab), folder)
    if pad_name not in vocab:
        raise CheckpointError(f"{folder}: the padding token {quote(pad_name)} is not in the vocabulary")
    public = (vocab, merges) == clip_table()
    try:
        return TokenizerConfig(
            pad=vocab.index(pad_name) if pad is None else pad,
            length=_length(settings, folder) if length is None else length,
            vocab=None if public else vocab,
            merges=None if public else merges,
            added=words,
        )
    except ConfigError as e:
        raise UnsupportedError(f"{folder}: {e}") from None


def _settings(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Read ``tokenizer_config.json``, with the special tokens of the older file if the reference would read it too, and
    the sides of padding and truncation in ``data``, the parsed ``tokenizer.json``."""
    config, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_object(config) if config.exists() else {}
    if "added_tokens_decoder" not in settings and special.exists():
        settings |= read_object(special)
    for key, side in (("padding", "padding_side"), ("truncation", "truncation_side")):
        found = data.get(key)
        if isinstance(found, dict) and "direction" in found:
            settings.setdefault(side, str(found["direction"]).lower())
    for key, values in ONLY.items():
        if settings.get(key, values[0]) not in values:
            raise UnsupportedError(f"{folder}: {key}={quote(settings[key])} is not supported by minidiff's tokenizer")
    if settings.get("tokenizer_class") not in (None, *CLASSES):
        raise UnsupportedError(f"{config}: tokenizer_class={quote(settings['tokenizer_class'])} is not CLIP's")
    for key, needed in (("bos_token", START), ("eos_token", END), ("unk_token", END)):
        name = _name(settings.get(key), folder)
        if name not in (None, needed):
            raise UnsupportedError(f"{folder}: {key}={quote(name)}, CLIP's tokenizer has {needed!r} there")
    return settings


def _special_names(folder: Path, settings: dict[str, Any]) -> set[str]:
    """Return the tokens that the settings extract from the text before it is split into words."""
    switches = ("add_bos_token", "add_eos_token")
    names = {_name(v, folder) for key, v in settings.items() if key.endswith("_token") and key not in switches}
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        tokens = settings.get(key) or []
        if not isinstance(tokens, (list, dict)):
            raise CheckpointError(f"{folder}: {key} is not a list of tokens")
        names |= {_name(token, folder) for token in (tokens.values() if isinstance(tokens, dict) else tokens)}
    return {name for name in names if name is not None}


Added = dict[int, tuple[str, bool]]  # id -> a token, and whether it is matched in the text like a learned word


def _all_added(folder: Path, settings: dict[str, Any], data: dict[str, Any]) -> Added:
    """Return the tokens that the folder adds to its table, from the settings or else the files of older versions."""
    whole, older, config = (folder / n for n in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"))
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"] or {}
        if not isinstance(listed, dict):
            raise CheckpointError(f"{folder}: added_tokens_decoder is not a list of tokens")
        rows = [{**token, "id": key} if isinstance(token, dict) else token for key, token in listed.items()]
        return _added({"added_tokens": rows}, config)
    names = read_object(older) if older.exists() else {}
    rows = [{"content": name, "id": i} for name, i in names.items()]
    return _added({"added_tokens": rows}, older) | (_added(data, whole) if data else {})


def _words(added: Added, known: set[str], first: int, folder: Path) -> tuple[tuple[str, int], ...]:
    """Return the learned words among the added tokens with their numbers of vectors; ids continue from ``first``."""
    words: list[tuple[str, int]] = []
    fresh = [(i, *added[i]) for i in sorted(added) if added[i][0] not in known]
    for n, (i, name, plain) in enumerate(fresh):
        if not plain or i != first + n:
            why = f"its id is {i}, not {first + n}" if plain else "it is matched by other rules than a learned word"
            raise UnsupportedError(f"{folder}: the tokenizer has the added token {quote(name)}, and {why}; remove it")
        # The reference expands a word to all of its vectors only if the tokenizer returns its name unchanged.
        if words and name == f"{words[-1][0]}_{words[-1][1]}" and name == normalize(name):
            words[-1] = (words[-1][0], words[-1][1] + 1)
        else:
            words.append((name, 1))
    return tuple(words)


def _name(token: Any, where: Path) -> str | None:
    """Return a special token, given as a string or as an object with its ``content``."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{where}: {quote(name)} is no name of a token")
    return name


def _length(settings: dict[str, Any], folder: Path) -> int:
    value = settings.get("model_max_length", settings.get("max_len"))
    value = LONGEST_PROMPT + 1 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 2:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: model_max_length={quote(value)} is no length")
    return int(value) if value <= LONGEST_PROMPT else TokenizerConfig.length


def _require_clip(data: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Raise UnsupportedError if a file's byte-pair encoding, or the steps before it, differ from CLIP's."""
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


def _added(data: dict[str, Any], path: Path) -> Added:
    """Return the ``added_tokens`` of a tokenizer.json by id."""
    added: Added = {}
    try:
        for token in data.get("added_tokens") or ():
            special = token.get("special", False)
            plain = token.get("normalized", not special) and not special and not token.get("single_word", False)
            added[int(str(token["id"]))] = (_name(token["content"], path) or "", bool(plain))
    except (TypeError, KeyError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: added_tokens is not a list of tokens with their ids") from None
    return added


def _tokens(ids: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Return the tokens of a vocabulary in the order of their ids 0, 1, 2, ... without gaps.

    Raises CheckpointError for other ids, and for a missing start or end token.
    """
    if any(type(i) is not int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(f"{path}: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    missing = {START, END}.difference(ids)
    if missing:
        raise CheckpointError(f"{path}: the vocabulary of {len(ids)} tokens has no {min(missing)}")
    return tuple(sorted(ids, key=ids.__getitem__))


def _pairs(rows: Iterable[Any], path: Path) -> Merges:
    """Return the merges as pairs; each is given as a pair, or as one string with a space in between."""
    merges = []
    for rank, row in enumerate(rows):
        pair = row.split(" ") if isinstance(row, str) else row
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise CheckpointError(f"{path}: merge {rank} is no pair of tokens: {str(row)[:60]!r}")
        merges.append((pair[0], pair[1]))
    return tuple(merges)


def _fitting(vocab: tuple[str, ...], merges: Merges, path: Path) -> Table:
    """Return both, after checking that the vocabulary has the parts and the result of every merge."""
    try:
        rank_merges({token: i for i, token in enumerate(vocab)}, merges)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from None
    return vocab, merges
