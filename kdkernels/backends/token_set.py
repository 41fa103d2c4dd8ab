"""The family token_set: log-probabilities of a set of tokens, in plain PyTorch on chunks of tokens, for any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.chunked_head import Head, Needs, SideGradients, active_index, chunks, only_active, spread
from kdkernels.backends.rows import RowSpec, Side, compute_dtype, row_temperature
from kdkernels.backends.sparse_rows import NOTHING
from kdkernels.reference.rows import effective_logits

__all__ = ["gradients", "values"]

BLOCK_BYTES = 4 << 20
"""Of the rows that are worked on at a time on the CPU."""

SMALL = 1e-20
"""Of a sum of exponentials, whose largest term would be 1: below it digits may be lost."""

TEMPORARIES = 3
"""Rows of the vocabulary, in the compute type, that a row of logits needs beside itself."""


class Parts(NamedTuple):
    """A chunk of rows: probabilities ``[n, V]`` times their sums ``[n, 1]``, of all tokens and of the set alone."""

    whole: Tensor
    whole_sum: Tensor
    inside: Tensor
    inside_sum: Tensor
    distance: Tensor
    """``[n, 1]``, the largest logit of the set less the largest of all."""


def parts(logits: Tensor, members: Tensor, spec: RowSpec) -> Parts:
    whole = effective_logits(logits, spec.student_softcap, compute_dtype(logits, None))
    whole = whole / row_temperature(spec.student_temperature, spec.student_temperatures)
    largest = whole.amax(-1, keepdim=True)
    probabilities = (whole - largest).exp_()
    total = probabilities.sum(-1, keepdim=True)
    if whole.device.type == "cpu":
        inside = probabilities * members.to(whole.dtype)
        inside_sum = inside.sum(-1, keepdim=True)
        if not bool((inside_sum < SMALL).any()):
            return Parts(probabilities, total, inside, inside_sum, torch.zeros_like(inside_sum))
    # Slower on the CPU, but it knows a set that is unlikely altogether.
    inside = whole.masked_fill_(~members, NOTHING)
    largest_inside = inside.amax(-1, keepdim=True)
    inside = inside.sub_(largest_inside).exp_()
    return Parts(probabilities, total, inside, inside.sum(-1, keepdim=True), largest_inside - largest)


def blocks(rows: Tensor, vocab: int) -> Iterator[slice]:
    """Runs of rows of logits; on the CPU as many as stay in its caches with their temporaries."""
    count = len(rows)
    size = max(1, BLOCK_BYTES // (4 * vocab)) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def row_chunks(side: Side, memory_budget: int | None, vocab: int) -> Iterator[slice]:
    extra = 0 if side.tensor.device.type == "cpu" else TEMPORARIES * vocab * compute_dtype(side.tensor, None).itemsize
    return chunks([side], memory_budget, extra_row_bytes=extra)


@torch.no_grad()
def values(side: Side, members: Tensor, spec: RowSpec, memory_budget: int | None) -> Tensor:
    """``[N]``, 0 where a row is not active."""
    index = active_index([side], spec)
    if index is not None:
        kept = spec.take(index)._replace(active=None)
        return spread(values(only_active(side, index), members, kept, memory_budget), index, len(side.tensor))
    head = Head(side, Needs(False), spec.active)
    found = side.tensor.new_empty(side.tensor.shape[0], dtype=compute_dtype(side.tensor, None))
    for chunk in row_chunks(side, memory_budget, len(members)):
        logits, taken, out = head.logits(chunk), spec.take(chunk), found[chunk]
        for block in blocks(logits, len(members)):
            part = parts(logits[block], members, taken.take(block))
            out[block] = (part.distance + part.inside_sum.log() - part.whole_sum.log()).squeeze(-1)
    return found if spec.active is None else found.masked_fill_(~spec.active, 0.0)


@torch.no_grad()
def gradients(
    side: Side, members: Tensor, spec: RowSpec, upstream: Tensor, needs: Needs, memory_budget: int | None
) -> SideGradients:
    """The gradients of ``sum(upstream * values)``."""
    index = active_index([side], spec)
    if index is not None:
        kept = spec.take(index)._replace(active=None)
        found = gradients(only_active(side, index), members, kept, upstream[index], needs, memory_budget)
        hidden = found.tensor
        return found if hidden is None else found._replace(tensor=spread(hidden, index, len(side.tensor)))
    head = Head(side, needs, spec.active)
    for chunk in row_chunks(side, memory_budget, len(members)):
        logits, taken, factors = head.logits(chunk), spec.take(chunk), upstream[chunk]
        buffer = head.gradient_buffer(logits, chunk)
        assert buffer is not None
        for block in blocks(logits, len(members)):
            buffer[block] = logit_gradient(logits[block], members, taken.take(block), factors[block])
        head.take(buffer, chunk)
    return head.finish()


def logit_gradient(logits: Tensor, members: Tensor, spec: RowSpec, upstream: Tensor) -> Tensor:
    part = parts(logits, members, spec)
    factor = upstream.unsqueeze(-1) / row_temperature(spec.student_temperature, spec.student_temperatures)
    gradient = part.inside.mul_(factor / part.inside_sum).sub_(part.whole.mul_(factor / part.whole_sum))
    if spec.student_softcap:
        slope = torch.tanh(logits.to(gradient.dtype) / spec.student_softcap).square_().neg_().add_(1)
        gradient.mul_(slope)
    return gradient if spec.active is None else gradient.masked_fill_(~spec.active.unsqueeze(-1), 0.0)
