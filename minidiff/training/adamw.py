"""AdamW written out (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2).

Each weight moves by about the learning rate, whatever the size of its gradient, because the gradient's average is
divided by the square root of the average of its square. The order of operations is that of ``torch.optim.AdamW`` on a
CPU, so the weights have the same bits. Torch's own loads its compiler first, which takes longer than a few steps on a
small model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW:
    """Optimiser of ``params``, with the arguments of ``torch.optim.AdamW``. ``param_groups[0]["lr"]`` may be set
    between two steps."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.params = list(params)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.param_groups: list[dict[str, Any]] = [{"params": self.params, "lr": lr}]
        self.taken = 0
        self.means = [torch.zeros_like(p) for p in self.params]  # of the gradient
        self.squares = [torch.zeros_like(p) for p in self.params]  # of its square

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        self.taken += 1
        rate, (first, second) = self.param_groups[0]["lr"], self.betas
        pace = rate / (1 - first**self.taken)  # both averages began at 0, and are too small by these factors
        root = (1 - second**self.taken) ** 0.5
        for p, mean, square in zip(self.params, self.means, self.squares, strict=True):
            if p.grad is not None:
                p.mul_(1 - rate * self.weight_decay)
                mean.lerp_(p.grad, 1 - first)
                square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                p.addcdiv_(mean, (square.sqrt() / root).add_(self.eps), value=-pace)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.params:
            p.grad = None
