"""``plackett_luce`` and ``token_ranks`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import Counting, Ranking
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import RowSpec, row_temperature
from kdkernels.reductions import reduce_rows
from kdkernels.reference.rows import LOGIT_FLOOR, effective_logits, side_logits
from kdkernels.sources import Source

__all__ = ["likelihood", "plackett_luce", "plackett_luce_rows", "rank_rows", "ranks_of", "teacher_order", "token_ranks"]


def plackett_luce(
    student: Source,
    teacher_or_order: Source,
    *,
    labels: Tensor | None = None,
    weights: str | Tensor = "softmax",
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """See ``kdkernels.plackett_luce``: same arguments, computed with autograd on whole ``[N, V]`` tensors."""
    ranking, total = arguments.prepare_plackett_luce(
        student,
        teacher_or_order,
        labels=labels,
        weights=weights,
        temperature=temperature,
        top_k=top_k,
        mask=mask,
        ignore_index=ignore_index,
        reduction=reduction,
        vocab_size=vocab_size,
    )
    return reduce_rows(plackett_luce_rows(ranking), ranking.problem, total)


def plackett_luce_rows(ranking: Ranking) -> Tensor:
    """The values ``[N]`` of a checked problem."""
    problem, order, weights = ranking.problem, ranking.order, ranking.weights
    spec = problem.spec
    with autocast_disabled(problem.student.tensor.device.type):
        student = side_logits(problem.student, spec.active)
        if order is None:
            assert problem.teacher is not None
            with torch.no_grad():
                teacher = side_logits(problem.teacher, spec.active)
                order, weights = teacher_order(teacher, spec, problem.dtype, weights, ranking.top_k)
        assert weights is not None
        return likelihood(student, order, weights, spec, problem.dtype)


def teacher_order(
    teacher: Tensor, spec: RowSpec, dtype: torch.dtype, weights: Tensor | None, ranks: int | None = None
) -> tuple[Tensor, Tensor]:
    """The first ranks that the teacher gives (None: all), ids ``[N, K]``, and their weights (None: its probabilities).

    The label comes first, then falling logits, equal ones by rising id. What the teacher masks has no weight, but for a
    label whose weight is given. Where the teacher has no distribution, the first weight is NaN.
    """
    teacher = teacher.to(dtype)
    keys = teacher.clamp(min=LOGIT_FLOOR).nan_to_num(nan=math.inf, posinf=math.inf)
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices
    if spec.labels is not None:
        labels = spec.labels if spec.active is None else spec.labels.masked_fill(~spec.active, 0)
        behind = (order != labels.unsqueeze(-1)).to(torch.int8)
        order = order.gather(-1, torch.sort(behind, dim=-1, stable=True).indices)
    order = order[:, :ranks]
    logits = effective_logits(teacher, spec.teacher_softcap, dtype)
    log_p = torch.log_softmax(logits / row_temperature(spec.teacher_temperature, spec.teacher_temperatures), -1)
    named = teacher.gather(-1, order) > LOGIT_FLOOR
    if weights is None:
        weights = log_p.gather(-1, order).exp()
    elif spec.labels is not None:
        named = named | (torch.arange(order.shape[1], device=order.device) == 0)
    weights = weights.masked_fill(~named, 0.0)
    invalid = log_p.isnan().any(-1, keepdim=True)
    return order, weights.masked_fill(invalid & (torch.arange(order.shape[1], device=order.device) == 0), math.nan)


def likelihood(student: Tensor, order: Tensor, weights: Tensor, spec: RowSpec, dtype: torch.dtype) -> Tensor:
    """The values ``[N]`` of logits ``[N, V]`` before the softcap, an order and weights ``[N, K]``."""
    logits = effective_logits(student, spec.student_softcap, dtype)
    named = order >= 0
    ids = order.clamp(min=0)
    # What has no rank comes behind what has; -1 stands past the last rank, as if below everything.
    nothing = -1e30
    ranked = logits.gather(-1, ids).masked_fill(~named, nothing)
    counts = torch.zeros_like(logits).scatter_add(-1, ids, named.to(dtype))
    rest = torch.logsumexp(logits.masked_fill(counts > 0, nothing), -1, keepdim=True)
    suffixes = torch.logcumsumexp(torch.cat([ranked, rest], -1).flip(-1), -1).flip(-1)[:, :-1]
    terms = (weights * (suffixes - ranked)).masked_fill(~named, 0.0)
    values = terms.sum(-1)
    return values if spec.active is None else values.masked_fill(~spec.active, 0.0)


def token_ranks(source: Source, ids: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """See ``kdkernels.token_ranks``: same arguments."""
    counting = arguments.prepare_token_ranks(source, ids, vocab_size=vocab_size)
    with torch.no_grad(), autocast_disabled(counting.source.tensor.device.type):
        return rank_rows(counting).reshape(counting.shape)


def rank_rows(counting: Counting) -> Tensor:
    """The ranks int64 ``[N, m]``."""
    return ranks_of(side_logits(counting.source), counting.ids)


def ranks_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The ranks int64 ``[N, m]`` of ids in logits ``[N, V]``."""
    own = logits.gather(-1, ids.clamp(min=0))
    ranks = [(logits > own[:, place : place + 1]).sum(-1) for place in range(ids.shape[1])]
    found = torch.stack(ranks, -1) if ranks else torch.zeros_like(ids)
    return found.masked_fill(own.isnan(), logits.shape[1]).masked_fill(ids < 0, -1)
