"""A fused divergence of backends whose forward and backward are launches of their own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kdkernels.backends.rows import RowSpec

__all__ = ["Fused", "fused_by"]

Fused = Callable[..., tuple[Tensor, Tensor]]


def fused_by(forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[..., None]) -> Fused:
    """``divergence_fused`` of ``backends.rows`` from the other two functions."""

    def divergence_fused(
        student: Tensor,
        teacher: Tensor,
        spec: RowSpec,
        grad_divergence: Tensor,
        grad_cross_entropy: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        divergence, cross_entropy, statistics = forward(student, teacher, spec)
        backward(student, teacher, statistics, spec, grad_divergence, grad_cross_entropy, grad_student, grad_teacher)
        return divergence, cross_entropy

    return divergence_fused
