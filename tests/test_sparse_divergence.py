"""Truncated, sampled and packed teachers, by the accuracy rule (see ``accuracy``) against dense constructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check, complaint
from sparse_truth import Result, allowed, each_tail, evaluate, ragged_teacher, row_values
from test_mutations import mutants, replaced
from torch import Tensor
from truth import (
    DTYPES,
    EVERY_DIVERGENCE,
    OTHER_PARAMETERS,
    Case,
    Head,
    compute_dtype,
    each,
    leaf,
    log_softmax,
    random_logits,
)

import kdkernels as kd

FORWARD_KL, REVERSE_KL, JSD = (EVERY_DIVERGENCE[place] for place in (0, 1, 3))
ROWS = 6
QUICK = [FORWARD_KL, JSD]
REST = [case for case in EVERY_DIVERGENCE if case not in QUICK]
each_case = each(QUICK, slow=REST)

each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, id=name, marks=pytest.mark.slow if dtype.itemsize == 2 else ())
        for name, dtype in DTYPES.items()
    ],
)


def upstream_for(logits: Tensor) -> Tensor:
    return torch.linspace(-1.5, 2.0, len(logits), dtype=compute_dtype(logits.dtype))


def found(
    case: Case, student: Tensor, teacher: kd.TopKLogits, upstream: Tensor, *, donate: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value per token and gradient; by the operator of rows, or with ``donate`` by that of totals (then no values)."""
    logits = leaf(student)
    if donate:
        source = kd.Logits(logits * 1, donate=True)
        value = kd.distillation_loss(source, teacher, case.divergence, weight=upstream, reduction="sum", **options)
        value.backward()
    else:
        value = kd.distillation_loss(logits, teacher, case.divergence, reduction="none", **options)
        torch.autograd.backward(value, upstream)
    assert logits.grad is not None
    assert logits.grad.dtype == student.dtype
    return value.detach(), logits.grad


def both(
    case: Case, student: Tensor, ids: Tensor, log_p: Tensor, tail: str, upstream: Tensor, **tempers: Any
) -> list[Result]:
    """Plain PyTorch in the kernel's precision, and the truth."""
    return [
        evaluate(case, student, ids, log_p, tail, upstream, dtype, **tempers)
        for dtype in (upstream.dtype, torch.float64)
    ]


def check_case(
    case: Case, student: Tensor, ids: Tensor, log_p: Tensor, tail: str, *, stored: float = 1.0, **tempers: Any
) -> None:
    upstream = upstream_for(student)
    teacher = kd.TopKLogits(ids, log_p, vocab_size=student.shape[-1], tail=tail, temperature=stored)
    ratios = {
        "temperature": tempers.get("temperature", 1.0),
        "tau": tempers.get("teacher_temperature", stored) / stored,
    }
    plain, truth = both(case, student, ids, log_p, tail, upstream, **ratios)
    if float(truth.gradient.abs().max()) > torch.finfo(student.dtype).max:
        # An alpha beyond 1 is unbounded: float16 cannot hold what is right in that row.
        counted = truth.gradient.abs().amax(-1) <= torch.finfo(student.dtype).max
        student, ids, log_p = student[counted], ids[counted], log_p[counted]
        check_case(case, student, ids, log_p, tail, stored=stored, **tempers)
        return
    value, gradient = found(case, student, teacher, upstream, **tempers)
    assert value.dtype == upstream.dtype
    check("value", value, plain.value, truth.value, truth.value_size)
    check("gradient", gradient, plain.gradient, truth.gradient, truth.gradient_size)
    total, gradient = found(case, student, teacher, upstream, donate=True, **tempers)
    check("gradient of the total", gradient, plain.gradient, truth.gradient, truth.gradient_size)
    totals = [(upstream.double() * each.value).sum(0, keepdim=True) for each in (plain, truth)]
    check("total", total.reshape(1), *totals, (upstream.abs() * truth.value_size).sum())


