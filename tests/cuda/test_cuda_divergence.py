"""The divergence kernels in CUDA C++, run on the host: sizes, strides, dtypes and what is asked of them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated as there
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.rows import RowSpec

FORWARD_KL, JSD = 0, 3

Emulated = Callable[..., Any]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return terms.sum(-1)


def truth(student: Tensor, teacher: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [logits.double().requires_grad_() for logits in (student, teacher)]
    values = jsd(*leaves, 0.3)
    return values.detach(), *torch.autograd.grad(values, leaves, upstream.double())


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the whole of what is expected: zeros and wrong signs are errors of 1 and 2."""
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_the_backend_says_what_it_runs_on(emulated: Emulated) -> None:
    found = emulated(there.availability)
    assert found["status"][0]
    assert "emulated" in found["status"][1]
    assert found["cpu"][0]
    assert not found["cuda"][0]
    assert "cpu tensors" in found["cuda"][1]


def test_kernels_and_backend_agree_on_what_is_saved(emulated: Emulated) -> None:
    kernels, backend = emulated(there.saved_statistics)
    assert kernels == backend


@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [
        *((torch.float32, vocab) for vocab in (2, 127, 4097, 8192)),
        *((torch.float64, vocab) for vocab in (127, 4097, 8192)),
        *((dtype, vocab) for dtype in (torch.bfloat16, torch.float16) for vocab in (127, 4097)),
    ],
    ids=str,
)
def test_every_size_and_dtype(dtype: torch.dtype, vocab: int, emulated: Emulated) -> None:
    student, teacher = normal(3, vocab, dtype=dtype), normal(3, vocab, seed=1, dtype=dtype)
    upstream = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    values, _, *gradients = emulated(there.divergence, student, teacher, RowSpec(JSD, 0.3, 0.0), upstream)
    expected = truth(student, teacher, upstream)
    rounding = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert_near(values, expected[0], 1e-12 if dtype == torch.float64 else 3e-6)
    for found, wanted in zip(gradients, expected[1:], strict=True):
        assert found.dtype == dtype
        assert_near(found, wanted, rounding)


@pytest.mark.slow
def test_a_whole_vocabulary(emulated: Emulated) -> None:
    student, teacher = normal(1, 151_936), normal(1, 151_936, seed=1)
    values, _, *gradients = emulated(there.divergence, student, teacher, RowSpec(JSD, 0.3, 0.0), torch.ones(1))
    expected = truth(student, teacher, torch.ones(1))
    for found, wanted in zip((values, *gradients), expected, strict=True):
        assert_near(found, wanted, 1e-5)


def test_a_vocabulary_of_one(emulated: Emulated) -> None:
    values, _, *gradients = emulated(
        there.divergence, normal(2, 1), normal(2, 1, seed=1), RowSpec(JSD, 0.3, 0.0), torch.ones(2)
    )
    for found in (values, *gradients):
        assert (found.abs() < 1e-6).all()


@pytest.mark.parametrize("padding", [0, 1, 8])
def test_strides_change_nothing(padding: int, emulated: Emulated) -> None:
    """Rows on 16-byte boundaries are read in vectors, others entry by entry."""
    student, teacher = normal(2, 200 + padding)[:, :200], normal(2, 200 + padding, seed=1)[:, :200]
    upstream = torch.tensor([1.0, -0.5])
    found = emulated(there.divergence, student, teacher, RowSpec(JSD, 0.3, 0.0), upstream, (True, True), False, padding)
    expected = truth(student, teacher, upstream)
    assert_near(found[0], expected[0], 3e-6)
    for gradient, wanted in zip(found[2:], expected[1:], strict=True):
        assert_near(gradient[:, :200], wanted, 3e-6)
        assert (gradient[:, 200:] == there.UNTOUCHED).all()


def test_gradients_over_the_logits(emulated: Emulated) -> None:
    student, teacher = normal(2, 300), normal(2, 300, seed=1)
    expected = truth(student, teacher, torch.ones(2))
    _, _, *gradients = emulated(
        there.divergence, student, teacher, RowSpec(JSD, 0.3, 0.0), torch.ones(2), (True, True), True
    )
    for found, wanted in zip(gradients, expected[1:], strict=True):
        assert_near(found, wanted, 3e-6)


def test_rows_that_do_not_count(emulated: Emulated) -> None:
    student, teacher = normal(3, 40), normal(3, 40, seed=1)
    student[1], teacher[1] = torch.nan, torch.inf
    spec = RowSpec(JSD, 0.3, 0.0, active=torch.tensor([True, False, True]))
    values, _, *gradients = emulated(there.divergence, student, teacher, spec, torch.ones(3))
    for found in (values, *gradients):
        assert found[1].eq(0).all()
        assert found.isfinite().all()
        assert found[0].ne(0).any()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 5])
def test_batches_and_repeatability(rows: int, emulated: Emulated) -> None:
    arguments = (normal(rows, 65), normal(rows, 65, seed=1), kd.ForwardKL(), {"reduction": "none"})
    first, again = emulated(there.loss_and_gradients, *arguments), emulated(there.loss_and_gradients, *arguments)
    assert first[0].shape == (rows,)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_a_label_outside_the_vocabulary_shows(emulated: Emulated) -> None:
    """Labels are not checked on GPUs unless debugging is on: their loss is NaN, and nothing outside the row is read."""
    spec = RowSpec(FORWARD_KL, 0.0, 0.0, labels=torch.tensor([3, 10**12]))
    values, cross_entropy, *_ = emulated(there.divergence, normal(2, 9), normal(2, 9, seed=1), spec, torch.ones(2))
    assert values.isfinite().all()
    assert cross_entropy[0].isfinite()
    assert cross_entropy[1].isnan()


def test_a_family_without_kernels_is_refused_by_name(emulated: Emulated) -> None:
    text = emulated(there.refusal, "sorted_l1", normal(2, 9), normal(2, 9, seed=1))
    assert text.startswith("ValueError: backend='cuda'")
    assert "sorted_l1" in text
    assert "divergence" in text
