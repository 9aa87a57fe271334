"""Looking into a run: every stage's value is shown to a tap, and the run goes on with what the tap gives back.

A tap that returns the value itself only watches. One that returns another side's value makes every stage begin from
that side's numbers, so that what differs at a stage is what happened there and nothing that was inherited.

Modules are watched by forward hooks: ``NAME:in`` is the first tensor that a module is given, ``NAME`` the first that it
returns. What happens between modules (skips, activations, heads) shows where one hands over to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Tap = Callable[[str, Tensor], Tensor]
"""(stage, value) -> the value that the run goes on with."""

Side = Callable[[Tap], None]
"""One implementation's run, from its start, showing every stage to the tap."""

Show = Callable[["Probe", Any], Any]
"""How an argument of a network is shown; gives what the network is called with."""

Inputs = Sequence[tuple[Show, int, tuple[str, ...]]]
"""(how it is shown, position, keywords): which arguments of a network are stages of their own."""

INPUT = ":in"


class Probe:
    """One run's way to its tap. ``scope`` is put before the names of modules and ``deep`` says, scope by scope,
    whether they are shown at all; a stage that comes again is numbered (``conv#2``)."""

    def __init__(self, tap: Tap, deep: Callable[[str], bool] = lambda scope: True) -> None:
        self.tap, self.deep, self.scope = tap, deep, ""
        self.seen: Counter[str] = Counter()

    def show(self, name: str, value: Any, scope: str | None = None) -> Any:
        """Show ``value``, the stage ``name`` of ``scope`` (None: the current one), if it is a tensor; gives what to go
        on with."""
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
        """Show inputs and outputs of the modules inside ``module``, {its name: the stage's}, for the time being.
        ``scope``: the one that begins when one of them is called."""
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
        """Show the arguments of a whole network, as ``inputs`` say, and its ``output``; each of its calls begins the
        next of ``scopes``."""

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
    """An argument that is one stage."""
    return lambda probe, value: probe.show(stage, value)


def hook(stack: ExitStack, part: nn.Module, before: Any, after: Any) -> None:
    """Put both hooks on ``part`` until ``stack`` is left."""
    stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(part.register_forward_hook(after).remove)


def swap_first(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """``value`` with the first tensor in it changed, wherever it lies: in a tuple, a dict, an output object.

    What cannot be rebuilt is handed to ``change`` all the same, and stays as it is.
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
                    value[key] = new  # the outputs of transformers and diffusers are such
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
    """Every floating-point weight and buffer in float64 for the time being, then the very same tensors again."""
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