@each_tail
@each_dtype
@each(QUICK, slow=[*REST, *OTHER_PARAMETERS])
def test_every_divergence_tail_and_dtype(case: Case, dtype: torch.dtype, tail: str) -> None:
    """With a short row and an empty one, ids in no order."""
    student, teacher = random_logits(127, dtype)
    ids, log_p = ragged_teacher(teacher, 9)
    if allowed(case, tail):
        check_case(case, student, ids, log_p, tail)
    else:
        with pytest.raises(ValueError, match="tail='bucket'"):
            check_case(case, student, ids, log_p, tail)


@each_tail
@pytest.mark.parametrize("vocab", [1, 2, 1023, 1025, pytest.param(4097, marks=pytest.mark.slow)], ids="V{}".format)
@pytest.mark.parametrize("case", [FORWARD_KL, JSD], ids=["forward_kl", "jsd"])
def test_sizes(case: Case, vocab: int, tail: str) -> None:
    student, teacher = random_logits(vocab, torch.float32)
    ids, log_p = ragged_teacher(teacher, min(vocab, 40))
    check_case(case, student, ids, log_p, tail)


@pytest.mark.slow
@each_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [FORWARD_KL, REVERSE_KL], ids=["forward_kl", "reverse_kl"])
def test_large_vocabulary(case: Case, dtype: torch.dtype, tail: str) -> None:
    student, teacher = random_logits(151_936, dtype, rows=2)
    if allowed(case, tail):
        check_case(case, student, *ragged_teacher(teacher, 64), tail)


@each_tail
@each_case
def test_all_of_the_vocabulary_is_the_dense_loss(case: Case, tail: str) -> None:
    if not allowed(case, tail):
        return
    student, teacher = random_logits(130, torch.float64)
    log_p, ids = teacher.log_softmax(-1).sort(-1, descending=True)
    upstream = upstream_for(student)
    value, gradient = found(case, student, kd.TopKLogits(ids, log_p, vocab_size=130, tail=tail), upstream)
    dense = leaf(student)
    expected = kd.distillation_loss(dense, teacher, case.divergence, reduction="none")
    expected.backward(upstream)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, dense.grad, rtol=1e-11, atol=1e-13)


def hard_rows() -> dict[str, tuple[Tensor, Tensor]]:
    """(student, log q of the teacher) on which naive code fails: 130 logits, of which the teacher names 8."""
    (base, other), columns = random_logits(130, rows=1), torch.arange(130)
    named = torch.isin(columns, other[0].topk(8).indices)
    masked = base.masked_fill(columns < 70, -torch.inf)
    return {
        "large": (1e4 * base.sign() + base, other),
        "far from zero": (base + 1e4, other),
        "masked": (masked, other),
        "all of the rest masked": (base.masked_fill(~named, -torch.inf), other),
        "all that is named masked": (base.masked_fill(named, -torch.inf), other),
        "all masked": (torch.full_like(base, -torch.inf), other),
        "named has all but 1e-30": (base + 69.0 * named, other),
        "named has all, the rest underflows": (base + 2e4 * named, other),
        "the rest has all": (base - 2e4 * named, other),
    }


@each_tail
@each_case
def test_hard_rows(case: Case, tail: str) -> None:
    if not allowed(case, tail):
        return
    for name, (student, teacher) in hard_rows().items():
        ids, log_p = ragged_teacher(teacher, 8)
        upstream = torch.tensor([1.5])
        plain, truth = both(case, student, ids, log_p, tail, upstream)
        value, gradient = found(case, student, kd.TopKLogits(ids, log_p, vocab_size=130, tail=tail), upstream)
        assert bool(value.isfinite().all()), name
        if bool(plain.value.isfinite().all() & plain.gradient.isfinite().all()):
            check(f"{name}: value", value, plain.value, truth.value, truth.value_size)
            masked = student < -1e5
            check(
                f"{name}: gradient",
                gradient,
                plain.gradient.masked_fill(masked, 0),
                truth.gradient.masked_fill(masked, 0),
                truth.gradient_size + 1.5 * truth.value_size.unsqueeze(-1),
            )
        assert bool((gradient[student < -1e5] == 0).all()), name


