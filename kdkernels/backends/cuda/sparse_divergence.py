"""The family sparse_divergence in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.compiled import sparse_divergence as compiled
from kdkernels.backends.cuda.launching import LIBRARY
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import Policy, SparseRows
from kdkernels.reference.records import unpack_records

__all__ = ["SPARSE_STATISTICS", "sparse_divergence_fused"]

SPARSE_STATISTICS = 8
"""Columns of what the launches leave to each other."""


def sparse_divergence_fused(
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The values and, where `grad_student` is given, the gradient."""
    teacher = teacher.unpacked(student.shape[1], unpack_records)
    if teacher.policy == Policy.SAMPLED:
        teacher = sorted_by_id(teacher)
    statistics = student.new_empty(student.shape[0], SPARSE_STATISTICS, dtype=torch.float64)
    return compiled.sparse_divergence_fused(
        LIBRARY,
        student,
        teacher,
        spec,
        grad_divergence,
        grad_cross_entropy,
        grad_student,
        statistics=statistics,
    )


def sorted_by_id(teacher: SparseRows) -> SparseRows:
    """Samples of one id as neighbours, in a fixed order: the kernel sums their weights."""
    assert teacher.ids is not None
    assert teacher.values is not None
    ids, order = teacher.ids.sort(dim=-1, stable=True)
    return teacher._replace(ids=ids, values=teacher.values.gather(-1, order))
