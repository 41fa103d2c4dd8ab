"""``gradient_tolerance``: what is promised of a row's gradient holds, and nothing else changes.

With the unit matrix as a head's weight, the gradient to the hidden states is that to the logits, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import cpu
from kdkernels.reference.gradient_rounding import round_nearest, round_stochastically

pytestmark = pytest.mark.skipif(not kd.backends()["cpu"].available, reason="needs the native kernels")

VOCAB = 1000
DIVERGENCES = [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.3), kd.TVD(), kd.Renyi(0.7), kd.ABDivergence(0.5, 0.5)]


def peaked(rows: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher that both give nearly all to few entries, as language models do."""
    teacher = 6 * torch.randn(rows, vocab)
    return teacher + torch.randn(rows, vocab), teacher


def even(rows: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    return 0.01 * torch.randn(rows, vocab), 0.01 * torch.randn(rows, vocab)


def mixed(rows: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    sides = zip(peaked(rows, vocab), even(rows, vocab), strict=True)
    some = torch.arange(rows).unsqueeze(1) % 8 == 0
    student, teacher = (torch.where(some, spread, sharp) for sharp, spread in sides)
    return student, teacher


LOGITS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"peaked": peaked, "even": even, "mixed": mixed}


def logit_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, kd.GradientReport]:
    """The gradient to a head's logits ``[N, V]``, by the unit matrix."""
    hidden = student.clone().requires_grad_()
    head = kd.LMHead(hidden, torch.eye(student.shape[1], dtype=student.dtype))
    with kd.GradientReport() as report:
        kd.distillation_loss(head, teacher, **options).backward()
    assert hidden.grad is not None
    return hidden.grad, report


def relative_error(gradient: Tensor, exact: Tensor) -> Tensor:
    return (gradient.double() - exact.double()).norm(dim=-1) / exact.double().norm(dim=-1)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("kind", LOGITS)
