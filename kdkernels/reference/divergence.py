"""``distillation_loss`` in plain PyTorch: the definition of correct for every family of divergences."""

from __future__ import annotations

from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.divergences import Divergence, ForwardKL
from kdkernels.reductions import reduce_rows
from kdkernels.reference import rows, sparse_divergence
from kdkernels.sources import Source, SparseTeacher

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
    ce_weight: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
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
    return loss(problem, total)


def loss(problem: arguments.Problem, total: arguments.Total) -> Tensor:
    """The loss of a checked problem."""
    device = problem.student.tensor.device.type
    # Autocast would undo the float32 of log_softmax's neighbours; the head's dtype is settled already.
    with autocast_disabled(device):
        student = rows.side_logits(problem.student, problem.spec.active)
        if problem.sparse is not None:
            values = sparse_divergence.divergence(student, problem.sparse, problem.spec)
        else:
            assert problem.teacher is not None
            teacher = rows.side_logits(problem.teacher, problem.spec.active)
            values = rows.divergence(student, teacher, problem.spec)
        values = values * total.divergence_scale
        if problem.spec.labels is not None:
            values = values + total.cross_entropy_scale * rows.cross_entropy(student, problem.spec, problem.dtype)
        return reduce_rows(values, problem, total)
