"""Changes to a model that are made completely or not at all, even if they are interrupted.

Ctrl-C may raise at any point of a program. Each change is therefore recorded before it is made, and any exception
undoes all of them before it propagates. Undoing a change twice is harmless, and so is interrupting it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def set_all(changes: Iterable[tuple[object, str, Any]]) -> None:
    """Set every (object, attribute, value). If an error is raised, nothing is changed."""
    changes = list(changes)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        _set(changes)
    except BaseException:
        surely(lambda: _set(before))
        raise


def _set(changes: Iterable[tuple[object, str, Any]]) -> None:
    for owner, name, value in changes:
        setattr(owner, name, value)


def surely(back: Callable[[], object]) -> None:
    """Call ``back`` until it has completed; an interruption is raised after that."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            back()
            break
        except KeyboardInterrupt as e:
            interrupted = e
    if interrupted is not None:
        raise interrupted


def forward_hook(layer: nn.Module, hook: Callable[..., Any], handles: list[RemovableHandle]) -> None:
    """Register a forward hook of ``layer``; its handle is added to ``handles`` before the hook is active."""
    _register(layer._forward_hooks, hook, handles)


def forward_pre_hook(layer: nn.Module, hook: Callable[..., Any], handles: list[RemovableHandle]) -> None:
    """Register a forward pre-hook of ``layer`` in the same way."""
    _register(layer._forward_pre_hooks, hook, handles)


def _register(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any], handles: list[RemovableHandle]) -> None:
    handle = RemovableHandle(hooks)
    handles.append(handle)
    hooks[handle.id] = hook


class ThreadHook:
    """Hook of a layer for the calls of the thread that made it: those of others, who may share the model, go on as if
    it were not there."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.thread = hook, get_ident()

    def __call__(self, *given: Any) -> Any:
        return self.hook(*given) if get_ident() == self.thread else None
