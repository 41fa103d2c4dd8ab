"""What ``gradient_tolerance`` means, on whole rows of a gradient: by sorting, where the kernels use a histogram.

The kernels' threshold lies at most one bin, an eighth of an octave, below the one found here; both keep the promise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["round_nearest", "round_stochastically", "with_rounded_gradient"]


def round_nearest(gradient: Tensor, tolerance: float) -> Tensor:
    """The rows ``[N, V]`` with the mean in place of the smallest entries, whose squares add up to ``tolerance^2 |g|^2``.

    The error is at most that of zeros in their place, and the sum of a row remains (of softmax gradients: 0).
    """
    squares, order = gradient.double().square().sort(-1)
    lost = squares.cumsum(-1) <= tolerance**2 * squares.sum(-1, keepdim=True)
    lost = torch.zeros_like(lost).scatter(-1, order, lost)
    mean = (gradient.double() * lost).sum(-1, keepdim=True) / lost.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(lost, mean.to(gradient.dtype), gradient)


def round_stochastically(gradient: Tensor, tolerance: float, seed: int) -> Tensor:
    """The rows with the entries below t at +-t with probability ``|g_v| / t``, else 0.

    t is the largest magnitude of the row for which ``sum |g_v| (t - |g_v|)`` over the entries below it, the expected
    squared error, is at most ``tolerance^2 |g|^2``.
    """
    magnitudes = gradient.double().abs()
    ascending = magnitudes.sort(-1).values
    squares = ascending.square()
    error = ascending * ascending.cumsum(-1) - squares.cumsum(-1)
    allowed = error <= tolerance**2 * squares.sum(-1, keepdim=True)
    threshold = ascending.gather(-1, (allowed.sum(-1, keepdim=True) - 1).clamp(min=0))
    draws = torch.rand(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    raised = (draws.to(gradient.device) * threshold < magnitudes).to(gradient.dtype)
    rounded = gradient.sign() * threshold.to(gradient.dtype) * raised
    return torch.where(magnitudes < threshold, rounded, gradient)


class RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tolerance: float, seed: Tensor | None) -> Tensor:
        ctx.rule = tolerance, seed
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tolerance, seed = ctx.rule
        if seed is None:
            return round_nearest(gradient, tolerance), None, None
        return round_stochastically(gradient, tolerance, int(seed)), None, None


def with_rounded_gradient(logits: Tensor, tolerance: float, seed: Tensor | None) -> Tensor:
    """The logits ``[N, V]``, whose gradient will be rounded on its way back."""
    return RoundedGradient.apply(logits, tolerance, seed)  # type: ignore[no-untyped-call, no-any-return]
