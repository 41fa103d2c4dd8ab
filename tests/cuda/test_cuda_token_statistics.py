"""The CUDA kernel of `token_statistics`, run on the host by the tests that the other backends pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_token_statistics as shared
import torch
from truth import each_dtype, random_logits

import kdkernels as kd
from kdkernels.backends.rows import STATISTICS, Composition, RowSpec, Side

pytestmark = pytest.mark.slow

Emulated = Callable[..., Any]


@pytest.mark.parametrize("vocab", [1, 2, 127, 4097], ids="V{}".format)
@each_dtype
def test_sizes_and_dtypes(dtype: torch.dtype, vocab: int, emulated: Emulated) -> None:
    emulated(shared.test_logits, "cuda", dtype, vocab)


@pytest.mark.slow
def test_a_large_vocabulary(emulated: Emulated) -> None:
    emulated(shared.test_logits, "cuda", torch.bfloat16, 151_936)


@pytest.mark.parametrize(
    "test",
    [
        shared.test_only_what_is_asked_for_is_given,
        shared.test_temperature_per_token,
        shared.test_the_lowest_of_equal_maxima_is_named,
        shared.test_dropped_tokens_are_zero,
        shared.test_masked_vocabulary,
        shared.test_no_tokens_and_shapes,
        shared.test_has_no_gradient,
    ],
    ids=lambda test: test.__name__,
)
def test_what_other_backends_do(test: Callable[[str], None], emulated: Emulated) -> None:
    emulated(test, "cuda")


@pytest.mark.parametrize("pairing", ["head-none", "head-head", "logits-head"])
def test_heads(pairing: str, emulated: Emulated) -> None:
    emulated(shared.test_heads, "cuda", 1300, pairing)


def unaligned_rows(vocab: int, dtype: torch.dtype) -> None:
    """Rows of an odd distance whose first one is not at a boundary of 16 bytes; half precision beside float32."""
    student, teacher = random_logits(vocab + 3, dtype)
    views = student[:, 1 : vocab + 1], teacher.float()[:, 2 : vocab + 2]
    shared.check_logits(*views, torch.arange(6), "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_rows(dtype: torch.dtype, emulated: Emulated) -> None:
    emulated(unaligned_rows, 700, dtype)


def statistics_of_a_mixture() -> tuple[torch.Tensor, torch.Tensor, kd.TokenStatistics]:
    """By the kernel that puts the logits together, and of logits that were put together before."""
    from kdkernels.backends import row_backend

    student, teacher = random_logits(300)
    other = random_logits(300, seed=1)[1]
    weights = torch.tensor([[0.7, 0.3]]).repeat(6, 1)
    composition = Composition(others=(Side(other, softcap=5.0),), coefficients=weights)
    spec = RowSpec(0, 0.0, 0.0, labels=torch.arange(6), teacher_composition=composition)
    values, argmax = row_backend("cuda").token_statistics(student, teacher, spec)
    together = 0.7 * teacher + 0.3 * 5 * torch.tanh(other / 5)
    return values, argmax, kd.token_statistics(student, together, torch.arange(6), backend="reference")


def test_compositions(emulated: Emulated) -> None:
    values, argmax, expected = emulated(statistics_of_a_mixture)
    for name, column in zip(STATISTICS, values.unbind(-1), strict=True):
        torch.testing.assert_close(column, getattr(expected, name), rtol=2e-5, atol=2e-5)
    assert torch.equal(argmax, torch.stack([expected.argmax_student, expected.argmax_teacher], -1))
