"""The CUDA kernels of the family pairwise_l1, run on the host: what the general cases of ``test_cuda_kernels`` leave out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accuracy
import emulated_transport as there
import pytest
import torch
from torch import Tensor

from kdkernels.backends.cuda.pairwise_l1 import parts_of
from kdkernels.backends.rows import PairSpec, Tempering

pytestmark = pytest.mark.slow

Emulated = Callable[..., Any]


def logits(*shape: int, seed: int = 0) -> Tensor:
    """Rows flat and peaked in turn."""
    spread = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64).repeat(-(-shape[-2] // 3))[: shape[-2], None]
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes(student: Tensor, teacher: Tensor, upstream: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of the terms that distances and gradients are made from; exponentials err by their exponents' roundings."""
    temperature = options.get("temperature", 1.0)

    def of(rows: Tensor, temperature: float, weights: Tensor) -> Tensor:
        log_p = torch.log_softmax(rows.double() / temperature, -1).clamp(min=-1e4)
        return weights.unsqueeze(-1) * log_p.exp() * (1 - log_p) / temperature

    weights = upstream.abs()
    return (
        torch.full_like(upstream, 2.0),
        of(student, temperature, weights.sum(-1)),
        of(teacher, options.get("teacher_temperature", temperature), weights.sum(-2)),
    )


def hold(emulated: Emulated, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Values and gradients by the accuracy rule."""
    shape = (*student.shape[:-1], teacher.shape[-2])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found: tuple[Tensor, ...] = emulated(there.pairs, student, teacher, upstream, options)
    single = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    plain = there.pairs(student.to(single), teacher.to(single), upstream, options, "reference")
    truth = there.pairs(student.double(), teacher.double(), upstream, options, "reference")
    for place, size in enumerate(sizes(student, teacher, upstream, options)):
        accuracy.check(f"output {place}", found[place], plain[place], truth[place], size)
        if student.shape[-1] > 1:
            assert accuracy.complaint(-found[place], plain[place], truth[place], size), "a wrong sign passes"
    return found


@pytest.mark.parametrize("vocab_size", [1, 2, 127, pytest.param(4097, marks=pytest.mark.slow)])
def test_vocabularies(emulated: Emulated, vocab_size: int) -> None:
    hold(emulated, logits(3, vocab_size).float(), logits(5, vocab_size, seed=1).float())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_more_rows_than_a_block(emulated: Emulated, dtype: torch.dtype) -> None:
    """Problems of several tiles of pairs, temperatures of their own, rows that are not aligned."""
    student, teacher = logits(2, 37, 67).to(dtype)[..., 1:66], logits(2, 34, 65, seed=1).to(dtype)
    hold(emulated, student, teacher, temperature=0.7, teacher_temperature=1.9)


@pytest.mark.slow
def test_two_precisions_and_a_vocabulary_in_parts(emulated: Emulated) -> None:
    hold(emulated, logits(2, 300).bfloat16(), logits(3, 300, seed=1).double())
    hold(emulated, logits(1, 9001).bfloat16(), logits(2, 9001, seed=1).float())


def test_the_vocabulary_is_cut_for_few_pairs_only() -> None:
    def parts(problems: int, rows: int, vocab_size: int) -> int:
        return parts_of(vocab_size, PairSpec(problems, rows, rows, Tempering(1.0), Tempering(1.0)))

    assert (parts(1, 8, 151_936), parts(1, 8, 5000), parts(1, 8, 1)) == (74, 2, 1)
    assert (parts(8, 64, 151_936), parts(64, 512, 151_936)) == (16, 1)


def test_equal_rows_and_masked_vocabulary(emulated: Emulated) -> None:
    student, teacher = logits(4, 40).float(), logits(4, 40, seed=1).float()
    student[0, 5:9] = -math.inf
    teacher[1] = student[2]
    teacher[2, ::2] = torch.finfo(torch.float32).min
    distance, grad_student, grad_teacher = hold(emulated, student, teacher)
    assert distance[2, 1] == 0
    assert (grad_student[0, 5:9] == 0).all()
    assert (grad_teacher[2, ::2] == 0).all()


def test_identical_sides(emulated: Emulated) -> None:
    """Exactly 0 apart, and exactly no gradient."""
    rows = logits(3, 130).bfloat16()
    distance, *gradients = emulated(there.pairs, rows, rows, torch.eye(3), {})
    assert (distance.diagonal() == 0).all()
    assert (distance + torch.eye(3) > 0.01).all()
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_row_without_a_distribution_shows(emulated: Emulated) -> None:
    student, teacher = logits(3, 50).float(), logits(2, 50, seed=1).float()
    expected, *_ = emulated(there.pairs, student, teacher, torch.ones(3, 2), {})
    student[1, 7] = math.nan
    found, *_ = emulated(there.pairs, student, teacher, torch.ones(3, 2), {})
    assert found[1].isnan().all()
    assert torch.equal(found[::2], expected[::2])


@pytest.mark.slow
def test_gradients_in_place(emulated: Emulated) -> None:
    """Over the logits that the other side's gradient asks for too."""
    student, teacher, grad = logits(5, 70).float(), logits(3, 70, seed=1).float(), logits(5, 3, seed=2).float()
    expected = emulated(there.pair_gradients, student, teacher, grad, ("apart", "apart"))
    assert all(float(each.abs().max()) > 1e-3 for each in expected)
    for places in (("in place", "in place"), ("in place", "apart"), ("apart", "in place"), ("unwanted", "in place")):
        found = emulated(there.pair_gradients, student, teacher, grad, places)
        for place, ours, other in zip(places, found, expected, strict=True):
            assert ours is None if place == "unwanted" else torch.equal(ours, other)


def test_empty(emulated: Emulated) -> None:
    for n, m in ((0, 3), (3, 0)):
        distance, *gradients = emulated(there.pairs, torch.zeros(n, 7), torch.zeros(m, 7), torch.zeros(n, m), {})
        assert distance.shape == (n, m)
        assert all((gradient == 0).all() for gradient in gradients)
