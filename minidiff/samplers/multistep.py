"""Helpers of the multistep methods in lambda: the order of each step, and checks of its coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.method import Method
from minidiff.schedule import NoiseSchedule

FEW = 15  # runs of fewer steps end with steps of lower order, which are more stable there

Outputs = tuple[Tensor, ...]
"""The latest outputs, converted to the quantity that a method combines, oldest first."""


def highest_orders(n: int, order: int, lower_order_final: bool, first_at_last: bool) -> tuple[int, ...]:
    """Return the highest order of each step of a multistep method, (n,): ``order``, or the number of outputs so far if
    that is lower. With ``lower_order_final`` and few steps, the last two have order 2 and 1 at most; with
    ``first_at_last``, the last has order 1."""
    few = lower_order_final and n < FEW
    orders = [min(order, i + 1) for i in range(n)]
    if few and n > 1:
        orders[-2] = min(orders[-2], 2)
    if few or first_at_last:
        orders[-1] = 1
    return tuple(orders)


def unclipped(schedule: NoiseSchedule, last_alpha_bar: float, lambda_min: float | None) -> int:
    """Return the number of training's timesteps, counted from the lowest, with lambda >= ``lambda_min`` (None: all)."""
    if lambda_min is None:
        return len(schedule)
    alpha_bar = schedule.alphas_cumprod.clone()
    if alpha_bar[-1] == 0:
        alpha_bar[-1] = last_alpha_bar
    lambdas = torch.log(torch.sqrt(alpha_bar)) - torch.log(torch.sqrt(1 - alpha_bar))
    last = len(schedule) - int(torch.searchsorted(lambdas.flip(0), lambda_min))
    check(last >= 1, f"lambda_min_clipped={lambda_min} clips every timestep of training")
    return last


def usable(
    method: Method[Any, Any], orders: tuple[int, ...], order: int, columns: dict[str, Tensor], ahead: int = 1
) -> dict[str, Tensor]:
    """Return ``columns`` of coefficients (n,) for steps of ``order``, set to 0 where no step of that order is made:
    because of ``orders``, or because row i has at most i + ``ahead`` outputs.

    Raises ConfigError if a possible step has coefficients that are not finite: two sigmas are equal, or a higher-order
    step leads to sigma 0. The reference gives NaN there."""
    wanted = torch.tensor([min(o, i + ahead) >= order for i, o in enumerate(orders)], dtype=torch.bool, device="cpu")
    for column in columns.values():
        bad = (wanted & ~column.isfinite()).nonzero().flatten().tolist()
        check(
            not bad,
            f"{method.name}: no finite coefficients of order {order} at rows {bad[:4]} of {len(orders)}, where two "
            "sigmas are equal or the last is 0; use fewer steps, a lower solver_order, lower_order_final or another "
            "final_sigma",
        )
    return {name: torch.where(wanted, column, 0.0) for name, column in columns.items()}
