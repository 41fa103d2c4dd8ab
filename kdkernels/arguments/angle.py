"""The arguments of ``angle_loss``."""

from __future__ import annotations

from typing import Any

from kdkernels.checks import check_floating

__all__ = ["check_points"]


def check_points(student: Any, teacher: Any) -> None:
    """Both must be ``[B, d]``, each with a d of its own."""
    for name, points in (("student", student), ("teacher", teacher)):
        check_floating(name, points)
        if points.dim() != 2:
            raise ValueError(f"{name} must have the shape [B, d], got {list(points.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher must have as many points, got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"the student is on {student.device} and the teacher on {teacher.device}")
