"""The divergences of the distillation loss as one writes them in plain PyTorch: the baseline to measure against.

Each function takes the full log-probabilities of teacher and student, ``[tokens, vocabulary]``, and returns the sum of
the divergence over the tokens (a scalar). p is the teacher, q the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), summed over the tokens."""
    return functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


def log_mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log1p(-share_of_p))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return kl(log_p, log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return kl(log_q, log_mixture(log_p, log_q, 1 - alpha))


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum()


def jeffreys(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)


def alpha_divergence(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return (1 - (alpha * log_p + (1 - alpha) * log_q).exp().sum(-1)).sum() / (alpha * (1 - alpha))


def renyi(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1).sum() / (alpha - 1)


def ab_divergence(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    total = alpha + beta
    cross = (alpha * log_p + beta * log_q).exp()
    pure = (alpha * (total * log_p).exp() + beta * (total * log_q).exp()) / total
    return -(cross - pure).sum() / (alpha * beta)


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (1 - (0.5 * (log_p + log_q)).exp().sum(-1)).sum()


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "jeffreys": jeffreys,
    "alpha": alpha_divergence,
    "renyi": renyi,
    "ab": ab_divergence,
    "hellinger": hellinger,
}


def log_probabilities(
    hidden: Tensor, weight: Tensor, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Log-softmax of the head's logits; ``hidden [..., H]`` and ``weight [V, H]`` give ``[..., V]``, in their own dtype.

    With a ``dtype`` the matrix product runs in it, and so do those of its gradient, as under autocast.
    """
    if dtype is None:
        logits = functional.linear(hidden, weight)
    else:
        logits = functional.linear(hidden.to(dtype), weight.to(dtype)).to(hidden.dtype)
    return functional.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
