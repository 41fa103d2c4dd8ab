"""The native CPU backend: hands addresses of torch tensors to the C++ kernels (families in ``csrc/cpu``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import native
from kdkernels.backends.rows import STATISTICS, RowSpec, compute_dtype

__all__ = [
    "SAVED_STATISTICS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "status",
    "token_statistics",
]

SAVED_STATISTICS = 0
"""Columns of the statistics that the forward hands to the backward."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def status() -> tuple[bool, str]:
    """Whether the backend can be used, and its instruction set or the reason why not."""
    if native.module is None:
        return False, native.reason
    try:
        return True, f"instruction set {native.module.isa()}, {torch.get_num_threads()} threads"
    except RuntimeError as error:
        return False, str(error)


def _module() -> Any:
    if native.module is None:
        raise RuntimeError(f"the cpu backend is not available: {native.reason}")
    return native.module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), _DTYPES[tensor.dtype])


def _sides(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Any, ...]:
    """The leading arguments that all kernels share."""
    rows, vocab = student.shape
    return (
        torch.get_num_threads(),
        compute_dtype(student, teacher) == torch.float64,
        rows,
        vocab,
        *_matrix(student),
        *_matrix(teacher),
        spec.student_temperature,
        _address(spec.student_temperatures),
        spec.teacher_temperature,
        _address(spec.teacher_temperatures),
        spec.student_softcap,
        spec.teacher_softcap,
        _address(spec.labels),
        _address(spec.active),
    )


def _launch(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    divergence: Tensor | None,
    cross_entropy: Tensor | None,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    _module().divergence(
        *_sides(student, teacher, spec),
        spec.kind,
        spec.a,
        spec.b,
        _address(divergence),
        _address(cross_entropy),
        _address(grad_divergence),
        _address(grad_cross_entropy),
        *_matrix(grad_student)[:2],
        *_matrix(grad_teacher)[:2],
    )


def _values(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    rows = student.shape[0]
    return torch.empty(rows, dtype=dtype), torch.empty(0 if spec.labels is None else rows, dtype=dtype)


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    _launch(student, teacher, spec, divergence, cross_entropy, None, None, None, None)
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
    _launch(student, teacher, spec, None, None, grad_divergence, grad_cross_entropy, grad_student, grad_teacher)


def divergence_fused(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    _launch(
        student, teacher, spec, divergence, cross_entropy, grad_divergence, grad_cross_entropy, grad_student, grad_teacher
    )
    return divergence, cross_entropy


def token_statistics(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    rows = student.shape[0]
    values = torch.empty(rows, len(STATISTICS), dtype=compute_dtype(student, teacher))
    argmax = torch.empty(rows, 2, dtype=torch.int64)
    _module().token_statistics(*_sides(student, teacher, spec), values.data_ptr(), argmax.data_ptr())
    return values, argmax
