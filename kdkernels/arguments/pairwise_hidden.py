"""The arguments of ``pairwise_cosine`` and ``pairwise_sqeuclidean``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import compute_dtype
from kdkernels.checks import check_floating

__all__ = ["hidden_pairs"]


def hidden_pairs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states ``[..., n, d]`` and ``[..., m, d]``, checked, in the compute type."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        check_floating(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have the shape [..., rows, d], got {tuple(tensor.shape)}")
    if student.shape[:-2] != teacher.shape[:-2]:
        raise ValueError(
            f"student and teacher must have the same batch: the student's has the shape {tuple(student.shape[:-2])}, "
            f"the teacher's {tuple(teacher.shape[:-2])}"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student and teacher have hidden states of {student.shape[-1]} and {teacher.shape[-1]} entries; "
            f"project one of them to the size of the other"
        )
    if student.device != teacher.device:
        raise ValueError(f"the student is on {student.device} and the teacher on {teacher.device}")
    dtype: torch.dtype = compute_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)
