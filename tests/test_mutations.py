"""The accuracy rule is worth nothing if it lets a broken gradient pass: here it is given broken ones."""

from __future__ import annotations

import pytest
import torch
from accuracy import SLACK, complaint
from test_linear_divergence import SLACK as LINEAR_SLACK
from test_linear_divergence import each_pairing, ours, plain, random_sides
from torch import Tensor
from truth import (
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


def one_entry_negated(row: Tensor, place: float) -> Tensor:
    """The one that stands at this place, from 0 to 1, in the order of size; what float16 lets underflow is left out."""
    broken = row.clone()
    order = row.abs().argsort()
    normal = order[row[order].abs() >= torch.finfo(row.dtype).tiny]
    entry = normal[int(place * (len(normal) - 1))] if len(normal) else order[-1]
    broken[entry] = -broken[entry]
    return broken


def shifted_by_one(row: Tensor) -> Tensor:
    return row.roll(1, -1)


def mutants(row: Tensor, place: float = 0.5) -> dict[str, Tensor]:
    """Broken versions of a gradient; the single wrong entry is that of median size, or at another ``place``."""
    return {
        "all zero": torch.zeros_like(row),
        "negated": -row,
        "2% too large": (row.double() * 1.02).to(row.dtype),
        "2% too small": (row.double() * 0.98).to(row.dtype),
        "off by one entry": shifted_by_one(row),
        "one entry negated": one_entry_negated(row, place),
    }


def replaced(gradient: Tensor, row: int, broken: Tensor) -> Tensor:
    return torch.cat([gradient[:row], broken.unsqueeze(0), gradient[row + 1 :]])


@pytest.mark.parametrize("vocab", [127, pytest.param(4097, marks=pytest.mark.slow)], ids="V{}".format)
@each_dtype
@each(EVERY_DIVERGENCE, slow=OTHER_PARAMETERS)
def test_broken_gradients_are_rejected(case: Case, dtype: torch.dtype, vocab: int) -> None:
    """In any single row, flat or peaked, close to the teacher or far from it."""
    student, teacher = random_logits(vocab, dtype)
    upstream = torch.linspace(-1.5, 2.0, len(student), dtype=compute_dtype(dtype))
    near = evaluate(case, student, teacher, upstream, upstream.dtype)
    exact = evaluate(case, student, teacher, upstream, torch.float64)
    leaves = leaf(student), leaf(teacher)
    kd.distillation_loss(*leaves, case.divergence, weight=upstream, reduction="sum").backward()
    for side, logits in (("student", leaves[0]), ("teacher", leaves[1])):
        expected = getattr(near, side), getattr(exact, side), exact.gradient_size
        gradient = logits.grad
        assert gradient is not None
        assert complaint(gradient, *expected) is None
        for row in range(len(student)):
            for name, broken in mutants(gradient[row]).items():
                assert complaint(replaced(gradient, row, broken), *expected), (
                    f"{side}'s gradient, row {row}: {name} passes"
                )


@each_divergence
def test_broken_values_are_rejected(case: Case) -> None:
    student, teacher = random_logits(127)
    upstream = torch.ones(len(student))
    near, exact = (evaluate(case, student, teacher, upstream, dtype) for dtype in (torch.float32, torch.float64))
    value = kd.distillation_loss(student, teacher, case.divergence, reduction="none")
    assert complaint(value, near.value, exact.value, exact.value_size) is None
    for row in range(len(student)):
        for factor in (0.0, -1.0, 0.98, 1.02):
            broken = value.clone()
            broken[row] *= factor
            assert complaint(broken, near.value, exact.value, exact.value_size), f"row {row} times {factor} passes"


@each_dtype
@each_pairing
def test_broken_gradients_of_heads_are_rejected(pairing: str, dtype: torch.dtype) -> None:
    sides = random_sides(pairing, 127, dtype)
    _, gradients = ours(EVERY_DIVERGENCE[3], sides)
    _, near = plain(EVERY_DIVERGENCE[3], sides)
    _, exact = plain(EVERY_DIVERGENCE[3], sides, torch.float64)
    for name, gradient in gradients.items():
        assert gradient is not None
        expected = [each[name].reshape(1, -1) for each in (near, exact)]  # type: ignore[union-attr]
        flat = gradient.reshape(-1)
        assert complaint(flat.unsqueeze(0), *expected, slack=LINEAR_SLACK[dtype]) is None
        for mutation, broken in mutants(flat, place=0.95).items():
            assert complaint(broken.unsqueeze(0), *expected, slack=LINEAR_SLACK[dtype]), f"{name}: {mutation} passes"


def test_what_is_let_pass_is_far_below_any_mutation() -> None:
    assert max(SLACK.values()) < 1e-5
    assert max(LINEAR_SLACK.values()) < 0.01


def test_not_finite_and_misshapen_results_are_rejected() -> None:
    truth = torch.ones(2, 3, dtype=torch.float64)
    for bad in (float("nan"), float("inf")):
        broken = torch.ones(2, 3)
        broken[1, 2] = bad
        assert complaint(broken, torch.ones(2, 3), truth)
        assert complaint(broken, broken, truth), "plain PyTorch's own failure is no excuse"
    assert complaint(torch.ones(3), torch.ones(3), truth)
