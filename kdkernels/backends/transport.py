"""What a row backend is asked to do for the family ``sinkhorn``.

Tensors are contiguous: ``cost [B, n, m]`` of any supported dtype, ``a [B, n]`` and ``b [B, m]`` of the compute type
(``transport_dtype``), zero on the padding. The padding of ``cost`` may hold anything and must not be read for any result.

``sinkhorn_forward(cost, a, b, spec, keep_history) -> TransportValues``
    The iterations of every problem. With ``E_ij = exp((f_i + g_j - C_ij) / eps)`` the plan is ``P_ij = a_i b_j E_ij``. From
    ``g = spec.start`` (or 0), iteration k = 0, 1, .. with ``eps = spec.epsilons()[k]`` and ``lam = reach / (reach + eps)`` (1 if
    the reach is infinite) is ``f_i = -lam_rows eps log sum_j b_j exp((g_j - C_ij) / eps)``, then
    ``g_j = -lam_columns eps log sum_i a_i exp((f_i - C_ij) / eps)``. A potential whose sum is empty (no allowed partner of
    positive mass) is 0, and takes no part in gradients; so is the padding.
``sinkhorn_backward(cost, a, b, values, spec, gradient, upstream, grad_cost, grad_a, grad_b)``
    Writes the gradients of ``sum(upstream * values)`` (None: not wanted), zeros in the padding and where a pair is forbidden.
    ``values`` is what the forward returned; its histories are there for ``gradient="unrolled"``.

    With row sums ``r_i = sum_j b_j E_ij`` and column sums ``s_j = sum_i a_i E_ij`` of the last iteration (both 1 at a balanced
    optimum) the direct parts are: to C, ``P (1 - C / eps)`` for the distance and ``P`` for the value; to a_i,
    ``sum_j b_j E_ij C_ij`` and ``phi(f_i) - eps (r_i - sum b)``; to f_i, ``sum_j P_ij C_ij / eps`` and
    ``a_i phi'(f_i) - a_i r_i``; alike for b and g. ``phi(x)`` is x, or ``reach (1 - exp(-x / reach))``.

    "envelope": the potentials are constants, and the distance has the gradients of the value.

    "unrolled": (fbar, gbar), the gradients to the last potentials, go back through every iteration that was made. Column
    step, ``Q_ij = a_i exp((f_i + g_j / lam - C_ij) / eps)``: ``Cbar_ij += lam Q_ij gbar_j``, ``fbar_i -= lam sum_j Q_ij gbar_j``,
    ``abar_i -= lam eps sum_j Q_ij / a_i gbar_j``. Row step with g of the iteration before,
    ``R_ij = b_j exp((f_i / lam + g_j - C_ij) / eps)``: ``Cbar_ij += lam R_ij fbar_i``, ``gbar_j = -lam sum_i R_ij fbar_i``,
    ``bbar_j -= lam eps sum_i R_ij / b_j fbar_i``.

    "implicit": the same sums over infinitely many repetitions of the last iteration, by conjugate gradients: solve
    ``h_j - lam_rows lam_columns sum_i E_ij a_i / r_i sum_k E_ik b_k / s_k h_k = -lam_rows sum_i E_ij x0_i / r_i``, where
    ``x0_i = fbar_i - lam_columns a_i sum_j E_ij gbar_j / s_j``, in the inner product weighted by ``b / s``. Then
    ``y = gbar + b h``, ``x_i = fbar_i - lam_columns a_i sum_j E_ij y_j / s_j``,
    ``Cbar_ij += E_ij (lam_rows b_j x_i / r_i + lam_columns a_i y_j / s_j)``,
    ``abar_i -= eps lam_columns sum_j E_ij y_j / s_j``, ``bbar_j -= eps lam_rows sum_i E_ij x_i / r_i``. If both sides are
    balanced, potentials are determined up to a constant only: the right-hand side loses its part along s
    (``rhs -= s sum(b rhs) / sum(b s)``), and ``sum_j b_j h_j = 0``.
``SINKHORN_POTENTIALS``
    The dtype of the potentials that leave the backend (f, g, the histories and the upstream gradients to f and g); None: the
    compute type.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FAULTS",
    "GRADIENTS",
    "LARGEST_EXPONENT",
    "SOLVER_TOLERANCE",
    "TransportGradients",
    "TransportSpec",
    "TransportValues",
    "raise_for_status",
    "transport_dtype",
]

GRADIENTS = ("envelope", "implicit", "unrolled")

SOLVER_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Conjugate gradients stop at this residual, relative to the right-hand side, by the compute type; or after
``2 min(n, m) + 10`` steps."""

