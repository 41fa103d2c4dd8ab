"""The family row_deviation on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.cpu.launching import DTYPES, FLOAT64, module

__all__ = ["row_deviation", "row_deviation_backward"]


def launch(logits: Tensor, least: float, means: Tensor, deviations: Tensor, gradient: Tensor | None) -> None:
    dtype = DTYPES[logits.dtype]
    module().row_deviation(
        torch.get_num_threads(),
        dtype == FLOAT64,
        *logits.shape,
        logits.data_ptr(),
        logits.stride(0),
        dtype,
        least,
        means.data_ptr(),
        deviations.data_ptr(),
        *((0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0))),
    )


def row_deviation(logits: Tensor, least: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    means, deviations = torch.empty(2, len(logits), dtype=dtype)
    launch(logits, least, means, deviations, None)
    return means, deviations


def row_deviation_backward(logits: Tensor, means: Tensor, deviations: Tensor, gradient: Tensor) -> None:
    launch(logits, 0.0, means, deviations, gradient)
