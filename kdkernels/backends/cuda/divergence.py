"""The family divergence in CUDA C++."""

from __future__ import annotations

from torch import Tensor

from kdkernels.backends.compiled.divergence import launch_divergence
from kdkernels.backends.cuda.launching import LIBRARY
from kdkernels.backends.rows import RowSpec, Scales, compute_dtype

__all__ = ["SAVED_STATISTICS", "divergence_backward", "divergence_forward", "divergence_fused"]

SAVED_STATISTICS = 9
"""Columns of the statistics that the forward hands to the backward."""


def results(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (divergence [N], cross_entropy [N] or [0], statistics [N, SAVED_STATISTICS])."""
    rows = student.shape[0]
    divergence = student.new_empty(rows, dtype=compute_dtype(student, teacher))
    return (
        divergence,
        divergence.new_empty(0 if spec.labels is None else rows),
        divergence.new_empty(rows, SAVED_STATISTICS),
    )


def scales(grad_divergence: Tensor, grad_cross_entropy: Tensor | None) -> Scales:
    return Scales(
        0.0,
        grad_divergence.contiguous(),
        0.0,
        None if grad_cross_entropy is None else grad_cross_entropy.contiguous(),
    )


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], cross_entropy [N] or [0], statistics [N, SAVED_STATISTICS])."""
    divergence, cross_entropy, statistics = results(student, teacher, spec)
    if student.shape[0]:
        launch_divergence(
            LIBRARY,
            "divergence_forward",
            student,
            teacher,
            spec,
            divergence=divergence,
            cross_entropy=cross_entropy,
            statistics=statistics,
        )
    return divergence, cross_entropy, statistics


def divergence_backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Writes the wanted gradients; `statistics` are those that `divergence_forward` returned."""
    if not student.shape[0] or (grad_student is None and grad_teacher is None):
        return
    launch_divergence(
        LIBRARY,
        "divergence_backward",
        student,
        teacher,
        spec,
        scales(grad_divergence, grad_cross_entropy),
        grad_student=grad_student,
        grad_teacher=grad_teacher,
        statistics=statistics,
    )


def divergence_fused(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(divergence [N], cross_entropy [N] or [0]), and writes the wanted gradients.

    One launch that reads each logit once where shared memory can hold the rows, else a forward and a backward.
    """
    divergence, cross_entropy, statistics = results(student, teacher, spec)
    if student.shape[0]:
        launch_divergence(
            LIBRARY,
            "divergence_fused",
            student,
            teacher,
            spec,
            scales(grad_divergence, grad_cross_entropy),
            divergence=divergence,
            cross_entropy=cross_entropy,
            grad_student=grad_student,
            grad_teacher=grad_teacher,
            statistics=statistics,
        )
    return divergence, cross_entropy
