"""The family ranking on GPUs: ranks are counted by a kernel of ours; sorts and scans are those of PyTorch, which has tuned
ones for every device, on blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.triton.launching import load_kernels, on_device_of, warp_size
from kdkernels.reference.ranking import teacher_order
from kdkernels.reference.rows import LOGIT_FLOOR, effective_logits

__all__ = ["plackett_luce", "token_ranks"]

BLOCK_ENTRIES = 1 << 24
"""Logits whose sorts and scans are made at a time; each takes about 80 bytes of temporary memory."""

COUNTING_TILE, COUNTING_THREADS = 2048, 256


def plackett_luce(
    student: Tensor,
    teacher: Tensor | None,
    order: Tensor | None,
    weights: Tensor | None,
    spec: RowSpec,
    grad_values: Tensor | None,
    grad_student: Tensor | None,
) -> Tensor:
    rows, vocab = student.shape
    values = student.new_empty(rows, dtype=compute_dtype(student, teacher))
    size = max(1, BLOCK_ENTRIES // vocab)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        part = spec.take(block)
        block_order, block_weights = (None if tensor is None else tensor[block] for tensor in (order, weights))
        if block_order is None:
            assert teacher is not None
            block_order, block_weights = teacher_order(teacher[block], part, values.dtype, block_weights)
        assert block_weights is not None
        values[block], gradient = scans(student[block], block_order, block_weights, part, values.dtype)
        if grad_student is not None:
            if grad_values is not None:
                gradient *= grad_values[block].unsqueeze(-1)
            grad_student[block] = gradient
    return values


def scans(student: Tensor, order: Tensor, weights: Tensor, spec: RowSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values ``[n]`` and gradients ``[n, V]`` of rows; both scans in the logarithm, so that no terms cancel or overflow."""
    logits = effective_logits(student, spec.student_softcap, dtype)
    named = order >= 0
    ids = order.clamp(min=0)
    nothing = -1e30
    ranked = logits.gather(-1, ids).masked_fill(~named, nothing)
    counts = torch.zeros_like(logits).scatter_add_(-1, ids, named.to(dtype))
    tail = logits.masked_fill(counts > 0, nothing)
    rest = torch.logsumexp(tail, -1, keepdim=True)
    suffixes = torch.logcumsumexp(torch.cat([ranked, rest], -1).flip(-1), -1).flip(-1)
    sums, behind = suffixes[:, :-1], suffixes[:, 1:]
    weights = weights.masked_fill(~named, 0.0)
    values = (weights * (sums - ranked)).masked_fill(~named, 0.0).sum(-1)
    # log C_k, see csrc/cpu/ranking.cpp
    shares = torch.logcumsumexp(weights.log() - sums, -1)
    before = torch.cat([torch.full_like(shares[:, :1], -torch.inf), shares[:, :-1]], -1)
    of_named = (ranked + before).exp() - weights * (behind - sums).exp()
    gradient = (tail + shares[:, -1:]).exp()
    gradient.scatter_add_(-1, ids, of_named.masked_fill(~named, 0.0))
    gradient.masked_fill_(logits <= LOGIT_FLOOR, 0.0)
    if spec.student_softcap:
        gradient *= 1 - (logits / spec.student_softcap).square()
    if spec.active is not None:
        values = values.masked_fill(~spec.active, 0.0)
        gradient = gradient.masked_fill(~spec.active.unsqueeze(-1), 0.0)
    return values, gradient


def token_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    ranks = torch.empty_like(ids)
    if ids.numel():
        with on_device_of(logits, "token_ranks"):
            load_kernels().ranking.token_ranks_kernel[tuple(ids.shape)](
                logits=logits,
                stride=logits.stride(0),
                vocab_size=logits.shape[1],
                ids=ids,
                ranks=ranks,
                TILE=COUNTING_TILE,
                num_warps=COUNTING_THREADS // warp_size(logits),
            )
    return ranks
