"""The family token_statistics on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.cpu.divergence import sides_arguments
from kdkernels.backends.cpu.launching import composition, module
from kdkernels.backends.rows import STATISTICS, RowSpec, compute_dtype

__all__ = ["token_statistics"]


def token_statistics(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    rows = student.shape[0]
    values = torch.empty(rows, len(STATISTICS), dtype=compute_dtype(student, teacher))
    argmax = torch.empty(rows, 2, dtype=torch.int64)
    module().token_statistics(
        *sides_arguments(student, teacher, spec),
        values.data_ptr(),
        argmax.data_ptr(),
        composition(spec.student_composition),
        composition(spec.teacher_composition),
    )
    return values, argmax
