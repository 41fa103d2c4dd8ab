"""``pairwise_cosine`` and ``pairwise_sqeuclidean`` pair by pair: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.checks import check_real

__all__ = ["pairwise_cosine", "pairwise_sqeuclidean"]


def pairwise_cosine(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> Tensor:
    """See ``kdkernels.pairwise_cosine``: same arguments, products ``[..., n, m, d]`` made whole."""
    x, y = arguments.hidden_pairs(student, teacher)
    check_real("eps", eps, positive=True)
    with autocast_disabled(x.device.type):
        products = (x.unsqueeze(-2) * y.unsqueeze(-3)).sum(-1)
        lengths = [torch.linalg.vector_norm(rows, dim=-1).clamp(min=eps) for rows in (x, y)]
        cosines: Tensor = products / (lengths[0].unsqueeze(-1) * lengths[1].unsqueeze(-2))
        return 1 - cosines


def pairwise_sqeuclidean(student: Tensor, teacher: Tensor) -> Tensor:
    """See ``kdkernels.pairwise_sqeuclidean``: same arguments, differences ``[..., n, m, d]`` made whole."""
    x, y = arguments.hidden_pairs(student, teacher)
    with autocast_disabled(x.device.type):
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
