r"""sd_embed, as of April 2025 (4a47f71): prompt_parser.py, embedding_funcs.py.

    emphasis   (words), (words:1.3), [words], \( ... as in the web UI: emphasis.py, without spaces around the number

BREAK is the word "BREAK" with the weight -1, and a schedule is plain text in brackets. A prompt without a character is
the word "empty", and so is a negative prompt that is not given.

The shorter of prompt and negative prompt is filled up with end tokens; both are then cut at every 75th token, wherever
that falls. The last chunk of SD1 and SD2 ends with its text, so that a context is as long as its prompt; that of SDXL
is filled up with end tokens, for both encoders.

Each token's output is multiplied by its weight, which is rounded to float16; SDXL's both with the weights of the first
encoder's tokens. The refiner's becomes last + w * (output - last), with the output of the chunk's last token. SDXL's
pooled text is that of the last chunk, unweighted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline.dialects.chunks import Chunk, Encoded, check_weight
from minidiff.pipeline.dialects.dialect import Dialect, Model, Part, Texts, always
from minidiff.pipeline.dialects.emphasis import fragments

NOTHING = "empty"  # what stands for no prompt

Tokens = list[tuple[int, float]]


class SDEmbed(Dialect):
    """Prompts of sd_embed."""

    name = "sd_embed"

    def chunks(self, text: str, tokenizer: Tokenizer) -> list[Chunk]:
        return _cut(tokenizer, _tokens(tokenizer, text), pad=False)

    def parts(self, model: Model, texts: Texts, calls: int, negative: bool) -> list[Part]:
        return always(self._encode(model, self._tokens(model, texts)))

    def pair(
        self, model: Model, prompt: Texts, negative: Texts | None, calls: int
    ) -> tuple[list[Part], list[Part] | None]:
        if negative is None:
            return super().pair(model, prompt, negative, calls)
        sides = [self._tokens(model, texts) for texts in (prompt, negative)]
        for reader, one, two in zip(model.readers, *sides, strict=True):
            length = max(len(one), len(two))
            check(length > 0, "neither prompt nor negative prompt has a token; sd_embed encodes no such pair")
            for own in (one, two):
                own += [(reader.tokenizer.end, 1.0)] * (length - len(own))
        positive, against = (always(self._encode(model, side)) for side in sides)
        return positive, against

    def _tokens(self, model: Model, texts: Texts) -> list[Tokens]:
        """Return the tokens of a prompt for each encoder."""
        self.check_texts(texts)
        return [_tokens(r.tokenizer, text) for text, r in zip(texts, model.readers, strict=True)]

    def _encode(self, model: Model, tokens: Sequence[Tokens]) -> Encoded:
        """Encode the tokens of each encoder, chunk by chunk."""
        each = [_cut(r.tokenizer, own, pad=model.pooled) for own, r in zip(tokens, model.readers, strict=True)]
        check(
            len({*map(len, each)}) == 1 and each[0] != [], "the encoders of this model get different numbers of chunks"
        )
        found = []
        for row in zip(*each, strict=True):
            z, pooled = zip(
                *(reader([chunk.ids]) for chunk, reader in zip(row, model.readers, strict=True)), strict=True
            )
            found.append(Encoded(_weighted(torch.cat(z, dim=-1), row[0], model), pooled[-1]))
        return Encoded(torch.cat([one.context for one in found], dim=1), found[-1].pooled)


def _tokens(tokenizer: Tokenizer, text: str) -> Tokens:
    found: Tokens = []
    for piece, weight in fragments(text or NOTHING, spaces=False):
        check_weight(piece, weight)
        found += [(i, weight) for i in tokenizer.encode(piece)]
    return found


def _cut(tokenizer: Tokenizer, tokens: Tokens, pad: bool) -> list[Chunk]:
    """Cut tokens into chunks; ``pad``: fill up the last one."""
    room, chunks = tokenizer.length - 2, []
    for at in range(0, len(tokens), room):
        ids, weights = zip(*tokens[at : at + room], strict=True)
        padding = 1 + (room - len(ids) if pad else 0)
        chunks.append(Chunk((tokenizer.start, *ids, *[tokenizer.end] * padding), (1.0, *weights, *[1.0] * padding)))
    return chunks


def _weighted(z: Tensor, chunk: Chunk, model: Model) -> Tensor:
    """Apply the weights of a chunk to its output (1, L, D)."""
    weights = torch.tensor(chunk.weights, dtype=torch.float16, device=z.device).to(z.dtype)[:, None]
    if model.pooled and len(model.readers) == 1:  # the refiner
        last = z[:, -1:]
        return torch.where(weights == 1.0, z, last + (z - last) * weights)
    return z * weights
