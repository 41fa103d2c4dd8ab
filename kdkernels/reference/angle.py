"""``angle_loss`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.backends.rows import compute_dtype

__all__ = ["angle_loss", "loss"]


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """See ``kdkernels.angle_loss``: same arguments, computed from differences ``[B, B, d]`` made whole."""
    arguments.check_points(student, teacher)
    return loss(student, teacher)


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of checked points, differentiable any number of times."""
    dtype = compute_dtype(student, teacher)
    if not student.shape[0]:
        return student.sum(dtype=dtype)
    return torch.nn.functional.smooth_l1_loss(cosines_of(student.to(dtype)), cosines_of(teacher.detach().to(dtype)))


def cosines_of(points: Tensor) -> Tensor:
    """``[B, B, B]`` by corner; 0 where a leg has no length, and no gradient there."""
    legs = points.unsqueeze(0) - points.unsqueeze(1)
    squares = legs.square().sum(-1, keepdim=True)
    there = squares > 0
    units = torch.where(there, legs * torch.where(there, squares, 1).rsqrt(), 0)
    return units @ units.mT
