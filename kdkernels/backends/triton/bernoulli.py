"""The family bernoulli in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch, row_arguments

__all__ = ["bernoulli"]


def bernoulli(
    student: Tensor, targets: Tensor, spec: RowSpec, grad_values: Tensor | None, grad_student: Tensor | None
) -> Tensor:
    """The values [N]; the gradient of sum(grad_values * values) is written into `grad_student` (None: not wanted)."""
    rows, vocab_size = student.shape
    values = torch.empty(rows, dtype=compute_dtype(student, targets), device=student.device)
    launch = prepare_launch(student, targets, grad_student, kernel="bernoulli")
    if rows:
        with on_device_of(student, "bernoulli"):
            load_kernels().bernoulli.bernoulli_kernel[(rows,)](
                student,
                targets,
                grad_student,
                launch.stride(student),
                launch.stride(targets),
                launch.stride(grad_student),
                vocab_size,
                values,
                grad_values,
                **row_arguments(spec),
                FORM=spec.kind,
                **launch.options,
            )
    return values
