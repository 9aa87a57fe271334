"""Results that belong to a tensor, kept as long as it exists and is not written to."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class Kept(Generic[Result]):
    """Results by tensor. Parallel runs have tensors of their own, and a finished run leaves nothing behind.

    Tensors made in inference mode count no writes, and cannot be used here.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[Tensor], int, Result]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, x: Tensor) -> Result | None:
        """Return the result kept for ``x``; None if there is none, or ``x`` was written to since."""
        found = self._by_id.get(id(x))
        return found[2] if found is not None and found[0]() is x and found[1] == x._version else None

    def keep(self, x: Tensor, result: Result) -> Result:
        """Keep ``result`` for ``x`` as it is now, in place of an earlier one, and return it."""
        key = id(x)
        self._by_id[key] = (weakref.ref(x, partial(self._drop, key)), x._version, result)
        return result

    def _drop(self, key: int, gone: weakref.ref[Tensor]) -> None:
        found = self._by_id.get(key)
        if found is not None and found[0] is gone:  # not another tensor that got its id
            self._by_id.pop(key, None)