def test_what_is_left_of_the_student_keeps_its_digits() -> None:
    """K holds 1 - 1e-30 of the student's mass: no difference from 1 could tell."""
    student = torch.zeros(1, 1000)
    student[0, :4] = 69.07755 + 1.0  # log 1e30
    ids, log_p = torch.arange(4)[None], torch.full((1, 4), 0.2).log()
    logits = student.requires_grad_()
    value = kd.distillation_loss(logits, kd.TopKLogits(ids, log_p, vocab_size=1000), kd.ForwardKL())
    value.backward()
    truth = evaluate(FORWARD_KL, student, ids, log_p, "bucket", torch.ones(1), torch.float64)
    torch.testing.assert_close(value.double(), truth.value[0], rtol=1e-6, atol=0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), truth.gradient, rtol=1e-5, atol=0)


@each_tail
@each_case
def test_broken_gradients_are_rejected(case: Case, tail: str) -> None:
    if not allowed(case, tail):
        return
    student, teacher = random_logits(127)
    log_p, ids = teacher.double().log_softmax(-1).topk(9)
    upstream = upstream_for(student)
    plain, truth = both(case, student, ids, log_p, tail, upstream)
    _, gradient = found(case, student, kd.TopKLogits(ids, log_p, vocab_size=127, tail=tail), upstream)
    expected = plain.gradient, truth.gradient, truth.gradient_size
    assert complaint(gradient, *expected) is None
    for row in range(len(student)):
        for name, broken in mutants(gradient[row]).items():
            assert complaint(replaced(gradient, row, broken), *expected), f"row {row}: {name} passes"


@pytest.mark.parametrize("per_token", [False, True], ids=["number", "per_token"])
@pytest.mark.parametrize("tail", ["renormalize", "uniform"])
@pytest.mark.parametrize("case", [FORWARD_KL, JSD], ids=["forward_kl", "jsd"])
def test_other_temperatures(case: Case, tail: str, per_token: bool) -> None:
    student, teacher = random_logits(127)
    tempers: dict[str, Any] = {"temperature": 1.7, "teacher_temperature": 0.6}
    if per_token:
        tempers = {"temperature": torch.linspace(0.5, 3.0, ROWS), "teacher_temperature": torch.linspace(2.0, 0.7, ROWS)}
    check_case(case, student, *ragged_teacher(teacher, 9), tail, stored=1.3, **tempers)


def test_renormalized_entries_at_another_temperature_are_the_softmax_over_them() -> None:
    student, teacher = random_logits(60, torch.float64)
    at_one, at_two = (
        kd.TopKLogits(*top(teacher / tau), vocab_size=60, tail="renormalize", temperature=tau) for tau in (1.0, 2.0)
    )
    losses = [kd.distillation_loss(student, each, temperature=2.0) for each in (at_one, at_two)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def top(logits: Tensor, k: int = 7) -> tuple[Tensor, Tensor]:
    values, ids = logits.log_softmax(-1).topk(k)
    return ids, values


def everything(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "labels": torch.tensor([3, 0, 5, -100, 36, 7]),
        "ce_weight": 0.7,
        "mask": torch.tensor([True, True, False, True, True, True]),
        "weight": torch.linspace(0.2, 2.0, ROWS, dtype=dtype),
        "temperature": 2.0,
        "temperature_squared": True,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 2.5},
    "none": {"reduction": "none"},
}


