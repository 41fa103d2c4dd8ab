"""The family bernoulli on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.compiled.divergence import sides_arguments
from kdkernels.backends.cpu.launching import LIBRARY, address, module
from kdkernels.backends.rows import RowSpec, compute_dtype

__all__ = ["bernoulli"]


def bernoulli(
    student: Tensor, targets: Tensor, spec: RowSpec, grad_values: Tensor | None, grad_student: Tensor | None
) -> Tensor:
    values = torch.empty(student.shape[0], dtype=compute_dtype(student, targets))
    module().bernoulli(
        *sides_arguments(LIBRARY, student, targets, spec),
        spec.kind,
        values.data_ptr(),
        address(grad_values),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        # Memory of its own is taken for new: missing pages are brought in a row at a time, not one by one as they fault.
        grad_student is not None and grad_student.data_ptr() != student.data_ptr(),
    )
    return values
