"""The family sparse_divergence in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.compiled.divergence import lists_arguments, rounding_arguments
from kdkernels.backends.compiled.library import DTYPES, FLOAT64, Library, address
from kdkernels.backends.gradient_entries import EntryLists
from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.sparse_rows import Records, SparseRows

__all__ = ["sparse_divergence_fused"]


def sparse_divergence_fused(
    library: Library,
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    lists: EntryLists | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = student.shape
    divergence = student.new_empty(rows, dtype=compute_dtype(student, None))
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    student_type = DTYPES[student.dtype]
    wrong = library.module().sparse_divergence(
        library.place(student),
        student_type == FLOAT64,
        rows,
        vocab,
        student.data_ptr(),
        student.stride(0),
        student_type,
        spec.student_temperature,
        address(spec.student_temperatures),
        spec.teacher_temperature,
        address(spec.teacher_temperatures),
        spec.student_softcap,
        address(spec.labels),
        address(spec.active),
        *spec[:3],
        teacher.policy,
        *_entries(teacher),
        *_records(teacher.records, rows),
        divergence.data_ptr(),
        address(cross_entropy),
        address(grad_divergence),
        address(grad_cross_entropy),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        *lists_arguments(lists),
        *rounding_arguments(spec),
        address(spec.parameters),
        address(statistics),
    )
    if wrong < rows:
        records.refuse_record(wrong)
    return divergence, cross_entropy


def _entries(teacher: SparseRows) -> tuple[Any, ...]:
    """(entries per row, ids and their stride, whether int64, values, their stride and dtype, constants and dtype)."""
    ids, values, constants = teacher.ids, teacher.values, teacher.constants
    if ids is None or values is None:
        return (0, 0, 0, True, 0, 0, 0, 0, 0)
    constant = (0, 0) if constants is None else (constants.data_ptr(), DTYPES[constants.dtype])
    wide = ids.dtype == torch.int64
    return (
        ids.shape[1],
        ids.data_ptr(),
        ids.stride(0),
        wide,
        values.data_ptr(),
        values.stride(0),
        DTYPES[values.dtype],
        *constant,
    )


def _records(packed: Records | None, rows: int) -> tuple[int, ...]:
    """(data, where each row's record begins, counts, the largest, bits)."""
    if packed is None:
        return (0, 0, 0, 0, 0)
    assert packed.offsets is not None
    largest = int(packed.counts.max()) if rows else 0
    return packed.data.data_ptr(), packed.offsets.data_ptr(), packed.counts.data_ptr(), largest, packed.bits
