"""The divergences as one writes them in plain PyTorch, without a library: the baseline, eager and compiled.

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

__all__ = ["mean_divergence"]

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
