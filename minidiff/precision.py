"""Half precision without black pictures: what stays in float32, and who to blame when something overflows all the same.

float16 ends at 65504. The activations of SDXL's autoencoder go beyond that, and so do the attention scores of
Stable Diffusion 2.1; both give NaN, and NaN is a black picture. The configs say so (``VAEConfig.upcast``,
``UNetConfig.upcast_attention``), as their checkpoints do. In float32 and bfloat16 nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.config import ControlConfig, ModelConfig, UNetConfig, VAEConfig
from minidiff.errors import MinidiffError
from minidiff.models.attention import Attention, attention
from minidiff.models.undo import ThreadHook, forward_hook


def attention_in_float32(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """:func:`~minidiff.models.attention.attention` of float16 tensors, computed in float32."""
    return attention(q.float(), k.float(), v.float(), causal).to(q.dtype)


def apply_policy(config: ModelConfig | ControlConfig, parts: Mapping[str, nn.Module]) -> None:
    """Give every part of a model the precision that its family needs, after its weights came or changed their dtype."""
    for name, part in parts.items():
        own = getattr(config, name)
        if isinstance(own, UNetConfig):
            careful = own.upcast_attention and _dtype(part) == torch.float16
            for module in part.modules():
                if isinstance(module, Attention) and module.kernel in (attention, attention_in_float32):
                    module.kernel = attention_in_float32 if careful else attention
        if isinstance(own, VAEConfig) and own.upcast and _dtype(part) == torch.float16:
            part.float()


def _dtype(part: nn.Module) -> torch.dtype:
    return next(part.parameters()).dtype


# --- who made the first NaN -----------------------------------------------------------------------------------------


class _FoundError(Exception):
    """Ends a forward pass at the culprit."""


@contextmanager
def watched(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context manager: inside, the first module that returns a value that is not finite ends the pass with a
    :class:`MinidiffError` that names it. In this thread: what others do with the same modules goes on."""

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, _: Any, out: Any) -> None:
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                    raise _FoundError(f"{name} ({type(module).__name__}, {str(tensor.dtype).removeprefix('torch.')})")

        return look

    named = {f"{part}.{name}".rstrip("."): m for part, module in parts.items() for name, m in module.named_modules()}
    handles: list[RemovableHandle] = []
    try:
        for name, module in named.items():
            forward_hook(module, ThreadHook(watch(name)), handles)
        yield
    except _FoundError as e:
        raise MinidiffError(f"NaN or infinite values, first from {e}; {ADVICE}") from None
    finally:
        for handle in handles:
            handle.remove()


ADVICE = "compute in float32 (dtype=torch.float32, or --dtype float32), or check the weights (minidiff info --check)"


def check_finite(x: Tensor, parts: Mapping[str, nn.Module], again: Callable[[], object]) -> None:
    """Raise :class:`MinidiffError` unless ``x`` is finite, naming the module at fault.

    Only then is ``again`` called, which is to do once more what led to ``x``, now watched: the way that goes well pays
    one look at the result and no more.
    """
    if bool(x.isfinite().all()):
        return
    with watched(parts):
        again()
    raise MinidiffError(f"the result is NaN or infinite, though every module's output is finite; {ADVICE}")
