"""The family angle on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.cpu.launching import module

__all__ = ["angle"]


def angle(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], corners: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    points = student[0].shape[0]
    losses, gradient = torch.empty(points, dtype=torch.float64), torch.empty(points, points, dtype=torch.float64)
    sums = torch.zeros_like(gradient)
    module().angle(
        torch.get_num_threads(),
        points,
        *(matrix.data_ptr() for matrix in (*student, *teacher)),
        corners.shape[0],
        corners.data_ptr(),
        losses.data_ptr(),
        gradient.data_ptr(),
        sums.data_ptr(),
    )
    return losses, gradient, sums
