"""The family divergence on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.cpu.launching import DTYPES, FLOAT64, address, module
from kdkernels.backends.gradient_entries import EntryLists
from kdkernels.backends.rows import RowSpec, Scales, compute_dtype

__all__ = [
    "SAVED_STATISTICS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "divergence_total",
    "lists_arguments",
    "rounding_arguments",
    "sides_arguments",
]

SAVED_STATISTICS = 0
"""Columns of the statistics that the forward hands to the backward."""

NO_SCALES = Scales(0.0, None, 0.0, None)


def sides_arguments(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Any, ...]:
    """The leading arguments that all kernels share."""
    rows, vocab = student.shape
    student_temperature, student_rows, teacher_temperature, teacher_rows, *softcaps, labels, active = spec[3:11]
    student_type = DTYPES[student.dtype]
    teacher_type = student_type if teacher is None else DTYPES[teacher.dtype]
    return (
        torch.get_num_threads(),
        student_type == FLOAT64 or teacher_type == FLOAT64,
        rows,
        vocab,
        student.data_ptr(),
        student.stride(0),
        student_type,
        0 if teacher is None else teacher.data_ptr(),
        0 if teacher is None else teacher.stride(0),
        teacher_type,
        student_temperature,
        address(student_rows),
        teacher_temperature,
        address(teacher_rows),
        *softcaps,
        address(labels),
        address(active),
    )


def lists_arguments(lists: EntryLists | None) -> tuple[int, int]:
    return (0, 0) if lists is None else (lists.counts.data_ptr(), lists.summaries.data_ptr())


def rounding_arguments(spec: RowSpec) -> tuple[float, bool, int, int]:
    """(tolerance, whether stochastic, seed, number of the first row)."""
    seed = spec.gradient_seed
    return spec.gradient_tolerance, seed is not None, 0 if seed is None else int(seed), spec.first_row


def _launch(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    scales: Scales = NO_SCALES,
    *,
    divergence: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    grad_student: Tensor | None = None,
    grad_teacher: Tensor | None = None,
    total: Tensor | None = None,
    fresh_gradients: bool = False,
    lists: tuple[EntryLists | None, EntryLists | None] = (None, None),
) -> None:
    module().divergence(
        *sides_arguments(student, teacher, spec),
        *spec[:3],
        address(divergence),
        address(cross_entropy),
        scales.divergence_factor,
        address(scales.divergence),
        scales.cross_entropy_factor,
        address(scales.cross_entropy),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        *((0, 0) if grad_teacher is None else (grad_teacher.data_ptr(), grad_teacher.stride(0))),
        address(total),
        fresh_gradients,
        *lists_arguments(lists[0]),
        *lists_arguments(lists[1]),
        *rounding_arguments(spec),
        address(spec.parameters),
        address(spec.targets),
        spec.target_weight,
        address(spec.target_weights),
        spec.rest_weight,
        address(spec.rest_weights),
    )


def _values(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    rows = student.shape[0]
    return torch.empty(rows, dtype=dtype), torch.empty(0 if spec.labels is None else rows, dtype=dtype)


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    _launch(student, teacher, spec, divergence=divergence, cross_entropy=cross_entropy)
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
    _launch(student, teacher, spec, scales, grad_student=grad_student, grad_teacher=grad_teacher)


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
    _launch(
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
    _launch(
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