def test_each_row_loses_at_most_the_tolerance(kind: str, tolerance: float) -> None:
    torch.manual_seed(1)
    student, teacher = LOGITS[kind](24)
    exact, _ = logit_gradient(student, teacher)
    gradient, report = logit_gradient(student, teacher, gradient_tolerance=tolerance)
    error = relative_error(gradient, exact)
    assert bool((error <= tolerance * 1.0001 + 1e-6).all()), error.max()
    # The report tells the truth, up to the rounding of the gradient itself.
    torch.testing.assert_close(report.relative_error, error, rtol=1e-2, atol=2e-6)
    torch.testing.assert_close(gradient.sum(-1), exact.sum(-1), rtol=0, atol=float(2e-6 * exact.abs().sum(-1).max()))
    if kind == "peaked":  # it was made use of
        assert float(report.relative_error.mean()) > 0.4 * tolerance
        assert float(report.density.mean()) < 0.3


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_divergence_and_dtype(divergence: kd.Divergence, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    student, teacher = (side.to(dtype) for side in peaked(6, 777))
    options = {"labels": torch.arange(6), "ce_weight": 0.3, "temperature": 1.5, "reduction": "sum"}
    exact, _ = logit_gradient(student.float(), teacher.float(), divergence=divergence, **options)
    gradient, report = logit_gradient(
        student, teacher, divergence=divergence, gradient_tolerance=0.02, gradient_rounding="nearest", **options
    )
    rounding = torch.finfo(dtype).eps
    assert bool((relative_error(gradient, exact) <= 0.02 + rounding).all())
    assert float(report.relative_error.min()) > 0.002


def test_the_kernel_and_the_definition_leave_out_alike() -> None:
    torch.manual_seed(3)
    student, teacher = peaked(16)
    exact, _ = logit_gradient(student, teacher)
    _, report = logit_gradient(student, teacher, gradient_tolerance=1e-2)
    defined = round_nearest(exact, 1e-2)
    by_reference, _ = logit_gradient(student, teacher, gradient_tolerance=1e-2, backend="reference")
    torch.testing.assert_close(by_reference, defined, rtol=1e-4, atol=1e-7)
    assert bool((relative_error(defined, exact) <= 1e-2).all())
    # The kernel's threshold lies at most an eighth of an octave lower: it keeps a little more.
    kept_by_definition = (defined != defined.mode(-1, keepdim=True).values).sum(-1)
    kept = (report.density * VOCAB).round().long()
    assert bool((kept >= kept_by_definition - 1).all())
    assert bool((kept <= 1.35 * kept_by_definition + 4).all())


def test_without_a_tolerance_nothing_changes() -> None:
    torch.manual_seed(4)
    student, teacher = peaked(8)
    exact, _ = logit_gradient(student, teacher)
    for rounding in ("nearest", "stochastic"):
        gradient, report = logit_gradient(student, teacher, gradient_tolerance=0.0, gradient_rounding=rounding)
        assert torch.equal(gradient, exact)
        assert not report.density.numel()


@pytest.mark.parametrize("tolerance", [3e-3, 3e-2])
def test_stochastic_rounding_has_the_gradient_as_its_mean(tolerance: float) -> None:
    torch.manual_seed(5)
    student, teacher = peaked(32, 300)
    exact = logit_gradient(student, teacher)[0].double()
    runs = 200
    options: dict[str, Any] = {"gradient_tolerance": tolerance, "gradient_rounding": "stochastic"}
    options["generator"] = torch.Generator().manual_seed(6)
    samples = torch.stack([logit_gradient(student, teacher, **options)[0] for _ in range(runs)]).double()
    noise = samples.var(0).sum(-1) / runs

    def departure(mean: Tensor) -> float:
        """The squared error of a mean of samples over what chance makes of it: near 1, whose standard error is 0.1."""
        return float(((mean - exact).square().sum(-1) / noise).mean())

    assert departure(samples.mean(0)) < 1.4
    # Biased estimators do not pass: the same draws that are not rounded up, and nearest rounding.
    assert departure(torch.where(samples != 0, exact, 0.0).mean(0)) > 10
    assert departure(logit_gradient(student, teacher, gradient_tolerance=tolerance)[0].double()) > 10
    # The tolerance bounds the expected squared error.
    squared = (samples - exact).square().sum(-1).mean(0) / exact.square().sum(-1)
    assert bool((squared.sqrt() <= 1.1 * tolerance).all()), squared.sqrt()
    assert bool((squared.sqrt() >= 0.3 * tolerance).all()), squared.sqrt()


def test_the_definition_of_stochastic_rounding() -> None:
    torch.manual_seed(7)
    gradient = torch.randn(3, 200, dtype=torch.float64) ** 5
    samples = torch.stack([round_stochastically(gradient, 0.05, seed) for seed in range(600)])
    noise = samples.var(0).sum(-1) / len(samples)
    assert bool(((samples.mean(0) - gradient).square().sum(-1) / noise < 2).all())
    squared = (samples - gradient).square().sum(-1).mean(0) / gradient.square().sum(-1)
    assert bool((squared.sqrt() <= 0.055).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_chunks_threads_and_seeds(rounding: str) -> None:
    torch.manual_seed(8)
    tolerance = 1e-2
    hidden, weight = torch.randn(40, 33), 2 * torch.randn(VOCAB, 33)
    teacher = hidden @ weight.t() + torch.randn(40, VOCAB)

    def gradients(seed: int = 9, threads: int = 2, **options: Any) -> list[Tensor]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        generator = torch.Generator().manual_seed(seed) if rounding == "stochastic" else None
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            kd.distillation_loss(
                kd.LMHead(*leaves),
                teacher,
                gradient_tolerance=tolerance,
                gradient_rounding=rounding,
                generator=generator,
                **options,
            ).backward()
        finally:
            torch.set_num_threads(before)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    whole = gradients()
    assert all(torch.equal(*pair) for pair in zip(whole, gradients(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(whole, gradients(threads=1), strict=True))
    for budget in (1, 7 * 4 * VOCAB):  # a row at a time; chunks that do not divide the rows
        for one, other in zip(whole, gradients(memory_budget=budget), strict=True):
            # Matrix products of other sizes round otherwise, and an entry may cross the threshold; other draws would
            # differ by the tolerance.
            assert float((one - other).norm() / one.norm()) < 0.05 * tolerance
    if rounding == "stochastic":
        other = gradients(seed=10)[0]
        assert float((whole[0] - other).norm() / other.norm()) > 0.2 * tolerance


def test_lists_that_do_not_pay_are_made_dense() -> None:
    torch.manual_seed(11)
    student, teacher = even(16)
    exact, _ = logit_gradient(student, teacher)
    for rounding in ("nearest", "stochastic"):
        gradient, report = logit_gradient(student, teacher, gradient_tolerance=1e-3, gradient_rounding=rounding)
        assert float(report.density.mean()) > 0.12
        assert bool((relative_error(gradient, exact) <= 1.2e-3).all())


def test_masked_vocabulary_keeps_a_gradient_of_zero() -> None:
    torch.manual_seed(12)
    student, teacher = peaked(6)
    bias = torch.zeros(VOCAB)
    bias[100:300] = -torch.inf
    hidden, learned = student.clone().requires_grad_(), bias.clone().requires_grad_()
    head = kd.LMHead(hidden, torch.eye(VOCAB), learned)
    kd.distillation_loss(head, teacher, gradient_tolerance=1e-2).backward()
    assert hidden.grad is not None
    assert learned.grad is not None
    assert bool((hidden.grad[:, 100:300] == 0).all())
    assert bool((learned.grad[100:300] == 0).all())
    assert float(hidden.grad.abs().sum()) > 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 127])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_degenerate_rows(vocab: int, rounding: str, dtype: torch.dtype) -> None:
    torch.manual_seed(13)
    student = torch.stack(
        [torch.zeros(vocab), torch.full((vocab,), 1e4), torch.randn(vocab), torch.full((vocab,), -torch.inf)]
    )
    teacher = torch.stack([torch.zeros(vocab), torch.randn(vocab), torch.randn(vocab), torch.randn(vocab)])
    options = {"gradient_tolerance": 1e-2, "gradient_rounding": rounding}
    hidden = torch.zeros(4, 1, dtype=dtype).requires_grad_()
    weight = torch.zeros(vocab, 1, dtype=dtype).requires_grad_()
    for row in range(4):  # each row as a bias, so that its logits are these
        bias = student[row].to(dtype).requires_grad_()
        exact = student[row].to(dtype).clone().requires_grad_()
        kd.distillation_loss(
            kd.LMHead(hidden[:1], weight, bias), teacher[row : row + 1].to(dtype), **options
        ).backward()
        kd.distillation_loss(exact.unsqueeze(0), teacher[row : row + 1].to(dtype)).backward()
        assert bias.grad is not None
        assert exact.grad is not None
        allowed = (2e-2 + torch.finfo(dtype).eps) * float(exact.grad.norm()) + 1e-9
        assert float((bias.grad - exact.grad).norm()) <= allowed


def test_empty_and_inactive_batches() -> None:
    head = kd.LMHead(torch.randn(0, 4).requires_grad_(), torch.randn(9, 4).requires_grad_())
    kd.distillation_loss(head, torch.randn(0, 9), gradient_tolerance=1e-2).backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    hidden, weight = torch.randn(5, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    mask = torch.zeros(5, dtype=torch.bool)
    teacher = torch.full((5, 9), torch.nan)
    kd.distillation_loss(kd.LMHead(hidden, weight), teacher, mask=mask, gradient_tolerance=1e-2).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_what_stands_where_a_token_does_not_count_has_no_influence() -> None:
    torch.manual_seed(21)
    hidden, weight, teacher = torch.randn(6, 4), 3 * torch.randn(300, 4), 5 * torch.randn(6, 300)
    mask = torch.tensor([True, False, True, True, False, True])

    def gradients(blank: float) -> list[Tensor]:
        filled = [torch.where(mask.unsqueeze(1), each, blank) for each in (hidden, teacher)]
        leaves = [filled[0].requires_grad_(), weight.clone().requires_grad_()]
        loss = kd.distillation_loss(kd.LMHead(*leaves), filled[1], mask=mask, gradient_tolerance=0.05)
        return list(torch.autograd.grad(loss, leaves))

    for one, other in zip(gradients(torch.nan), gradients(0.0), strict=True):
        assert torch.equal(one, other)
        assert float(one.abs().sum()) > 0


def test_a_weight_of_any_layout() -> None:
    torch.manual_seed(22)
    hidden, weight, teacher = torch.randn(6, 5), 3 * torch.randn(5, 300), 5 * torch.randn(6, 300)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for layout in (weight.t(), weight.t().contiguous()):
            leaf = layout.to(dtype).requires_grad_()
            head = kd.LMHead(hidden.to(dtype), leaf)
            loss = kd.distillation_loss(head, teacher.to(dtype), gradient_tolerance=0.05)
            found.append(torch.autograd.grad(loss, leaf)[0].float())
        torch.testing.assert_close(*found, rtol=0.02, atol=1e-3 * float(found[0].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher_kind", ["head", "logits", "topk"])
def test_gradients_of_both_heads(teacher_kind: str, reduction: str, dtype: torch.dtype) -> None:
    """To hidden states, weights and biases, through scale and softcap, within what the tolerance implies."""
    torch.manual_seed(14)
    rows, vocab, tolerance = 19, 501, 1e-2
    teacher_logits = 6 * torch.randn(rows, vocab)

    def gradients(**options: Any) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(15)
        leaves = [torch.randn(rows, 16), 1.5 * torch.randn(vocab, 16), torch.randn(vocab)]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        student = kd.LMHead(*leaves, softcap=20.0, logit_scale=0.7)
        teacher: Any = teacher_logits.to(dtype)
        if teacher_kind == "topk":
            teacher = kd.topk_logits(teacher, 12)
        if teacher_kind == "head":
            leaves += [
                torch.randn(rows, 24).to(dtype).requires_grad_(),
                torch.randn(vocab, 24).to(dtype).requires_grad_(),
            ]
            teacher = kd.LMHead(*leaves[3:])
        loss = kd.distillation_loss(student, teacher, reduction=reduction, memory_budget=8 * vocab * 8, **options)
        (loss * torch.linspace(1, 2, loss.numel()).reshape(loss.shape)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None], loss.detach()

    exact, value = gradients()
    rounded, same_value = gradients(gradient_tolerance=tolerance)
    torch.testing.assert_close(same_value, value, rtol=1e-6, atol=1e-6)
    assert len(exact) == len(rounded) == (5 if teacher_kind == "head" else 3)
    for place, (one, other) in enumerate(zip(rounded, exact, strict=True)):
        error = float((one.double() - other.double()).norm() / other.double().norm())
        assert error <= 4 * tolerance + 4 * torch.finfo(dtype).eps, (place, error)
        assert error > 0


def test_a_gradient_that_nobody_wants_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[bool, bool]] = []
    products = cpu.sparse_products

    def recorded(*arguments: Any) -> None:
        wanted.append((arguments[-2] is not None, arguments[-1] is not None))
        products(*arguments)

    monkeypatch.setattr(cpu, "sparse_products", recorded)
    torch.manual_seed(16)
    teacher = 6 * torch.randn(4, 300)
    for hidden_grad, weight_grad in ((True, False), (False, True), (True, True)):
        wanted.clear()
        hidden = torch.randn(4, 8).requires_grad_(hidden_grad)
        weight = (3 * torch.randn(300, 8)).requires_grad_(weight_grad)
        kd.distillation_loss(kd.LMHead(hidden, weight), teacher, gradient_tolerance=0.1).backward()
        assert wanted == [(hidden_grad, weight_grad)]
        assert (hidden.grad is not None, weight.grad is not None) == (hidden_grad, weight_grad)


# The last two: several blocks of the vocabulary, several tiles of rows, both in several strips.
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 2, 5), (40, 127, 16), (17, 4097, 37), (5, 3000, 577), (4000, 70, 150)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparse_products(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(17)
    rows, vocab, width = sizes
    dense = torch.randn(rows, vocab) * (torch.rand(rows, vocab) < 0.2)
    dense[rows // 2] = 0
    index = dense.nonzero()
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = (dense != 0).sum(-1).cumsum(0)
    columns, values = index[:, 1].to(torch.int32), dense[dense != 0]
    weight = torch.randn(vocab, width + 3).to(dtype)[:, :width]  # rows apart
    hidden, start, everywhere = torch.randn(rows, width), torch.randn(vocab, width), torch.randn(width)
    to_hidden, to_weight = torch.full((rows, width), torch.nan), start.clone()
    cpu.sparse_products(offsets, columns, values, weight, hidden, everywhere, to_hidden, to_weight)
    expected = (
        dense.double() @ weight.double(),
        start.double() + everywhere.double() + dense.double().t() @ hidden.double(),
    )
    for found, truth in zip((to_hidden, to_weight), expected, strict=True):
        scale = float(truth.abs().max()) + 1e-30
        assert float((found.double() - truth).abs().max()) <= 1e-5 * scale


@pytest.mark.slow
def test_compiled_and_differentiated_twice() -> None:
    torch.manual_seed(18)
    hidden, weight = torch.randn(6, 5).requires_grad_(), (2 * torch.randn(200, 5)).requires_grad_()
    teacher = 5 * torch.randn(6, 200)

    def loss(tolerance: float) -> Tensor:
        return kd.distillation_loss(kd.LMHead(hidden, weight), teacher, gradient_tolerance=tolerance)

    (eager,) = torch.autograd.grad(loss(0.05), hidden)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(0.05), hidden)
    torch.testing.assert_close(compiled, eager)
    (exact,) = torch.autograd.grad(loss(0.0), hidden, create_graph=True)
    (again,) = torch.autograd.grad(loss(0.05), hidden, create_graph=True)
    # A second derivative is one of the exact gradient.
    second = [torch.autograd.grad(each.square().sum(), hidden)[0] for each in (exact, again)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_tolerance": -0.1}, "gradient_tolerance must be at least 0 and less than 1, got -0.1"),
        ({"gradient_tolerance": 1.0}, "gradient_tolerance must be at least 0 and less than 1, got 1.0"),
        ({"gradient_tolerance": "0.1"}, "gradient_tolerance must be a finite number, got '0.1'"),
        ({"gradient_rounding": "up"}, "gradient_rounding must be one of nearest, stochastic, got 'up'"),
        ({"generator": 3}, "generator must be a torch.Generator on the CPU, got int"),
        ({"generator": torch.Generator()}, "generator is for gradient_rounding='stochastic', not for 'nearest'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    head = kd.LMHead(torch.randn(2, 3), torch.randn(5, 3))
    with pytest.raises((TypeError, ValueError), match=message.replace("(", r"\(")):
        kd.distillation_loss(head, torch.randn(2, 5), **options)
