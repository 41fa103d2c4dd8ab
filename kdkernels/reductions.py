"""How the losses of the rows become the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments import Problem, Total

__all__ = ["Scales", "reduce_rows", "row_scales"]


def reduce_rows(values: Tensor, problem: Problem, total: Total) -> Tensor:
    """Weights and reduces the losses ``[N]`` of the rows, which are 0 where a row is not active."""
    if total.weight is not None:
        values = total.weight * values
    if total.reduction == "none":
        return values.reshape(problem.batch_shape)
    if total.reduction == "sum":
        return values.sum()
    return values.sum() * reciprocal(problem, total)


def reciprocal(problem: Problem, total: Total) -> float | Tensor:
    """One over what reduction="mean" divides by; 0 if no row counts."""
    if isinstance(total.normalizer, Tensor):
        return total.normalizer.to(problem.dtype).reciprocal()
    if total.normalizer is not None:
        return 1.0 / total.normalizer
    if total.weight is not None:
        count = total.weight.sum()
    elif problem.spec.active is not None:
        count = problem.spec.active.sum(dtype=problem.dtype)
    else:
        rows = problem.student.tensor.shape[0]
        return 1.0 / rows if rows else 0.0
    empty = count == 0
    return torch.where(empty, 0.0, 1.0 / torch.where(empty, 1.0, count))


class Scales(NamedTuple):
    """What the result gives to the value of each row: its gradient, known before the values are."""

    divergence: Tensor
    cross_entropy: Tensor | None


def row_scales(problem: Problem, total: Total) -> Scales:
    """The factors ``[N]`` such that the result is the sum of factor times value over the rows. Not for "none"."""
    rows, device = problem.student.tensor.shape[0], problem.student.tensor.device
    scale = 1.0 if total.reduction == "sum" else reciprocal(problem, total)
    divergence_scale = scale * total.divergence_scale
    cross_entropy_scale = scale * total.cross_entropy_scale

    def per_row(factor: float | Tensor) -> Tensor:
        if total.weight is not None:
            return (total.weight * factor).to(problem.dtype)
        if isinstance(factor, Tensor):
            return factor.to(problem.dtype).expand(rows).contiguous()
        return torch.full((rows,), factor, dtype=problem.dtype, device=device)

    return Scales(per_row(divergence_scale), None if problem.spec.labels is None else per_row(cross_entropy_scale))
