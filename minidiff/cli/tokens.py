"""``minidiff tokens``: what the text encoder gets of a prompt."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minidiff.cli.options import about, add_options
from minidiff.console import one_line, show
from minidiff.errors import UnsupportedError
from minidiff.pipeline.request import Request

if TYPE_CHECKING:
    from minidiff.models.tokenizer import Tokenizer
    from minidiff.pipeline.dialects.chunks import Chunk

EXAMPLES = """\
examples:
  minidiff tokens "a lighthouse at dawn"
  minidiff tokens "a (red:1.3) [cat:dog:0.5] AND snow :0.4" --prompt-style a1111 --steps 20
  minidiff tokens "a <cat-toy> in ink" --model sd15-with-words.safetensors
"""
LONGEST = 400  # characters of what was cut that are shown


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(commands, "tokens", "print a prompt as the text encoder gets it: chunks, tokens, ids, weights", EXAMPLES)
    p.add_argument("prompt", metavar="PROMPT", help="the text")
    add_options({"": p}, Request, only=("prompt_style", "steps"))
    p.add_argument("--model", metavar="PATH", help="take its tokenizers and learned words (default: those of SD1)")


def run(args: Namespace) -> None:
    """Print the tokens of a prompt, for each tokenizer that reads it in its own way."""
    from minidiff.config import TokenizerConfig
    from minidiff.models.tokenizer import Tokenizer
    from minidiff.pipeline.request import prompt_style

    if args.prompt_style is not None:
        prompt_style("--prompt-style", args.prompt_style)
    named: list[tuple[str, TokenizerConfig]] = [("", TokenizerConfig())]
    if args.model is not None:
        import weights_convert

        config = weights_convert.open_source(args.model).config
        both = (("text encoder", config.tokenizer), ("second text encoder", config.tokenizer_2))
        named = [(name, one) for name, one in both if one is not None]
        if not named:
            raise UnsupportedError(f"{args.model}: a {config.family} model reads no text")
    for name, own in named:
        heading = [f"{name}:"] if len(named) > 1 else []
        show("\n".join([*heading, *_lines(args, Tokenizer(own))]))


def _lines(args: Namespace, tokenizer: Tokenizer) -> Iterator[str]:
    from minidiff.pipeline.dialects import DIALECTS

    if args.prompt_style is None:
        ids, room = tokenizer.encode(args.prompt), tokenizer.length - 2
        yield from _table(tokenizer, [_row(tokenizer, ids[:room])])
        if len(ids) > room:
            yield f"cut: {len(ids) - room} tokens: {one_line(tokenizer.decode(ids[room:]), LONGEST)}"
        return
    dialect = DIALECTS[args.prompt_style]
    for reading in dialect.readings(args.prompt, tokenizer, args.steps or 50):
        yield from [f"{reading.what}:"] if reading.what else []
        yield from _table(tokenizer, reading.chunks)


def _row(tokenizer: Tokenizer, ids: list[int]) -> Chunk:
    from minidiff.pipeline.dialects.chunks import Chunk, row

    return Chunk(tuple(row(tokenizer, ids)), (1.0,) * tokenizer.length)


def _table(tokenizer: Tokenizer, chunks: list[Chunk]) -> Iterator[str]:
    """Yield a line for each token; of start, end and padding only how many there are."""
    yield f"{'chunk':>5}  {'id':>5}  {'weight':>6}  token"
    learned = {i: f"{name} {k}" for name, span in tokenizer.added.items() for k, i in enumerate(span, 1)}
    for number, chunk in enumerate(chunks, 1):
        last = chunk.ids.index(tokenizer.end, 1)
        for i, weight in list(zip(chunk.ids, chunk.weights, strict=True))[1:last]:
            shown = learned.get(i) or tokenizer.decode([i])
            yield f"{number:>5}  {i:>5}  {weight:>6.4g}  {shown}"
        padding = len(chunk.ids) - last - 1
        yield f"{number:>5}  {last - 1} token{'s' * (last != 2)}, {padding} of padding"
