"""The losses as one writes them in plain PyTorch, without a library: the baseline, eager and compiled.

Unlike ``kdkernels.reference`` these compute nothing beyond the formula: no floor under the logits, no masks, no unused
exponentials. Half-precision logits are converted to float32 by the softmax itself, the cheapest way to the same accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kdkernels.divergences import Divergence, Kind

__all__ = ["mean_divergence", "mean_divergence_from_stored", "pair_distances", "sinkhorn_distances", "sinkhorn_plan"]
__all__ += ["top_log_probs"]

Formula = Callable[[Tensor, Tensor], Tensor]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)``, averaged over the rows."""
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """``log(share p + (1 - share) q)``."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def formula(divergence: Divergence) -> Formula:
    """The divergence as a function of ``log p`` and ``log q``, ``[N, V]``, averaged over the rows."""
    kind, a, b = divergence.form

    def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = log_mixture(log_p, log_q, a)
        return a * kl(log_p, log_m) + (1 - a) * kl(log_q, log_m)

    def ab(log_p: Tensor, log_q: Tensor) -> Tensor:
        cross = (a * log_p + b * log_q).exp()
        own = a * ((a + b) * log_p).exp() + b * ((a + b) * log_q).exp()
        return (own / (a + b) - cross).sum(-1).mean() / (a * b)

    formulas: dict[int, Formula] = {
        Kind.FORWARD_KL: kl,
        Kind.REVERSE_KL: lambda log_p, log_q: kl(log_q, log_p),
        Kind.JEFFREYS: lambda log_p, log_q: a * kl(log_p, log_q) + (1 - a) * kl(log_q, log_p),
        Kind.JSD: jsd,
        Kind.SKEW_FORWARD_KL: lambda log_p, log_q: kl(log_p, log_mixture(log_p, log_q, a)),
        Kind.SKEW_REVERSE_KL: lambda log_p, log_q: kl(log_q, log_mixture(log_q, log_p, a)),
        Kind.TVD: lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean(),
        Kind.ALPHA: lambda log_p, log_q: b * (1 - (a * log_p + (1 - a) * log_q).exp().sum(-1)).mean(),
        Kind.RENYI: lambda log_p, log_q: (a * log_p + (1 - a) * log_q).logsumexp(-1).mean() / (a - 1),
        Kind.AB: ab,
        Kind.SOFT_CROSS_ENTROPY: lambda log_p, log_q: -(log_p.exp() * log_q).sum(-1).mean(),
    }
    return formulas[kind]


def mean_divergence(divergence: Divergence) -> Formula:
    """The divergence as a function of student and teacher logits ``[N, V]``, averaged over the rows."""
    of_log_probabilities = formula(divergence)

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        log_q = functional.log_softmax(student, -1, dtype=dtype)
        log_p = functional.log_softmax(teacher, -1, dtype=dtype)
        return of_log_probabilities(log_p, log_q)

    return mean


def mean_divergence_from_stored(divergence: Divergence) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The divergence of student logits ``[N, V]`` from stored log-probabilities and their ids ``[N, K]``.

    All other ids are one outcome, whose probabilities are what the named ones leave.
    """
    of_log_probabilities = formula(divergence)

    def mean(student: Tensor, log_probs: Tensor, ids: Tensor) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        log_q = functional.log_softmax(student, -1, dtype=dtype).gather(-1, ids)
        return of_log_probabilities(with_rest(log_probs.to(dtype)), with_rest(log_q))

    return mean


def with_rest(log_probs: Tensor) -> Tensor:
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-9)
    return torch.cat([log_probs, rest.log()], -1)


def top_log_probs(logits: Tensor, k: int) -> Tensor:
    """The log-probabilities of the ``k`` most probable ids."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.topk(logits, k, -1).values - torch.logsumexp(logits, -1, keepdim=True)


def pair_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """The L1 distances of softmax rows, ``[..., n, V]`` and ``[..., m, V]``."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.cdist(functional.softmax(student, -1, dtype=dtype), functional.softmax(teacher, -1, dtype=dtype), p=1)


def sinkhorn_plan(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Uniform marginals, in the log domain, every step a tensor of its own."""
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    n, m = cost.shape[1:]
    scores = -cost / epsilon
    f, g = cost.new_zeros(cost.shape[:2]), cost.new_zeros(cost.shape[0], m)
    for _ in range(iterations):
        f = -math.log(n) - torch.logsumexp(scores + g.unsqueeze(-2), -1)
        g = -math.log(m) - torch.logsumexp(scores + f.unsqueeze(-1), -2)
    return (scores + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def sinkhorn_distances(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    return (sinkhorn_plan(cost, epsilon, iterations) * cost).sum((-1, -2))
