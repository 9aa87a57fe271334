"""Exponential moving average (EMA) of the weights, which is used for sampling, evaluation and the saved model.

Training ends at a random point of a noisy path; the average over its end lies nearer to the minimum (Polyak & Juditsky
1992; Ho et al. 2020 use a decay of 0.9999).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Moving average: average = decay * average + (1 - decay) * weights, after every step.

    The decay starts low, (1 + n) / (10 + n) after n steps, so that the average forgets its random beginning.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Start from a float32 copy of ``weights`` (by name), which are not changed here."""
        self.decay = decay
        self.average = {name: w.detach().float().clone() for name, w in weights.items()}

    def decay_at(self, steps: int) -> float:
        """Return the decay of the update after ``steps`` steps; the first one (1) takes the weights as they are."""
        done = max(0, steps - 1)
        return 0.0 if done == 0 else min((1 + done) / (10 + done), self.decay)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Update the average with ``weights`` after ``steps`` steps."""
        ours, theirs = list(self.average.values()), [weights[name].detach() for name in self.average]
        gap = torch._foreach_sub(ours, theirs)  # one call for all: launching one per small tensor costs more
        torch._foreach_mul_(gap, 1 - self.decay_at(steps))
        torch._foreach_sub_(ours, gap)

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Context manager: inside, ``weights`` hold the average; afterwards, even on errors, their former values."""
        kept = {name: w.detach().clone() for name, w in weights.items()}
        _copy(self.average, weights)
        try:
            yield
        finally:
            _copy(kept, weights)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
