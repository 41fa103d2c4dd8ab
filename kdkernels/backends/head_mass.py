"""The family head_mass over any row backend: language-model heads by chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.chunked_head import Head, Needs, chunks
from kdkernels.backends.rows import RowSpec, Side, compute_dtype

__all__ = ["empty", "head_mass"]


def empty(teacher: Tensor, student: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the thresholds ``[N]`` and the gaps ``[N, 2]``, or ``[0, 2]`` without a student."""
    rows = teacher.shape[0]
    thresholds = teacher.new_empty(rows, dtype=compute_dtype(teacher, student))
    return thresholds, thresholds.new_empty(0 if student is None else rows, 2)


@torch.no_grad()
def head_mass(
    teacher: Side, student: Side | None, spec: RowSpec, memory_budget: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """``head_mass`` of a row backend, for any sources."""
    kernels = row_backend(backend)
    sides = [teacher] if student is None else [teacher, student]
    heads = [Head(side, Needs(False), spec.active) for side in sides]
    thresholds, gaps = empty(teacher.tensor, None if student is None else student.tensor)
    for chunk in chunks(sides, memory_budget):
        logits = [head.logits(chunk) for head in heads]
        found = kernels.head_mass(logits[0], logits[1] if student else None, spec.take(chunk))
        thresholds[chunk] = found[0]
        if student is not None:
            gaps[chunk] = found[1]
    return thresholds, gaps
