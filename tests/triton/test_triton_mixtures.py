"""Compositions in the Triton kernels, run in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor

from kdkernels.backends.rows import STATISTICS, Composition, RowSpec, Side
from kdkernels.reference import rows as reference

pytestmark = pytest.mark.slow

ROWS, VOCAB = 4, 150
KIND = 3  # JSD, which reads the logits twice


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def composition(space: str, dtype: torch.dtype) -> Composition:
    others = noise(2, ROWS, VOCAB, seed=1).to(dtype)
    others[0, :, 5] = -torch.inf
    coefficients = torch.tensor([[0.5, 0.2, 0.3], [0, 1, 0], [1, -0.5, 0.5], [0, 0, 1.0]], dtype=dtype)
    sides = Side(others[0], softcap=3.0), Side(others[1])
    if space == "probabilities":
        offsets = torch.tensor([[-0.5, -1.2, 0.3], [-torch.inf, 0.1, -torch.inf], [1, 0.5, 0.5], [0, 0, 1.0]])
        return Composition(sides, coefficients.abs() + 0.1, offsets.to(dtype))
    ids = torch.tensor([[0, 149], [-1, 3], [7, 7], [-1, -1]])
    bounds = torch.tensor([[-1, 1.5], [-torch.inf, 2], [-0.5, torch.inf], [-2, 2]], dtype=dtype)
    return Composition(
        sides, coefficients, None, noise(VOCAB, seed=2).to(dtype), bounds, ids, noise(ROWS, 2, seed=3).to(dtype)
    )


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_values_gradients_and_statistics(space: str, interpreter: Callable[..., Any]) -> None:
    dtype = torch.float32
    student, teacher = (2 * noise(2, ROWS, VOCAB, seed=4)).to(dtype)
    if space == "logits":
        teacher[1] = torch.nan  # where its coefficient is 0
    labels, upstream = torch.tensor([3, 0, 7, 149]), torch.linspace(0.5, 2, ROWS)
    options: dict[str, Any] = {"student_temperature": 0.8, "teacher_temperature": 1.3, "labels": labels}

    def spec(dtype: torch.dtype) -> RowSpec:
        made = composition(space, dtype)
        own = Composition(class_bias=noise(VOCAB, seed=6).to(torch.float32).to(dtype))
        return RowSpec(KIND, 0.3, 0.0, **options, student_composition=own, teacher_composition=made)

    values, hard, gradient, _ = interpreter(
        interpreted.divergence, student, teacher, spec(dtype), upstream, upstream, (True, False)
    )
    exact = student.double().requires_grad_()
    true = spec(torch.float64)
    truth = reference.divergence(exact, teacher.double(), true)
    true_hard = reference.cross_entropy(exact, true, torch.float64)
    (slope,) = torch.autograd.grad(((truth + true_hard) * upstream).sum(), exact)
    torch.testing.assert_close(values.double(), truth.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hard.double(), true_hard.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=1e-5 * float(slope.abs().max()))
    found, argmax = interpreter(interpreted.token_statistics, student, teacher, spec(dtype))
    logits = reference.composed_logits(teacher.double(), 0.0, torch.float64, true.teacher_composition)
    torch.testing.assert_close(
        found[:, STATISTICS.index("max_teacher")].double(), logits.amax(-1), rtol=1e-5, atol=1e-5
    )
    lse = torch.logsumexp(logits / 1.3, -1)
    torch.testing.assert_close(found[:, STATISTICS.index("lse_teacher")].double(), lse, rtol=1e-5, atol=1e-5)
    label = (logits / 1.3).gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse
    place = STATISTICS.index("label_log_prob_teacher")
    torch.testing.assert_close(found[:, place].double(), label, rtol=1e-5, atol=1e-5)
    assert torch.equal(argmax[:, 1], logits.argmax(-1))
