"""The family sorted_l1 in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch, row_arguments

__all__ = ["sorted_l1"]

SORTED_BYTES = 256 << 20
"""Of sorted logits and their places at a time."""

UNROLL = 4
"""Logits of either side that a thread has in hand."""


def sorted_l1(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    error_bound: float,
    grad_values: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(values [N], omitted [N]), see ``kdkernels.backends.rows``. Everything is sorted, whatever the error bound."""
    rows = student.shape[0]
    values = torch.zeros(rows, dtype=compute_dtype(student, teacher), device=student.device)
    row_bytes = sum(side.shape[1] * (side.element_size() + 8) for side in (student, teacher))
    size = max(1, SORTED_BYTES // max(1, row_bytes))
    for start in range(0, rows, size):
        chunk = slice(start, start + size)
        gradients = [None if each is None else each[chunk] for each in (grad_student, grad_teacher)]
        upstream = None if grad_values is None else grad_values[chunk]
        _sort_and_compare(student[chunk], teacher[chunk], spec.take(chunk), values[chunk], upstream, *gradients)
    return values, torch.zeros_like(values)


def _sort_and_compare(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    values: Tensor,
    grad_values: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    student, student_order = torch.sort(student, dim=-1, descending=True, stable=True)
    teacher, teacher_order = torch.sort(teacher, dim=-1, descending=True, stable=True)
    longer = student if student.shape[1] >= teacher.shape[1] else teacher
    launch = prepare_launch(longer, student, teacher)
    with on_device_of(student, "sorted_l1"):
        load_kernels().sorted_l1.sorted_l1_kernel[(len(student),)](
            student.contiguous(),
            teacher.contiguous(),
            student_order.contiguous(),
            teacher_order.contiguous(),
            student.shape[1],
            teacher.shape[1],
            values,
            grad_values,
            grad_student,
            grad_teacher,
            0 if grad_student is None else grad_student.stride(0),
            0 if grad_teacher is None else grad_teacher.stride(0),
            **row_arguments(spec),
            COMPUTE=launch.compute,
            UNROLL=UNROLL,
            LANES=launch.lanes,
            num_warps=launch.num_warps,
        )