def plain_loss(case: Case, logits: Tensor, ids: Tensor, log_p: Tensor, tail: str, given: dict[str, Any]) -> Tensor:
    """The contract with the options of ``everything``; the teacher's entries are at the same temperature."""
    kept = given["mask"] & (given["labels"] != -100)
    tau = given["temperature"]
    value = tau**2 * row_values(case, logits[kept], ids[kept], log_p[kept], tail, temperature=tau)
    hard = log_softmax(logits[kept]).gather(-1, given["labels"][kept].unsqueeze(-1)).squeeze(-1)
    weight = given["weight"][kept]
    value = weight * (value - given["ce_weight"] * hard)
    if given.get("reduction") == "none":
        return logits.new_zeros(len(logits)).index_put((kept,), value)
    if given.get("reduction") == "sum":
        return value.sum()
    return value.sum() / given.get("normalizer", weight.sum())


@each_tail
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, tail: str) -> None:
    student, teacher = random_logits(37, torch.float64)
    ids, log_p = ragged_teacher(teacher, 5)
    given = {**everything(torch.float64), **OPTIONS[option]}
    beyond = ids.masked_fill(~given["mask"].unsqueeze(-1), 99)  # refused where a token counts
    teacher_rows = kd.TopKLogits(beyond, log_p, vocab_size=37, tail=tail, temperature=2.0)
    leaves = [leaf(student) for _ in range(2)]
    with torch.no_grad():
        leaves[0][2] = torch.nan  # does not count
    value = kd.distillation_loss(leaves[0], teacher_rows, kd.JSD(), **given)
    expected = plain_loss(JSD, leaves[1], ids, log_p, tail, given)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    for loss in (value, expected):
        (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("option", ["mean", "none"])
@each_tail
@pytest.mark.parametrize("case", [FORWARD_KL, JSD], ids=["forward_kl", "jsd"])
def test_heads(case: Case, tail: str, option: str, dtype: torch.dtype) -> None:
    """Gradients to hidden states, weight and bias, through softcap and scale, in several chunks."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = Head(normal(ROWS, 8), 2 * normal(37, 8), normal(37), softcap=9.0, logit_scale=0.8)
    ids, log_p = ragged_teacher(random_logits(37, torch.float64)[1], 5)
    given = {**everything(dtype), **OPTIONS[option]}
    exact = head.with_leaves(torch.float64)
    expected = plain_loss(case, exact.logits(), ids, log_p, tail, given)
    ours = head.with_leaves()
    teacher = kd.TopKLogits(ids, log_p, vocab_size=37, tail=tail, temperature=2.0)
    for budget in (None, 2 * 37 * dtype.itemsize * 2):
        value = kd.distillation_loss(ours.source(), teacher, case.divergence, memory_budget=budget, **given)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
        gradients = torch.autograd.grad(value.sum(), list(ours.tensors().values()))
        truths = torch.autograd.grad(expected.sum(), list(exact.tensors().values()), retain_graph=True)
        for name, gradient, truth in zip(ours.tensors(), gradients, truths, strict=True):
            error = float((gradient.double() - truth).norm() / truth.norm())
            assert error < tolerance, f"{name} errs by {error:.1e}"


@pytest.mark.parametrize("entropy", [False, True])
@each_dtype
def test_sampled_teachers(dtype: torch.dtype, entropy: bool) -> None:
    """The cross-entropy with the samples' weights; ids that were drawn repeatedly add up."""
    student, _ = random_logits(127, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 127, (ROWS, 40), generator=generator)
    ids[1, 20:], ids[-1] = -1, -1
    weights = torch.rand(ROWS, 40, generator=generator) / 40
    entropies = torch.linspace(0, 1, ROWS) if entropy else None
    upstream = upstream_for(student)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = student.detach().to(dtype).requires_grad_()
        dense = torch.zeros(ROWS, 128, dtype=dtype)
        for row in range(ROWS):
            for id, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
                dense[row, id] += weight
        value = -(dense[:, :127] * log_softmax(logits)).sum(-1)
        (gradient,) = torch.autograd.grad(value, logits, upstream.to(dtype))
        return value.detach() - (0 if entropies is None else entropies.to(dtype)), gradient

    teacher = kd.SampledLogits(ids, weights, vocab_size=127, entropy=entropies)
    value, gradient = found(FORWARD_KL, student, teacher, upstream)  # type: ignore[arg-type]
    near, exact = plain(upstream.dtype), plain(torch.float64)
    check("value", value, near[0], exact[0], exact[0].abs() + 5)
    check("gradient", gradient, near[1], exact[1])
    assert complaint(torch.zeros_like(gradient), near[1], exact[1])
    assert complaint(-gradient, near[1], exact[1])


@each_tail
@pytest.mark.parametrize("codec", ["q4", "bf16"])
def test_packed_teachers_are_what_they_unpack_to(codec: str, tail: str) -> None:
    student, teacher = random_logits(300)
    ids, log_p = ragged_teacher(teacher, 20)
    packed = kd.pack(kd.TopKLogits(ids, log_p, vocab_size=300, tail=tail), codec)
    unpacked = kd.unpack(packed)
    upstream = upstream_for(student)
    mask = torch.tensor([True, False, True, True, True, True])
    for case in (FORWARD_KL, JSD):
        results = [
            found(case, student, each, upstream, backend=backend, mask=mask, **options)  # type: ignore[arg-type]
            for each in (packed, unpacked)
            for backend in ("cpu", "reference")
            for options in ({}, {"memory_budget": 3 * 300 * 4})
        ]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=2e-5, atol=1e-6)


