"""The result of ``sinkhorn``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdkernels.arguments.sinkhorn import Transport, valid_pairs
from kdkernels.backends.transport import LARGEST_EXPONENT, TransportValues

__all__ = ["SinkhornResult", "as_result"]


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """What ``kd.sinkhorn`` found; shapes are those of the cost's batch, float32 unless an input was float64."""

    distance: Tensor
    """``[...]``: the transport cost ``sum_ij P_ij C_ij``, where a forbidden pair (P = 0, C = inf) counts 0."""
    value: Tensor
    """``[...]``: the regularised objective ``<P, C> + epsilon KL(P | a b)`` (plus ``reach KL`` of a relaxed marginal), as its
    dual: a lower bound that meets it at convergence."""
    f: Tensor
    """``[..., n]``: potentials of the rows; 0 on the padding."""
    g: Tensor
    """``[..., m]``: potentials of the columns."""
    iterations: Tensor
    """int64 ``[...]``: iterations made."""
    marginal_error: Tensor
    """``[...]``: ``sum_i |sum_j P_ij - a_i|``; the columns' marginal is exact. With a relaxed marginal: the largest change of f, in
    units of epsilon, that one more iteration would make."""
    converged: Tensor
    """bool ``[...]``: whether the error is at most the tolerance."""
    potentials: tuple[Tensor, Tensor] = field(repr=False)
    """f and g with all the digits that they were computed with; what ``plan`` and a warm start use."""
    problem: Transport = field(repr=False)

    def plan(self) -> Tensor:
        """The transport plan ``[..., n, m]``, zero on the padding and where the cost is infinite.

        Differentiable in cost, a and b as the potentials are; a constant if the gradient is "envelope".
        """
        problem = self.problem
        batch, n, m = problem.cost.shape
        f, g = self.potentials[0].reshape(batch, n), self.potentials[1].reshape(batch, m)
        exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - problem.cost) / problem.spec.epsilon
        valid = valid_pairs(problem)
        if valid is not None:
            exponent = torch.where(valid, exponent, -torch.inf)
        # Only where neither side has mass would it overflow.
        exponent = exponent.clamp(max=LARGEST_EXPONENT[f.dtype])
        plan = problem.a.unsqueeze(-1) * problem.b.unsqueeze(-2) * exponent.exp()
        if problem.gradient == "envelope":
            plan = plan.detach()
        return plan.to(self.distance.dtype).reshape(*problem.batch_shape, n, m)


def as_result(problem: Transport, values: TransportValues) -> SinkhornResult:
    """The values of a backend as what the user gets."""
    shape, dtype = problem.batch_shape, values.distance.dtype
    distance, value, f, g, iterations, error = (
        tensor.reshape((*shape, *tensor.shape[1:])) for tensor in values[:6]
    )  # fmt: skip
    converged = error <= problem.spec.tolerance
    return SinkhornResult(
        distance, value, f.to(dtype), g.to(dtype), iterations, error, converged, (f, g), problem
    )  # fmt: skip
