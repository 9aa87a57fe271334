"""Classifier-free guidance (Ho & Salimans 2022): exaggerate what the prompt changes.

The network predicts twice, with the prompt and with the negative (or empty) one; the guided prediction walks from the
second through the first and ``scale`` times as far. At 1 the negative prompt cancels out, at 0 the prompt does.
"""

from __future__ import annotations

from torch import Tensor


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """u + scale * (c - u), all of one shape (Ho & Salimans 2022, equation 6, with scale = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Bring the spread of each guided picture back towards the conditional one's (Lin et al. 2023, section 3.4).

    Strong guidance overexposes; ``amount`` in [0, 1] mixes the rescaled prediction in (0.7 is the paper's advice).
    """
    axes = list(range(1, guided.ndim))
    std, wanted = guided.std(dim=axes, keepdim=True), conditional.std(dim=axes, keepdim=True)
    return amount * (guided * (wanted / std)) + (1 - amount) * guided
