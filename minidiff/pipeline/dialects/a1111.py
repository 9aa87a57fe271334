r"""AUTOMATIC1111's stable-diffusion-webui, as of March 2024 (45b8a499): prompt_parser.py, sd_hijack_clip.py,
sd_emphasis.py, sd_samplers_cfg_denoiser.py.

    emphasis                 (words), (words:1.3), [words], \( ...: emphasis.py
    BREAK                    ends a chunk
    [a:b:0.5], [a|b]         texts that change on the way: schedule.py
    one AND two :0.6         several conditionals, in the prompt only: out = u + scale * sum of weight * (c - u).
                             A number behind a colon at the end of each is its weight, AND or not
    <lora:name:1>            another network: named and refused here, --lora brings it

The order: AND, then the schedule, then emphasis.

Chunks have 75 tokens between start and end. One is full when a token more would not fit; if a comma is among its last
20 tokens, what follows it moves to the next chunk. Short ones are padded with the end token, or after their end token
with the encoder's own padding. All texts of a schedule get the same number of chunks, by empty ones at the end.

Each token's output is multiplied by its weight. Then all of a chunk, and of all texts of a schedule, is scaled so that
the mean is what it was before. SDXL's pooled text is the first chunk's, unweighted, and an empty negative prompt is
zeros for it.

A schedule counts model calls, twice as many as steps for methods of second order, and its ends are compared with a
count from 0: the first text stays one call longer than it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minidiff.config import check, quote
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline.dialects.chunks import Chunk, Encoded, Fragment, Reader, check_weight, spans
from minidiff.pipeline.dialects.dialect import Dialect, Model, Part, Reading, Texts, side_by_side, zeros
from minidiff.pipeline.dialects.emphasis import BREAK, fragments
from minidiff.pipeline.dialects.schedule import schedule

COMMA = ",</w>"
BACK = 20  # tokens behind the last comma that move to the next chunk

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*$")
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_REGION = re.compile(r"\b(?:ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b")


class A1111(Dialect):
    """Prompts of AUTOMATIC1111's web UI."""

    name = "a1111"

    def chunks(self, text: str, tokenizer: Tokenizer) -> list[Chunk]:
        return _Filling(tokenizer).of(fragments(text))

    def conditionals(self, text: str, negative: bool) -> list[Fragment]:
        """Split a text at AND, each with its weight. Raises :class:`ConfigError` for what is not done here."""
        if negative:
            return [(text, 1.0)]
        network = _NETWORK.search(text)
        if network is not None:
            kind, strength = network[1], network[2].partition(":")[2].partition(":")[0]
            instead = f", and give its file with --lora FILE={strength or 1}" if kind == "lora" else ""
            told = f"networks named in a prompt are not loaded; leave it out{instead}"
            raise UnsupportedError(f"{quote(network[0])}: {told}")
        region = _REGION.search(text)
        if region is not None:
            raise UnsupportedError(f"{region[0]} splits the picture into regions, as an extension does; leave it out")
        return [_weighted(one) for one in _AND.split(text)]

    def conditionals_of(self, text: str) -> int:
        return len(self.conditionals(text, negative=False))

    def readings(self, text: str, tokenizer: Tokenizer, calls: int, negative: bool = False) -> Iterator[Reading]:
        conditionals = self.conditionals(text, negative)
        for k, (one, weight) in enumerate(conditionals, 1):
            joined = "" if len(conditionals) == 1 and weight == 1 else f"conditional {k}, weight {weight:g}"
            read = _read_at(schedule(one, calls), calls)
            for way, at in read.items():
                when = "" if len(read) == 1 else f"model calls {_ranges(at)}"
                yield Reading(", ".join(filter(None, (joined, when))), self.chunks(way, tokenizer))

    def parts(self, model: Model, texts: Texts, calls: int, negative: bool) -> list[Part]:
        self.check_texts(texts)
        found = []
        for text, weight in self.conditionals(texts[0], negative):
            ends, ways = zip(*schedule(text, calls), strict=True)
            each = dict(zip(ways, self._encode(model, ways), strict=True))  # equal texts share one
            if negative and model.pooled and not any(ways):
                each = {way: zeros(one) for way, one in each.items()}
            found.append(Part(weight, tuple((end, each[way]) for end, way in zip(ends, ways, strict=True))))
        return _equally_long(found)

    def _encode(self, model: Model, ways: Sequence[str]) -> list[Encoded]:
        """Encode the texts of a schedule in one batch, chunk by chunk."""
        each = [self._read(reader, ways) for reader in model.readers]
        return [side_by_side(encoders) for encoders in zip(*each, strict=True)]

    def _read(self, reader: Reader, ways: Sequence[str]) -> list[Encoded]:
        cut = {way: self.chunks(way, reader.tokenizer) for way in dict.fromkeys(ways)}
        texts = [cut[way] for way in ways]
        count = max(map(len, texts))
        empty = _Filling(reader.tokenizer).empty()
        columns = [[chunks[k] if k < len(chunks) else empty for chunks in texts] for k in range(count)]
        contexts, pooled = zip(*(self._column(reader, column) for column in columns), strict=True)
        joined = torch.cat(contexts, dim=1)
        return [Encoded(joined[i : i + 1], pooled[0][i : i + 1]) for i in range(len(ways))]

    def _column(self, reader: Reader, column: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Encode one chunk of every text, and apply the weights."""
        z, pooled = reader([chunk.ids for chunk in column])
        before = z.mean()
        weights = torch.tensor([chunk.weights for chunk in column], device=z.device)
        z = z.to(weights.dtype) * weights[..., None]
        restored = z * (before / z.mean())
        # There a black picture comes of it. A card is not waited for: on one, the check of the finished picture tells.
        if z.device.type == "cpu" and z.isfinite().all() and not restored.isfinite().all():
            mean = "the weights of this prompt leave an encoding whose mean is 0, and restoring the mean gives NaN"
            raise ConfigError(f"prompt_style=a1111: {mean}, as there; change a weight")
        return restored, pooled


def _read_at(ways: Sequence[tuple[int, str]], calls: int) -> dict[str, list[int]]:
    """Return the texts of a schedule, each with the model calls that read it."""
    found: dict[str, list[int]] = {}
    later = iter(ways)
    last, way = next(later)
    for call in range(calls):
        if call > last:
            last, way = next(later)
        found.setdefault(way, []).append(call)
    return found


def _ranges(calls: Sequence[int]) -> str:
    """Return model calls, counted from 1, as people write them: 1 to 3, 5, 7."""
    starts = [c for c in calls if c - 1 not in calls]
    ends = [c for c in calls if c + 1 not in calls]
    return ", ".join(f"{a + 1} to {b + 1}" if b > a else f"{a + 1}" for a, b in zip(starts, ends, strict=True))


def _weighted(text: str) -> Fragment:
    """Take the weight off the end of a conditional; 1 if there is none."""
    found = _WEIGHT.search(text)
    assert found is not None  # the end of the text always fits
    weight = float(found[1] or 1)
    check_weight(text, weight)
    return text[: found.start()], weight


def _equally_long(parts: Sequence[Part]) -> list[Part]:
    """Fill up the shorter ones among conditionals that are joined by AND with their last vector."""
    longest = max(part.ways[0][1].context.shape[1] for part in parts)

    def filled(way: Encoded) -> Encoded:
        missing = longest - way.context.shape[1]
        if not missing:
            return way
        return way._replace(context=torch.cat([way.context, way.context[:, -1:].expand(-1, missing, -1)], dim=1))

    return [part._replace(ways=tuple((last, filled(way)) for last, way in part.ways)) for part in parts]


class _Filling:
    """Chunks in the making: ``ids`` and ``weights`` of the one that is being filled, ``comma`` the place of its last
    comma."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.room = tokenizer.length - 2
        self.done: list[Chunk] = []
        self.comma: int | None = None
        self._begin([], [])

    def of(self, found: Sequence[Fragment]) -> list[Chunk]:
        """Return fragments in chunks."""
        comma = self.tokenizer.ids.get(COMMA)
        for text, weight in found:
            if (text, weight) == BREAK:
                self._finish()
                continue
            check_weight(text, weight)
            ids = self.tokenizer.encode(text, padding=False)
            for i, count in spans(self.tokenizer, ids):
                full = len(self.ids) == self.room
                if ids[i] == comma:
                    self.comma = len(self.ids)
                elif full and self.comma is not None and self.room - self.comma <= BACK:
                    self._wrap(self.comma + 1)
                if len(self.ids) + count > self.room:
                    self._finish()
                check(count <= self.room, f"a learned word of {count} vectors is longer than {self.room}")
                self.ids += ids[i : i + count]
                self.weights += [weight] * count
        if self.ids or not self.done:
            self._finish()
        return self.done

    def empty(self) -> Chunk:
        """Return a chunk without text."""
        return self._padded([], [])

    def _begin(self, ids: list[int], weights: list[float]) -> None:
        self.ids, self.weights = ids, weights
        self.comma = None

    def _wrap(self, at: int) -> None:
        """Finish the chunk before token ``at``, and begin the next one with what follows."""
        ids, weights = self.ids[at:], self.weights[at:]
        self.ids, self.weights = self.ids[:at], self.weights[:at]
        self._finish()
        self._begin(ids, weights)

    def _finish(self) -> None:
        self.done.append(self._padded(self.ids, self.weights))
        self._begin([], [])

    def _padded(self, ids: list[int], weights: list[float]) -> Chunk:
        t, missing = self.tokenizer, self.room - len(ids)
        row = [t.start, *ids, *[t.end] * (missing + 1)]
        if t.pad != t.end:
            end = row.index(t.end) + 1
            row[end:] = [t.pad] * (len(row) - end)
        return Chunk(tuple(row), (1.0, *weights, *[1.0] * (missing + 1)))
