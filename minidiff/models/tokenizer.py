"""CLIP's tokenizer: a prompt becomes the ids that the text encoder reads.

Byte-pair encoding (Sennrich et al. 2016) as CLIP uses it (Radford et al. 2021): the text is normalised and split into
words (``unicode_tables.py``), and each word into its UTF-8 bytes, the last one marked ``</w>``. Then the adjacent pair
that comes first in the table of merges is joined, repeatedly, until no pair is left. The public table is part of
minidiff; its vocabulary is 256 bytes, the same 256 with ``</w>``, one token for every merge, and the start and the end
token.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from heapq import heappop, heappush
from importlib.resources import files

import torch
from torch import Tensor

from minidiff.config import TokenizerConfig
from minidiff.console import one_line, warn
from minidiff.errors import ConfigError
from minidiff.models.unicode_tables import mend, normalize, words

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
CACHED_WORDS = 2**16

# Every byte as a printable character, as in the files of byte-level tables: itself if it is printable in Latin-1,
# otherwise the next free character from U+0100 on.
_SHAPED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = {b: chr(b) for b in _SHAPED} | {
    b: chr(0x100 + i) for i, b in enumerate(b for b in range(256) if b not in _SHAPED)
}
BYTE_OF = {c: b for b, c in BYTES.items()}

Merges = tuple[tuple[str, str], ...]
Ranks = dict[tuple[int, int], tuple[int, int]]


@cache
def clip_table() -> tuple[tuple[str, ...], Merges]:
    """Return the public CLIP vocabulary (49,408 tokens in the order of their ids) and its 48,894 merges by rank."""
    packed = files("minidiff").joinpath("assets/clip_merges.txt.gz").read_bytes()
    pairs = (line.split(" ") for line in gzip.decompress(packed).decode("utf-8").split("\n"))
    merges = tuple((left, right) for left, right in pairs)
    # The ids follow the bytes in the order of BYTES, printable ones first.
    letters = tuple(BYTES.values())
    vocab = (*letters, *(c + END_OF_WORD for c in letters), *(a + b for a, b in merges), START, END)
    return vocab, merges


def rank_merges(ids: dict[str, int], merges: Merges) -> Ranks:
    """Map (left id, right id) to (rank, id of the joined token). Raises ConfigError if the vocabulary lacks one."""
    try:
        return {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(merges)}
    except KeyError as e:
        raise ConfigError(f"the merges need the token {e}, which the vocabulary does not have") from None


@cache
def _clip_lookup() -> tuple[dict[str, int], Ranks]:
    """Return ids and ranks of the public table, built once for all tokenizers."""
    vocab, merges = clip_table()
    ids = {token: i for i, token in enumerate(vocab)}
    return ids, rank_merges(ids, merges)


class Tokenizer:
    """Tokenizer with the same ids as transformers' CLIPTokenizer for every text.

    ``start``, ``end`` and ``pad`` are ids; ``length`` is the number of tokens in a row, including start and end. As in
    the reference, the names of these tokens inside a prompt stand for the tokens themselves: with SD2, which pads with
    ``!`` (id 0), every ``!`` of a prompt becomes id 0. Raises ConfigError for a table without the start token, the end
    token, or the result of a merge, and for a pad id out of range.
    """

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        self.config = config = config or TokenizerConfig()
        if config.vocab is None or config.merges is None:
            self.vocab = clip_table()[0]
            self.ids, self._ranks = _clip_lookup()
        else:
            self.vocab = config.vocab
            self.ids = {token: i for i, token in enumerate(config.vocab)}
            self._ranks = rank_merges(self.ids, config.merges)
        for name in (START, END):
            if name not in self.ids:
                raise ConfigError(f"the vocabulary of {len(self.vocab)} tokens has no {name}")
        if not 0 <= config.pad < len(self.vocab):
            raise ConfigError(f"pad={config.pad} is not an id of the vocabulary of {len(self.vocab)} tokens")
        self.start, self.end, self.pad, self.length = self.ids[START], self.ids[END], config.pad, config.length
        self._special, self._ends = (
            re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")  # the longest match wins
            for names in ({START, END, self.vocab[self.pad]}, {START, END})
        )
        self.added: dict[str, range] = {}  # learned word, normalised -> the ids of its vectors
        free = len(self.vocab)
        for name, count in config.added:
            self.added[normalize(name)] = range(free, free + count)
            free += count
        # The reference also has a token for every further vector, which may appear alone in a prompt.
        self._learned = {f"{name}_{i}": ids[i : i + 1] for name, ids in self.added.items() for i in range(1, len(ids))}
        self._learned |= self.added
        longest_first = sorted(self._learned, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._cache: dict[str, list[int]] = {}

    @property
    def size(self) -> int:
        """Number of ids: those of the vocabulary and those of learned words."""
        return len(self.vocab) + sum(map(len, self.added.values()))

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenize one prompt or several to int64 (B, length): start, the text, end, padding.

        Text beyond ``length`` - 2 tokens is truncated, with a warning for each prompt that quotes the lost part.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        room = self.length - 2
        rows: list[list[int]] = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > room:
                lost = one_line(self.decode(ids[room:]), 400)
                message = f"a prompt of {len(ids)} tokens was cut to {room}; this part of it was lost: {lost}"
                warn(message, stacklevel=2)
            row = [self.start, *ids[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), self.length)

    def encode(self, text: str, *, padding: bool = True) -> list[int]:
        """Return the ids of a text of any length, without start, end and padding. Lone surrogates become U+FFFD.

        ``padding``: False reads the name of the padding token as any other text, as some programs do.
        """
        if not isinstance(text, str):
            raise ConfigError(f"a prompt must be a string, got {type(text).__name__}")
        ids: list[int] = []
        for i, part in enumerate((self._special if padding else self._ends).split(mend(text))):
            if i % 2:  # re.split puts the separators at odd positions
                ids.append(self.ids[part])
            else:
                for piece in self._pieces(normalize(part)):
                    ids += self._learned.get(piece) or self._cache.get(piece) or self._merge(piece)
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield the words of normalised text; learned words are cut out first, wherever they appear."""
        if self._added is None:
            yield from words(text)
            return
        for i, part in enumerate(self._added.split(text)):
            yield from ([part] if i % 2 else words(part))

    def unknown(self, text: str, kept: Collection[int]) -> list[str]:
        """Return the words of ``text`` with a token outside ``kept``, once each, in order, ignoring punctuation."""
        found = [word for part in self._special.split(mend(text))[::2] for word in self._pieces(normalize(part))]
        found = [word for word in found if any(c.isalnum() for c in word)]
        return [word for word in dict.fromkeys(found) if not set(self.encode(word)) <= set(kept)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids in normalised form (composed, lower case), with special tokens by name.

        Invalid UTF-8 becomes U+FFFD. Raises ConfigError for an id that is not in the vocabulary.
        """
        raw = bytearray()
        learned = {span.start: name for name, span in self.added.items()}
        beyond = {i for span in self.added.values() for i in span}
        for i in map(int, ids):
            if i in beyond:
                raw += (learned[i] + " ").encode() if i in learned else b""
                continue
            if not 0 <= i < len(self.vocab):
                raise ConfigError(f"id {i} is beyond the vocabulary of {len(self.vocab)} tokens")
            token = self.vocab[i]
            shown = BYTE_OF.keys() >= set(token)  # a custom table may have a token that is not a sequence of bytes
            raw += bytes(BYTE_OF[c] for c in token) if shown else token.encode("utf-8", "replace")
        return raw.decode("utf-8", "replace").replace(END_OF_WORD, " ").strip()

    def _merge(self, word: str) -> list[int]:
        """Encode one word by byte-pair encoding.

        A heap holds the pairs that may be joined, ordered by rank and then position; a doubly linked list holds the
        current tokens of the word. A word of n bytes takes O(n log n) steps, where a plain search takes O(n**2).
        """
        letters = [BYTES[b] for b in word.encode()]
        letters[-1] += END_OF_WORD
        ids = [self.ids.get(letter, self.end) for letter in letters]  # the unknown token is the end token
        n, ranks = len(ids), self._ranks
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        heap: list[tuple[int, int, int]] = []  # rank, position of the left token, id of the joined token

        def offer(i: int) -> None:
            """Put the pair that starts at ``i`` on the heap, if the table has it."""
            j = after[i]
            if j < n and (ids[i], ids[j]) in ranks:
                rank, joined = ranks[ids[i], ids[j]]
                heappush(heap, (rank, i, joined))

        for i in range(n):
            offer(i)
        while heap:
            _, i, joined = heappop(heap)
            j = after[i]
            # The pair may no longer exist: its left token was joined to another (-1), or one of them has changed.
            if ids[i] < 0 or j >= n or ranks.get((ids[i], ids[j]), (0, -1))[1] != joined:
                continue
            ids[i], ids[j] = joined, -1
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            offer(i)
            if before[i] >= 0:
                offer(before[i])
        result = [i for i in ids if i >= 0]
        if len(word) <= 64:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = result
        return result