LARGEST_EXPONENT = {torch.float32: 69.0, torch.float64: 690.0}
"""Of the density E: only pairs without mass on either side reach it."""

FAULTS = {
    1: "cost of problem {} holds NaN or -inf; +inf forbids a pair",
    2: "cost of problem {} forbids every partner of a row with positive mass",
    3: "cost of problem {} forbids every partner of a column with positive mass",
}
"""What ``TransportValues.status`` may say of a problem besides 0."""


class TransportSpec(NamedTuple):
    """Everything about a batch of problems but costs and marginals."""

    epsilon: float
    max_iterations: int
    tolerance: float = 0.0
    """0: every problem makes all iterations. Else a problem stops after the first one at the final epsilon whose error is
    no larger."""
    row_reach: float = math.inf
    column_reach: float = math.inf
    """Weight of the KL divergence that relaxes a marginal; infinite: the marginal is kept."""
    epsilon_start: float = 0.0
    """Of the first iteration, if larger than epsilon."""
    epsilon_decay: float = 0.5
    row_lengths: Tensor | None = None
    column_lengths: Tensor | None = None
    """int64 ``[B]``."""
    start: Tensor | None = None
    """g to start from, ``[B, m]`` of the potentials' dtype."""

    @property
    def balanced(self) -> bool:
        return math.isinf(self.row_reach) and math.isinf(self.column_reach)

    def epsilons(self) -> list[float]:
        """One per iteration."""
        return [
            max(self.epsilon, self.epsilon_start * self.epsilon_decay**iteration)
            for iteration in range(self.max_iterations)
        ]


class TransportValues(NamedTuple):
    """What the forward returns."""

    distance: Tensor
    """``[B]``, compute type: ``sum P C``, without forbidden pairs."""
    value: Tensor
    """``[B]``, compute type: ``sum_i a_i phi(f_i) + sum_j b_j phi(g_j) - eps (sum P - sum a sum b)``."""
    f: Tensor
    g: Tensor
    """``[B, n]`` and ``[B, m]``, of the potentials' dtype."""
    iterations: Tensor
    """int64 ``[B]``: how many were made; 0 if a length is."""
    error: Tensor
    """``[B]``, compute type. Balanced: ``sum_i a_i |r_i - 1|``. Else the largest ``|f'_i - f_i| / eps`` of rows
    with mass, f' being what one more iteration would make of f."""
    status: Tensor
    """int32 ``[B]``: 0, or what is wrong with the problem, see ``FAULTS``; the results of such a problem do not matter."""
    f_history: Tensor
    g_history: Tensor
    """``[B, max_iterations, n]`` and ``[B, max_iterations, m]``, of the potentials' dtype: after every iteration that was made
    (zeros where nothing was kept: past the last, and of problems whose iterations the backward makes again); or ``[B, 0, n]`` and
    ``[B, 0, m]``."""


class TransportGradients(NamedTuple):
    """Upstream gradients, contiguous, with the shapes and dtypes of the values; None is zero."""

    distance: Tensor | None
    value: Tensor | None
    f: Tensor | None
    g: Tensor | None


def transport_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The compute type: float64 if any of the tensors is, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def raise_for_status(status: Tensor) -> None:
    """Raises ValueError if ``TransportValues.status`` finds fault with a problem."""
    if bool(status.any()):
        place = int((status != 0).int().argmax())
        raise ValueError(FAULTS[int(status[place])].format(place))
