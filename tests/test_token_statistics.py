"""``token_statistics`` against plain PyTorch, by the accuracy rule (see ``accuracy``)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor
from truth import Head, compute_dtype, each_dtype, kl, log_softmax, random_logits

import kdkernels as kd

BACKENDS = ("cpu", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ARGMAX = ("argmax_student", "argmax_teacher")


def plain_statistics(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    dtype: torch.dtype,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Every statistic that the inputs allow, by its definition, computed in ``dtype``."""
    sides = {"student": (student, temperature)}
    if teacher is not None:
        sides["teacher"] = (teacher, temperature if teacher_temperature is None else teacher_temperature)
    found: dict[str, Tensor] = {}
    log_probs = {}
    for name, (stored, tau) in sides.items():
        logits = stored.to(dtype)
        per_row = tau.to(dtype).unsqueeze(-1) if isinstance(tau, Tensor) and tau.dim() else tau
        log_probs[name] = log_softmax(logits, tau)
        found[f"lse_{name}"] = torch.logsumexp(logits / per_row, -1)
        found[f"entropy_{name}"] = -(log_probs[name].exp() * log_probs[name]).sum(-1)
        found[f"max_{name}"] = logits.amax(-1)
        found[f"argmax_{name}"] = logits.argmax(-1)
        if labels is not None:
            found[f"label_log_prob_{name}"] = log_probs[name].gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if teacher is not None:
        found["forward_kl"] = kl(log_probs["teacher"], log_probs["student"])
        found["reverse_kl"] = kl(log_probs["student"], log_probs["teacher"])
    return found


