"""The CUDA kernels of sparse teachers, run on the host, by the accuracy rule against dense constructions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import emulated as there
import pytest
import sparse_kernels
import torch
from sparse_truth import allowed, each_tail, evaluate, ragged_teacher
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case, each_divergence, log_softmax, random_logits

import kdkernels as kd
from kdkernels.backends import row_backend
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import Policy, Records, SparseRows, needs_dense_rows
from kdkernels.reference import rows as reference
from kdkernels.reference import sparse_divergence as sparse_reference

pytestmark = pytest.mark.slow

Emulated = Callable[..., Any]
FORWARD_KL, REVERSE_KL, JSD = (EVERY_DIVERGENCE[place] for place in (0, 1, 3))


def check_case(
    emulated: Emulated, case: Case, student: Tensor, k: int, tail: str, offset: int = 0, **options: Any
) -> None:
    def run(*arguments: Any) -> Any:
        return emulated(there.sparse_divergence, *arguments, offset)

    sparse_kernels.check_case(run, case, student, k, tail, **options)


@pytest.mark.slow
@each_tail
@each_divergence
def test_every_divergence_and_tail(case: Case, tail: str, emulated: Emulated) -> None:
    if allowed(case, tail) and not needs_dense_rows(Policy[tail.upper()], case.divergence.form.kind):
        check_case(emulated, case, random_logits(300, rows=4)[0], 70, tail)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_dtypes(dtype: torch.dtype, tail: str, emulated: Emulated) -> None:
    check_case(emulated, FORWARD_KL, random_logits(304, dtype, rows=4)[0], 9, tail)


@pytest.mark.parametrize("vocab", [1, 2, 127, 4097], ids="V{}".format)
def test_sizes(vocab: int, emulated: Emulated) -> None:
    for tail in ("bucket", "drop"):
        check_case(emulated, JSD, random_logits(vocab, rows=4)[0], min(vocab, 20), tail)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [151_936, 262_144 + 1001], ids="V{}".format)
def test_large_vocabularies(vocab: int, emulated: Emulated) -> None:
    """Also one of more columns than have a bit in shared memory at a time."""
    check_case(emulated, FORWARD_KL, random_logits(vocab, torch.bfloat16, rows=1)[0], 64, "bucket")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unaligned_and_strided_rows(dtype: torch.dtype, emulated: Emulated) -> None:
    for tail in ("bucket", "uniform"):
        check_case(emulated, FORWARD_KL, random_logits(700, dtype, rows=3)[0], 40, tail, offset=3)


def test_temperatures(emulated: Emulated) -> None:
    student = random_logits(127, rows=4)[0]
    taus = torch.tensor([0.5, 1.0, 1.7, 3.0])
    for tail in ("renormalize", "uniform"):
        check_case(emulated, FORWARD_KL, student, 9, tail, student_temperature=1.7, teacher_temperature=0.6)
        check_case(emulated, FORWARD_KL, student, 9, tail, student_temperatures=taus, teacher_temperatures=taus.flip(0))


@each_tail
def test_all_of_the_vocabulary_is_named(tail: str, emulated: Emulated) -> None:
    check_case(emulated, JSD, random_logits(130, rows=2)[0], 130, tail)


@each_tail
def test_hard_rows(tail: str, emulated: Emulated) -> None:
    sparse_kernels.check_hard_rows(partial(emulated, there.sparse_divergence), tail)


@pytest.mark.parametrize("softcap", [0.0, 6.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in_place"])
def test_hard_labels_softcap_parameters_and_inactive_rows(
    temperature: float, softcap: float, in_place: bool, emulated: Emulated
) -> None:
    """Against the reference, whose hard-label term has tests of its own. Labels are named ids and others."""
    student, teacher = random_logits(300, rows=5)
    ids, log_p = ragged_teacher(teacher, 9)
    rows = SparseRows(int(Policy.BUCKET), ids.int(), log_p)
    spec = RowSpec(
        *JSD.divergence.form,
        student_temperature=temperature,
        student_softcap=softcap,
        labels=torch.tensor([int(ids[0, 0]), 299, -100, 5, 6]),
        active=torch.tensor([True, True, False, True, True]),
        parameters=torch.linspace(0.1, 0.9, 5),
    )
    student[2] = torch.nan
    upstream, hard_upstream = torch.linspace(-1, 2, 5), torch.linspace(1, 2, 5)
    found = emulated(there.sparse_divergence, student, rows, spec, upstream, hard_upstream, in_place)
    leaf = student.double().requires_grad_()
    double = spec._replace(parameters=spec.parameters.double())  # type: ignore[union-attr]
    values = sparse_reference.divergence(leaf, rows, double), reference.cross_entropy(leaf, double, torch.float64)
    (expected,) = torch.autograd.grad(values, leaf, [upstream.double(), hard_upstream.double()])
    for ours, truth in zip(found, (*values, expected), strict=True):
        torch.testing.assert_close(ours.double(), truth.detach(), rtol=2e-5, atol=2e-6)
        assert bool((ours[2] == 0).all())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_repeated_samples_in_no_order(wide: bool, entropy: bool, emulated: Emulated) -> None:
    student, _ = random_logits(300, rows=4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 30, (4, 40), generator=generator)
    weights = torch.rand(4, 40, generator=generator) / 40
    kept = weights.double().masked_fill(ids < 0, 0)
    dense = torch.zeros(4, 300, dtype=torch.float64).scatter_add(1, ids.clamp(min=0), kept)
    spec, upstream = RowSpec(*FORWARD_KL.divergence.form), torch.linspace(-1, 2, 4)
    constants = torch.arange(4.0) if entropy else None
    rows = SparseRows(int(Policy.SAMPLED), ids if wide else ids.int(), weights, constants)
    value, _, gradient = emulated(there.sparse_divergence, student, rows, spec, upstream)
    log_q = log_softmax(student.double())
    expected = -(dense * log_q).sum(-1) - (constants.double() if constants is not None else 0)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    expected = upstream.double().unsqueeze(-1) * (log_q.exp() * dense.sum(-1, keepdim=True) - dense)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_given_tail_mass_of_another_dtype_is_taken(emulated: Emulated) -> None:
    """Beside log-probabilities in half precision, whose sum says something else; as the CPU kernels do."""
    student, teacher = random_logits(300, rows=4)
    ids, log_p = ragged_teacher(teacher, 9)
    rows = SparseRows(int(Policy.BUCKET), ids, log_p.half(), torch.linspace(-3, -0.5, 4, dtype=torch.bfloat16))
    spec, upstream = RowSpec(*REVERSE_KL.divergence.form), torch.ones(4)
    value, _, gradient = emulated(there.sparse_divergence, student, rows, spec, upstream)
    by_cpu = torch.empty_like(student)
    expected, _ = row_backend("cpu").sparse_divergence_fused(student, rows, spec, upstream, None, by_cpu)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, by_cpu, rtol=1e-5, atol=1e-7)


def packed_teacher(codec: str) -> tuple[Tensor, SparseRows, SparseRows]:
    """(student, packed, unpacked)."""
    student, teacher = random_logits(300, rows=4)
    packed = kd.pack(kd.TopKLogits(*ragged_teacher(teacher, 20), vocab_size=300), codec=codec)
    unpacked = kd.unpack(packed)
    records = Records(packed.data, packed.counts, {"q6": 6, "bf16": 16}[codec])
    return (
        student,
        SparseRows(0, records=records),
        SparseRows(0, unpacked.ids, unpacked.log_probs, unpacked.log_tail_mass),
    )


@pytest.mark.parametrize("codec", ["q6", "bf16"])
def test_packed_teachers(codec: str, emulated: Emulated) -> None:
    student, packed, unpacked = packed_teacher(codec)
    spec, upstream = RowSpec(*FORWARD_KL.divergence.form), torch.ones(4)
    both = [emulated(there.sparse_divergence, student, rows, spec, upstream) for rows in (packed, unpacked)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)


def malformed_records() -> tuple[str, bool]:
    """What is said of them, and whether the logits, which the gradient takes the place of, are as they were."""
    student, packed, _ = packed_teacher("q6")
    assert packed.records is not None
    packed.records.data[-4:] ^= 0xFF
    before = student.clone()
    try:
        backend = row_backend("cuda")
        backend.sparse_divergence_fused(student, packed, RowSpec(0, 0.0, 0.0), torch.ones(4), None, student)
    except ValueError as error:
        return str(error), torch.equal(student, before)
    return "", False


def test_malformed_records_are_refused_before_anything_is_written(emulated: Emulated) -> None:
    refusal, untouched = emulated(malformed_records)
    assert "record of token 2 is malformed" in refusal
    assert untouched


def test_what_is_named_is_left_out_of_the_tail(emulated: Emulated) -> None:
    """K holds 1 - 1e-30 of the student's mass."""
    student = torch.zeros(1, 1000)
    student[0, :4] = 70.0
    ids, log_p = torch.arange(4)[None], torch.full((1, 4), 0.2).log()
    spec = RowSpec(*FORWARD_KL.divergence.form)
    value, _, gradient = emulated(there.sparse_divergence, student, SparseRows(0, ids, log_p), spec, torch.ones(1))
    truth = evaluate(FORWARD_KL, student, ids, log_p, "bucket", torch.ones(1), torch.float64)
    torch.testing.assert_close(value.double(), truth.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), truth.gradient, rtol=1e-5, atol=0)


def without_tokens_or_entries() -> None:
    backend = row_backend("cuda")
    spec = RowSpec(*FORWARD_KL.divergence.form)
    none = SparseRows(0, torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3))
    gradient = torch.empty(0, 40)
    values = backend.sparse_divergence_fused(torch.empty(0, 40), none, spec, torch.empty(0), None, gradient)
    assert [each.shape for each in values] == [(0,), (0,)]
    student = random_logits(40, rows=2)[0]
    empty = SparseRows(int(Policy.DROP), torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0))
    gradient = torch.ones(2, 40)
    value, _ = backend.sparse_divergence_fused(student, empty, spec, torch.ones(2), None, gradient)
    assert not value.any()
    assert not gradient.any()


def test_no_tokens_and_no_entries(emulated: Emulated) -> None:
    emulated(without_tokens_or_entries)


def test_the_launches_know_how_much_they_leave_to_each_other(emulated: Emulated) -> None:
    kernels, backend = emulated(there.sparse_statistics)
    assert kernels == backend
