"""Row-level definitions of divergences from truncated and sampled teachers, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype, row_temperature
from kdkernels.backends.sparse_rows import NOTHING, Policy, SparseRows, dense_rows, entries, needs_dense_rows
from kdkernels.divergences import Kind
from kdkernels.reference.records import unpack_records
from kdkernels.reference.rows import blank_inactive, formula, parameter, tempered_log_softmax

__all__ = ["divergence"]


def divergence(student: Tensor, teacher: SparseRows, spec: RowSpec) -> Tensor:
    """The divergence per row ``[N]`` of logits ``[N, V]``; rows that are not active get 0."""
    dtype, vocab = compute_dtype(student, None), student.shape[1]
    if spec.active is not None:
        student = blank_inactive(student, spec.active)
    temperature = row_temperature(spec.student_temperature, spec.student_temperatures)
    log_q = tempered_log_softmax(student, spec.student_softcap, temperature, dtype)
    kind, policy = Kind(spec.kind), teacher.policy
    teacher = teacher.unpacked(vocab, unpack_records)
    found = entries(teacher, spec, vocab, dtype)
    named = found.ids < vocab
    if policy == Policy.SAMPLED:
        value = -(found.values * log_q.gather(-1, found.ids.clamp(max=vocab - 1))).sum(-1)
        if teacher.constants is not None:
            value = value - teacher.constants.to(dtype)
    elif policy == Policy.UNIFORM or needs_dense_rows(policy, kind):
        value = formula(kind, dense_rows(teacher, spec, vocab, dtype)[0], log_q, parameter(spec), spec.b)
    else:
        log_q_named = log_q.gather(-1, found.ids.clamp(max=vocab - 1)).masked_fill(~named, NOTHING)
        log_p, log_q = found.values, torch.cat([log_q_named, tail(log_q, found.ids, policy)], -1)
        log_p = torch.cat([log_p, found.log_tail.unsqueeze(-1)], -1)
        value = formula(kind, log_p, log_q, parameter(spec), spec.b)
    if policy in (Policy.RENORMALIZE, Policy.DROP):  # then a row without entries says nothing
        value = value.masked_fill(~named.any(-1), 0.0)
    return value if spec.active is None else value.masked_fill(~spec.active, 0.0)


def tail(log_q: Tensor, ids: Tensor, policy: int) -> Tensor:
    """``[N, 1]``: the logarithm of the student's mass on the ids that are not named, or NOTHING if that is no outcome."""
    rows, vocab = log_q.shape
    inside = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=log_q.device).scatter_(-1, ids, True)[:, :vocab]
    none = inside.all(-1, keepdim=True) | (policy == Policy.DROP)
    return log_q.masked_fill(inside, NOTHING).logsumexp(-1, keepdim=True).masked_fill(none, NOTHING)
