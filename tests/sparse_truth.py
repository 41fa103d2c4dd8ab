"""Sparse teachers as dense constructions in plain PyTorch, row by row: what is right, independent of the library."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from truth import Case, log_softmax

import kdkernels as kd

TAILS = ("bucket", "renormalize", "uniform", "drop")
each_tail = pytest.mark.parametrize("tail", TAILS)
FLOOR = -1e5


def outcomes_value(case: Case, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of some outcomes, which need not have all the mass."""
    if isinstance(case.divergence, kd.AlphaDivergence | kd.Hellinger):
        hellinger = isinstance(case.divergence, kd.Hellinger)
        a = 0.5 if hellinger else case.divergence.alpha
        factor = 1.0 if hellinger else 1 / (a * (1 - a))
        cross = (a * log_p + (1 - a) * log_q).exp()
        return factor * (a * log_p.exp() + (1 - a) * log_q.exp() - cross).sum(-1)
    return case.formula(log_p, log_q)


def row_value(case: Case, log_q: Tensor, ids: Tensor, log_p: Tensor, tail: str, tau: float = 1.0) -> Tensor:
    """One token: log q over the vocabulary ``[V]``, the entries ``[K]``. ``tau``: over the temperature they are stored at."""
    kept = ids >= 0
    named, log_p = ids[kept].long(), log_p[kept].to(log_q.dtype)
    rest = torch.ones(len(log_q), dtype=torch.bool)
    rest[named] = False
    mass = log_p.double().exp().sum()
    log_r = torch.log1p(-mass.clamp(max=1)).clamp(min=FLOOR).to(log_q.dtype)
    if tail == "drop" or (tail == "bucket" and not bool(rest.any())):
        return outcomes_value(case, log_p, log_q[named]) if len(named) else 0 * log_q.sum()
    if tail == "bucket":
        bucket = torch.logsumexp(log_q[rest], 0, keepdim=True)
        return outcomes_value(case, torch.cat([log_p, log_r.reshape(1)]), torch.cat([log_q[named], bucket]))
    if tail == "renormalize":
        if not len(named):
            return 0 * log_q.sum()
        dense = torch.full_like(log_q, FLOOR)
    else:
        dense = torch.full_like(log_q, (log_r - math.log(max(1, int(rest.sum())))).item())
    dense[named] = log_p
    dense = torch.log_softmax(dense / tau, -1).clamp(min=FLOOR)
    if tail == "renormalize":
        dense[rest] = FLOOR
    return outcomes_value(case, dense, log_q)


def row_values(
    case: Case, student: Tensor, ids: Tensor, log_p: Tensor, tail: str, temperature: Any = 1.0, tau: Any = 1.0
) -> Tensor:
    """``[N]``, from logits ``[N, V]``; ``temperature`` and ``tau`` are numbers or one per token."""
    log_q = log_softmax(student, temperature)
    taus = tau.tolist() if isinstance(tau, Tensor) else [tau] * len(student)
    rows = zip(log_q, ids, log_p, taus, strict=True)
    return torch.stack([row_value(case, *row[:3], tail, row[3]) for row in rows])


class Result(NamedTuple):
    """The loss per token, the gradient of sum(upstream * loss), and the size of the terms behind them."""

    value: Tensor
    gradient: Tensor
    value_size: Tensor
    gradient_size: Tensor


def evaluate(
    case: Case,
    student: Tensor,
    ids: Tensor,
    log_p: Tensor,
    tail: str,
    upstream: Tensor,
    dtype: torch.dtype,
    **tempers: Any,
) -> Result:
    """Plain PyTorch in ``dtype``."""
    leaf = student.detach().to(dtype, copy=True).requires_grad_()
    value = row_values(case, leaf, ids, log_p, tail, **tempers)
    (gradient,) = torch.autograd.grad(value, leaf, upstream.to(dtype))
    with torch.no_grad():
        size = case.factor * value.abs().clamp(min=1)
        log_q = log_softmax(leaf, tempers.get("temperature", 1.0))
        terms = log_q.exp() * (1 - log_q)
        p = torch.where(ids >= 0, log_p.to(dtype).exp() * (1 - log_p.to(dtype).clamp(min=-80)), 0.0)
        terms = terms.scatter_add(-1, ids.clamp(min=0).long(), p)
        if tail == "bucket":  # shared out in proportion to q, and it may be all of the tail
            terms = terms + terms.sum(-1, keepdim=True) * torch.finfo(dtype).eps
        gradient_size = (upstream.to(dtype).abs() * size).unsqueeze(-1) * terms
    return Result(value.detach(), gradient, size.clamp(min=case.factor * math.log(student.shape[-1])), gradient_size)


def allowed(case: Case, tail: str) -> bool:
    """Whether the tail leaves the divergence finite."""
    kind, a, _ = case.divergence.form
    return tail != "renormalize" or not (kind == 1 or (kind == 2 and a != 1) or (kind == 7 and a < 0))


def ragged_teacher(teacher: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) ``[N, K]`` of the likeliest, in no order; the second row short, the last one empty."""
    log_p, ids = teacher.double().log_softmax(-1).topk(k)
    if len(ids) > 2:
        ids[1, k // 2 :] = -1
        ids[-1] = -1
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return ids.gather(-1, order), log_p.gather(-1, order)
