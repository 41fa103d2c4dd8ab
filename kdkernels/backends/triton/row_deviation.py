"""The family row_deviation in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import compute_dtype
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch

__all__ = ["row_deviation", "row_deviation_backward"]


def row_deviation(logits: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(means [N], deviations [N])."""
    rows, vocab_size = logits.shape
    means, deviations = torch.empty(2, rows, dtype=compute_dtype(logits, None), device=logits.device)
    launch = prepare_launch(logits, kernel="row_deviation")
    if rows:
        with on_device_of(logits, "row_deviation"):
            load_kernels().row_deviation.row_deviation_kernel[(rows,)](
                logits, launch.stride(logits), vocab_size, least, means, deviations, **launch.options
            )
    return means, deviations


def row_deviation_backward(logits: Tensor, means: Tensor, deviations: Tensor, gradient: Tensor) -> None:
    """Changes the gradient [N, V], see ``kdkernels.backends.rows``."""
    rows, vocab_size = logits.shape
    launch = prepare_launch(logits, gradient, kernel="row_deviation_backward")
    if rows:
        with on_device_of(logits, "row_deviation"):
            load_kernels().row_deviation.row_deviation_backward_kernel[(rows,)](
                logits,
                gradient,
                launch.stride(logits),
                launch.stride(gradient),
                vocab_size,
                means,
                deviations,
                **launch.options,
            )
