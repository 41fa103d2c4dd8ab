"""The family divergence on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.compiled.divergence import launch_divergence
from kdkernels.backends.cpu.launching import LIBRARY
from kdkernels.backends.gradient_entries import EntryLists
from kdkernels.backends.rows import RowSpec, Scales, compute_dtype

__all__ = [
    "SAVED_STATISTICS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "divergence_total",
]

SAVED_STATISTICS = 0
"""Columns of the statistics that the forward hands to the backward."""


def _values(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    rows = student.shape[0]
    return torch.empty(rows, dtype=dtype), torch.empty(0 if spec.labels is None else rows, dtype=dtype)


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    launch_divergence(LIBRARY, "divergence", student, teacher, spec, divergence=divergence, cross_entropy=cross_entropy)
    return divergence, cross_entropy, divergence.new_empty(divergence.shape[0], SAVED_STATISTICS)


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
    # The rows are in the cache when the gradient is written, so the normalisers are found anew: no statistics.
    scales = Scales(0.0, grad_divergence, 0.0, grad_cross_entropy)
    launch_divergence(
        LIBRARY, "divergence", student, teacher, spec, scales, grad_student=grad_student, grad_teacher=grad_teacher
    )


def divergence_fused(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
    lists: tuple[EntryLists | None, EntryLists | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    launch_divergence(
        LIBRARY,
        "divergence",
        student,
        teacher,
        spec,
        Scales(0.0, grad_divergence, 0.0, grad_cross_entropy),
        divergence=divergence,
        cross_entropy=cross_entropy,
        grad_student=grad_student,
        grad_teacher=grad_teacher,
        lists=lists,
    )
    return divergence, cross_entropy


def divergence_total(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    scales: Scales,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> Tensor:
    """The sum over the rows of scale times value, and its gradients; nothing is kept per row.

    The gradients' memory is taken for new: missing pages are brought in a row at a time, not one by one as they fault.
    """
    total = torch.empty((), dtype=compute_dtype(student, teacher))
    launch_divergence(
        LIBRARY,
        "divergence",
        student,
        teacher,
        spec,
        scales,
        grad_student=grad_student,
        grad_teacher=grad_teacher,
        total=total,
        fresh_gradients=True,
    )
    return total
