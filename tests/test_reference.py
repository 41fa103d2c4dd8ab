"""``kd.reference``, the definition of correct: against the definitions of ``truth``, and its first and second derivatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import EVERY_DIVERGENCE, OTHER_PARAMETERS, Case, Head, each, each_divergence, loss, random_logits

import kdkernels as kd

VOCAB, ROWS = 5, 2
MASK = torch.tensor([True, False, True])
LABELS = torch.tensor([4, 0, 2])


@each(EVERY_DIVERGENCE + OTHER_PARAMETERS)
def test_every_formula(case: Case) -> None:
    student, teacher = random_logits(50, torch.float64)
    options: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 0.7, "reduction": "none"}
    found = kd.reference.distillation_loss(student, teacher, case.divergence, **options)
    torch.testing.assert_close(found, loss(case, student, teacher, **options), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_option(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [
        Head(
            *(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, h), (8, h), (8,))),
            4.0,
            1.5,
        )
        for h in (4, 6)
    ]
    options: dict[str, Any] = {
        "temperature": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "teacher_temperature": 0.7,
        "temperature_squared": True,
        "weight": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        "mask": MASK,
        "labels": LABELS,
        "ce_weight": 0.3,
        "vocab_size": 7,
        "reduction": reduction,
    }
    for case in EVERY_DIVERGENCE:
        expected = loss(case, heads[0].logits(), heads[1].logits(), **options)
        found = kd.reference.distillation_loss(heads[0].source(), heads[1].source(), case.divergence, **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_signatures_are_those_of_the_fused_functions() -> None:
    """But for the arguments that say how a kernel should run."""
    how = {"vocabulary_order", "memory_budget", "process_group", "backend"}
    for name in ("distillation_loss", "token_statistics"):
        fused = inspect.signature(getattr(kd, name)).parameters
        plain = inspect.signature(getattr(kd.reference, name)).parameters
        assert [each for each in fused if each not in how] == list(plain)
        assert all(fused[each].default == plain[each].default for each in plain)


def inputs_of(kind: str) -> tuple[Callable[..., tuple[Any, Any]], list[Tensor]]:
    """How to make the two sources of this kind from tensors, and the tensors."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    if kind == "logits":
        return lambda s, t: (s, t), [random(ROWS, VOCAB), random(ROWS, VOCAB)]
    if kind == "student_head":
        return lambda h, w, b, t: (kd.LMHead(h, w, b, softcap=3.0), t), [
            random(ROWS, 3),
            random(VOCAB, 3),
            random(VOCAB),
            random(ROWS, VOCAB),
        ]
    if kind == "teacher_head":
        return lambda s, h, w: (s, kd.LMHead(h, w, logit_scale=0.6)), [
            random(ROWS, VOCAB),
            random(ROWS, 3),
            random(VOCAB, 3),
        ]
    return lambda h, w, g, v: (kd.LMHead(h, w), kd.LMHead(g, v, softcap=4.0)), [
        random(ROWS, 3),
        random(VOCAB, 3),
        random(ROWS, 2),
        random(VOCAB, 2),
    ]


each_kind = pytest.mark.parametrize("kind", ["logits", "student_head", "teacher_head", "heads"])


def function_of(kind: str, case: Case, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    make, tensors = inputs_of(kind)
    options = {"temperature": 1.3, "labels": LABELS[:ROWS], "ce_weight": 0.4, "reduction": "none", **options}
    return lambda *inputs: kd.reference.distillation_loss(*make(*inputs), case.divergence, **options), tensors


@each_kind
@each([EVERY_DIVERGENCE[3]], slow=[case for case in EVERY_DIVERGENCE if case.name != "jsd(0.5)"])
def test_first_derivatives(case: Case, kind: str) -> None:
    assert torch.autograd.gradcheck(*function_of(kind, case))


@pytest.mark.slow
@each_kind
@each_divergence
def test_second_derivatives(case: Case, kind: str) -> None:
    assert torch.autograd.gradgradcheck(*function_of(kind, case))


@pytest.mark.slow
@each_divergence
def test_second_derivatives_on_logits(case: Case) -> None:
    """Of the fused loss too, which leaves them to the reference."""
    function, tensors = function_of("logits", case)
    assert torch.autograd.gradgradcheck(function, tensors)
    for reduction in ("none", "mean"):

        def fused(student: Tensor, teacher: Tensor, reduction: str = reduction) -> Tensor:
            return kd.distillation_loss(student, teacher, case.divergence, temperature=1.3, reduction=reduction)

        assert torch.autograd.gradcheck(fused, tensors)
        assert torch.autograd.gradgradcheck(fused, tensors)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives_by_weight_and_temperature(reduction: str) -> None:
    student, teacher = (logits[:3] for logits in random_logits(VOCAB, torch.float64))
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    temperatures = [torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(weight: Tensor, temperature: Tensor, teacher_temperature: Tensor) -> Tensor:
        return kd.reference.distillation_loss(
            student,
            teacher,
            kd.JSD(0.3),
            weight=weight,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            temperature_squared=True,
            mask=MASK,
            reduction=reduction,
        )

    assert torch.autograd.gradcheck(function, (weight, *temperatures))
    assert torch.autograd.gradgradcheck(function, (weight, *temperatures))
