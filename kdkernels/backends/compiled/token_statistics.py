"""The family token_statistics in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.compiled.divergence import sides_arguments
from kdkernels.backends.compiled.library import Library, composition
from kdkernels.backends.rows import STATISTICS, RowSpec, compute_dtype

__all__ = ["token_statistics"]


def token_statistics(library: Library, student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    rows = student.shape[0]
    values = student.new_empty(rows, len(STATISTICS), dtype=compute_dtype(student, teacher))
    argmax = student.new_empty(rows, 2, dtype=torch.int64)
    library.module().token_statistics(
        *sides_arguments(library, student, teacher, spec),
        values.data_ptr(),
        argmax.data_ptr(),
        composition(spec.student_composition),
        composition(spec.teacher_composition),
    )
    return values, argmax
