"""``sorted_l1`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from kdkernels import arguments
from kdkernels.arguments import Problem
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import RowSpec, compute_dtype, row_temperature
from kdkernels.checks import check_flag
from kdkernels.reference import rows
from kdkernels.sources import Source

__all__ = ["distance", "rounding_bound", "sorted_l1", "sorted_l1_rows"]


def sorted_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    error_bound: float = 0.0,
    return_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``kdkernels.sorted_l1``: same arguments, computed by sorting whole ``[N, V]`` tensors, whatever the error bound."""
    check_flag("return_bound", return_bound)
    problem, _ = arguments.prepare_sorted_l1(
        student,
        teacher,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        error_bound=error_bound,
    )
    values = sorted_l1_rows(problem).reshape(problem.batch_shape)
    if not return_bound:
        return values
    return values, torch.full_like(values, rounding_bound(problem), requires_grad=False)


def sorted_l1_rows(problem: Problem) -> Tensor:
    """The values ``[N]`` of a checked problem."""
    assert problem.teacher is not None
    with autocast_disabled(problem.student.tensor.device.type):
        student, teacher = (rows.side_logits(side, problem.spec.active) for side in (problem.student, problem.teacher))
        return distance(student, teacher, problem.spec)


def distance(student: Tensor, teacher: Tensor, spec: RowSpec) -> Tensor:
    """The distance per row ``[N]`` of logits ``[N, V_s]`` and ``[N, V_t]``; rows that are not active get 0."""
    dtype = compute_dtype(student, teacher)
    if spec.active is not None:
        student, teacher = rows.blank_inactive(student, spec.active), rows.blank_inactive(teacher, spec.active)
    temperatures = (
        row_temperature(spec.student_temperature, spec.student_temperatures),
        row_temperature(spec.teacher_temperature, spec.teacher_temperatures),
    )
    q = sorted_probabilities(student, spec.student_softcap, temperatures[0], dtype)
    p = sorted_probabilities(teacher, spec.teacher_softcap, temperatures[1], dtype)
    longer = max(q.shape[-1], p.shape[-1])
    q, p = (functional.pad(side, (0, longer - side.shape[-1])) for side in (q, p))
    value = (q - p).abs().sum(-1)
    return value if spec.active is None else value.masked_fill(~spec.active, 0.0)


def sorted_probabilities(logits: Tensor, softcap: float, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    effective = rows.effective_logits(logits, softcap, dtype)
    # Relative to the largest before the temperature, so that no digits are lost.
    relative = effective - effective.detach().amax(-1, keepdim=True)
    return torch.sort(torch.softmax(relative / temperature, -1), dim=-1, descending=True, stable=True).values


def rounding_bound(problem: Problem) -> float:
    """What rounding can add to the error of a value: see docs/optimal_transport.md, "Sorted losses"."""
    assert problem.teacher is not None
    sides = problem.student, problem.teacher
    longest = max(side.tensor.shape[1] if side.weight is None else side.weight.shape[0] for side in sides)
    return torch.finfo(problem.dtype).eps * (10 + 2 * min(longest, 70) + 5 * math.log2(longest))
