"""The operator ``kdkernels::head_mass``, for logits and language-model heads. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import HeadProblem
from kdkernels.backends import head_mass
from kdkernels.backends.rows import Side
from kdkernels.ops.eager import traced
from kdkernels.ops.schema import SPEC, TAGS, pack_spec, unpack_spec

__all__ = ["rows"]

SCHEMA = (
    "(Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, Tensor? student, "
    "Tensor? student_weight, Tensor? student_bias, float student_scale, int? memory_budget, str backend, "
    f"{SPEC}) -> (Tensor, Tensor)"
)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    sides, (memory_budget, backend, *packed) = arguments[:8], arguments[8:]
    student = None if sides[4] is None else Side(*sides[4:])
    return head_mass.head_mass(Side(*sides[:4]), student, unpack_spec(packed), memory_budget, backend)


head_mass_op = torch.library.custom_op("kdkernels::head_mass", forward, mutates_args=(), schema=SCHEMA, tags=TAGS)


@head_mass_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return head_mass.empty(arguments[0], arguments[4])


def rows(problem: HeadProblem, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """``(thresholds [N], gaps [N, 2] or [0, 2])``."""
    teacher, student = problem.teacher, problem.student
    sides = (*teacher[:4], *((None, None, None, 1.0) if student is None else student[:4]))
    call = head_mass_op if traced(teacher.tensor, None if student is None else student.tensor) else forward
    found: tuple[Tensor, Tensor] = call(*sides, memory_budget, backend, *pack_spec(problem.spec))
    return found
