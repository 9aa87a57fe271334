r"""compel 2.5.1 (damian0815/compel), as its CompelForSD and CompelForSDXL use it: compel.py, embeddings_provider.py.

What is written how: compel_grammar.py. Long prompts are cut, behind the last sentence that fits into 75 tokens, else
behind the last phrase, else behind the last word. Each chunk is padded with the encoder's own padding.

The output of a token with weight w becomes empty + w * (output - empty), with the empty prompt's output at the same
place. For every fragment of a weight below 1 the prompt is encoded once more, with its tokens hidden from all others;
the result is the average of all these, in which the whole prompt counts 1 and each of the others tan((1 - w) * pi / 2).

``.blend(...)`` is the average of several such prompts by its weights, which are divided by their sum unless
``no_normalize`` is said; ``.and(...)`` puts several one behind the other, a weight other than 1 applied as to a token.
Shorter ones, and the shorter of prompt and negative prompt, are filled up with the encoded empty prompt. SDXL's pooled
text is that of the raw text, brackets and all, cut at 77 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minidiff.models.tokenizer import END_OF_WORD, Tokenizer
from minidiff.pipeline.dialects.chunks import Chunk, Encoded, Fragment, Reader, check_weight, row
from minidiff.pipeline.dialects.compel_grammar import Blend, clauses
from minidiff.pipeline.dialects.dialect import Dialect, Model, Part, Reading, Texts, always

SENTENCE = (".",)
PHRASE = (".", ",", ";", ":")
SMALLEST = 1e-5  # weight below 1, so that the share of the prompt without a fragment stays finite


class Compel(Dialect):
    """Prompts of compel."""

    name = "compel"
    second = True
    silent = True

    def chunks(self, text: str, tokenizer: Tokenizer) -> list[Chunk]:
        return [chunk for reading in self.readings(text, tokenizer, 1) for chunk in reading.chunks]

    def readings(self, text: str, tokenizer: Tokenizer, calls: int, negative: bool = False) -> Iterator[Reading]:
        found = clauses(text)
        for k, clause in enumerate(found, 1):
            joined = f"part {k} of and, weight {clause.weight:g}" if len(found) > 1 else ""
            for fragments, share in zip(clause.prompts, clause.shares, strict=True):
                blended = f"blended, weight {share:g}" if len(clause.prompts) > 1 else ""
                what = ", ".join(filter(None, (joined, blended)))
                yield Reading(what, [chunk for chunk, _ in _cut(tokenizer, fragments)])

    def parts(self, model: Model, texts: Texts, calls: int, negative: bool) -> list[Part]:
        return always(self._encode(model, texts))

    def _encode(self, model: Model, texts: Texts) -> Encoded:
        each = [_read(reader, text) for text, reader in zip(texts, model.readers, strict=True)]
        contexts = _equally_long([one.context for one in each], *[reader.empty for reader in model.readers])
        return Encoded(torch.cat(contexts, dim=-1), each[-1].pooled)

    def pair(
        self, model: Model, prompt: Texts, negative: Texts | None, calls: int
    ) -> tuple[list[Part], list[Part] | None]:
        if negative is None:
            return super().pair(model, prompt, negative, calls)
        sides = [self._encode(model, texts) for texts in (prompt, negative)]
        empty = torch.cat([reader.empty for reader in model.readers], dim=-1)
        contexts = _equally_long([side.context for side in sides], empty)
        positive, against = (side._replace(context=z) for side, z in zip(sides, contexts, strict=True))
        return always(positive), always(against)


def _read(reader: Reader, text: str) -> Encoded:
    """Encode one encoder's text."""
    parts = [_clause(reader, clause) for clause in clauses(text)]
    raw = reader.tokenizer.encode(text)[: reader.tokenizer.length - 2]
    pooled = reader([row(reader.tokenizer, raw)])[1]
    return Encoded(torch.cat(parts, dim=1), pooled)


