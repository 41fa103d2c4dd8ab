"""The family token_set over any row backend: log-probabilities of a set of tokens, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.chunked_head import Head, Needs, SideGradients, active_index, chunks, only_active, spread
from kdkernels.backends.rows import RowSpec, Side, compute_dtype

__all__ = ["gradients", "values"]


@torch.no_grad()
def values(side: Side, members: Tensor, spec: RowSpec, memory_budget: int | None, backend: str) -> Tensor:
    """``[N]``, 0 where a row is not active."""
    index = active_index([side], spec)
    if index is not None:
        kept = spec.take(index)._replace(active=None)
        found = values(only_active(side, index), members, kept, memory_budget, backend)
        return spread(found, index, len(side.tensor))
    kernel = row_backend(backend).token_set
    head = Head(side, Needs(False), spec.active)
    found = side.tensor.new_empty(side.tensor.shape[0], dtype=compute_dtype(side.tensor, None))
    for chunk in chunks([side], memory_budget):
        found[chunk] = kernel(head.logits(chunk), members, spec.take(chunk), None, None)
    return found


@torch.no_grad()
def gradients(
    side: Side,
    members: Tensor,
    spec: RowSpec,
    upstream: Tensor,
    needs: Needs,
    memory_budget: int | None,
    backend: str,
) -> SideGradients:
    """The gradients of ``sum(upstream * values)``."""
    index = active_index([side], spec)
    if index is not None:
        kept = spec.take(index)._replace(active=None)
        found = gradients(only_active(side, index), members, kept, upstream[index], needs, memory_budget, backend)
        hidden = found.tensor
        return found if hidden is None else found._replace(tensor=spread(hidden, index, len(side.tensor)))
    kernel = row_backend(backend).token_set
    head = Head(side, needs, spec.active)
    for chunk in chunks([side], memory_budget):
        logits = head.logits(chunk)
        buffer = head.gradient_buffer(logits, chunk)
        kernel(logits, members, spec.take(chunk), upstream[chunk], buffer)
        head.take(buffer, chunk)
    return head.finish()
