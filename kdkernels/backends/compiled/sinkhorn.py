"""The family sinkhorn in C++."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.backends.compiled.library import Library, address
from kdkernels.backends.transport import (
    GRADIENTS,
    SOLVER_TOLERANCE,
    TransportGradients,
    TransportSpec,
    TransportValues,
)

__all__ = ["SINKHORN_POTENTIALS", "sinkhorn_backward", "sinkhorn_forward"]

SINKHORN_POTENTIALS = torch.float64
"""In single precision a potential of 1e4 has lost the digits that matter at an epsilon of 1e-3."""


def problem_arguments(library: Library, cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec) -> tuple[Any, ...]:
    """The leading arguments of both kernels; ``cost`` has the compute type."""
    return (
        library.place(cost),
        a.dtype == torch.float64,
        *cost.shape,
        cost.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        address(spec.row_lengths),
        address(spec.column_lengths),
        address(spec.start),
        spec.epsilon,
        spec.tolerance,
        spec.row_reach,
        spec.column_reach,
        spec.epsilon_start,
        spec.epsilon_decay,
        spec.max_iterations,
    )


def potentials_arguments(values: TransportValues) -> tuple[int, ...]:
    histories = (0, 0) if values.f_history.shape[1] == 0 else (values.f_history.data_ptr(), values.g_history.data_ptr())
    return values.f.data_ptr(), values.g.data_ptr(), values.iterations.data_ptr(), *histories


def history(batch: int, steps: int, size: int, device: torch.device) -> Tensor:
    """Zeros; on the CPU the system makes only those pages of them that are written, as of torch's own it does not."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros((batch, steps, size)))
    return torch.zeros(batch, steps, size, dtype=SINKHORN_POTENTIALS, device=device)


def sinkhorn_forward(
    library: Library,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    spec: TransportSpec,
    keep_history: bool,
    scratch: Tensor | None = None,
) -> TransportValues:
    """``scratch``: of a GPU, which is told of it besides."""
    batch, n, m = cost.shape
    steps = spec.max_iterations if keep_history else 0
    values = TransportValues(
        distance=a.new_empty(batch),
        value=a.new_empty(batch),
        f=a.new_empty(batch, n, dtype=SINKHORN_POTENTIALS),
        g=a.new_empty(batch, m, dtype=SINKHORN_POTENTIALS),
        iterations=a.new_empty(batch, dtype=torch.int64),
        error=a.new_empty(batch),
        status=a.new_empty(batch, dtype=torch.int32),
        f_history=history(batch, steps, n, a.device),
        g_history=history(batch, steps, m, a.device),
    )
    cost = cost.to(a.dtype)
    library.module().sinkhorn(
        *problem_arguments(library, cost, a, b, spec),
        *potentials_arguments(values),
        values.distance.data_ptr(),
        values.value.data_ptr(),
        values.error.data_ptr(),
        values.status.data_ptr(),
        *(() if scratch is None else (scratch.data_ptr(),)),
    )
    return values


def sinkhorn_backward(
    library: Library,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    values: TransportValues,
    spec: TransportSpec,
    gradient: str,
    upstream: TransportGradients,
    grad_cost: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    scratch: Tensor | None = None,
) -> None:
    computed = cost.to(a.dtype)
    into = grad_cost if grad_cost is None or grad_cost.dtype == a.dtype else torch.empty_like(computed)
    library.module().sinkhorn_gradient(
        *problem_arguments(library, computed, a, b, spec),
        *potentials_arguments(values),
        GRADIENTS.index(gradient),
        SOLVER_TOLERANCE[a.dtype],
        *(address(each) for each in upstream),
        address(into),
        address(grad_a),
        address(grad_b),
        *(() if scratch is None else (scratch.data_ptr(),)),
    )
    if grad_cost is not None and into is not None and into is not grad_cost:
        grad_cost.copy_(into)
