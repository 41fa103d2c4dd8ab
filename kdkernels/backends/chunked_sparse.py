"""The family sparse_divergence over any row backend, for students that are logits or language-model heads.

As in ``chunked_head``, the tokens go by in chunks that fit a memory budget. Where a divergence needs the teacher's tail
entry by entry, a chunk of the teacher's rows is filled in and goes through the dense kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.chunked_head import (
    Head,
    Needs,
    SideGradients,
    active_index,
    chunks,
    list_settings,
    only_active,
    spread,
)
from kdkernels.backends.gradient_entries import EntryLists
from kdkernels.backends.rows import RowSpec, Side, compute_dtype
from kdkernels.backends.sparse_rows import SparseRows, dense_rows, needs_dense_rows

__all__ = ["divergence"]


@torch.no_grad()
def divergence(
    student: Side,
    teacher: SparseRows,
    spec: RowSpec,
    upstream: tuple[Tensor, Tensor | None] | None,
    needs: Needs,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, SideGradients]:
    """``(divergence [N], cross_entropy [N] or [0], gradients)``.

    The gradients that ``needs`` names are those of sum(upstream[0] * divergence + upstream[1] * cross_entropy).
    """
    rows = student.tensor.shape[0]
    vocab = student.tensor.shape[1] if student.weight is None else student.weight.shape[0]
    teacher = teacher.located(vocab)
    index = active_index([student], spec)
    if index is not None:
        kept = None if upstream is None else (upstream[0][index], None if upstream[1] is None else upstream[1][index])
        values = divergence(
            only_active(student, index),
            teacher.take(index),
            spec.take(index)._replace(active=None),
            kept,
            needs,
            memory_budget,
            backend,
        )
        hidden = values[2].tensor
        return (
            spread(values[0], index, rows),
            values[1] if spec.labels is None else spread(values[1], index, rows),
            values[2] if hidden is None else values[2]._replace(tensor=spread(hidden, index, rows)),
        )
    dtype = compute_dtype(student.tensor, None)
    value = torch.empty(rows, dtype=dtype, device=student.tensor.device)
    cross_entropy = value.new_empty(0 if spec.labels is None else rows)
    settings = list_settings([student], [needs], spec, memory_budget, backend)
    head = Head(student, needs, spec.active, settings)
    dense = needs_dense_rows(teacher.policy, spec.kind)
    extra = vocab * dtype.itemsize if dense else 0
    share = settings.share_of_logits if settings else 1.0
    for chunk in chunks([student], memory_budget, extra_row_bytes=extra, share=share):
        logits = head.logits(chunk)
        gradient = head.gradient_buffer(logits, chunk)
        factors = (None, None) if upstream is None else (upstream[0][chunk], upstream[1])
        hard = None if factors[1] is None else factors[1][chunk]
        lists = head.lists(chunk)
        part = row_values(
            logits, teacher.take(chunk), spec.take(chunk), factors[0], hard, gradient, lists, dense, backend
        )
        value[chunk] = part[0]
        if spec.labels is not None:
            cross_entropy[chunk] = part[1]
        head.take(gradient, chunk, lists)
    return value, cross_entropy, head.finish()


def row_values(
    logits: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    gradient: Tensor | None,
    lists: EntryLists | None,
    dense: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The values of a chunk, whose gradient is written where it is wanted."""
    kernels = row_backend(backend)
    values: tuple[Tensor, Tensor]
    options: dict[str, Any]
    if not dense:
        options = {} if lists is None else {"lists": lists}
        values = kernels.sparse_divergence_fused(
            logits, teacher, spec, grad_divergence, grad_cross_entropy, gradient, **options
        )
        return values
    teacher = teacher.unpacked(logits.shape[1], kernels.unpack_records)
    log_probs, silent = dense_rows(teacher, spec, logits.shape[1], compute_dtype(logits, None))
    if silent is not None and grad_divergence is not None:
        grad_divergence = grad_divergence.masked_fill(silent, 0.0)
    spec = spec._replace(teacher_temperature=1.0, teacher_temperatures=None)
    if gradient is None or grad_divergence is None:
        values = kernels.divergence_forward(logits, log_probs, spec)[:2]
    else:
        options = {} if lists is None else {"lists": (lists, None)}
        values = kernels.divergence_fused(
            logits, log_probs, spec, grad_divergence, grad_cross_entropy, gradient, None, **options
        )
    return values if silent is None else (values[0].masked_fill(silent, 0.0), values[1])
