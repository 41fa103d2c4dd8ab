"""The family sinkhorn on NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.compiled import sinkhorn as compiled
from kdkernels.backends.cuda.launching import LIBRARY
from kdkernels.backends.transport import TransportGradients, TransportSpec, TransportValues

__all__ = ["SINKHORN_POTENTIALS", "sinkhorn_backward", "sinkhorn_forward"]

SINKHORN_POTENTIALS = compiled.SINKHORN_POTENTIALS


def scratch_of(cost: Tensor, vectors: int) -> Tensor:
    batch, n, m = cost.shape
    return torch.empty(batch, vectors, n + m, dtype=torch.float64, device=cost.device)


def sinkhorn_forward(cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec, keep_history: bool) -> TransportValues:
    """See ``kdkernels.backends.transport``."""
    scratch = scratch_of(cost, LIBRARY.module().SINKHORN_VECTORS)
    return compiled.sinkhorn_forward(LIBRARY, cost, a, b, spec, keep_history, scratch)


def sinkhorn_backward(
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
) -> None:
    """See ``kdkernels.backends.transport``."""
    scratch = scratch_of(cost, LIBRARY.module().SINKHORN_GRADIENT_VECTORS)
    compiled.sinkhorn_backward(
        LIBRARY, cost, a, b, values, spec, gradient, upstream, grad_cost, grad_a, grad_b, scratch
    )
