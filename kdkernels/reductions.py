"""How the losses of the rows become the result."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.arguments import Problem, Total
from kdkernels.backends.rows import Scales
from kdkernels.transforms import values_are_known

__all__ = ["reduce_rows", "row_scales", "weighted_sum"]


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
    active = problem.spec.active
    if total.weight is not None:
        count = total.weight.sum()
    elif active is None:
        rows = problem.student.tensor.shape[0]
        return 1.0 / rows if rows else 0.0
    elif active.device.type == "cpu" and values_are_known():
        return 1.0 / max(1, int(active.sum()))
    else:
        count = active.sum(dtype=problem.dtype)
    empty = count == 0
    return torch.where(empty, 0.0, 1.0 / torch.where(empty, 1.0, count))


def row_scales(problem: Problem, total: Total) -> Scales:
    """What the result gives to the value of each row; not for reduction="none"."""
    scale = 1.0 if total.reduction == "sum" else reciprocal(problem, total)
    divergence = scale * total.divergence_scale
    cross_entropy = scale * total.cross_entropy_scale
    if total.weight is None and not isinstance(divergence, Tensor) and not isinstance(cross_entropy, Tensor):
        return Scales(divergence, None, cross_entropy, None)

    def per_row(factor: float | Tensor) -> Tensor:
        if total.weight is not None:
            return (total.weight * factor).to(problem.dtype)
        rows = problem.student.tensor.shape[0]
        return (problem.student.tensor.new_ones(rows, dtype=problem.dtype) * factor).to(problem.dtype)

    return Scales(0.0, per_row(divergence), 0.0, None if problem.spec.labels is None else per_row(cross_entropy))


def weighted_sum(scales: tuple[Tensor, Tensor | None], divergence: Tensor, cross_entropy: Tensor) -> Tensor:
    """The sum over the rows ``[N]`` of scale times value; without a second scale there is no hard-label term."""
    value = torch.dot(scales[0], divergence)
    return value if scales[1] is None else value + torch.dot(scales[1], cross_entropy)
