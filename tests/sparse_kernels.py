"""What kernels of the family sparse_divergence are held to, whoever runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accuracy import check
from sparse_truth import evaluate, ragged_teacher
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case, random_logits

from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import Policy, SparseRows

__all__ = ["Run", "check_case", "check_hard_rows"]

Run = Callable[..., Any]
"""``run(student, rows, spec, upstream, grad_cross_entropy, in_place)`` gives (values, cross-entropies, gradient)."""


def check_case(run: Run, case: Case, student: Tensor, k: int, tail: str, **options: Any) -> None:
    """Value and gradient; the same written over the logits, and the value alone."""
    teacher = random_logits(student.shape[1], torch.float64, rows=len(student))[1]
    ids, log_p = ragged_teacher(teacher, k)
    compute = torch.float64 if student.dtype == torch.float64 else torch.float32
    upstream = torch.linspace(-1.5, 2.0, len(student), dtype=compute)
    rows = SparseRows(int(Policy[tail.upper()]), ids, log_p)
    spec = RowSpec(*case.divergence.form, **options)
    value, _, gradient = run(student, rows, spec, upstream, None, False)
    tempers = {
        "temperature": spec.student_temperature if spec.student_temperatures is None else spec.student_temperatures,
        "tau": spec.teacher_temperature if spec.teacher_temperatures is None else spec.teacher_temperatures,
    }
    plain, truth = (
        evaluate(case, student, ids, log_p, tail, upstream, dtype, **tempers) for dtype in (compute, torch.float64)
    )
    check("value", value, plain.value, truth.value, 4 * truth.value_size)
    check("gradient", gradient, plain.gradient, truth.gradient, 4 * truth.gradient_size)
    _, _, written_over = run(student.clone(), rows, spec, upstream, None, True)
    assert torch.equal(written_over, gradient)
    alone, _, nothing = run(student, rows, spec, None, None, False)
    assert nothing is None
    assert torch.equal(alone, value)


def check_hard_rows(run: Run, tail: str) -> None:
    """Masked entries, logits of 1e4, a row that is masked throughout."""
    student, teacher = random_logits(130, rows=4)
    student[0, :70] = -torch.inf
    student[1] = 1e4 * student[1].sign() + student[1]
    student[2, :] = -torch.inf
    ids, log_p = ragged_teacher(teacher, 9)
    rows = SparseRows(int(Policy[tail.upper()]), ids, log_p)
    forward_kl = EVERY_DIVERGENCE[0]
    spec, upstream = RowSpec(*forward_kl.divergence.form), torch.full((4,), 1.5)
    value, _, gradient = run(student, rows, spec, upstream, None, False)
    plain, truth = (
        evaluate(forward_kl, student, ids, log_p, tail, upstream, dtype) for dtype in (torch.float32, torch.float64)
    )
    check("value", value, plain.value, truth.value, 4 * truth.value_size)
    masked = student < -1e5
    near, exact = (each.gradient.masked_fill(masked, 0) for each in (plain, truth))
    check("gradient", gradient, near, exact, truth.gradient_size + 1.5 * truth.value_size.unsqueeze(-1))
    assert bool((gradient[masked] == 0).all())
