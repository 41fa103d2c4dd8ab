"""The standard deviation of each row of logits as the temperature of a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.reference import row_deviation as reference

__all__ = ["LEAST", "ThroughDeviation", "row_deviation"]

LEAST = 1e-7
"""That a standard deviation is taken for."""


def implementation(backend: str) -> Any:
    return reference if backend == "reference" else row_backend(backend)


def row_deviation(logits: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[N]`` of rows ``[N, V]``, by 1 / (V - 1), of the compute type. Without gradient."""
    found: tuple[Tensor, Tensor] = implementation(backend).row_deviation(logits.detach(), LEAST)
    return found


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
        gradient = gradient.contiguous()
        implementation(ctx.backend).row_deviation_backward(logits, mean, deviation, gradient)
        return gradient, None, None, None
