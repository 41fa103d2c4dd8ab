"""``sinkhorn`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import Transport
from kdkernels.arguments.sinkhorn import valid_pairs
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.transport import LARGEST_EXPONENT, TransportSpec, TransportValues, raise_for_status
from kdkernels.debugging import values_are_checked
from kdkernels.transforms import values_are_known
from kdkernels.transport import SinkhornResult, as_result

__all__ = ["sinkhorn", "solve", "values_of"]


def sinkhorn(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, **options: Any) -> SinkhornResult:
    """See ``kdkernels.sinkhorn``: same arguments, one tensor operation at a time.

    "unrolled" is left to autograd, "implicit" solves the dense adjoint system. No warning where it does not converge.
    """
    defaults: dict[str, Any] = {
        "max_iterations": 100,
        "tolerance": 0.0,
        "row_lengths": None,
        "column_lengths": None,
        "gradient": "implicit",
        "unbalanced": None,
        "marginals": "probability",
        "epsilon_start": None,
        "epsilon_decay": 0.5,
        "warm_start": None,
    }
    problem = arguments.prepare_sinkhorn(cost, a, b, **(defaults | options))
    with autocast_disabled(cost.device.type):
        return as_result(problem, solve(problem))


class Iterate(NamedTuple):
    f: Tensor
    g: Tensor
    iterations: Tensor


def solve(problem: Transport) -> TransportValues:
    """The answer of a backend, differentiable in cost, a and b."""
    a, b, spec = problem.a, problem.b, problem.spec
    cost = problem.cost.to(a.dtype)
    valid = valid_pairs(problem)
    if valid is not None:
        cost = torch.where(valid, cost, math.inf)
    if values_are_checked(cost):
        check_cost(cost, a, b)
    if problem.gradient == "unrolled":
        f, g, iterations = iterate(cost, a, b, spec)
    else:
        with torch.no_grad():
            f, g, iterations = iterate(cost, a, b, spec)
        if problem.gradient == "implicit" and differentiated(cost, a, b):
            f, g = attached(f, g, cost, a, b, spec)
    distance, value = values_of(f, g, cost, a, b, spec)
    if problem.gradient == "envelope":
        distance = distance.detach() + (value - value.detach())
    with torch.no_grad():
        error = marginal_error(f, g, cost, a, b, spec)
    nothing = f.new_empty(0)
    return TransportValues(distance, value, f, g, iterations, error, nothing, nothing, nothing)


def differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient may be wanted; in a transformation that is not to be known."""
    return torch.is_grad_enabled() and (not values_are_known() or any(tensor.requires_grad for tensor in tensors))