def check_statistics(found: kd.TokenStatistics, plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    size = sum(truth[name].abs() for name in truth if name.startswith("lse")) + 1
    for name, value in found._asdict().items():
        if name not in truth:
            assert value is None, f"{name} from what?"
        elif name in ARGMAX:
            assert torch.equal(value, truth[name]), name
        else:
            assert value.dtype == plain[name].dtype
            check(name, value.reshape(-1), plain[name].reshape(-1), truth[name].reshape(-1), size.reshape(-1))


def check_logits(student: Tensor, teacher: Tensor | None, labels: Tensor | None, backend: str, **options: Any) -> None:
    dtypes = [side.dtype for side in (student, teacher) if side is not None]
    truth = plain_statistics(student, teacher, labels, torch.float64, **options)
    plain = plain_statistics(student, teacher, labels, compute_dtype(*dtypes), **options)
    check_statistics(kd.token_statistics(student, teacher, labels, backend=backend, **options), plain, truth)


@pytest.mark.parametrize(
    "vocab", [1, 2, 127, 1025, 4097, pytest.param(151_936, marks=pytest.mark.slow)], ids="V{}".format
)
@each_dtype
@each_backend
def test_logits(backend: str, dtype: torch.dtype, vocab: int) -> None:
    student, teacher = random_logits(vocab, dtype)
    labels = torch.arange(6) * 7919 % vocab
    check_logits(student, teacher, labels, backend, temperature=1.7, teacher_temperature=0.6)


@each_backend
def test_only_what_is_asked_for_is_given(backend: str) -> None:
    student, teacher = random_logits(300)
    check_logits(student, None, None, backend)
    check_logits(student, None, torch.arange(6), backend)
    check_logits(student, teacher, None, backend)


@each_backend
def test_temperature_per_token(backend: str) -> None:
    student, teacher = random_logits(300)
    temperature = torch.tensor([0.5, 0.8, 1.0, 1.5, 2.0, 4.0])
    check_logits(student, teacher, torch.arange(6), backend, temperature=temperature)
    check_logits(student, teacher, None, backend, temperature=temperature, teacher_temperature=temperature.flip(0))


@pytest.mark.parametrize("pairing", ["head-none", "head-head", "head-logits", "logits-head"])
@pytest.mark.parametrize("memory_budget", [1, 1300, None], ids="budget_{}".format)
@each_backend
def test_heads(backend: str, memory_budget: int | None, pairing: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = [
        Head(random(2, 4, hidden), random(90, hidden), random(90), softcap=softcap, logit_scale=0.7)
        for hidden, softcap in ((12, None), (20, 4.0))
    ]
    kinds = pairing.split("-")
    choices = [{"head": head.source(), "logits": head.logits(), "none": None} for head in heads]
    student_source, teacher_source = (choice[kind] for choice, kind in zip(choices, kinds, strict=True))
    assert student_source is not None
    labels = torch.arange(8).reshape(2, 4)
    found = kd.token_statistics(
        student_source,
        teacher_source,
        labels,
        temperature=2.0,
        vocab_size=80,
        memory_budget=memory_budget,
        backend=backend,
    )
    student, teacher = (head.logits(80) for head in heads)
    truth = plain_statistics(student, None if kinds[1] == "none" else teacher, labels, torch.float64, temperature=2.0)
    for name, value in found._asdict().items():
        if name in truth:
            torch.testing.assert_close(value, truth[name], rtol=1e-11, atol=1e-12)
        else:
            assert value is None


@each_backend
def test_the_lowest_of_equal_maxima_is_named(backend: str) -> None:
    student = torch.zeros(5, 3000)
    student[1, [2900, 1500, 1501, 700]] = 2.0
    student[2, [2999, 1024]] = 2.0
    student[3] = -math.inf
    student[4] = -math.inf
    student[4, 2048] = -3.0
    found = kd.token_statistics(student, student.flip(-1), backend=backend)
    assert found.argmax_student.tolist() == [0, 700, 1024, 0, 2048]
    assert found.argmax_teacher is not None
    assert found.argmax_teacher.tolist() == [0, 99, 0, 0, 951]
    assert found.max_student[:3].tolist() == [0.0, 2.0, 2.0]


@each_backend
def test_dropped_tokens_are_zero(backend: str) -> None:
    """By the mask, and by a label equal to ``ignore_index``; whatever their logits hold."""
    student, teacher = random_logits(300)
    labels = torch.tensor([5, 1, -7, 299, 0, 3])
    mask = torch.tensor([True, False, True, True, True, True])
    whole = kd.token_statistics(student, teacher, labels.abs(), backend=backend)
    student[1], teacher[2] = math.nan, math.inf
    found = kd.token_statistics(student, teacher, labels, mask=mask, ignore_index=-7, backend=backend)
    kept = torch.tensor([0, 3, 4, 5])
    for value, expected in zip(found, whole, strict=True):
        assert value is not None
        assert expected is not None
        assert torch.equal(value[kept], expected[kept])
        assert bool((value[[1, 2]] == 0).all())


@each_backend
def test_masked_vocabulary(backend: str) -> None:
    """-inf columns: the statistics of the rest, and a label among them is very improbable but not infinitely so."""
    student, teacher = random_logits(300)
    masked = torch.arange(300) % 3 == 0
    labels = torch.ones(6, dtype=torch.int64)
    found = kd.token_statistics(
        student.masked_fill(masked, -math.inf), teacher.masked_fill(masked, -math.inf), labels, backend=backend
    )
    rest = kd.token_statistics(student[:, ~masked], teacher[:, ~masked], torch.zeros_like(labels), backend=backend)
    for name, value in found._asdict().items():
        if name not in ARGMAX:
            torch.testing.assert_close(value, getattr(rest, name), rtol=1e-5, atol=1e-5)
    improbable = kd.token_statistics(student.masked_fill(masked, -math.inf), None, 0 * labels, backend=backend)
    assert improbable.label_log_prob_student is not None
    assert bool(improbable.label_log_prob_student.isfinite().all())
    assert bool((improbable.label_log_prob_student < -9e4).all())


@each_backend
def test_no_tokens_and_shapes(backend: str) -> None:
    student, teacher = (logits.reshape(2, 3, 40) for logits in random_logits(40))
    whole = kd.token_statistics(student, teacher, torch.zeros(2, 3).long(), backend=backend)
    assert all(value is not None and value.shape == (2, 3) for value in whole)
    assert kd.token_statistics(student[0, 0], backend=backend).lse_student.shape == ()
    empty = kd.token_statistics(student[:0], teacher[:0], backend=backend)
    assert empty.forward_kl is not None
    assert empty.forward_kl.shape == (0, 3)


@each_backend
def test_has_no_gradient(backend: str) -> None:
    student = torch.randn(3, 40, requires_grad=True)
    assert not any(value.requires_grad for value in kd.token_statistics(student, backend=backend) if value is not None)
