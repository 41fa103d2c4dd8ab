"""The family token_statistics in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import STATISTICS, RowSpec, compute_dtype
from kdkernels.backends.triton.launching import (
    composed_of,
    composition_arguments,
    load_kernels,
    on_device_of,
    prepare_launch,
    row_arguments,
)

__all__ = ["token_statistics"]


def token_statistics(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """(values [N, 10], columns as `rows.STATISTICS` names them; argmax int64 [N, 2])."""
    rows, vocab_size = student.shape
    launch = prepare_launch(student, teacher, *composed_of(spec), kernel="token_statistics")
    values = torch.empty(rows, len(STATISTICS), dtype=compute_dtype(student, teacher), device=student.device)
    argmax = torch.empty(rows, 2, dtype=torch.int64, device=student.device)
    if rows:
        with on_device_of(student, "token_statistics"):
            load_kernels().token_statistics.token_statistics_kernel[(rows,)](
                student,
                teacher,
                launch.stride(student),
                launch.stride(teacher),
                vocab_size,
                values,
                argmax,
                spec.labels,
                **row_arguments(spec),
                **composition_arguments(spec),
                **launch.options,
            )
    return values, argmax
