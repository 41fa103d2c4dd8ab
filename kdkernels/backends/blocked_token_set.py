"""Rows of the family token_set in plain PyTorch, some of them at a time: what a backend without a kernel for it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype, row_temperature
from kdkernels.backends.sparse_rows import NOTHING
from kdkernels.reference.rows import effective_logits

__all__ = ["token_set"]

BLOCK_BYTES = {"cpu": 4 << 20}
"""Of the rows that are worked on at a time, by the type of device: on the CPU what stays in its caches with three temporaries."""

BLOCK_BYTES_ELSEWHERE = 64 << 20

SMALL = 1e-20
"""Of a sum of exponentials, whose largest term would be 1: below it digits may be lost."""


class Parts(NamedTuple):
    """A block of rows: probabilities ``[n, V]`` times their sums ``[n, 1]``, of all tokens and of the set alone."""

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


def blocks(rows: Tensor) -> Iterator[slice]:
    count, vocab = rows.shape
    size = max(1, BLOCK_BYTES.get(rows.device.type, BLOCK_BYTES_ELSEWHERE) // (4 * vocab))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def token_set(
    logits: Tensor, members: Tensor, spec: RowSpec, grad_values: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """The values [N], see ``kdkernels.backends.rows``."""
    values = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits, None))
    for block in blocks(logits):
        rows, taken = logits[block], spec.take(block)
        part = parts(rows, members, taken)
        values[block] = (part.distance + part.inside_sum.log() - part.whole_sum.log()).squeeze(-1)
        if gradient is not None and grad_values is not None:
            gradient[block] = logit_gradient(part, rows, taken, grad_values[block])
    return values if spec.active is None else values.masked_fill_(~spec.active, 0.0)


def logit_gradient(part: Parts, logits: Tensor, spec: RowSpec, upstream: Tensor) -> Tensor:
    factor = upstream.unsqueeze(-1) / row_temperature(spec.student_temperature, spec.student_temperatures)
    gradient = part.inside.mul_(factor / part.inside_sum).sub_(part.whole.mul_(factor / part.whole_sum))
    if spec.student_softcap:
        slope = torch.tanh(logits.to(gradient.dtype) / spec.student_softcap).square_().neg_().add_(1)
        gradient.mul_(slope)
    return gradient if spec.active is None else gradient.masked_fill_(~spec.active.unsqueeze(-1), 0.0)
