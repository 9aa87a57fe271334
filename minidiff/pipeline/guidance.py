"""Classifier-free guidance (Ho & Salimans 2022): amplify the effect of the prompt.

The network predicts twice, with the prompt and with the negative (or empty) prompt. The guided prediction starts at the
second and goes ``scale`` times the difference towards the first. At scale 1 the negative prompt cancels out, at 0 the
prompt does.
"""

from __future__ import annotations

from torch import Tensor


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return u + scale * (c - u), all of the same shape (Ho & Salimans 2022, equation 6, with scale = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Rescale each guided prediction towards the standard deviation of the conditional one (Lin et al. 2023, 3.4).

    Strong guidance overexposes pictures. ``amount`` in [0, 1] is the share of the rescaled prediction in the result;
    the paper recommends 0.7.
    """
    axes = list(range(1, guided.ndim))
    std, wanted = guided.std(dim=axes, keepdim=True), conditional.std(dim=axes, keepdim=True)
    return amount * (guided * (wanted / std)) + (1 - amount) * guided