def check_cost(cost: Tensor, a: Tensor, b: Tensor) -> None:
    """As the kernels do, raises for the first problem that cannot be solved."""
    allowed = cost < math.inf
    pairs = allowed & (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    faults = (
        (cost.isnan() | cost.isneginf()).any(-1).any(-1),
        ((a > 0) & ~pairs.any(-1)).any(-1),
        ((b > 0) & ~pairs.any(-2)).any(-1),
    )
    status = torch.zeros(len(cost), dtype=torch.int32, device=cost.device)
    for code, fault in reversed(list(enumerate(faults, 1))):
        status = torch.where(fault, code, status)
    raise_for_status(status)


def relaxation(reach: float, epsilon: float) -> float:
    """How much of a balanced update a relaxed one makes."""
    return 1.0 if math.isinf(reach) else reach / (reach + epsilon)


def update(scores: Tensor, mass: Tensor, epsilon: float, reach: float) -> Tensor:
    """``-lam eps log sum_j mass_j exp(scores_ij / eps)``, 0 where the sum is empty."""
    exponents = scores / epsilon
    counting = exponents.detach().masked_fill((mass == 0).unsqueeze(-2), -math.inf)
    largest = (
        counting.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    )
    empty = largest.isneginf()
    largest = torch.where(empty, 0, largest)
    terms = (exponents - largest).clamp(max=LARGEST_EXPONENT[mass.dtype]).exp()
    total = (terms * mass.unsqueeze(-2)).sum(-1)
    logarithm = largest.squeeze(-1) + torch.where(empty.squeeze(-1), 1, total).log()
    return torch.where(empty.squeeze(-1), 0, -relaxation(reach, epsilon) * epsilon * logarithm)


def row_update(g: Tensor, cost: Tensor, b: Tensor, epsilon: float, reach: float) -> Tensor:
    return update(g.unsqueeze(-2) - cost, b, epsilon, reach)


def column_update(f: Tensor, cost: Tensor, a: Tensor, epsilon: float, reach: float) -> Tensor:
    return update(f.unsqueeze(-2) - cost.mT, a, epsilon, reach)


def iterate(cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec) -> Iterate:
    """The potentials after the iterations of each problem, and how many it made."""
    f, g = torch.zeros_like(a), torch.zeros_like(b) if spec.start is None else spec.start.to(b.dtype)
    pending = torch.ones(len(cost), dtype=torch.bool, device=cost.device) & (0 not in cost.shape)
    for lengths in (spec.row_lengths, spec.column_lengths):
        if lengths is not None:
            pending = pending & (lengths > 0)
    g = torch.where(pending.unsqueeze(-1), g, 0)
    iterations = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    for epsilon in spec.epsilons():
        moved_f = row_update(g, cost, b, epsilon, spec.row_reach)
        moved_g = column_update(moved_f, cost, a, epsilon, spec.column_reach)
        f = torch.where(pending.unsqueeze(-1), moved_f, f)
        g = torch.where(pending.unsqueeze(-1), moved_g, g)
        iterations = iterations + pending
        if spec.tolerance > 0 and epsilon == spec.epsilon:
            with torch.no_grad():
                pending = pending & (marginal_error(f, g, cost, a, b, spec) > spec.tolerance)
            if values_are_known() and not bool(pending.any()):
                break
    return Iterate(f, g, iterations)


def kernel(f: Tensor, g: Tensor, cost: Tensor, spec: TransportSpec) -> Tensor:
    """``E_ij``: the plan's density with respect to a b."""
    exponents = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / spec.epsilon
    return exponents.clamp(max=LARGEST_EXPONENT[cost.dtype]).exp()


def marginal_error(f: Tensor, g: Tensor, cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec) -> Tensor:
    if 0 in cost.shape:
        return cost.new_zeros(len(cost))
    moved = row_update(g, cost, b, spec.epsilon, spec.row_reach)
    change = (moved - f) / spec.epsilon
    if spec.balanced:
        return (a * torch.expm1(-change).abs()).sum(-1)
    return torch.where(a > 0, change.abs(), 0).amax(-1)


def conjugate(potential: Tensor, reach: float) -> Tensor:
    """``phi``, which the dual objective takes of a potential."""
    return potential if math.isinf(reach) else -reach * torch.expm1(-potential / reach)


def values_of(f: Tensor, g: Tensor, cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec) -> tuple[Tensor, Tensor]:
    """Distance and value, differentiable in all the tensors."""
    plan = a.unsqueeze(-1) * b.unsqueeze(-2) * kernel(f, g, cost, spec)
    distance = (plan * torch.where(cost == math.inf, 0, cost)).sum((-1, -2))
    masses = a.sum(-1) * b.sum(-1)
    value = (a * conjugate(f, spec.row_reach)).sum(-1) + (b * conjugate(g, spec.column_reach)).sum(-1)
    return distance, value - spec.epsilon * (plan.sum((-1, -2)) - masses)


def attached(f: Tensor, g: Tensor, cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec) -> tuple[Tensor, Tensor]:
    """The potentials with the derivative that the fixed-point equations give them: the transpose of what
    ``kdkernels.backends.transport`` says of the adjoint."""
    epsilon = spec.epsilon
    moved_f = row_update(g, cost, b, epsilon, spec.row_reach)
    moved_g = column_update(f, cost, a, epsilon, spec.column_reach)
    df, dg = moved_f - moved_f.detach(), moved_g - moved_g.detach()
    with torch.no_grad():
        lam_rows, lam_columns = relaxation(spec.row_reach, epsilon), relaxation(spec.column_reach, epsilon)
        density = kernel(f, g, cost, spec)
        r, s = (density * b.unsqueeze(-2)).sum(-1), (density * a.unsqueeze(-1)).sum(-2)
        r, s = torch.where(r > 0, r, 1), torch.where(s > 0, s, 1)
        to_rows = density / r.unsqueeze(-1)
        to_columns = density.mT / s.unsqueeze(-1)
        system = lam_rows * lam_columns * (to_rows * a.unsqueeze(-1)).mT @ (to_columns.mT * b.unsqueeze(-2))
        system = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device) - system
        shift = (b * s).sum(-1, keepdim=True)
        shift = torch.where(shift > 0, shift, 1)
        if spec.balanced:
            system = system + s.unsqueeze(-1) * (b / shift).unsqueeze(-2)
    dy = dg - lam_columns * apply(to_columns, a * df)
    h = torch.linalg.solve(system.mT, b * dy)
    if spec.balanced:
        h = h - b * ((s * h).sum(-1, keepdim=True) / shift)
    w = -lam_rows * apply(to_rows, h)
    return f + df + w, g + dy - lam_columns * apply(to_columns, a * w)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
