"""The arguments of ``sorted_l1``."""

from __future__ import annotations

from torch import Tensor

from kdkernels.arguments.rows import Problem, active_rows, pair
from kdkernels.checks import check_real
from kdkernels.divergences import Form
from kdkernels.sources import Source

__all__ = ["prepare_sorted_l1"]


def prepare_sorted_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    mask: Tensor | None,
    error_bound: float,
) -> tuple[Problem, float]:
    """Checks the arguments of ``sorted_l1``; the problem and the error bound."""
    if teacher is None:
        raise TypeError("teacher must be a tensor of logits, kd.Logits or kd.LMHead, got None")
    bound = check_real("error_bound", error_bound)
    if bound < 0:
        raise ValueError(f"error_bound must be at least 0, got {error_bound!r}")
    problem = pair(student, teacher, Form(0), None, temperature, teacher_temperature, same_vocabulary=False)
    return active_rows(problem, mask, None, -100), bound
