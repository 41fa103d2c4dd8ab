"""Row-level definitions in plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from kdkernels.backends.rows import NOTHING, Composition, RowSpec, Side, compute_dtype, row_temperature
from kdkernels.divergences import Kind

__all__ = [
    "LOGIT_FLOOR",
    "LOG_SATURATION",
    "composed_logits",
    "cross_entropy",
    "divergence",
    "side_logits",
    "tempered_log_softmax",
]

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


def composed_logits(
    logits: Tensor, softcap: float, dtype: torch.dtype, composition: Composition | None, active: Tensor | None = None
) -> Tensor:
    """The logits that a side's softmax is taken of: its own, or what a composition makes of them."""
    own = effective_logits(logits, softcap, dtype)
    if composition is None:
        return own
    if active is not None:
        composition = blank_composition(composition, active)
    others = (effective_logits(side_logits(other, active), other.softcap, dtype) for other in composition.others)
    found, masked = combined([own, *others], composition)
    if composition.class_bias is not None:
        found = found + composition.class_bias
    if composition.bounds is not None:
        found = found.clamp(composition.bounds[:, :1], composition.bounds[:, 1:])
    found = found.masked_fill(masked, LOGIT_FLOOR)
    if composition.columns is not None and composition.values is not None:
        ids = torch.arange(found.shape[-1], device=found.device)
        for column, value in zip(composition.columns.unbind(-1), composition.values.unbind(-1), strict=True):
            found = torch.where(ids == column.unsqueeze(-1), value.unsqueeze(-1), found)
    return found.clamp(min=LOGIT_FLOOR)


def combined(sources: list[Tensor], composition: Composition) -> tuple[Tensor, Tensor]:
    """The sum of the sources, of logits or of probabilities, and which entries are masked."""
    coefficients, offsets = composition.coefficients, composition.offsets
    if coefficients is None:
        return sources[0], sources[0] <= LOGIT_FLOOR
    factors = [factor.unsqueeze(-1) for factor in coefficients.unbind(-1)]
    if offsets is None:
        # Where a source is not read, not even its NaN counts.
        terms = [(factor * source).masked_fill(factor == 0, 0) for factor, source in zip(factors, sources, strict=True)]
        masked = [(factor > 0) & (source <= LOGIT_FLOOR) for factor, source in zip(factors, sources, strict=True)]
        return torch.stack(terms).sum(0), torch.stack(masked).any(0)
    shifts = [offset.unsqueeze(-1) for offset in offsets.unbind(-1)]
    exponents = torch.stack(
        [
            (factor * source + shift).masked_fill((source <= LOGIT_FLOOR) | shift.isneginf(), -math.inf)
            for factor, source, shift in zip(factors, sources, shifts, strict=True)
        ]
    )
    masked_everywhere = exponents.isneginf().all(0)
    return torch.logsumexp(exponents.masked_fill(masked_everywhere, 0), 0), masked_everywhere


def blank_composition(composition: Composition, active: Tensor) -> Composition:
    """Zeros where not active."""
    coefficients, offsets, bounds, values = (
        None if numbers is None else blank_inactive(numbers, active)
        for numbers in (composition.coefficients, composition.offsets, composition.bounds, composition.values)
    )
    return composition._replace(coefficients=coefficients, offsets=offsets, bounds=bounds, values=values)


def tempered_log_softmax(logits: Tensor, softcap: float, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    return torch.log_softmax(effective_logits(logits, softcap, dtype) / temperature, dim=-1)


def tempered_logits(side: str, logits: Tensor, spec: RowSpec, dtype: torch.dtype) -> Tensor:
    """What the softmax of a side, "student" or "teacher", is taken of."""
    if side == "student":
        softcap, composition = spec.student_softcap, spec.student_composition
        temperature = row_temperature(spec.student_temperature, spec.student_temperatures)
    else:
        softcap, composition = spec.teacher_softcap, spec.teacher_composition
        temperature = row_temperature(spec.teacher_temperature, spec.teacher_temperatures)
    return composed_logits(logits, softcap, dtype, composition, spec.active) / temperature


def divergence(student: Tensor, teacher: Tensor, spec: RowSpec) -> Tensor:
    """The divergence per row ``[N]`` of logits ``[N, V]``; rows that are not active get 0."""
    dtype = compute_dtype(student, teacher)
    if spec.active is not None:
        student, teacher = blank_inactive(student, spec.active), blank_inactive(teacher, spec.active)
    s, t = (tempered_logits(side, logits, spec, dtype) for side, logits in (("student", student), ("teacher", teacher)))
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
    logits = composed_logits(student, spec.student_softcap, dtype, spec.student_composition, spec.active)
    log_q = torch.log_softmax(logits, dim=-1)
    value = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return value if spec.active is None else value.masked_fill(~spec.active, 0.0)
