"""``pairwise_cosine`` and ``pairwise_sqeuclidean``: costs between hidden states, by matrix products of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.checks import check_real

__all__ = ["pairwise_cosine", "pairwise_sqeuclidean"]


def pairwise_cosine(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> Tensor:
    """All pairs of cosine distances ``1 - <s_i, t_j> / (|s_i| |t_j|)``, in [0, 2].

    Args:
        student: hidden states ``[..., n, d]``; float32, bfloat16, float16 or float64.
        teacher: hidden states ``[..., m, d]`` with the same batch.
        eps: positive number; norms below it count as ``eps``, so that a row of zeros has the distance 1 from every other.

    Returns:
        ``[..., n, m]``, float32, or float64 if a side is; differentiable any number of times. Never negative; rows of one
        direction are 0 apart but for rounding.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    x, y = arguments.hidden_pairs(student, teacher)
    check_real("eps", eps, positive=True)
    with autocast_disabled(x.device.type):
        x, y = (torch.nn.functional.normalize(rows, dim=-1, eps=eps) for rows in (x, y))
        return (1 - x @ y.mT).clamp(min=0, max=2)


def pairwise_sqeuclidean(student: Tensor, teacher: Tensor) -> Tensor:
    """All pairs of squared Euclidean distances ``|s_i - t_j|^2``.

    Computed as ``|s_i|^2 + |t_j|^2 - 2 <s_i, t_j>`` about the teacher's mean row, which spares the digits that all rows
    have in common: the error is a few roundings of the largest squared distance from that mean.

    Args:
        student: hidden states ``[..., n, d]``; float32, bfloat16, float16 or float64.
        teacher: hidden states ``[..., m, d]`` with the same batch.

    Returns:
        ``[..., n, m]``, float32, or float64 if a side is; differentiable any number of times. Never negative; identical
        rows are 0 apart but for rounding.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    x, y = arguments.hidden_pairs(student, teacher)
    with autocast_disabled(x.device.type):
        # The distances do not depend on the origin, so neither does their gradient.
        origin = y.detach().sum(-2, keepdim=True) / max(1, y.shape[-2])
        x, y = x - origin, y - origin
        squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2)
        return (squares - 2 * (x @ y.mT)).clamp(min=0)
