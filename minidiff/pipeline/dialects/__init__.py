"""Dialects: prompts as other programs read them.

minidiff takes a prompt as it stands: every character is text, and what goes beyond 77 tokens is cut off. Other programs
give brackets a meaning, take longer texts, and differ in nearly every detail of both. A :class:`Dialect` is one
program's way, from a text to weighted chunks and from those to what the UNet reads; ``a1111.py`` and its neighbours say
at their top what each does.
"""

from __future__ import annotations

from minidiff.config import one_of
from minidiff.pipeline.dialects.a1111 import A1111
from minidiff.pipeline.dialects.comfyui import ComfyUI
from minidiff.pipeline.dialects.compel import Compel
from minidiff.pipeline.dialects.dialect import Dialect
from minidiff.pipeline.dialects.sd_embed import SDEmbed

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (A1111(), ComfyUI(), Compel(), SDEmbed())}


def read(name: str) -> Dialect:
    """Return a dialect. Raises :class:`ConfigError` for a name that is none."""
    one_of(DIALECTS, prompt_style=name)
    return DIALECTS[name]
