"""Mean and standard deviation of rows in plain PyTorch, and what the deviation adds to a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.backends.rows import compute_dtype

__all__ = ["row_deviation", "row_deviation_backward"]


def row_deviation(logits: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.backends.rows``, as the next."""
    rows = logits.to(compute_dtype(logits, None))
    mean = rows.mean(-1)
    squares = torch.linalg.vector_norm(rows - mean.unsqueeze(-1), dim=-1)
    return mean, (squares / math.sqrt(max(1, rows.shape[1] - 1))).clamp(min=least)


def row_deviation_backward(logits: Tensor, means: Tensor, deviations: Tensor, gradient: Tensor) -> None:
    from_mean = logits.to(means.dtype) - means.unsqueeze(-1)
    product = torch.linalg.vecdot(gradient.to(means.dtype), from_mean)
    factor = product / (max(1, logits.shape[1] - 1) * deviations.square())
    gradient.sub_((factor.unsqueeze(-1) * from_mean).to(gradient.dtype))
