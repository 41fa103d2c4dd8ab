"""The family divergence in CUDA C++."""

from __future__ import annotations

from torch import Tensor

from kdkernels.backends.compiled.divergence import launch_divergence
from kdkernels.backends.cuda.launching import LIBRARY
from kdkernels.backends.rows import RowSpec, Scales, compute_dtype
from kdkernels.backends.two_launches import fused_by

__all__ = ["SAVED_STATISTICS", "divergence_backward", "divergence_forward", "divergence_fused"]

SAVED_STATISTICS = 9
"""Columns of the statistics that the forward hands to the backward."""


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], cross_entropy [N] or [0], statistics [N, SAVED_STATISTICS])."""
    rows = student.shape[0]
    divergence = student.new_empty(rows, dtype=compute_dtype(student, teacher))
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    statistics = divergence.new_empty(rows, SAVED_STATISTICS)
    if rows:
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
    if grad_cross_entropy is None:
        spec = spec._replace(labels=None)
    launch_divergence(
        LIBRARY,
        "divergence_backward",
        student,
        teacher,
        spec,
        Scales(
            0.0,
            grad_divergence.contiguous(),
            0.0,
            None if grad_cross_entropy is None else grad_cross_entropy.contiguous(),
        ),
        grad_student=grad_student,
        grad_teacher=grad_teacher,
        statistics=statistics,
    )


divergence_fused = fused_by(divergence_forward, divergence_backward)
