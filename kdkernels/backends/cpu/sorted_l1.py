"""The family sorted_l1 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.cpu.launching import DTYPES, address, module
from kdkernels.backends.rows import RowSpec, compute_dtype

__all__ = ["sorted_l1"]


def sorted_l1(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    error_bound: float,
    grad_values: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, dtype = student.shape[0], compute_dtype(student, teacher)
    values, omitted = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=dtype)
    module().sorted_l1(
        torch.get_num_threads(),
        dtype == torch.float64,
        rows,
        student.shape[1],
        teacher.shape[1],
        student.data_ptr(),
        student.stride(0),
        DTYPES[student.dtype],
        teacher.data_ptr(),
        teacher.stride(0),
        DTYPES[teacher.dtype],
        spec.student_temperature,
        address(spec.student_temperatures),
        spec.teacher_temperature,
        address(spec.teacher_temperatures),
        spec.student_softcap,
        spec.teacher_softcap,
        address(spec.active),
        error_bound,
        values.data_ptr(),
        omitted.data_ptr(),
        address(grad_values),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        *((0, 0) if grad_teacher is None else (grad_teacher.data_ptr(), grad_teacher.stride(0))),
    )
    return values, omitted
