"""The family divergence in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.triton.launching import (
    composed_of,
    composition_arguments,
    load_kernels,
    on_device_of,
    prepare_launch,
    row_arguments,
)

__all__ = ["SAVED_STATISTICS", "divergence_backward", "divergence_forward", "divergence_fused"]

SAVED_STATISTICS = 9
"""Columns of the statistics that the forward hands to the backward."""


def form_arguments(spec: RowSpec) -> dict[str, Any]:
    """The arguments that say what is computed, but for what only the forward needs."""
    return {
        "a": spec.a,
        "b": spec.b,
        "parameters": spec.parameters,
        "targets": spec.targets,
        "rest_weight": spec.rest_weight,
        "rest_weights": spec.rest_weights,
    }


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], cross_entropy [N] or [0], statistics [N, SAVED_STATISTICS])."""
    rows, vocab_size = student.shape
    kernels = load_kernels()
    launch = prepare_launch(student, teacher, *composed_of(spec), kernel="divergence_forward")
    divergence = torch.empty(rows, dtype=compute_dtype(student, teacher), device=student.device)
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    statistics = divergence.new_empty(rows, SAVED_STATISTICS)
    if rows:
        with on_device_of(student, "divergence"):
            kernels.divergence.divergence_forward_kernel[(rows,)](
                student,
                teacher,
                launch.stride(student),
                launch.stride(teacher),
                vocab_size,
                divergence,
                None if spec.labels is None else cross_entropy,
                statistics,
                spec.labels,
                **row_arguments(spec),
                **composition_arguments(spec),
                **form_arguments(spec),
                target_weight=spec.target_weight,
                target_weights=spec.target_weights,
                KIND=spec.kind,
                FAST_LOG=launch.fast_log,
                COMPUTE=launch.compute,
                UNROLL=launch.unroll,
                LANES=launch.lanes,
                WIDTH=launch.width,
                num_warps=launch.num_warps,
            )
    return divergence, cross_entropy, statistics


def divergence_backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Writes the wanted gradients; `statistics` are those that `divergence_forward` returned."""
    rows, vocab_size = student.shape
    if not rows or (grad_student is None and grad_teacher is None):
        return
    launch = prepare_launch(
        student, teacher, grad_student, grad_teacher, *composed_of(spec), kernel="divergence_backward"
    )
    hard = grad_cross_entropy is not None and grad_student is not None
    with on_device_of(student, "divergence"):
        load_kernels().divergence.divergence_backward_kernel[(rows,)](
            student,
            teacher,
            grad_student,
            grad_teacher,
            launch.stride(student),
            launch.stride(teacher),
            launch.stride(grad_student),
            launch.stride(grad_teacher),
            vocab_size,
            statistics,
            grad_divergence.contiguous(),
            grad_cross_entropy.contiguous() if hard and grad_cross_entropy is not None else None,
            spec.labels if hard else None,
            **row_arguments(spec),
            **composition_arguments(spec),
            **form_arguments(spec),
            KIND=spec.kind,
            FAST_LOG=launch.fast_log,
            COMPUTE=launch.compute,
            TILE=launch.unroll * launch.lanes * launch.width,
            REST_TILE=launch.lanes * launch.width,
            WIDTH=launch.width,
            num_warps=launch.num_warps,
        )


def divergence_fused(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(divergence [N], cross_entropy [N] or [0]), and writes the wanted gradients: the two functions above in turn."""
    divergence, cross_entropy, statistics = divergence_forward(student, teacher, spec)
    divergence_backward(
        student, teacher, statistics, spec, grad_divergence, grad_cross_entropy, grad_student, grad_teacher
    )
    return divergence, cross_entropy
