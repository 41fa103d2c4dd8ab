"""The Triton kernels of sparse teachers, run in Triton's interpreter, by the accuracy rule against dense constructions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import interpreted
import pytest
import sparse_kernels
import torch
from sparse_truth import TAILS, allowed, evaluate, ragged_teacher
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case, each_divergence, log_softmax, random_logits

import kdkernels as kd
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import Policy, Records, SparseRows, needs_dense_rows

pytestmark = pytest.mark.slow

Interpreter = Callable[..., Any]
FORWARD_KL, JSD = EVERY_DIVERGENCE[0], EVERY_DIVERGENCE[3]


def check_case(interpreter: Interpreter, case: Case, student: Tensor, k: int, tail: str, **options: Any) -> None:
    sparse_kernels.check_case(partial(interpreter, interpreted.sparse_divergence), case, student, k, tail, **options)


@pytest.mark.parametrize("tail", TAILS)
@each_divergence
def test_every_divergence_and_tail(case: Case, tail: str, interpreter: Interpreter) -> None:
    if allowed(case, tail) and not needs_dense_rows(Policy[tail.upper()], case.divergence.form.kind):
        check_case(interpreter, case, random_logits(300, rows=4)[0], 70, tail)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_dtypes(dtype: torch.dtype, tail: str, interpreter: Interpreter) -> None:
    check_case(interpreter, FORWARD_KL, random_logits(300, dtype, rows=4)[0], 9, tail)


@pytest.mark.parametrize("vocab", [1, 2, 127, 4097])
def test_sizes(vocab: int, interpreter: Interpreter) -> None:
    for tail in ("bucket", "drop"):
        check_case(interpreter, JSD, random_logits(vocab, rows=4)[0], min(vocab, 20), tail)


def test_temperatures(interpreter: Interpreter) -> None:
    for tail in ("renormalize", "uniform"):
        student = random_logits(127, rows=4)[0]
        check_case(interpreter, FORWARD_KL, student, 9, tail, student_temperature=1.7, teacher_temperature=0.6)


@pytest.mark.parametrize("tail", TAILS)
def test_hard_rows(tail: str, interpreter: Interpreter) -> None:
    sparse_kernels.check_hard_rows(partial(interpreter, interpreted.sparse_divergence), tail)


@pytest.mark.parametrize("softcap", [0.0, 6.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hard_labels_softcap_and_inactive_rows(temperature: float, softcap: float, interpreter: Interpreter) -> None:
    """Against the reference, whose hard-label term has tests of its own."""
    student, teacher = random_logits(300, rows=5)
    ids, log_p = ragged_teacher(teacher, 9)
    rows = SparseRows(int(Policy.BUCKET), ids, log_p)
    active = torch.tensor([True, True, False, True, True])
    labels = torch.tensor([int(ids[0, 0]), 299, -100, 5, 6])
    spec = RowSpec(
        *JSD.divergence.form, student_temperature=temperature, student_softcap=softcap, labels=labels, active=active
    )
    student[2] = torch.nan
    upstream, hard_upstream = torch.linspace(-1, 2, 5), torch.linspace(1, 2, 5)
    value, hard, gradient = interpreter(interpreted.sparse_divergence, student, rows, spec, upstream, hard_upstream)
    from kdkernels.reference import rows as reference
    from kdkernels.reference import sparse_divergence

    leaf = student.double().requires_grad_()
    values = sparse_divergence.divergence(leaf, rows, spec), reference.cross_entropy(leaf, spec, torch.float64)
    (expected,) = torch.autograd.grad(values, leaf, [upstream.double(), hard_upstream.double()])
    for ours, truth in zip((value, hard, gradient), (*values, expected), strict=True):
        torch.testing.assert_close(ours.double(), truth.detach(), rtol=2e-5, atol=2e-6)
    assert bool((gradient[2] == 0).all())


def test_sampled_and_packed_teachers(interpreter: Interpreter) -> None:
    student, teacher = random_logits(300, rows=4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30, (4, 40), generator=generator)
    weights = torch.rand(4, 40, generator=generator) / 40
    dense = torch.zeros(4, 300, dtype=torch.float64).scatter_add(1, ids, weights.double())
    upstream = torch.ones(4)
    spec = RowSpec(*FORWARD_KL.divergence.form)
    rows = SparseRows(int(Policy.SAMPLED), ids, weights, torch.ones(4))
    value, _, gradient = interpreter(interpreted.sparse_divergence, student, rows, spec, upstream)
    log_q = log_softmax(student.double())
    torch.testing.assert_close(value.double(), -(dense * log_q).sum(-1) - 1, rtol=1e-5, atol=1e-6)
    expected = log_q.exp() * dense.sum(-1, keepdim=True) - dense
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
    packed = kd.pack(kd.TopKLogits(*ragged_teacher(teacher, 20), vocab_size=300))
    unpacked = kd.unpack(packed)
    both = (
        SparseRows(0, records=Records(packed.data, packed.counts, 6)),
        SparseRows(0, unpacked.ids, unpacked.log_probs, unpacked.log_tail_mass),
    )
    results = [interpreter(interpreted.sparse_divergence, student, rows, spec, upstream) for rows in both]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_what_is_named_is_left_out_of_the_tail(interpreter: Interpreter) -> None:
    """K holds 1 - 1e-30 of the student's mass."""
    student = torch.zeros(1, 1000)
    student[0, :4] = 70.0
    rows = SparseRows(0, torch.arange(4)[None], torch.full((1, 4), 0.2).log())
    spec = RowSpec(*FORWARD_KL.divergence.form)
    value, _, gradient = interpreter(interpreted.sparse_divergence, student, rows, spec, torch.ones(1))
    assert rows.ids is not None
    assert rows.values is not None
    truth = evaluate(FORWARD_KL, student, rows.ids, rows.values, "bucket", torch.ones(1), torch.float64)
    torch.testing.assert_close(value.double(), truth.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), truth.gradient, rtol=1e-5, atol=0)
