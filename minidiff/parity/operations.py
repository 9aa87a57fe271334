"""Below a module: the first operation at which two sides part, when both run in torch.

While a stage is computed, on equal inputs, every operation of torch is recorded with hashes of the numbers that went in
and came out. The hash does not depend on the order of the numbers, so that views, transposed layouts and copies have
that of their source: an operation is where a value arises that the other side does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minidiff.errors import MinidiffError

MIXERS = (-7046029254386353131, -4417276706812531889)  # odd, of random bits (2 ** 64 / golden ratio; splitmix64)
ADDRESS = re.compile(r" object at 0x[0-9a-f]+")  # two objects differ by it, and two runs
LONGEST = 120  # characters of one operation's description


class Call(NamedTuple):
    """One operation: its name, the arguments that are no tensors, and hashes of those that are, and of the results."""

    name: str
    literals: tuple[str, ...]
    given: tuple[int, ...]
    made: tuple[int, ...]

    def __str__(self) -> str:
        shown = f"{self.name}({', '.join(self.literals)})"
        return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 5]} ...)"


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recorder of the operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.active = False

    def start(self) -> None:
        """Record from here on, and forget what was recorded."""
        self.calls.clear()
        self.__enter__()  # type: ignore[no-untyped-call]
        self.active = True

    def stop(self) -> None:
        """End the recording, if it has begun."""
        if self.active:
            self.active = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*_leaves(args), *_leaves(kwargs or {})]
        before = tuple(number(x) for x in given if isinstance(x, Tensor))
        out = func(*args, **(kwargs or {}))
        literals = tuple(ADDRESS.sub("", repr(x)) for x in given if not isinstance(x, Tensor) and x is not None)
        made = tuple(number(x) for x in _leaves(out) if isinstance(x, Tensor))
        name = str(func).removesuffix(".default")
        self.calls.append(Call(name, literals, before, made))
        return out


def parting(run_a: Callable[[Recorder], None], run_b: Callable[[Recorder], None]) -> tuple[Call | None, Call | None]:
    """Return the first operations of both that make a value the other does not have; None for a side without one."""
    recorders = []
    for run in (run_a, run_b):
        recorder = Recorder()
        try:
            with suppress(RuntimeError, MinidiffError):
                run(recorder)
        finally:
            recorder.stop()
        recorders.append(recorder.calls)
    have = [{value for call in calls for value in (*call.given, *call.made)} for calls in recorders]
    first = [
        next((call for call in calls if not others.issuperset(call.made) and set(call.made) - set(call.given)), None)
        for calls, others in zip(recorders, have[::-1], strict=True)
    ]
    return first[0], first[1]


def between(
    tape: Mapping[str, Tensor], stage: str, replaced: Callable[[Tensor, Tensor], Tensor], recorder: Recorder
) -> Callable[[str, Tensor], Tensor]:
    """Return a tap that hands a run the tape's values, and records the operations between ``stage`` and the one before
    it; for the first stage, from here on."""
    stages = list(tape)
    before = stages[stages.index(stage) - 1] if stage != stages[0] else None
    if before is None:
        recorder.start()

    def tap(at: str, value: Tensor) -> Tensor:
        if at not in tape:
            return value
        recorder.stop()
        value = replaced(value, tape[at])
        if at == before:
            recorder.start()
        return value

    return tap


def describe(a: Call | None, b: Call | None) -> str:
    """Describe in one line where two sides part."""
    if a is None and b is None:
        return ""
    if a is not None and b is not None and a.name == b.name:
        if a.literals == b.literals:
            return f"{a}, on other weights" if set(a.given) != set(b.given) else f"{a}, by other sums"
        return f"{a} in A, {b} in B"
    return f"{a or 'no operation of its own'} in A, {b or 'no operation of its own'} in B"


def number(x: Tensor) -> int:
    """Return a hash of a tensor's numbers that does not depend on their order."""
    x = x.detach()
    if x.numel() == 0 or x.layout != torch.strided or x.is_complex():
        return hash((tuple(x.shape), str(x.dtype)))
    x = x.double() + 0.0 if x.is_floating_point() else x.long()
    bits = x.contiguous().view(torch.int64).reshape(-1) if x.is_floating_point() else x.reshape(-1)
    mixed = (bits + MIXERS[0]) * MIXERS[1]
    mixed = (mixed ^ (mixed >> 29)) * MIXERS[0]
    return int((mixed ^ (mixed >> 32)).sum())


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _leaves(entry)
    else:
        yield value
