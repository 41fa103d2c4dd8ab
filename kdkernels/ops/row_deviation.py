"""The standard deviation of each row of logits as the temperature of a loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.rows import compute_dtype

__all__ = ["LEAST", "ThroughDeviation", "row_deviation"]

LEAST = 1e-7
"""That a standard deviation is taken for."""


def row_deviation(logits: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[N]`` of rows ``[N, V]``, by 1 / (V - 1), of the compute type. Without gradient."""
    if backend == "cpu":
        found: tuple[Tensor, Tensor] = row_backend("cpu").row_deviation(logits.detach(), LEAST)
        return found
    rows = logits.detach().to(compute_dtype(logits, None))
    mean = rows.mean(-1)
    squares = torch.linalg.vector_norm(rows - mean.unsqueeze(-1), dim=-1)
    return mean, (squares / math.sqrt(max(1, rows.shape[1] - 1))).clamp(min=LEAST)


class ThroughDeviation(torch.autograd.Function):
    """Logits ``[N, V]`` themselves, for a loss that takes their standard deviation ``d`` for its temperature, as a number.

    The loss gives ``g``, the gradient at that temperature. The temperature's own is ``-<g, s> / d``, and
    ``dd / ds = (s - mean(s)) / ((V - 1) d)``; the entries of g sum to 0, so that ``<g, s> = <g, s - mean(s)>``. What is missing
    is taken off ``g`` in place, which nobody else sees: the logits that come out of here are the loss's own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mean: Tensor, deviation: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(logits, mean, deviation)
        ctx.backend = backend
        return logits.view_as(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, mean, deviation = ctx.saved_tensors
        if ctx.backend == "cpu" and gradient.stride(-1) == 1:
            row_backend("cpu").row_deviation_backward(logits, mean, deviation, gradient)
            return gradient, None, None, None
        from_mean = logits.to(mean.dtype) - mean.unsqueeze(-1)
        product = torch.linalg.vecdot(gradient.to(mean.dtype), from_mean)
        factor = product / (max(1, logits.shape[1] - 1) * deviation.square())
        gradient.sub_((factor.unsqueeze(-1) * from_mean).to(gradient.dtype))
        return gradient, None, None, None
