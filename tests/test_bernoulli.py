"""``bernoulli_loss`` against the formulas of binary cross-entropy and divergence in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check, complaint
from pairs import BATCH, VOCAB, each_pairing, make, sources, value_and_gradients
from test_operators import check_compiled, compiled, graphs, recorded
from torch import Tensor
from torch.nn import functional as F
from truth import compute_dtype, each_dtype, leaf

import kdkernels as kd

FORMS = {
    "cross_entropy": {"form": "cross_entropy"},
    "kl": {"form": "kl"},
    "half": {"form": "half"},
    "targets": {"form": "cross_entropy", "probabilities": True},
    "kl of targets": {"form": "kl", "probabilities": True},
}
each_form = pytest.mark.parametrize("form", FORMS)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def normal(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher_of(form: str, logits: Tensor) -> Tensor:
    return torch.sigmoid(logits.float()).to(logits.dtype) if "targets" in form else logits


def entries(form: str, student: Tensor, teacher: Tensor, tau: float = 1.0, teacher_tau: float = 1.0) -> Tensor:
    """``[N, V]``: sums of two outcomes."""
    x = student / tau
    if form == "half":
        y = teacher / teacher_tau
        return -(F.logsigmoid(x - y) + F.logsigmoid(y - x)) / 2 - math.log(2)
    y = torch.logit(teacher) if "targets" in form else teacher / teacher_tau
    b, other = (teacher, 1 - teacher) if "targets" in form else (torch.sigmoid(y), torch.sigmoid(-y))
    value = -b * F.logsigmoid(x) - other * F.logsigmoid(-x)
    return value + torch.xlogy(b, b) + torch.xlogy(other, other) if form.startswith("kl") else value


def evaluate(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, upstream: Tensor
) -> list[Tensor]:
    source = leaf(student)
    value = loss(source, teacher)
    return [value.detach(), torch.autograd.grad(value, source, upstream.to(value.dtype))[0]]


@each_form
@each_dtype
def test_accuracy(form: str, dtype: torch.dtype) -> None:
    student, teacher = normal(3, 301).to(dtype), teacher_of(form, normal(3, 301, seed=1).to(dtype))
    upstream, taus = torch.tensor([1.0, -0.3, 2.0]), (1.7, 1.7)
    found = evaluate(
        lambda s, t: kd.bernoulli_loss(s, t, temperature=1.7, reduction="none", **FORMS[form]),
        student,
        teacher,
        upstream,
    )
    single = compute_dtype(dtype)
    plain = evaluate(lambda s, t: entries(form, s, t, *taus).sum(-1), student.to(single), teacher.to(single), upstream)
    truth = evaluate(lambda s, t: entries(form, s, t, *taus).sum(-1), student.double(), teacher.double(), upstream)
    exact = entries(form, student.double(), teacher.double(), *taus).abs() + (teacher.double() * student.double()).abs()
    check("values", found[0], plain[0], truth[0], exact.sum(-1))
    check("gradient", found[1], plain[1], truth[1], upstream.abs().unsqueeze(-1).expand_as(truth[1]))
    for broken in (torch.zeros_like(found[1]), -found[1], 1.01 * found[1]):
        slope = upstream.abs().unsqueeze(-1).expand_as(truth[1])
        assert dtype.itemsize == 2 or complaint(broken, plain[1], truth[1], slope) is not None


@each_backend
@each_form
def test_digits_are_kept(form: str, backend: str) -> None:
    """Of small probabilities and, by the kernel, of students close to the teacher."""
    far, close = torch.full((1, 64), -17.0), torch.linspace(-8, 8, 64).unsqueeze(0)
    for student, teacher in ((far, far - 1), (close + 2e-3, close)) if form in ("kl", "half") else ((far, far - 1),):
        wanted = teacher_of(form, teacher)
        exact = entries(form, student.double(), wanted.double()).sum(-1)
        found = kd.bernoulli_loss(student, wanted, reduction="none", backend=backend, **FORMS[form]).double()
        if backend == "cpu":
            torch.testing.assert_close(found, exact, rtol=2e-2 if student is not far else 1e-5, atol=0)
        else:
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@each_backend
@each_form
def test_extremes_are_finite(form: str, backend: str) -> None:
    values = torch.tensor([-math.inf, -1e4, -80.0, -0.0, 0.0, 80.0, 1e4])
    student = torch.cartesian_prod(values, values)[:, 0].unsqueeze(0).requires_grad_()
    teacher = torch.cartesian_prod(values, values)[:, 1].unsqueeze(0)
    if "targets" in form:
        teacher = torch.sigmoid(teacher)
    value = kd.bernoulli_loss(student, teacher, backend=backend, **FORMS[form])
    (gradient,) = torch.autograd.grad(value, student)
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())
    assert bool((gradient[student == -math.inf] == 0).all())
    equal = (
        kd.bernoulli_loss(teacher, teacher, form=form, backend=backend) if form in ("kl", "half") else torch.zeros(())
    )
    assert float(equal) == 0 or backend == "reference"


@each_pairing
@each_form
def test_pairings_reductions_and_options(pairing: str, form: str) -> None:
    tensors = make(pairing, dtype=torch.float64)
    for name in tensors:
        if name.startswith("teacher"):
            tensors[name] = tensors[name].detach()
    if "targets" in form and "teacher.logits" not in tensors:
        pytest.skip("a head makes logits")
    if "targets" in form:
        tensors["teacher.logits"] = torch.sigmoid(tensors["teacher.logits"])
    weight, mask = torch.rand(BATCH, generator=torch.Generator().manual_seed(1)), torch.ones(BATCH, dtype=torch.bool)
    mask[0, 2] = mask[1, 4] = False
    all_options: list[dict[str, Any]] = [
        {},
        {"reduction": "none", "temperature": 0.5 + weight, "temperature_squared": True, "mask": mask},
        {"weight": weight, "mask": mask, "vocabulary": "mean", "memory_budget": 1, "vocab_size": 33, "normalizer": 7},
        {"reduction": "sum", "weight": weight, "temperature": 2.0, "temperature_squared": True},
    ]
    for some in all_options:
        options = FORMS[form] | some

        def loss(tensors: dict[str, Tensor], library: Any = kd, options: dict[str, Any] = options) -> Tensor:
            heads = {"softcap": 5.0, "logit_scale": 0.9} if "head" in pairing else {}
            value: Tensor = library.bernoulli_loss(*sources(tensors, **heads), **options)
            return value

        expected_options = {name: value for name, value in options.items() if name != "memory_budget"}
        expected = value_and_gradients(lambda t, o=expected_options: loss(t, kd.reference, o), tensors, factor=1.5)
        found = value_and_gradients(loss, tensors, factor=1.5)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@each_backend
@pytest.mark.parametrize("form", ["cross_entropy", "kl"])
def test_sparse_targets(form: str, backend: str) -> None:
    student, fill = normal(3, 40).requires_grad_(), torch.tensor([0.0, 0.2, 0.01], dtype=torch.float64)
    ids = torch.tensor([[3, 39, -1], [0, 7, 9], [-1, -1, -1]])
    values = torch.rand(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = fill.unsqueeze(-1).repeat(1, 40)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        target[row, ids[row, column]] = values[row, column]
    for given, wanted in ((fill, target), (0.3, torch.where(target == fill.unsqueeze(-1), 0.3, target))):
        sparse = kd.SparseTargets(ids, values, given)
        found = kd.bernoulli_loss(student, sparse, form=form, memory_budget=1, backend=backend)
        expected = kd.reference.bernoulli_loss(student, wanted, form=form, probabilities=True)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (found, expected)))


def test_gradcheck_of_reference_and_kernel_and_second_derivatives() -> None:
    student, teacher = normal(2, 5, spread=1).requires_grad_(), normal(2, 5, seed=1)
    for form in ("cross_entropy", "kl", "half"):
        for backend in ("reference", "cpu"):

            def loss(s: Tensor, form: str = form, backend: str = backend) -> Tensor:
                return kd.bernoulli_loss(s, teacher, form=form, temperature=1.3, backend=backend)

            assert torch.autograd.gradcheck(loss, (student,))
            assert torch.autograd.gradgradcheck(loss, (student,))


def test_gradient_to_the_weight_and_backward_twice() -> None:
    student, teacher = normal(4, 30).requires_grad_(), normal(4, 30, seed=1)
    weight = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def gradients(backend: str) -> list[Tensor]:
        value = kd.bernoulli_loss(student, teacher, weight=weight, backend=backend)
        torch.autograd.grad(value, (student, weight), retain_graph=True)
        return list(torch.autograd.grad(value, (student, weight)))

    torch.testing.assert_close(gradients("cpu"), gradients("reference"))


def test_half_precision_does_not_underflow() -> None:
    student, teacher = normal(4, 50).half().requires_grad_(), normal(4, 50, seed=1).half()
    value = kd.bernoulli_loss(student, teacher, normalizer=1e7)
    (gradient,) = torch.autograd.grad(value * 2.0**16, student)
    exact = kd.bernoulli_loss(student, teacher, normalizer=1e7 / 2.0**16, backend="reference")
    (right,) = torch.autograd.grad(exact, student)
    torch.testing.assert_close(gradient, right, rtol=2e-3, atol=1e-5)
    assert bool((gradient != 0).any())


@each_backend
def test_what_stands_where_no_token_counts_has_no_influence(backend: str) -> None:
    student, teacher, mask = normal(3, 20), normal(3, 20, seed=1), torch.tensor([True, False, True])
    student[1], teacher[1] = math.nan, math.nan
    student.requires_grad_()
    value = kd.bernoulli_loss(student, teacher, mask=mask, backend=backend)
    torch.testing.assert_close(value, kd.bernoulli_loss(student[mask], teacher[mask], backend="reference"))
    (gradient,) = torch.autograd.grad(value, student)
    assert bool((gradient[1] == 0).all())
    assert float(kd.bernoulli_loss(student, teacher, mask=torch.zeros(3, dtype=torch.bool), backend=backend)) == 0
    kd.bernoulli_loss(student, torch.sigmoid(teacher), probabilities=True, mask=mask, backend=backend)


@each_backend
def test_no_rows_and_not_contiguous(backend: str) -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    value = kd.bernoulli_loss(empty, empty.detach(), backend=backend)
    assert float(value) == 0
    assert torch.autograd.grad(value, empty)[0].shape == (0, 5)
    student, teacher = normal(30, 3).float().t().requires_grad_(), normal(30, 3, seed=1).float().t()
    found = kd.bernoulli_loss(student, teacher, backend=backend)
    torch.testing.assert_close(
        found, kd.bernoulli_loss(student.contiguous(), teacher.contiguous(), backend="reference")
    )


def test_threads_make_no_difference() -> None:
    student, teacher = normal(5, 9_001).float().requires_grad_(), normal(5, 9_001, seed=1).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            value = kd.bernoulli_loss(student, teacher, form="kl")
            found.append(torch.cat([value.detach().view(1), torch.autograd.grad(value, student)[0].view(-1)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def loss_of(tensors: dict[str, Tensor], **options: Any) -> Tensor:
    student, teacher = sources({name: t if name.startswith("student") else t.detach() for name, t in tensors.items()})
    return kd.bernoulli_loss(student, teacher, **options)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    tensors = make("head-logits")
    sparse = kd.SparseTargets(torch.zeros((*BATCH, 2), dtype=torch.int64), torch.full((*BATCH, 2), 0.5))
    logits = torch.zeros(*BATCH, VOCAB, requires_grad=True)
    found = recorded(lambda: loss_of(tensors, reduction=reduction).sum().backward())
    found += recorded(lambda: kd.bernoulli_loss(logits, sparse, reduction=reduction).sum().backward())
    names = {operator._opname for operator, _ in found}
    assert names == ({"bernoulli_total"} if reduction == "mean" else {"bernoulli", "bernoulli_backward"})
    for operator, arguments in found:
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
def test_compiled_and_changing_numbers_do_not_recompile() -> None:
    tensors = {name: t if name.startswith("student") else t.detach() for name, t in make("head-logits").items()}
    for reduction in ("mean", "none"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        check_compiled(lambda given, how=reduction: loss_of(given, reduction=how).sum(), tensors)
    student, teacher = normal(5, 37).float(), normal(5, 37, seed=1).float()
    call = compiled(lambda tau: kd.bernoulli_loss(student, teacher, temperature=tau, temperature_squared=True))
    before = graphs()
    for tau in (1.1, 1.2, 1.3, 1.4):
        torch.testing.assert_close(
            call(tau), kd.bernoulli_loss(student, teacher, temperature=tau, temperature_squared=True)
        )
    assert graphs() - before <= 2


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("teacher", "options", "error", "text"),
    [
        (ZEROS, {"form": "mse"}, ValueError, "form must be one of"),
        (ZEROS, {"form": "half", "probabilities": True}, ValueError, "compares logits"),
        (ZEROS + 2, {"probabilities": True}, ValueError, "probabilities must be in"),
        (ZEROS, {"probabilities": True, "teacher_temperature": 2.0}, ValueError, "teacher_temperature is for"),
        (ZEROS, {"vocabulary": "none"}, ValueError, "vocabulary must be one of"),
        (torch.zeros(2, 4), {}, ValueError, "vocabularies of 3 and 4"),
        (torch.zeros(3, 3), {}, ValueError, "same tokens"),
        (ZEROS.clone().requires_grad_(), {}, NotImplementedError, "teacher requires grad"),
        (kd.SparseTargets(torch.tensor([[3], [0]]), torch.ones(2, 1)), {}, ValueError, "ids must be in"),
        (kd.SparseTargets(torch.tensor([[2], [0]]), torch.full((2, 1), 1.5)), {}, ValueError, "values must be in"),
        (kd.SparseTargets(torch.zeros(3, 1).long(), torch.ones(3, 1)), {}, ValueError, "batch has the shape"),
        (None, {}, TypeError, "teacher must be a tensor"),
    ],
)
def test_refused(teacher: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kd.bernoulli_loss(ZEROS, teacher, **options)


def test_sparse_targets_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        kd.SparseTargets(torch.zeros(2, 3).long(), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="fill must be in"):
        kd.SparseTargets(torch.zeros(2, 3).long(), torch.zeros(2, 3), 1.5)
    with pytest.raises(ValueError, match="fill must have the shape"):
        kd.SparseTargets(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(3))
