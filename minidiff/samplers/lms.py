"""LMS: linear multistep, a polynomial through the latest slopes, integrated over the next interval (k-diffusion's LMS).

The path is dx / d sigma = slope(x, sigma) with slope (x - x0) / sigma. The Adams-Bashforth method replaces the unknown
slope ahead by the polynomial through the latest m known ones. The weights are integrals of Lagrange polynomials,

    coef[k] = integral from sigma_i to sigma_{i+1} of  prod_{j != k} (tau - sigma_{i-j}) / (sigma_{i-k} - sigma_{i-j})

which depend on the sigmas alone and are part of the plan. Each step takes one model call, and is of order 4 once four
slopes are known.

The reference integrates by scipy's adaptive quadrature, with the integrand in float32. On polynomials of this degree
the quadrature stops after one application of the 21-point Gauss-Kronrod rule (Piessens et al. 1983, QUADPACK's qk21).
The same rule is applied here, in float32, so that the integrand is rounded equally. The closed form of the integral
would be more accurate, but differs by up to 9e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.samplers.checks import check_finite
from minidiff.samplers.levels import SpacedSigmas
from minidiff.samplers.method import Draw, Levels, Next, Outputs, Plan
from minidiff.samplers.options import Rule

MAX_ORDER = 8  # the rule integrates polynomials up to degree 31; in float32 higher orders are noise
Order = Annotated[int, Rule(lambda v: 1 <= v <= MAX_ORDER, f"must lie in 1..{MAX_ORDER}")]

# The rule on -1..1: (node, weight) in the order in which the terms are summed. Every node but 0 stands for its
# negative too. The odd ones of the full list come first: they are those of the 10-point Gauss rule.
NODES = (
    (0.0, 0.149445554002916905664936468389821),
    (0.973906528517171720077964012084452, 0.032558162307964727478818972459390),
    (0.865063366688984510732096688423493, 0.075039674810919952767043140916190),
    (0.679409568299024406234327365114874, 0.109387158802297641899210590325805),
    (0.433395394129247190799265943165784, 0.134709217311473325928054001771707),
    (0.148874338981631210884826001129720, 0.147739104901338491374841515972068),
    (0.995657163025808080735527280689003, 0.011694638867371874278064396062192),
    (0.930157491355708226001207180059508, 0.054755896574351996031381300244580),
    (0.780817726586416897063717578345042, 0.093125454583697605535065465083366),
    (0.562757134668604683339000099272694, 0.123491976262065851077958109585166),
    (0.294392862701460198131126603103866, 0.142775938577060080797094273138717),
)


class Row(NamedTuple):
    """``coefs`` (n, order, order): with m slopes known, entry [i, m - 1, k] is the weight of the k-th latest of them in
    row i."""

    coefs: Tensor

    def shown(self) -> dict[str, Tensor]:
        """Return the weights of a run from the top, for the printed plan: "coef k" -> (n,)."""
        n, order = self.coefs.shape[:2]
        full = torch.stack([self.coefs[i, min(i + 1, order) - 1] for i in range(n)])
        return {f"coef {k}": full[:, k] for k in range(order)}


@dataclass(frozen=True, kw_only=True)
class LMS(SpacedSigmas[Row, Outputs]):
    """LMS sampler. Options: those of :class:`SpacedSigmas`, and ``solver_order``, the number of slopes: 1 is Euler, 4
    is usual, 8 is the maximum. The state is the slopes so far, oldest first.

    ``like_diffusers``: a run that starts at a later row (img2img) uses the weights for as many slopes as a full run
    would have there, although they are not known, so that the weights do not add up.
    """

    solver_order: Order = 4

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw) -> Next[Outputs]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.levels.here[i]
        slopes = (*state, slope)[-self.solver_order :]
        known = min(i + 1, self.solver_order) if self.like_diffusers else len(slopes)
        coefs = plan.at(i).coefs[known - 1]
        move = slope * coefs[0]  # in half precision a 0-dim tensor in front would be rounded to it first
        for k in range(1, len(slopes)):
            move = move + slopes[-1 - k] * coefs[k]
        return x + move, slopes

    def require_usable(self, rows: Row) -> None:
        check_finite(self, rows.coefs)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        return Row(adams_bashforth_coefs(torch.cat([at.here, at.to[-1:]]), self.solver_order))


def adams_bashforth_coefs(sigmas: Tensor, order: int) -> Tensor:
    """Return the weights, (n, order, order) float32, described in :class:`Row`, for float32 ``sigmas`` (n + 1,); 0
    where a row has no such entry."""
    n = len(sigmas) - 1
    start, end = sigmas[:-1].double(), sigmas[1:].double()
    center, half = 0.5 * (start + end), 0.5 * (end - start)
    coefs = torch.zeros(n, order, order, dtype=torch.float32, device="cpu")
    for known in range(1, min(order, n) + 1):
        rows = torch.arange(known - 1, n, device="cpu")
        past = [sigmas[rows - j] for j in range(known)]
        for k in range(known):
            total = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
            for node, weight in NODES:
                value = _lagrange(center[rows] - half[rows] * node, past, k)
                if node:
                    value = value + _lagrange(center[rows] + half[rows] * node, past, k)
                total = total + weight * value
            coefs[rows, known - 1, k] = (total * half[rows]).float()
    return coefs


def _lagrange(tau: Tensor, past: Sequence[Tensor], k: int) -> Tensor:
    """Evaluate the polynomial that is 1 at ``past[k]`` and 0 at the others, at float64 ``tau`` (rows,), in float32."""
    at = tau.float()
    value = torch.ones_like(at)
    for j, other in enumerate(past):
        if j != k:
            value = value * ((at - other) / (past[k] - other))
    return value.double()
