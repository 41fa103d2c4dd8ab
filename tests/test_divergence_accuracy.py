"""Values and gradients of every divergence on dense logits, by the accuracy rule (see ``accuracy``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor
from truth import (
    DTYPES,
    EVERY_DIVERGENCE,
    OTHER_PARAMETERS,
    Case,
    compute_dtype,
    each,
    each_divergence,
    each_dtype,
    evaluate,
    leaf,
    random_logits,
)

import kdkernels as kd

WANTED = {"both": (True, True), "student": (True, False), "teacher": (False, True)}


def upstream_for(logits: Tensor) -> Tensor:
    """An upstream gradient per row that no two rows share."""
    return torch.linspace(-1.5, 2.0, logits.shape[0], dtype=compute_dtype(logits.dtype))


def per_row(case: Case, student: Tensor, teacher: Tensor, upstream: Tensor, **options: Any) -> Tensor:
    value = kd.distillation_loss(student, teacher, case.divergence, reduction="none", **options)
    torch.autograd.backward(value, upstream)
    return value


def summed(case: Case, student: Tensor, teacher: Tensor, upstream: Tensor, **options: Any) -> Tensor:
    """Scalar losses have a path of their own: value and gradient in one call."""
    value = kd.distillation_loss(student, teacher, case.divergence, weight=upstream, reduction="sum", **options)
    value.backward()
    return value


def check_case(
    case: Case, student: Tensor, teacher: Tensor, *, sides: tuple[str, ...] = ("both",), **options: Any
) -> None:
    """Value and gradients from the two paths through the operators; ``sides`` says which gradients are asked for."""
    compute = compute_dtype(student.dtype, teacher.dtype)
    upstream = upstream_for(student).to(compute)
    truth = evaluate(case, student, teacher, upstream, torch.float64, **options)
    plain = evaluate(case, student, teacher, upstream, compute, **options)
    for path in (per_row, summed):
        for wanted_name in sides:
            wanted = WANTED[wanted_name]
            leaves = [
                leaf(logits).requires_grad_(want) for logits, want in zip((student, teacher), wanted, strict=True)
            ]
            value = path(case, *leaves, upstream, **options)
            name = f"{path.__name__}, gradient to {wanted_name}:"
            assert value.dtype == compute
            if path is per_row:
                check(f"{name} value", value.detach(), plain.value, truth.value, truth.value_size)
            else:
                total = [(upstream.double() * values).sum(0, keepdim=True) for values in (plain.value, truth.value)]
                size = (upstream.double().abs() * truth.value_size).sum()
                check(f"{name} value", value.detach().reshape(1), *total, size)
            expected = zip(("student", "teacher"), leaves, wanted, plain[1:3], truth[1:3], strict=True)
            for side, logits, want, near, exact in expected:
                if want:
                    assert logits.grad is not None
                    assert logits.grad.dtype == logits.dtype
                    check(f"{name} {side}'s gradient", logits.grad, near, exact, truth.gradient_size)
                else:
                    assert logits.grad is None


@pytest.mark.parametrize("vocab", [1, 2, 127, 4097], ids="V{}".format)
@each_dtype
@each_divergence
def test_every_dtype_and_size(case: Case, dtype: torch.dtype, vocab: int) -> None:
    check_case(case, *random_logits(vocab, dtype))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_divergence
def test_gradient_to_one_side(case: Case, dtype: torch.dtype, side: str) -> None:
    check_case(case, *random_logits(1030, dtype), sides=(side,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_divergence
def test_large_vocabulary(case: Case, dtype: torch.dtype) -> None:
    check_case(case, *random_logits(151_936, dtype, rows=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@each(OTHER_PARAMETERS)
def test_other_parameters(case: Case, dtype: torch.dtype) -> None:
    check_case(case, *random_logits(1030, dtype))


@each_dtype
@each_divergence
def test_temperatures_of_each_side(case: Case, dtype: torch.dtype) -> None:
    check_case(case, *random_logits(300, dtype), temperature=1.7, teacher_temperature=0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@each_divergence
def test_temperature_per_token_and_hard_labels(case: Case, dtype: torch.dtype) -> None:
    student, teacher = random_logits(1300, dtype)
    check_case(
        case,
        student,
        teacher,
        temperature=torch.tensor([0.5, 0.8, 1.0, 1.5, 2.0, 4.0]),
        teacher_temperature=torch.tensor([1.0, 3.0, 1.0, 0.7, 2.0, 1.1]),
        temperature_squared=True,
        labels=torch.tensor([0, 1299, 1024, 1023, 5, 700]),
        ce_weight=0.4,
    )


@pytest.mark.parametrize("teacher_dtype", DTYPES.values(), ids=[f"teacher_{name}" for name in DTYPES])
@pytest.mark.parametrize("student_dtype", DTYPES.values(), ids=[f"student_{name}" for name in DTYPES])
def test_sides_of_different_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = random_logits(127, torch.float64)
    check_case(EVERY_DIVERGENCE[3], student.to(student_dtype), teacher.to(teacher_dtype))


@pytest.mark.parametrize("vocab", [15, 16, 17, 1023, 1024, 1025, 2048], ids="V{}".format)
@each_divergence
def test_sizes_around_a_vector_and_a_block(case: Case, vocab: int) -> None:
    check_case(case, *random_logits(vocab, torch.float32))


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@each_divergence
def test_far_from_zero(case: Case, temperature: float) -> None:
    """Logits are differences: an offset that plain PyTorch removes exactly must cost no accuracy here."""
    student, teacher = random_logits(300, torch.float32)
    check_case(case, student + 1e4, teacher - 3e3, temperature=temperature)


@each_divergence
def test_nearly_equal_distributions(case: Case) -> None:
    student, noise = random_logits(300, torch.float32)
    # Nowhere so near that the sign of p - q, the gradient of the total variation, is a matter of rounding.
    check_case(case, student, student + 0.01 * (noise + noise.sign()))