def test_packed_teachers_of_heads_in_chunks() -> None:
    _, teacher = random_logits(300)
    packed = kd.pack(kd.TopKLogits(*ragged_teacher(teacher, 20), vocab_size=300))
    generator = torch.Generator().manual_seed(3)
    head = Head(torch.randn(ROWS, 8, generator=generator), torch.randn(300, 8, generator=generator))
    mask = torch.tensor([True, False, True, True, True, True])
    gradients = []
    for source in (packed, kd.unpack(packed)):
        ours = head.with_leaves()
        kd.distillation_loss(ours.source(), source, kd.JSD(), mask=mask, memory_budget=2 * 300 * 4).backward()
        gradients.append([ours.hidden.grad, ours.weight.grad])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_malformed_records_are_refused_before_anything_is_written() -> None:
    student, teacher = random_logits(300)
    packed = kd.pack(kd.TopKLogits(*ragged_teacher(teacher, 20), vocab_size=300))
    data = packed.data.clone()
    data[len(data) // 2 :] = 255
    broken = kd.PackedLogits(data, packed.counts, vocab_size=300, codec="q6")
    logits = student.clone().requires_grad_()
    donated = logits * 1
    before = donated.detach().clone()
    with pytest.raises(ValueError, match=r"record of token \d is malformed"):
        kd.distillation_loss(kd.Logits(donated, donate=True), broken)
    assert torch.equal(donated.detach(), before)
    for counts in (packed.counts + 1, packed.counts - 21, packed.counts + 300):
        with pytest.raises(ValueError, match=r"counts|bytes"):
            kd.distillation_loss(student, kd.PackedLogits(packed.data, counts, vocab_size=300, codec="q6"))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 1, 2), (2, 0)], ids=str)
