r"""ComfyUI, as of October 2025 (a125cd84): comfy/sd1_clip.py, comfy/sdxl_clip.py, comfy/text_encoders/sd2_clip.py.

    (words)          weight times 1.1          ((words))  1.21, and so on
    (words:1.3)      the weight is 1.3, whatever stands around it; anything that Python reads as a number
    \( \)            the character itself
    embedding:name   a learned word

Square brackets, BREAK and AND are plain text. A bracket that nothing closes, or that closes nothing, is a character.
{a|b} is chosen from at random by the program's page, before the prompt is read: named and refused here.

Chunks have 75 tokens between start and end. What stands between two changes of weight stays together: with fewer than 8
tokens it moves to the next chunk as a whole, otherwise it is cut where the chunk is full. After the end token comes the
encoder's own padding.

If any weight is not 1, the empty prompt is encoded in the same batch, and the output of a token with weight w becomes
empty + w * (output - empty), with the empty prompt's output at the same place. SDXL's pooled text is the first chunk's,
unweighted; its two contexts reach as far as the shorter one. Prompts of different lengths are repeated until they are
equally long, which changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from minidiff.config import check, quote
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.models.unicode_tables import normalize
from minidiff.pipeline.dialects.chunks import Chunk, Encoded, Fragment, Reader, check_weight, row
from minidiff.pipeline.dialects.dialect import Dialect, Model, Part, Texts, always, side_by_side

MORE = 1.1
LONG = 8  # tokens from which on a fragment is cut
DEEPEST = 50  # brackets in brackets
EMBEDDING = "embedding:"
FILES = (".safetensors", ".pt", ".bin")

# Escaped brackets while the others are read.
ESCAPED = {r"\)": "\0\1", r"\(": "\0\2"}

_EMBEDDING = re.compile(rf" {EMBEDDING}|\n{EMBEDDING}")
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")


class ComfyUI(Dialect):
    """Prompts of ComfyUI's CLIPTextEncode."""

    name = "comfyui"
    second = True

    def chunks(self, text: str, tokenizer: Tokenizer) -> list[Chunk]:
        choice = _CHOICE.search(text)
        if choice is not None:
            raise UnsupportedError(f"{quote(choice[0])} is a random choice, which is not made here; write one of them")
        return _filled(tokenizer, [group for fragment in fragments(text) for group in _groups(tokenizer, *fragment)])

    def parts(self, model: Model, texts: Texts, calls: int, negative: bool) -> list[Part]:
        rows = [self.chunks(text, reader.tokenizer) for text, reader in zip(texts, model.readers, strict=True)]
        count = max(map(len, rows))
        if len({*texts}) > 1:  # a text for each encoder: empty chunks fill up the shorter one
            rows = [r + _filled(m.tokenizer, []) * (count - len(r)) for r, m in zip(rows, model.readers, strict=True)]
        return always(side_by_side([_read(reader, own) for reader, own in zip(model.readers, rows, strict=True)]))


def fragments(text: str) -> list[Fragment]:
    """Return a text in fragments with their weights, in order."""
    for mark, sign in ESCAPED.items():
        text = text.replace(mark, sign)
    return list(_weighted(text, 1.0, 0))


def _weighted(text: str, weight: float, deep: int) -> Iterator[Fragment]:
    check(deep <= DEEPEST, f"brackets nest more than {DEEPEST} deep; leave some out")
    for piece in _pieces(text):
        if len(piece) < 2 or piece[0] != "(" or piece[-1] != ")":
            for mark, sign in ESCAPED.items():
                piece = piece.replace(sign, mark[1:])
            check_weight(piece, weight)
            yield piece, weight
            continue
        words, own = piece[1:-1], weight * MORE
        before, colon, number = words.rpartition(":")
        if before and colon:
            try:
                words, own = before, float(number)
            except ValueError:
                words = piece[1:-1]
        yield from _weighted(words, own, deep + 1)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text before each bracket that opens a group, and behind the one that closes it."""
    start = level = 0
    for i, c in enumerate(text):
        if c == "(":
            if level == 0 and i > start:
                yield text[start:i]
            start = i if level == 0 else start
            level += 1
        elif c == ")":
            level -= 1
            if level == 0:
                yield text[start : i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


Group = list[tuple[int, float]]


def _groups(tokenizer: Tokenizer, text: str, weight: float) -> Iterator[Group]:
    """Yield the tokens of a fragment, learned words that are named by ``embedding:`` apart."""
    first, *others = _EMBEDDING.split(text)
    for piece in filter(None, (first, *(EMBEDDING + other for other in others))):
        words = piece
        if piece.startswith(EMBEDDING):
            name, words = _named(tokenizer, piece[len(EMBEDDING) :])
            yield [(i, weight) for i in tokenizer.added[name]]
        if words:
            yield [(i, weight) for i in tokenizer.encode(words, padding=False)]


def _named(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """Return the learned word that ``text`` begins with, and the rest."""
    written, *others = text.split() or [""]
    rest = " ".join(others)
    for name, behind in ((written, ""), (written.strip(","), written[len(written.strip(",")) :] + " ")):
        stem = next((name.removesuffix(file) for file in FILES if name.endswith(file)), name)
        if normalize(stem) in tokenizer.added:
            return normalize(stem), behind + rest
    known = ", ".join(tokenizer.added) or "none"
    raise ConfigError(f"{quote(EMBEDDING + written)}: there is no such learned word, of {known}; add it by --embedding")


def _filled(tokenizer: Tokenizer, groups: Sequence[Group]) -> list[Chunk]:
    """Return groups of tokens in chunks."""
    room, rows = tokenizer.length - 2, list[Group]([[]])
    for group in groups:
        rest = group
        while rest:
            left = room - len(rows[-1])
            if len(rest) > left:
                if len(group) >= LONG:
                    rows[-1] += rest[:left]
                    rest = rest[left:]
                rows.append([])
            else:
                rows[-1] += rest
                rest = []
    return [
        Chunk(
            tuple(row(tokenizer, [i for i, _ in own])),
            (1.0, *(w for _, w in own), *[1.0] * (room - len(own) + 1)),
        )
        for own in rows
    ]


def _read(reader: Reader, chunks: Sequence[Chunk]) -> Encoded:
    weighted = any(chunk.weighted for chunk in chunks)
    empty = [row(reader.tokenizer, [])] if weighted else []
    z, pooled = reader([*(chunk.ids for chunk in chunks), *empty])
    z = z.float()
    if weighted:
        weights = torch.tensor([chunk.weights for chunk in chunks], dtype=z.dtype, device=z.device)[..., None]
        nothing, z = z[-1:], z[:-1]
        z = torch.where(weights == 1.0, z, (z - nothing) * weights + nothing)
    return Encoded(z.flatten(0, 1)[None], pooled[:1])
