"""The arguments of ``mass_threshold`` and ``head_tail_gap``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments.rows import REAL_DTYPES, Problem, active_rows, pair, per_token, side, temperature
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.checks import check_flag, check_real
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import Form
from kdkernels.sources import Source

__all__ = ["HeadProblem", "prepare_head_tail_gap", "prepare_mass_threshold"]


class HeadProblem(NamedTuple):
    """Whose head is wanted, and from whom its probabilities are compared; ``spec.a`` or ``spec.parameters`` is the mass,
    and ``spec.b`` is 1 where the ids that cross it belong to the head."""

    teacher: Side
    student: Side | None
    batch_shape: torch.Size
    spec: RowSpec


def with_mass(
    spec: RowSpec, mass: float | Tensor, crossing: bool, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> RowSpec:
    spec = spec._replace(b=float(check_flag("crossing", crossing)))
    if not isinstance(mass, Tensor):
        if not 0 <= check_real("mass", mass) <= 1:
            raise ValueError(f"mass must be in [0, 1], got {mass!r}")
        return spec._replace(a=float(mass))
    rows = per_token("mass", "real", mass, REAL_DTYPES, shape, device).to(dtype).contiguous()
    if values_are_checked(rows):
        allowed = (rows >= 0) & (rows <= 1)
        if not bool(allowed.all()):
            raise ValueError(f"mass must be in [0, 1] for every token, got {rows[~allowed][0].item()}")
    return spec._replace(parameters=rows)


def prepare_mass_threshold(
    source: Source, mass: float | Tensor, *, crossing: bool, temperature_of: float | Tensor, vocab_size: int | None
) -> HeadProblem:
    """Checks the arguments of ``mass_threshold``."""
    rows, shape, _ = side("source", source, vocab_size)
    device = rows.tensor.device
    dtype = torch.float64 if rows.tensor.dtype == torch.float64 else torch.float32
    number, per_row = temperature("temperature", temperature_of, shape, device, dtype)
    spec = RowSpec(0, 0.0, 0.0, teacher_temperature=number, teacher_temperatures=per_row, teacher_softcap=rows.softcap)
    return HeadProblem(rows, None, shape, with_mass(spec, mass, crossing, shape, device, dtype))


def prepare_head_tail_gap(
    student: Source,
    teacher: Source,
    mass: float | Tensor,
    *,
    crossing: bool,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    mask: Tensor | None,
    vocab_size: int | None,
) -> HeadProblem:
    """Checks the arguments of ``head_tail_gap``."""
    if teacher is None:
        raise TypeError("teacher must be a tensor of logits, kd.Logits or kd.LMHead, got None")
    problem: Problem = pair(student, teacher, Form(0), vocab_size, temperature, teacher_temperature)
    problem = active_rows(problem, mask, None, -100)
    assert problem.teacher is not None
    spec = with_mass(problem.spec, mass, crossing, problem.batch_shape, problem.student.tensor.device, problem.dtype)
    return HeadProblem(problem.teacher, problem.student, problem.batch_shape, spec)