def _clause(reader: Reader, clause: Blend) -> Tensor:
    """Encode one part of a conjunction: a prompt, or several that are blended."""
    each = [_prompt(reader, fragments) for fragments in clause.prompts]
    if clause.blended:
        z = _average(_equally_long(each, reader.empty), clause.shares, normalize=clause.normalize)
    else:
        (z,) = each
    if clause.weight != 1:
        empty = reader.empty.repeat(1, z.shape[1] // reader.empty.shape[1], 1)
        z = empty + (z - empty) * clause.weight
    return z


def _prompt(reader: Reader, fragments: Sequence[Fragment]) -> Tensor:
    """Encode a prompt without blends: (1, L, D)."""
    cut = _cut(reader.tokenizer, fragments)
    chunks, owners = [chunk for chunk, _ in cut], [owner for _, owner in cut]
    each, shares = [_weighted(reader, chunks, [None] * len(chunks))], [1.0]
    for k, (_, weight) in enumerate(fragments):
        places = [(c, i) for c, own in enumerate(owners) for i, owner in enumerate(own) if owner == k]
        if weight >= 1 or not places:
            continue
        shown = [_hiding(c, len(own), places[0], places[-1]) for c, own in enumerate(owners)]
        each.append(_weighted(reader, chunks, shown))
        shares.append(math.tan((1.0 - max(SMALLEST, weight)) * math.pi / 2))
    return _average(each, shares, normalize=True)


def _hiding(chunk: int, length: int, first: tuple[int, int], last: tuple[int, int]) -> list[int]:
    """Return the mask of a chunk that hides what lies between two places (chunk, token), but no chunk's two ends."""
    return [int(i in (0, length - 1) or not first <= (chunk, i) <= last) for i in range(length)]


def _weighted(reader: Reader, chunks: Sequence[Chunk], masks: Sequence[Sequence[int] | None]) -> Tensor:
    """Encode chunks one by one and apply their weights: (1, L, D)."""
    found = []
    for chunk, mask in zip(chunks, masks, strict=True):
        z = reader([chunk.ids], mask)[0].float()
        if chunk.weighted:
            weights = torch.tensor(chunk.weights, device=z.device)[:, None]
            empty = reader.empty
            z = torch.where(weights == 1, z, empty + (z - empty) * weights)
        found.append(z)
    return torch.cat(found, dim=1)


def _average(each: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the weighted sum of tensors (1, L, D), by weights that are divided by their sum if ``normalize``."""
    share = torch.tensor(weights, dtype=each[0].dtype, device=each[0].device)
    if normalize:
        share = share / torch.sum(share)
    stacked = torch.stack([z[0] for z in each])
    return torch.sum(stacked[None] * share[:, None, None], dim=1)


def _equally_long(each: Sequence[Tensor], *empty: Tensor) -> list[Tensor]:
    """Fill up the shorter ones of several contexts with the encoded ``empty`` prompt: one for all, or one for each."""
    longest = max(z.shape[1] for z in each)
    fill = empty * len(each) if len(empty) == 1 else empty
    rests = [(longest - z.shape[1]) // e.shape[1] for z, e in zip(each, fill, strict=True)]
    return [torch.cat([z, *[e] * n], dim=1) if n else z for z, e, n in zip(each, fill, rests, strict=True)]


def _cut(tokenizer: Tokenizer, fragments: Sequence[Fragment]) -> list[tuple[Chunk, list[int | None]]]:
    """Cut fragments into chunks; with each goes, for every token, the number of its fragment."""
    tokens: list[tuple[int, float, int]] = []
    for k, (text, weight) in enumerate(fragments):
        check_weight(text, weight)
        tokens += [(i, weight, k) for i in tokenizer.encode(text)]
    room, found = tokenizer.length - 2, list[tuple[Chunk, list[int | None]]]()
    while tokens or not found:
        end = _end(tokenizer, [i for i, _, _ in tokens[: room + 1]], room)
        here, tokens = tokens[:end], tokens[end:]
        padding = room - len(here) + 1
        weights = (1.0, *(w for _, w, _ in here), *[1.0] * padding)
        owners: list[int | None] = [None, *(k for _, _, k in here), *[None] * padding]
        found.append((Chunk(tuple(row(tokenizer, [i for i, _, _ in here])), weights), owners))
    return found


def _end(tokenizer: Tokenizer, ids: Sequence[int], room: int) -> int:
    """Return how many of the next tokens go into a chunk."""
    if len(ids) <= room:
        return room
    names = [tokenizer.vocab[i] if i < len(tokenizer.vocab) else "" for i in ids[:room]]
    for marks in (SENTENCE, PHRASE):
        closing = [k for k, name in enumerate(names) if name in {mark + END_OF_WORD for mark in marks}]
        if closing:
            return closing[-1] + 1
    words = [k for k, name in enumerate(names) if name.endswith(END_OF_WORD)]
    return words[-1] + 1 if words else room
