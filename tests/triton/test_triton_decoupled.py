"""The Triton kernels' soft cross-entropy, parameters per token and target apart, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreted
import pytest
import torch
from accuracy import check
from test_decoupled import SOFT_CROSS_ENTROPY, decoupled
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case, kl, leaf, log_softmax, random_logits

from kdkernels.backends.rows import RowSpec

pytestmark = pytest.mark.slow

Interpreter = Callable[..., Any]
LABELS = torch.tensor([3, 129, 64, 0])
UPSTREAM = torch.tensor([-1.5, 2.0, 0.7, 1.0])


def check_rows(
    interpreter: Interpreter, student: Tensor, teacher: Tensor, spec: RowSpec, value: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Value and gradients against a formula of the logits, by the accuracy rule."""
    hard = None if spec.labels is None else 0.5 * UPSTREAM
    ours = interpreter(interpreted.divergence, student, teacher, spec, UPSTREAM, hard)
    results = []
    for dtype in (torch.float32, torch.float64):
        s, t = leaf(student, dtype), leaf(teacher, dtype)
        rows = value(s, t)
        total = rows @ UPSTREAM.to(dtype)
        if spec.labels is not None:
            total = total + torch.nn.functional.cross_entropy(s, spec.labels, reduction="none") @ (0.5 * UPSTREAM).to(
                dtype
            )
        results.append((rows.detach(), *torch.autograd.grad(total, (s, t))))
    near, true = results
    probabilities = torch.softmax(student.double(), -1) + torch.softmax(teacher.double(), -1)
    size = UPSTREAM.abs().double().unsqueeze(-1) * probabilities  # of the terms, as far as they cancel
    check("value", ours[0], near[0], true[0], true[0].abs().clamp(min=5))
    for name, mine, plain, truth in zip(("student", "teacher"), ours[2:], near[1:], true[1:], strict=True):
        check(f"{name}'s gradient", mine, plain, truth, size, slack=1e-5)


def test_soft_cross_entropy(interpreter: Interpreter) -> None:
    student, teacher = random_logits(130, rows=4)
    spec = RowSpec(10, 0.0, 0.0, 1.3, None, 0.8)
    check_rows(
        interpreter,
        student,
        teacher,
        spec,
        lambda s, t: SOFT_CROSS_ENTROPY.formula(log_softmax(t, 0.8), log_softmax(s, 1.3)),
    )


@pytest.mark.parametrize("kind", [4, 5], ids=["skew_forward_kl", "skew_reverse_kl"])
def test_parameter_per_token(kind: int, interpreter: Interpreter) -> None:
    student, teacher = random_logits(130, rows=4)
    shares = torch.tensor([0.0, 0.3, 0.9, 0.0])

    def value(s: Tensor, t: Tensor) -> Tensor:
        share, p, q = shares.to(s.dtype).unsqueeze(-1), log_softmax(t), log_softmax(s)
        if kind == 4:
            return kl(p, (share * p.exp() + (1 - share) * q.exp()).log())
        return kl(q, (share * q.exp() + (1 - share) * p.exp()).log())

    check_rows(interpreter, student, teacher, RowSpec(kind, 0.0, 0.0, parameters=shares), value)


@pytest.mark.parametrize(
    "case", [EVERY_DIVERGENCE[0], EVERY_DIVERGENCE[3], EVERY_DIVERGENCE[8]], ids=["forward_kl", "jsd", "renyi"]
)
@pytest.mark.parametrize("logit", [None, 60.0], ids=["", "near-one"])
def test_target_apart(case: Case, logit: float | None, interpreter: Interpreter) -> None:
    student, teacher = random_logits(130, rows=4)
    if logit is not None:
        student = student.scatter(-1, LABELS.unsqueeze(-1), logit)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1])
    spec = RowSpec(
        *case.divergence.form, 1.3, None, 0.8, labels=LABELS, targets=LABELS, target_weights=weights, rest_weight=1.7
    )
    check_rows(
        interpreter,
        student,
        teacher,
        spec,
        lambda s, t: decoupled(case.formula, s, t, LABELS, 1.3, 0.8, weights.to(s.dtype), 1.7),
    )