def test_batches(shape: tuple[int, ...]) -> None:
    student = torch.randn(*shape, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, log_p = top(2 * student.detach())
    value = kd.distillation_loss(student, kd.TopKLogits(ids, log_p, vocab_size=19), kd.JSD(), reduction="none")
    assert value.shape == shape
    flat = [
        each.reshape(-1, each.shape[-1]) if each.numel() else each.new_empty(0, each.shape[-1])
        for each in (student, ids, log_p)
    ]
    if student.numel():
        torch.testing.assert_close(value.reshape(-1), row_values(JSD, *flat, "bucket"), rtol=1e-12, atol=1e-14)
    kd.distillation_loss(student, kd.TopKLogits(ids, log_p, vocab_size=19)).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_all_masked_gives_zero() -> None:
    student, teacher = random_logits(37)
    logits = leaf(student)
    value = kd.distillation_loss(
        logits, kd.TopKLogits(*ragged_teacher(teacher, 5), vocab_size=37), mask=torch.zeros(ROWS, dtype=torch.bool)
    )
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def test_strided_students_and_teachers_and_other_types() -> None:
    student, teacher = random_logits(40, torch.float64)
    ids, log_p = ragged_teacher(teacher, 6)
    expected = kd.distillation_loss(student, kd.TopKLogits(ids, log_p, vocab_size=40), kd.JSD())
    wide = torch.stack([student, student], -1)[..., 0]
    narrow = kd.TopKLogits(ids.int().t().contiguous().t(), torch.cat([log_p, log_p], -1)[:, :6], vocab_size=40)
    torch.testing.assert_close(kd.distillation_loss(wide, narrow, kd.JSD()), expected, rtol=1e-13, atol=0)
    padded = torch.cat([student, student], -1)
    found = kd.distillation_loss(padded, kd.TopKLogits(ids, log_p, vocab_size=40), kd.JSD(), vocab_size=40)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    coarse = kd.distillation_loss(student.float(), kd.TopKLogits(ids, log_p.bfloat16(), vocab_size=40), kd.JSD())
    torch.testing.assert_close(coarse.double(), expected, rtol=0.05, atol=0)


def test_a_given_tail_mass_is_taken() -> None:
    """A tail of 1e-12 is lost in the difference of float32 numbers."""
    student, _ = random_logits(40)
    ids = torch.arange(3).expand(ROWS, 3)
    log_p = torch.full((ROWS, 3), 1 / 3).log()
    tail = torch.full((ROWS,), -27.6310211)
    value = kd.distillation_loss(student, kd.TopKLogits(ids, log_p, vocab_size=40, log_tail_mass=tail), kd.ReverseKL())
    q = student.double().softmax(-1)
    rest = q[:, 3:].sum(-1)
    expected = ((q[:, :3] * (q[:, :3] * 3).log()).sum(-1) + rest * (rest.log() + 27.6310211)).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@each_tail
@each_case
def test_gradcheck_of_the_reference(case: Case, tail: str) -> None:
    if not allowed(case, tail) or case.name == "tvd":
        return
    student, teacher = random_logits(7, torch.float64, rows=3)
    sparse = kd.TopKLogits(*ragged_teacher(teacher, 3), vocab_size=7, tail=tail)

    def loss(logits: Tensor) -> Tensor:
        return kd.reference.distillation_loss(logits, sparse, case.divergence, reduction="none")

    assert torch.autograd.gradcheck(loss, leaf(student))
    assert torch.autograd.gradgradcheck(loss, leaf(student))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction: str) -> None:
    student, teacher = random_logits(11, torch.float64, rows=3)
    sparse = kd.TopKLogits(*ragged_teacher(teacher, 3), vocab_size=11)
    results = []
    for backend in (None, "reference"):
        logits = leaf(student)
        value = kd.distillation_loss(logits, sparse, kd.JSD(), reduction=reduction, backend=backend).sum()
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)
    donated = leaf(student)
    value = kd.distillation_loss(kd.Logits(donated * 1, donate=True), sparse, kd.JSD())
    with pytest.raises(RuntimeError, match="donate=False"):
        torch.autograd.grad(value, donated, create_graph=True)


def test_function_transformations_take_the_reference() -> None:
    student, teacher = random_logits(11, torch.float64, rows=3)
    sparse = kd.TopKLogits(*ragged_teacher(teacher, 3), vocab_size=11)
    gradient = torch.func.grad(lambda logits: kd.distillation_loss(logits, sparse))(student)
    logits = leaf(student)
    kd.distillation_loss(logits, sparse).backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-11, atol=1e-14)


IDS, LOG_P = torch.tensor([[0, 3], [2, -1]]), torch.tensor([[0.5, 0.25], [0.125, 0.0]]).log()


