"""Row-level definitions in plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from kdkernels.backends.rows import NOTHING, RowSpec, Side, compute_dtype, row_temperature
from kdkernels.divergences import Kind

__all__ = ["LOGIT_FLOOR", "LOG_SATURATION", "cross_entropy", "divergence", "side_logits", "tempered_log_softmax"]

LOGIT_FLOOR = -1e5
"""Logits are clamped here from below: -inf, masked vocabulary, gets probability 0 and everything stays finite."""

LOG_SATURATION = 60.0
"""The largest exponent in the alpha divergence, which is unbounded for alpha outside [0, 1]."""


def side_logits(side: Side, active: Tensor | None = None) -> Tensor:
    """The logits ``[N, V]`` of a side before its softcap, in the dtype of its tensor; of zeros where not active."""
    tensor = side.tensor if active is None else blank_inactive(side.tensor, active)
    if side.weight is None:
        return tensor
    logits = functional.linear(tensor, side.weight, side.bias)
    return logits if side.scale == 1 else logits * side.scale


def effective_logits(logits: Tensor, softcap: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.clamp(min=LOGIT_FLOOR)


def tempered_logits(logits: Tensor, softcap: float, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    return effective_logits(logits, softcap, dtype) / temperature


def tempered_log_softmax(logits: Tensor, softcap: float, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    return torch.log_softmax(tempered_logits(logits, softcap, temperature, dtype), dim=-1)


def divergence(student: Tensor, teacher: Tensor, spec: RowSpec) -> Tensor:
    """The divergence per row ``[N]`` of logits ``[N, V]``; rows that are not active get 0."""
    dtype = compute_dtype(student, teacher)
    if spec.active is not None:
        student, teacher = blank_inactive(student, spec.active), blank_inactive(teacher, spec.active)
    s = tempered_logits(
        student, spec.student_softcap, row_temperature(spec.student_temperature, spec.student_temperatures), dtype
    )
    t = tempered_logits(
        teacher, spec.teacher_softcap, row_temperature(spec.teacher_temperature, spec.teacher_temperatures), dtype
    )
    if spec.targets is None:
        value = formula(Kind(spec.kind), t.log_softmax(-1), s.log_softmax(-1), parameter(spec), spec.b)
    else:
        value = decoupled(t, s, spec.targets, spec)
    return value if spec.active is None else value.masked_fill(~spec.active, 0.0)


def decoupled(teacher: Tensor, student: Tensor, targets: Tensor, spec: RowSpec) -> Tensor:
    """Both parts of the divergence per row ``[N]``, each with its weight, the targets of tempered logits set apart."""
    is_target = targets.unsqueeze(-1) == torch.arange(student.shape[-1], device=targets.device)
    place = targets.clamp(min=0).unsqueeze(-1)
    log_rest, log_odds = [], []
    for logits in (teacher, student):
        rest = logits.masked_fill(is_target, -math.inf)
        log_rest.append(rest.log_softmax(-1).masked_fill(is_target, NOTHING))
        log_odds.append((logits.gather(-1, place) - rest.logsumexp(-1, keepdim=True)).squeeze(-1))
    value = formula(Kind(spec.kind), log_rest[0], log_rest[1], parameter(spec), spec.b)
    x, y = log_odds
    of_target = x.sigmoid() * (functional.logsigmoid(x) - functional.logsigmoid(y))
    of_target = of_target + (-x).sigmoid() * (functional.logsigmoid(-x) - functional.logsigmoid(-y))
    rest_weight = spec.rest_weight if spec.rest_weights is None else spec.rest_weights
    target_weight = spec.target_weight if spec.target_weights is None else spec.target_weights
    return rest_weight * value + target_weight * of_target.masked_fill(targets < 0, 0.0)


def parameter(spec: RowSpec) -> float | Tensor:
    """The parameter a of the divergence in a form that broadcasts against ``[N, V]``."""
    return row_temperature(spec.a, spec.parameters)


def blank_inactive(tensor: Tensor, active: Tensor) -> Tensor:
    """Zero where not active, so that what stands there cannot reach a gradient."""
    return tensor.masked_fill(~active.unsqueeze(-1), 0.0)


def log_mixture(share: float | Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """``log(share a + (1 - share) b)``; of the shares in a tensor some may be 0 or 1."""
    if not isinstance(share, Tensor):
        return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
    inside = share.where((share > 0) & (share < 1), torch.full_like(share, 0.5))
    mixture = torch.logaddexp(log_a + inside.log(), log_b + torch.log1p(-inside))
    return torch.where(share == 0, log_b, torch.where(share == 1, log_a, mixture))


def formula(kind: Kind, log_p: Tensor, log_q: Tensor, a: float | Tensor, b: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == Kind.FORWARD_KL:
        return (p * (log_p - log_q)).sum(-1)
    if kind == Kind.REVERSE_KL:
        return (q * (log_q - log_p)).sum(-1)
    if kind == Kind.JEFFREYS:
        return ((a * p - (1 - a) * q) * (log_p - log_q)).sum(-1)
    if kind == Kind.JSD:
        log_m = log_mixture(a, log_p, log_q)
        return (a * p * (log_p - log_m) + (1 - a) * q * (log_q - log_m)).sum(-1)
    if kind == Kind.SKEW_FORWARD_KL:
        return (p * (log_p - log_mixture(a, log_p, log_q))).sum(-1)
    if kind == Kind.SKEW_REVERSE_KL:
        return (q * (log_q - log_mixture(a, log_q, log_p))).sum(-1)
    if kind == Kind.SOFT_CROSS_ENTROPY:
        return -(p * log_q).sum(-1)
    if kind == Kind.TVD:
        return 0.5 * (p - q).abs().sum(-1)
    if kind == Kind.ALPHA:
        cross = (a * log_p + (1 - a) * log_q).clamp(max=LOG_SATURATION).exp()
        return b * (a * p + (1 - a) * q - cross).sum(-1)
    if kind == Kind.RENYI:
        return torch.logsumexp(a * log_p + (1 - a) * log_q, dim=-1) / (a - 1)
    total = a + b
    cross = (a * log_p + b * log_q).exp()
    return (a / total * (total * log_p).exp() + b / total * (total * log_q).exp() - cross).sum(-1) / (a * b)


def cross_entropy(student: Tensor, spec: RowSpec, dtype: torch.dtype) -> Tensor:
    """The hard-label term per row ``[N]`` at temperature 1; rows that are not active get 0."""
    assert spec.labels is not None
    labels = spec.labels
    if spec.active is not None:
        labels = labels.masked_fill(~spec.active, 0)
        student = blank_inactive(student, spec.active)
    log_q = torch.log_softmax(effective_logits(student, spec.student_softcap, dtype), dim=-1)
    value = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return value if spec.active is None else value.masked_fill(~spec.active, 0.0)
