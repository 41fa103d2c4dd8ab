"""The family ranking on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.cpu.launching import DTYPES, FLOAT64, address, module
from kdkernels.backends.rows import RowSpec, compute_dtype

__all__ = ["plackett_luce", "token_ranks"]


def plackett_luce(
    student: Tensor,
    teacher: Tensor | None,
    order: Tensor | None,
    weights: Tensor | None,
    spec: RowSpec,
    grad_values: Tensor | None,
    grad_student: Tensor | None,
) -> Tensor:
    rows, vocab = student.shape
    dtype = compute_dtype(student, teacher)
    values = torch.empty(rows, dtype=dtype)
    module().plackett_luce(
        torch.get_num_threads(),
        dtype == torch.float64,
        rows,
        vocab,
        student.data_ptr(),
        student.stride(0),
        DTYPES[student.dtype],
        spec.student_softcap,
        *((0, 0, 0) if teacher is None else (teacher.data_ptr(), teacher.stride(0), DTYPES[teacher.dtype])),
        spec.teacher_temperature,
        address(spec.teacher_temperatures),
        spec.teacher_softcap,
        address(spec.labels),
        address(spec.active),
        vocab if order is None else order.shape[1],
        address(order),
        *((0, 0) if weights is None else (weights.data_ptr(), weights.stride(0))),
        values.data_ptr(),
        address(grad_values),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
    )
    return values


def token_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    ranks = torch.empty_like(ids)
    dtype = DTYPES[logits.dtype]
    module().token_ranks(
        torch.get_num_threads(),
        dtype == FLOAT64,
        *logits.shape,
        logits.data_ptr(),
        logits.stride(0),
        dtype,
        ids.shape[1],
        ids.data_ptr(),
        ranks.data_ptr(),
    )
    return ranks
