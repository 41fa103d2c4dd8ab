"""``distillation_loss`` in plain PyTorch: the definition of correct for every family of divergences."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.divergences import Divergence, ForwardKL
from kdkernels.reductions import reduce_rows
from kdkernels.reference import rows, sparse_divergence
from kdkernels.reference.gradient_rounding import with_rounded_gradient
from kdkernels.sources import Source, SparseTeacher
from kdkernels.transforms import values_are_known

__all__ = ["distillation_loss"]


def distillation_loss(
    student: Source,
    teacher: Source | SparseTeacher,
    divergence: Divergence = ForwardKL(),  # noqa: B008 - immutable
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float | Tensor = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    gradient_tolerance: float = 0.0,
    gradient_rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """See ``kdkernels.distillation_loss``: same arguments, computed with autograd on whole ``[N, V]`` tensors."""
    problem, total = arguments.prepare_loss(
        student,
        teacher,
        divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        weight=weight,
        mask=mask,
        labels=labels,
        ignore_index=ignore_index,
        ce_weight=ce_weight,
        reduction=reduction,
        normalizer=normalizer,
        temperature_squared=temperature_squared,
        vocab_size=vocab_size,
    )
    return loss(arguments.with_tolerance(problem, gradient_tolerance, gradient_rounding, generator), total)


def loss(problem: arguments.Problem, total: arguments.Total) -> Tensor:
    """The loss of a checked problem."""
    device = problem.student.tensor.device.type
    # Autocast would undo the float32 of log_softmax's neighbours; the head's dtype is settled already.
    with autocast_disabled(device):
        student = side_logits(problem.student, problem.spec)
        if problem.sparse is not None:
            values = sparse_divergence.divergence(student, problem.sparse, problem.spec)
        else:
            assert problem.teacher is not None
            teacher = side_logits(problem.teacher, problem.spec)
            values = rows.divergence(student, teacher, problem.spec)
        values = values * total.divergence_scale
        if problem.spec.labels is not None:
            values = values + total.cross_entropy_scale * rows.cross_entropy(student, problem.spec, problem.dtype)
        return reduce_rows(values, problem, total)


def side_logits(side: Side, spec: RowSpec) -> Tensor:
    """The logits of a side, of a head with the gradient that is allowed."""
    logits = rows.side_logits(side, spec.active)
    # A permission, which function transformations, that do not know the rounding, need not use.
    if spec.gradient_tolerance == 0 or side.weight is None or not values_are_known():
        return logits
    return with_rounded_gradient(logits, spec.gradient_tolerance, spec.gradient_seed)
