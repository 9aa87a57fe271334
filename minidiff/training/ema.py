"""The average of the weights over the last steps: what is sampled from, evaluated and shipped.

Training ends at a random place of a noisy path; the average over its end lies nearer to the middle of the valley
(Polyak & Juditsky 1992; Ho et al. 2020 use 0.9999).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """average = decay * average + (1 - decay) * weights, after every step.

    The decay starts low, (1 + n) / (10 + n) after n steps, or the average would remember its random beginning.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """``weights`` by name; they are copied, in float32, and never changed here."""
        self.decay = decay
        self.average = {name: w.detach().float().clone() for name, w in weights.items()}

    def decay_at(self, steps: int) -> float:
        """The decay of the update after ``steps`` steps; the first one (1) takes the weights as they are."""
        done = max(0, steps - 1)
        return 0.0 if done == 0 else min((1 + done) / (10 + done), self.decay)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Take in ``weights`` as they are after ``steps`` steps."""
        ours, theirs = list(self.average.values()), [weights[name].detach() for name in self.average]
        gap = torch._foreach_sub(ours, theirs)  # one call for all: hundreds of small tensors cost more to launch
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
