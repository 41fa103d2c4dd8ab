"""The family ranking over any row backend: LM heads a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.chunked_head import (
    Head,
    Needs,
    SideGradients,
    active_index,
    by_chunks,
    chunks,
    only_active,
    spread,
)
from kdkernels.backends.rows import RowSpec, Side, Tempering, compute_dtype
from kdkernels.reference.rows import effective_logits

__all__ = ["leading_ids", "plackett_luce", "token_ranks"]


@torch.no_grad()
def plackett_luce(
    student: Side,
    teacher: Side | None,
    order: Tensor | None,
    weights: Tensor | None,
    spec: RowSpec,
    grad_values: Tensor | None,
    needs: Needs,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, SideGradients]:
    """The values ``[N]``, and the gradients of ``sum(grad_values * values)``; None: factors of 1."""
    sides = [student] if teacher is None else [student, teacher]

    def pick(tensor: Tensor | None, index: Tensor | slice) -> Tensor | None:
        return None if tensor is None else tensor[index]

    index = active_index(sides, spec)
    if index is not None:
        values, gradients = plackett_luce(
            only_active(student, index),
            None if teacher is None else only_active(teacher, index),
            pick(order, index),
            pick(weights, index),
            spec.take(index)._replace(active=None),
            pick(grad_values, index),
            needs,
            memory_budget,
            backend,
        )
        rows = student.tensor.shape[0]
        return spread(values, index, rows), gradients.spread(index, rows)
    kernels = row_backend(backend)
    values = student.tensor.new_empty(
        student.tensor.shape[0], dtype=compute_dtype(student.tensor, None if teacher is None else teacher.tensor)
    )
    head = Head(student, needs, spec.active)
    other = None if teacher is None else Head(teacher, Needs(False), spec.active)
    for chunk in chunks(sides, memory_budget):
        logits = head.logits(chunk)
        gradient = head.gradient_buffer(logits, chunk)
        values[chunk] = kernels.plackett_luce(
            logits,
            None if other is None else other.logits(chunk),
            pick(order, chunk),
            pick(weights, chunk),
            spec.take(chunk),
            pick(grad_values, chunk),
            gradient,
        )
        head.take(gradient, chunk)
    return values, head.finish()


@torch.no_grad()
def leading_ids(
    teacher: Side,
    k: int,
    labels: Tensor | None,
    tempering: Tempering,
    double: bool,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(ids int64 [N, k], log_probs [N, k])``: the label of each row, then the largest logits; -1 past the last one.

    In a row that has no distribution the first log-probability is NaN. ``double``: of a teacher that is not float64, too.
    """
    kernels = row_backend(backend)

    def ranked(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits = logits.double() if double else logits
        ids, log_probs, log_tail_mass = kernels.topk(logits, k, tempering)
        if labels is not None:
            ids, log_probs = label_first(logits, labels[rows], ids, log_probs, tempering)
        invalid = log_tail_mass.isnan()
        first = torch.arange(k, device=ids.device) == 0
        nowhere = (ids < 0) & first & invalid.unsqueeze(-1)
        return ids.masked_fill(nowhere, 0), log_probs.masked_fill(first & invalid.unsqueeze(-1), torch.nan)

    ids, log_probs = by_chunks(teacher, memory_budget, ranked)
    return ids, log_probs


def label_first(
    logits: Tensor, labels: Tensor, ids: Tensor, log_probs: Tensor, tempering: Tempering
) -> tuple[Tensor, Tensor]:
    """Puts the label at the head of the list, which keeps its length."""
    column = labels.unsqueeze(-1)
    pair = logits.gather(-1, torch.cat([column, ids[:, :1].clamp(min=0)], -1))
    own, largest = effective_logits(pair, tempering.softcap, log_probs.dtype).tensor_split(2, -1)
    own_log_prob = (own - largest) / tempering.temperature + log_probs[:, :1]
    same = ids == column
    same[:, -1] |= ~same.any(-1)  # who makes room
    leaving = torch.cat([torch.zeros_like(column, dtype=torch.int8), same.to(torch.int8)], -1)
    kept = torch.sort(leaving, dim=-1, stable=True).indices[:, :-1]
    ids, log_probs = torch.cat([column, ids], -1), torch.cat([own_log_prob, log_probs], -1)
    return ids.gather(-1, kept), log_probs.gather(-1, kept)


@torch.no_grad()
def token_ranks(source: Side, ids: Tensor, memory_budget: int | None, backend: str) -> Tensor:
    """The ranks int64 ``[N, m]``."""
    kernels = row_backend(backend)
    return by_chunks(source, memory_budget, lambda logits, rows: (kernels.token_ranks(logits, ids[rows]),))[0]
