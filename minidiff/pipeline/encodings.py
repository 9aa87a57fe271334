"""A text encoder that keeps what it has encoded, for many runs with few prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from minidiff.models.replacement import Replacement
from minidiff.pipeline.base import Pipeline


class Encoded(Replacement):
    """Replacement for the ``forward`` of a text encoder, whose output follows from its arguments alone."""

    def __init__(self, layer: nn.Module) -> None:
        self.kept: dict[Any, Any] = {}
        super().__init__(layer)

    def __call__(self, *given: Any, **named: Any) -> Any:
        parts = [_content(part) for part in (*given, *named.values())]
        key = (tuple(named), *parts)
        if key not in self.kept:
            self.kept[key] = self.inner(*given, **named)
        return self.kept[key]


def _content(part: Any) -> Any:
    """Return a tensor's shape and numbers, to be compared; anything else as it is."""
    return (tuple(part.shape), part.cpu().numpy().tobytes()) if isinstance(part, Tensor) else part


@contextmanager
def encoded_once(pipe: Pipeline) -> Iterator[None]:
    """Context manager: inside it, the text encoders of ``pipe`` encode each text once. One thread at a time."""
    encoders = [pipe.parts[name] for name in ("text_encoder", "text_encoder_2") if name in pipe.parts]
    try:
        for encoder in encoders:
            Encoded(encoder)
        yield
    finally:
        for encoder in encoders:
            Encoded.take_off(encoder)
