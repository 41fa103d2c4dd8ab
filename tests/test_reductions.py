"""How the losses of the tokens become the result: reductions, weights, masks, ignored labels, by arithmetic on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case, Head, each_divergence, leaf, random_logits, row_losses

import kdkernels as kd

VOCAB = 20
LABELS = torch.tensor([3, 19, 0, 7, 7, 11])
MASK = torch.tensor([True, True, False, True, False, True])
WEIGHT = torch.tensor([0.5, 2.0, 7.0, 1.0, 3.0, 0.0], dtype=torch.float64)
JSD = EVERY_DIVERGENCE[3]
SOURCES = ("logits", "head")
BACKENDS = ("cpu", "reference")
each_source = pytest.mark.parametrize("source", SOURCES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def loss(student: Tensor, teacher: Tensor, source: str = "logits", case: Case = JSD, **options: Any) -> Tensor:
    """The library's loss; as heads, the logits go through the identity."""
    sides: list[Any] = [student, teacher]
    if source == "head":
        sides = [Head(logits, torch.eye(VOCAB, dtype=logits.dtype)).source() for logits in sides]
    return kd.distillation_loss(*sides, case.divergence, **options)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, the losses of the six tokens)."""
    student, teacher = random_logits(VOCAB, torch.float64)
    return student, teacher, row_losses(JSD, student, teacher)


def equal(found: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-11, atol=1e-14)


@each_backend
@each_source
def test_plain_reductions(source: str, backend: str) -> None:
    student, teacher, rows = problem()
    equal(loss(student, teacher, source, reduction="none", backend=backend), rows)
    equal(loss(student, teacher, source, reduction="sum", backend=backend), rows.sum())
    equal(loss(student, teacher, source, reduction="mean", backend=backend), rows.sum() / 6)
    equal(loss(student, teacher, source, backend=backend), rows.sum() / 6)


@each_backend
@each_source
def test_mask_counts_only_what_is_kept(source: str, backend: str) -> None:
    student, teacher, rows = problem()
    kept = rows[[0, 1, 3, 5]]
    options = {"mask": MASK, "backend": backend}
    equal(loss(student, teacher, source, reduction="none", **options), rows * MASK)
    equal(loss(student, teacher, source, reduction="sum", **options), kept.sum())
    equal(loss(student, teacher, source, **options), kept.sum() / 4)
    equal(loss(student, teacher, source, normalizer=10, **options), kept.sum() / 10)


@each_backend
@each_source
def test_weights(source: str, backend: str) -> None:
    student, teacher, rows = problem()
    options = {"weight": WEIGHT, "backend": backend}
    equal(loss(student, teacher, source, reduction="none", **options), WEIGHT * rows)
    equal(loss(student, teacher, source, reduction="sum", **options), (WEIGHT * rows).sum())
    equal(loss(student, teacher, source, **options), (WEIGHT * rows).sum() / 13.5)
    equal(loss(student, teacher, source, normalizer=4.0, **options), (WEIGHT * rows).sum() / 4)


@each_backend
@each_source
def test_weights_of_masked_tokens_do_not_count(source: str, backend: str) -> None:
    student, teacher, rows = problem()
    expected = (0.5 * rows[0] + 2 * rows[1] + rows[3]) / 3.5
    weight = WEIGHT.masked_fill(~MASK, float("nan"))
    equal(loss(student, teacher, source, weight=weight, mask=MASK, backend=backend), expected)
    equal(loss(student, teacher, source, weight=WEIGHT.float(), mask=MASK, backend=backend), expected)


@each_backend
@each_source
def test_ignored_labels_drop_tokens(source: str, backend: str) -> None:
    """With a hard-label term and without; together with a mask."""
    student, teacher, rows = problem()
    labels = LABELS.masked_fill(torch.tensor([False, True, False, False, False, True]), -100)
    hard = -torch.log_softmax(student, -1)[torch.arange(6), LABELS]
    for ce_weight in (0.0, 0.3, -0.5):
        total = rows + ce_weight * hard
        options = {"labels": labels, "ce_weight": ce_weight, "backend": backend}
        equal(loss(student, teacher, source, **options), total[[0, 2, 3, 4]].mean())
        equal(loss(student, teacher, source, reduction="sum", **options), total[[0, 2, 3, 4]].sum())
        equal(loss(student, teacher, source, mask=MASK, **options), total[[0, 3]].mean())
        unreduced = loss(student, teacher, source, reduction="none", **options)
        equal(unreduced, total * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0]))


@each_backend
def test_another_ignore_index(backend: str) -> None:
    student, teacher, rows = problem()
    equal(loss(student, teacher, labels=LABELS, ignore_index=7, backend=backend), rows[[0, 1, 2, 5]].mean())
    labels = LABELS.to(torch.int32)
    equal(loss(student, teacher, labels=labels, ignore_index=7, backend=backend), rows[[0, 1, 2, 5]].mean())


@each_backend
@each_source
def test_hard_labels_keep_temperature_one(source: str, backend: str) -> None:
    """And ``temperature_squared`` multiplies the divergence only, by the student's temperature."""
    student, teacher, _ = problem()
    hard = torch.nn.functional.cross_entropy(student, LABELS, reduction="none")
    soft = row_losses(JSD, student, teacher, temperature=3.0, teacher_temperature=0.5)
    options = {"temperature": 3.0, "teacher_temperature": 0.5, "labels": LABELS, "ce_weight": 0.3, "backend": backend}
    equal(loss(student, teacher, source, **options), (soft + 0.3 * hard).mean())
    equal(loss(student, teacher, source, temperature_squared=True, **options), (9 * soft + 0.3 * hard).mean())
    per_token = torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    soft = row_losses(JSD, student, teacher, temperature=per_token)
    options = {"temperature": per_token, "labels": LABELS, "ce_weight": 0.3, "backend": backend}
    expected = (per_token**2 * soft + 0.3 * hard).mean()
    equal(loss(student, teacher, source, temperature_squared=True, **options), expected)


