"""The operator ``kdkernels::token_statistics``, for logits and language-model heads. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends import chunked_head
from kdkernels.backends.rows import Side, compute_dtype
from kdkernels.ops.eager import traced
from kdkernels.ops.schema import SPEC, TAGS, pack_spec, unpack_spec
from kdkernels.statistics import TokenStatistics, empty_matrix, from_matrix

__all__ = ["statistics"]

SCHEMA = (
    "(Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale, Tensor? teacher, "
    "Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, int? memory_budget, str backend, "
    f"{SPEC}) -> (Tensor, Tensor)"
)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    sides, (memory_budget, backend, *packed) = arguments[:8], arguments[8:]
    teacher = None if sides[4] is None else Side(*sides[4:])
    return chunked_head.statistics(Side(*sides[:4]), teacher, unpack_spec(packed), memory_budget, backend)


token_statistics_op = torch.library.custom_op(
    "kdkernels::token_statistics", forward, mutates_args=(), schema=SCHEMA, tags=TAGS
)


@token_statistics_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    student, teacher = arguments[0], arguments[4]
    return empty_matrix(student.shape[0], compute_dtype(student, teacher), student.device)


def statistics(problem: Problem, memory_budget: int | None, backend: str) -> TokenStatistics:
    """The statistics of a checked problem."""
    teacher = problem.teacher
    teacher_arguments = (None, None, None, 1.0) if teacher is None else teacher[:4]
    arguments = (*problem.student[:4], *teacher_arguments, memory_budget, backend, *pack_spec(problem.spec))
    tensors = (problem.student.tensor, None if teacher is None else teacher.tensor)
    call = token_statistics_op if traced(*tensors) else forward
    values, argmax = call(*arguments)
    return from_matrix(values, argmax, problem)
