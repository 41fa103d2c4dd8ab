"""``sinkhorn``."""

from __future__ import annotations

import warnings

from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import Transport
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import sinkhorn as operator
from kdkernels.reference.sinkhorn import solve
from kdkernels.transforms import values_are_known
from kdkernels.transport import SinkhornResult, as_result

__all__ = ["sinkhorn"]


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    max_iterations: int = 100,
    tolerance: float = 0.0,
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    gradient: str = "implicit",
    unbalanced: float | tuple[float | None, float | None] | None = None,
    marginals: str = "probability",
    epsilon_start: float | None = None,
    epsilon_decay: float = 0.5,
    warm_start: SinkhornResult | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> SinkhornResult:
    """Entropic optimal transport of a batch of problems by Sinkhorn's iterations (Cuturi 2013), in the log domain.

    Minimises ``<P, C> + epsilon KL(P | a b)`` over the plans P whose rows sum to ``a`` and whose columns sum to ``b``. The plan is
    ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)``; an iteration updates f from g, then g from f. Every problem has its
    own number of iterations; costs of 1e4 at epsilon 1e-3 are fine.

    Args:
        cost: ``[..., n, m]``; float32, bfloat16, float16 or float64. ``+inf`` forbids a pair.
        a: masses of the rows, ``[..., n]`` or what broadcasts to it, not negative, zero allowed. None: see ``marginals``.
        b: masses of the columns, ``[..., m]``, with the same sum.
        epsilon: strength of the entropy, in the units of the cost; positive.
        max_iterations: at most so many, at least 1.
        tolerance: a problem stops when its ``marginal_error`` is no larger; 0: all iterations are made.
        row_lengths: integers ``[...]``: problem i has that many rows, the others are padding, whose content (NaN, too) is
            never used. A problem without rows or columns has distance 0.
        column_lengths: the same for columns.
        gradient: how cost, a and b get their gradient. "implicit": of the exact solution (implicit function theorem; by
            conjugate gradients), right as far as the iterations have converged; potentials are determined up to a constant
            ``(f + c, g - c)``, so an upstream gradient along that is dropped, and a gradient to a and b is meant for changes
            that keep their sums equal. "unrolled": exact, of the iterations that were made, from their potentials alone.
            "envelope": plan and potentials are constants, ``distance`` and ``value`` have the gradients P to the cost, f to a
            and g to b, which is right for ``value`` at convergence; nothing else has a gradient.
        unbalanced: reach (weight of a KL divergence) that relaxes both marginals, or a pair (rows, columns) in which None
            keeps one; the objective gains ``reach KL(P 1 | a)`` and ``reach KL(P' 1 | b)`` (Chizat et al. 2018).
        marginals: what those are that are not given. "probability": uniform over the valid part. "unit": all 1, so that the
            plan is doubly stochastic (matrix scaling, Sinkhorn 1964).
        epsilon_start: iteration k works with ``max(epsilon, epsilon_start * epsilon_decay**k)``; None: always with epsilon.
        epsilon_decay: between 0 and 1.
        warm_start: an earlier result or potentials ``(f, g)`` of the same shape to start from; f follows from g. Detached.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best available.

    Returns:
        ``SinkhornResult``. A row or column of mass 0 whose pairs are all forbidden has the potential 0. With a tolerance that
        is missed on the CPU, a warning is given once per process; ``converged`` says where.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it. Values are checked on CPU tensors and under ``kd.debug``:
            also a cost that is NaN or -inf, and positive mass all of whose pairs are forbidden.
        RuntimeError: the backend asked for is not available here.
    """
    problem = arguments.prepare_sinkhorn(
        cost,
        a,
        b,
        epsilon=epsilon,
        max_iterations=max_iterations,
        tolerance=tolerance,
        row_lengths=row_lengths,
        column_lengths=column_lengths,
        gradient=gradient,
        unbalanced=unbalanced,
        marginals=marginals,
        epsilon_start=epsilon_start,
        epsilon_decay=epsilon_decay,
        warm_start=warm_start,
    )
    device = cost.device.type
    backend = backend_for(backend, device, "sinkhorn")
    with autocast_disabled(device):
        if backend == "reference":
            result = as_result(problem, solve(problem))
        else:
            result = as_result(problem, operator.sinkhorn(problem, backend))
    if tolerance > 0:
        report(problem, result)
    return result


def report(problem: Transport, result: SinkhornResult) -> None:
    """Warns if a problem has not converged, where knowing that costs no synchronisation."""
    if not (result.converged.device.type == "cpu" and values_are_known()):
        return
    missed = int((~result.converged).sum())
    if missed and not Warned.already:
        Warned.already = True
        warnings.warn(
            f"sinkhorn: {missed} of {result.converged.numel()} problems missed the tolerance {problem.spec.tolerance:g} in "
            f"{problem.spec.max_iterations} iterations; the result's `converged` says which (this is said once)",
            stacklevel=3,
        )


class Warned:
    """Whether this process has been told of a problem that did not converge."""

    already = False