def topk(**changes: Any) -> Callable[[], Any]:
    given = {"ids": IDS, "log_probs": LOG_P, "vocab_size": 5, **changes}
    return lambda: kd.TopKLogits(**given)


def sampled(**changes: Any) -> Callable[[], Any]:
    given = {"ids": IDS, "weights": torch.full((2, 2), 0.5), "vocab_size": 5, **changes}
    return lambda: kd.SampledLogits(**given)


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "another vocabulary": (topk(vocab_size=6), {}, r"vocabularies of 5 and 6"),
    "other tokens": (topk(ids=IDS[:1], log_probs=LOG_P[:1]), {}, r"\(2,\), that of the TopKLogits \(1,\)"),
    "id too large": (topk(ids=IDS + 2), {}, r"TopKLogits: ids must be in \[0, 5\).*token 0 has 5"),
    "id below -1": (topk(ids=IDS - 1), {}, r"ids must be in.*token 1 has -2"),
    "repeated id": (topk(ids=torch.zeros_like(IDS)), {}, r"must not occur twice.*token 0 has 0"),
    "positive": (topk(log_probs=-LOG_P), {}, r"log_probs must be at most 0; token 0 has 0\.69"),
    "nan": (topk(log_probs=LOG_P * torch.nan), {}, r"log_probs must be at most 0; token 0 has nan"),
    "too much mass": (topk(log_probs=LOG_P * 0), {}, r"add up to at most 1; token 0 has 2"),
    "tail mass": (topk(log_tail_mass=torch.tensor([-1.0, 1.0])), {}, r"log_tail_mass must be at most 0; token 1 has 1"),
    "requires grad": (topk(log_probs=LOG_P.clone().requires_grad_()), {}, r"log_probs requires grad"),
    "other temperature": (
        topk(),
        {"temperature": 2.0},
        r"temperature, which the teacher shares, is 2.*stored at, 1.*topk_logits\(temp",
    ),
    "teacher temperature": (
        topk(tail="drop"),
        {"teacher_temperature": 2.0},
        r"teacher_temperature is 2, but a TopKLogits with tail='drop'",
    ),
    "per token": (topk(), {"temperature": torch.ones(2)}, r"is one per token"),
    "renormalized reverse": (
        topk(tail="renormalize"),
        {"divergence": kd.ReverseKL()},
        r"infinite with tail='renormalize'.*'bucket'",
    ),
    "renormalized jeffreys": (topk(tail="renormalize"), {"divergence": kd.Jeffreys(0.5)}, r"infinite with"),
    "renormalized alpha": (topk(tail="renormalize"), {"divergence": kd.AlphaDivergence(-0.5)}, r"infinite with"),
    "sampled jsd": (
        sampled(),
        {"divergence": kd.JSD()},
        r"must be ForwardKL\(\) or SoftCrossEntropy\(\) for SampledLogits",
    ),
    "negative weight": (
        sampled(weights=torch.tensor([[0.5, -1.0], [1, 1]])),
        {},
        r"weights must be finite.*token 0 has -1",
    ),
    "infinite weight": (sampled(weights=torch.full((2, 2), torch.inf)), {}, r"weights must be finite"),
    "sampled id": (sampled(ids=IDS + 2), {}, r"SampledLogits: ids must be in"),
    "entropy": (sampled(entropy=torch.tensor([0.0, torch.nan])), {}, r"entropy must be finite; token 1 has nan"),
    "sampled temperature": (sampled(), {"temperature": 2.0}, r"SampledLogits stays at the temperature"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, options, message = BAD[name]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        kd.distillation_loss(torch.randn(2, 5), make(), **options)
    if name in {"id too large", "nan", "tail mass", "negative weight"}:
        # What does not count may hold anything.
        off = torch.zeros(2, dtype=torch.bool)
        assert kd.distillation_loss(torch.randn(2, 5), make(), mask=off, **options).item() == 0
