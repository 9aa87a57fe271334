"""Observation of a run: the value of every stage is shown to a tap, and the run continues with what the tap returns.

A tap that returns the value itself only observes. One that returns another side's value makes every stage start from
that side's numbers, so that differences at a stage arose there and were not inherited.

Modules are observed by forward hooks: ``NAME:in`` is the first input tensor of a module, ``NAME`` its first output.
Operations between modules (skips, activations, heads) show in the input of the next module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.models.undo import ThreadHook
from minidiff.parity.rows import INPUT

Tap = Callable[[str, Tensor], Tensor]
"""(stage, value) -> the value that the run goes on with."""

Side = Callable[[Tap], None]
"""One implementation's run, from its start, showing every stage to the tap."""

Show = Callable[["Probe", Any], Any]
"""Function that shows an argument of a network and returns what the network is called with."""

Inputs = Sequence[tuple[Show, int, tuple[str, ...]]]
"""(how it is shown, position, keywords): which arguments of a network are stages of their own."""


class Probe:
    """Connection of one run to its tap.

    ``scope`` is prepended to the names of modules, and ``deep`` decides for each scope whether they are shown; repeated
    stages are numbered (``conv#2``).
    """

    def __init__(self, tap: Tap, deep: Callable[[str], bool] = lambda scope: True) -> None:
        self.tap, self.deep, self.scope = tap, deep, ""
        self.seen: Counter[str] = Counter()

    def show(self, name: str, value: Any, scope: str | None = None) -> Any:
        """Show ``value``, the stage ``name`` of ``scope`` (None: the current one), if it is a tensor.

        Returns the value to continue with.
        """
        if not isinstance(value, Tensor):
            return value
        scope = self.scope if scope is None else scope
        stage = f"{scope}/{name}" if scope else name
        self.seen[stage] += 1
        if self.seen[stage] > 1:
            bare = stage.removesuffix(INPUT)
            stage = f"{bare}#{self.seen[stage]}{stage[len(bare) :]}"
        return self.tap(stage, value)

    @contextmanager
    def watch(self, module: nn.Module, names: Mapping[str, str], scope: str | None = None) -> Iterator[None]:
        """Return a context that shows inputs and outputs of the modules inside ``module``, {its name: the stage's}.

        ``scope``: the scope that begins when one of them is called.
        """
        with ExitStack() as stack:
            for name, stage in names.items():
                self._hook(stack, module.get_submodule(name), stage, scope)
            yield

    def _hook(self, stack: ExitStack, part: nn.Module, stage: str, scope: str | None) -> None:
        def before(part: nn.Module, args: Any, kwargs: Any) -> Any:
            self.scope = self.scope if scope is None else scope
            if not self.deep(self.scope):
                return None
            (args, kwargs), _ = swap_first((args, kwargs), lambda x: self.show(stage + INPUT, x))
            return args, kwargs

        def after(part: nn.Module, args: Any, out: Any) -> Any:
            return swap_first(out, lambda x: self.show(stage, x))[0] if self.deep(self.scope) else None

        hook(stack, part, before, after)

    @contextmanager
    def watch_root(
        self, module: nn.Module, scopes: Iterator[str], inputs: Inputs, output: str | None = None
    ) -> Iterator[None]:
        """Return a context that shows the arguments of a whole network, as given by ``inputs``, and its ``output``.

        Each call of the network begins the next of ``scopes``.
        """

        def before(part: nn.Module, args: Any, kwargs: Any) -> Any:
            self.scope = next(scopes)
            args, kwargs = list(args), dict(kwargs)
            for show, position, keywords in inputs:
                if position < len(args):
                    args[position] = show(self, args[position])
                for key in kwargs.keys() & set(keywords):
                    kwargs[key] = show(self, kwargs[key])
            return tuple(args), kwargs

        def after(part: nn.Module, args: Any, out: Any) -> Any:
            return None if output is None else swap_first(out, lambda x: self.show(output, x))[0]

        with ExitStack() as stack:
            hook(stack, module, before, after)
            yield


def named(stage: str) -> Show:
    """Describe an argument that is one stage."""
    return lambda probe, value: probe.show(stage, value)


def hook(stack: ExitStack, part: nn.Module, before: Any, after: Any) -> None:
    """Register both hooks on ``part`` until ``stack`` is closed. They see the calls of this thread only: those of other
    threads belong to other runs, and go on as they are."""
    stack.callback(part.register_forward_pre_hook(ThreadHook(before), with_kwargs=True).remove)
    stack.callback(part.register_forward_hook(ThreadHook(after)).remove)


def swap_first(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """Return ``value`` with its first tensor changed, also inside a tuple, a dict or an output object.

    A value that cannot be rebuilt is passed to ``change`` as well, and stays as it is.
    """
    if isinstance(value, Tensor):
        return change(value), True
    if isinstance(value, (tuple, list)):
        return _swap_in_sequence(value, change)
    if isinstance(value, Mapping):
        for key, entry in value.items():
            new, found = swap_first(entry, change)
            if found:
                if isinstance(value, MutableMapping) and new is not entry:
                    value[key] = new  # as the outputs of transformers and diffusers are
                return value, True
    return value, False


def _swap_in_sequence(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    for k, entry in enumerate(value):
        new, found = swap_first(entry, change)
        if found:
            if new is entry:
                return value, True
            entries = [*value[:k], new, *value[k + 1 :]]
            return (type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)), True
    return value, False


@contextmanager
def in_float64(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Return a context in which floating-point weights and buffers are float64; afterwards the same tensors return."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in modules:
            for part in module.modules():
                tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
                for table in tables:
                    for name, tensor in table.items():
                        if tensor is not None and tensor.is_floating_point():
                            kept.append((table, name, tensor))
                            wide = tensor.detach().to(torch.float64)
                            is_weight = isinstance(tensor, nn.Parameter)
                            table[name] = nn.Parameter(wide, requires_grad=False) if is_weight else wide
        yield
    finally:
        for table, name, tensor in reversed(kept):
            table[name] = tensor