@each_backend
@each_source
def test_everything_dropped_is_zero(source: str, backend: str) -> None:
    student, teacher, _ = problem()
    nothing = torch.zeros(6, dtype=torch.bool)
    ignored = torch.full((6,), -100)
    for options in ({"mask": nothing}, {"labels": ignored, "ce_weight": 1.0}, {"weight": torch.zeros(6)}):
        for reduction in ("mean", "sum"):
            leaves = leaf(student), leaf(teacher)
            value = loss(*leaves, source, reduction=reduction, backend=backend, **options)
            equal(value, 0.0)
            value.backward()
            for side in leaves:
                assert side.grad is not None
                assert bool((side.grad == 0).all())
    equal(loss(student, teacher, source, mask=nothing, normalizer=5, backend=backend), 0.0)


@each_backend
@each_source
def test_a_normalizer_may_be_a_tensor(source: str, backend: str) -> None:
    student, teacher, rows = problem()
    for normalizer in (torch.tensor(8), torch.tensor(8.0)):
        leaves = leaf(student), leaf(teacher)
        value = loss(*leaves, source, normalizer=normalizer, backend=backend)
        equal(value, rows.sum() / 8)
        value.backward()
        expected = torch.autograd.grad(row_losses(JSD, leaves[0], teacher).sum() / 8, leaves[0])
        assert leaves[0].grad is not None
        equal(leaves[0].grad, expected[0])


@each_backend
@each_source
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "normalizer"])
def test_gradient_to_the_weight(reduction: str, source: str, backend: str) -> None:
    """d/dw_i is the loss of token i; a mean also loses it to the denominator. A masked token has none."""
    student, teacher, soft = problem()
    hard = torch.nn.functional.cross_entropy(student, LABELS, reduction="none")
    rows = (soft + 0.3 * hard) * MASK
    weight = leaf(WEIGHT)
    upstream = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64) if reduction == "none" else torch.tensor(2.0).double()
    expected = {
        "none": upstream * rows,
        "sum": 2 * rows,
        "normalizer": 2 * rows / 9,
        "mean": 2 * (rows - (WEIGHT * rows).sum() / 3.5) / 3.5 * MASK,
    }[reduction]
    options: dict[str, Any] = (
        {"reduction": "mean", "normalizer": 9} if reduction == "normalizer" else {"reduction": reduction}
    )
    options |= {"mask": MASK, "labels": LABELS, "ce_weight": 0.3, "backend": backend}
    for student_learns in (False, True):
        weight.grad = None
        value = loss(student.clone().requires_grad_(student_learns), teacher, source, weight=weight, **options)
        value.backward(upstream)
        assert weight.grad is not None
        equal(weight.grad, expected)


@each_divergence
def test_scalar_reductions_agree_with_the_unreduced_loss(case: Case) -> None:
    """They take different ways through the operators."""
    student, teacher = random_logits(VOCAB, torch.float64)
    options = {"weight": WEIGHT, "mask": MASK, "labels": LABELS, "ce_weight": 0.2, "temperature": 1.4}
    gradients = []
    for reduce in (
        lambda s, t: loss(s, t, case=case, **options),
        lambda s, t: loss(s, t, case=case, reduction="none", **options).sum() / 3.5,
        lambda s, t: loss(s, t, case=case, reduction="sum", **options) / 3.5,
        lambda s, t: loss(s, t, case=case, normalizer=7, **options) * 2,
    ):
        leaves = leaf(student), leaf(teacher)
        value = reduce(*leaves)
        value.backward()
        gradients.append((value, leaves[0].grad, leaves[1].grad))
    for answers in gradients[1:]:
        for found, expected in zip(answers, gradients[0], strict=True):
            assert found is not None
            assert expected is not None
            equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_result(dtype: torch.dtype) -> None:
    student, teacher = random_logits(VOCAB, dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in ("none", "sum", "mean"):
        assert loss(student, teacher, reduction=reduction).dtype == expected
    assert loss(student, teacher.double()).dtype == torch.float64
