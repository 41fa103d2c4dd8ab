"""The soft cross-entropy, parameters per token, the target apart from the rest, and hard-label weights per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pairs
import pytest
import torch
from accuracy import check
from pairs import each_pairing
from sparse_truth import ragged_teacher, row_values
from test_divergence_accuracy import check_case, upstream_for
from test_operators import recorded
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case, each, kl, leaf, log_softmax, random_logits

import kdkernels as kd

SOFT_CROSS_ENTROPY = Case("soft_cross_entropy", kd.SoftCrossEntropy(), lambda p, q: -(p.exp() * q).sum(-1))
LABELS = torch.tensor([3, 0, 16, 16, 7, 5])


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


def assert_like(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Close, relative to the largest entry, which must not vanish."""
    size = expected.abs().max().item()
    assert size > 0
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=tolerance * size)


# --- soft cross-entropy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("vocab", [1, 2, 1030], ids="V{}".format)
def test_soft_cross_entropy(vocab: int, dtype: torch.dtype) -> None:
    check_case(SOFT_CROSS_ENTROPY, *random_logits(vocab, dtype), sides=("both", "student", "teacher"))


def test_soft_cross_entropy_with_temperatures_and_hard_labels() -> None:
    check_case(
        SOFT_CROSS_ENTROPY,
        *random_logits(1300),
        temperature=torch.tensor([0.5, 0.8, 1.0, 1.5, 2.0, 4.0]),
        teacher_temperature=1.7,
        labels=torch.tensor([0, 1299, 1024, 1023, 5, 700]),
        ce_weight=0.4,
    )


def test_soft_cross_entropy_is_the_forward_kl_and_the_entropy() -> None:
    student, teacher = random_logits(300, torch.float64)
    entropy = kd.token_statistics(student, teacher).entropy_teacher
    value = kd.distillation_loss(student, teacher, kd.SoftCrossEntropy(), reduction="none")
    assert_like(value, kd.distillation_loss(student, teacher, reduction="none") + entropy, 1e-12)
    far = torch.tensor([[0.0, -math.inf, 200.0]])  # a student without mass where the teacher has some
    kept = torch.tensor([[0.0, -math.inf, -300.0]], requires_grad=True)
    assert kd.distillation_loss(kept, far, kd.SoftCrossEntropy()).item() == pytest.approx(300)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "uniform", "drop"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_soft_cross_entropy_from_a_truncated_teacher(tail: str, backend: str | None) -> None:
    student, teacher = random_logits(37, torch.float64, rows=4)
    ids, log_p = ragged_teacher(teacher, 7)
    mine, true = leaf(student), leaf(student)
    sparse = kd.TopKLogits(ids, log_p, vocab_size=37, tail=tail)
    value = kd.distillation_loss(mine, sparse, kd.SoftCrossEntropy(), reduction="none", backend=backend)
    expected = row_values(SOFT_CROSS_ENTROPY, true, ids, log_p, tail)
    assert_like(value, expected)
    assert_like(*gradients(value, mine), *gradients(expected, true))


def test_soft_cross_entropy_from_samples_takes_no_entropy_off() -> None:
    student, teacher = random_logits(37, rows=4)
    sampled = kd.sample_logits(teacher, 20, generator=torch.Generator().manual_seed(0))
    log_q = torch.log_softmax(student.double(), -1)
    expected = -(sampled.weights.double() * log_q.gather(-1, sampled.ids.clamp(min=0).long())).sum(-1)
    value = kd.distillation_loss(student, sampled, kd.SoftCrossEntropy(), reduction="none")
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


# --- parameters per token ----------------------------------------------------------------------------------------------

SHARES = [0.0, 0.2, 0.5, 1.0, 0.9, 0.01]


def mixture(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    return (share * log_a.exp() + (1 - share) * log_b.exp()).log()


def jsd(share: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    m = mixture(share, log_p, log_q)
    return share * kl(log_p, m) + (1 - share) * kl(log_q, m)


WITH_PARAMETER: dict[type[kd.Divergence], Callable[[float, Tensor, Tensor], Tensor]] = {
    kd.Jeffreys: lambda share, p, q: share * kl(p, q) + (1 - share) * kl(q, p),
    kd.JSD: jsd,
    kd.SkewForwardKL: lambda share, p, q: kl(p, mixture(share, p, q)),
    kd.SkewReverseKL: lambda share, p, q: kl(q, mixture(share, q, p)),
}
each_with_parameter = pytest.mark.parametrize("divergence", WITH_PARAMETER, ids=lambda each: each.__name__)


def per_row_case(divergence: Any) -> Case:
    shares = torch.tensor(SHARES, dtype=torch.float64)
    formula = WITH_PARAMETER[divergence]

    def rows(log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.stack([formula(*row) for row in zip(SHARES, log_p, log_q, strict=True)])

    return Case(divergence.__name__, divergence(shares), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@each_with_parameter
def test_parameter_per_token(divergence: Any, dtype: torch.dtype) -> None:
    case = per_row_case(divergence)
    check_case(case, *random_logits(1030, dtype), temperature=1.3, teacher_temperature=0.8)


@pytest.mark.parametrize("kind", ["reference", "head", "truncated", "filled-in", "0-d"])
@each_with_parameter
def test_parameter_per_token_elsewhere(divergence: Any, kind: str) -> None:
    case = per_row_case(divergence)
    student, teacher = random_logits(37, torch.float64)
    mine, true = leaf(student), leaf(student)
    options: dict[str, Any] = {"reduction": "none"}
    source: Any = mine
    other: Any = teacher
    formula = case.divergence
    expected = case.formula(log_softmax(teacher), log_softmax(true))
    if kind == "reference":
        options["backend"] = "reference"
    elif kind == "head":
        source = kd.LMHead(torch.eye(6, dtype=torch.float64), mine.T)
        options["memory_budget"] = 8 * 37 * 2
    elif kind == "0-d":
        formula = divergence(torch.tensor(0.3, dtype=torch.float64))
        expected = WITH_PARAMETER[divergence](0.3, log_softmax(teacher), log_softmax(true))
    else:
        ids, log_p = ragged_teacher(teacher, 9)
        tail = "bucket" if kind == "truncated" else "uniform"
        other = kd.TopKLogits(ids, log_p, vocab_size=37, tail=tail)
        expected = torch.cat(
            [
                row_values(
                    Case("", case.divergence, lambda p, q, share=share: WITH_PARAMETER[divergence](share, p, q)),
                    true[row : row + 1],
                    ids[row : row + 1],
                    log_p[row : row + 1],
                    tail,
                )
                for row, share in enumerate(SHARES)
            ]
        )
    value = kd.distillation_loss(source, other, formula, **options)
    assert_like(value, expected)
    assert_like(*gradients(value, mine), *gradients(expected, true))


@each_with_parameter
def test_parameter_tensors_stay_finite_at_their_limits(divergence: Any) -> None:
    """Also where a side has no mass at all; no skew is the plain divergence, which is far more than the smallest number."""
    student = torch.tensor([[0.0, -200.0, -math.inf, 1.0]]).repeat(2, 1).requires_grad_()
    teacher = torch.tensor([[-200.0, 0.0, 2.0, -math.inf]]).repeat(2, 1).requires_grad_()
    for backend in (None, "reference"):
        value = kd.distillation_loss(
            student, teacher, divergence(torch.tensor([0.0, 1.0])), reduction="none", backend=backend
        )
        for each_gradient in gradients(value, student, teacher):
            assert bool(each_gradient.isfinite().all())
        plain = {kd.SkewForwardKL: kd.ForwardKL(), kd.SkewReverseKL: kd.ReverseKL()}.get(divergence)
        if plain:
            expected = kd.distillation_loss(student, teacher, plain, reduction="none")
            torch.testing.assert_close(value, expected * torch.tensor([1.0, 0.0]), rtol=1e-6, atol=1e-6)


def test_descriptions_with_tensors_are_compared_by_identity() -> None:
    alpha = torch.tensor([0.1, 0.2])
    assert kd.SkewForwardKL(alpha) == kd.SkewForwardKL(alpha)
    assert kd.SkewForwardKL(alpha) != kd.SkewForwardKL(alpha.clone())
    assert kd.SkewForwardKL(alpha) != kd.SkewForwardKL(0.1)
    assert kd.SkewForwardKL(0.1) == kd.SkewForwardKL(0.1) != kd.SkewReverseKL(0.1)
    assert len({kd.JSD(alpha), kd.JSD(alpha), kd.JSD(0.5), kd.JSD(), kd.Decoupled(kd.JSD(alpha))}) == 3


@pytest.mark.parametrize(
    ("divergence", "error", "text"),
    [
        (kd.JSD(torch.tensor([0.1, 1.2, 0.3, 0.1, 0.2, 0.3])), ValueError, r"JSD: beta must be between 0 and 1 .*1\.2"),
        (kd.SkewForwardKL(torch.tensor(-0.5)), ValueError, r"SkewForwardKL: alpha must be between 0 and 1 .*-0\.5"),
        (kd.Jeffreys(torch.full((6,), math.nan)), ValueError, "Jeffreys: weight must be between 0 and 1"),
        (
            kd.SkewReverseKL(torch.zeros(5)),
            ValueError,
            r"alpha must have one entry per token, shape \(6,\), got \(5,\)",
        ),
        (kd.JSD(torch.zeros(6, dtype=torch.complex64)), TypeError, "beta must be a dense real tensor"),
        (
            kd.JSD(torch.full((6,), 0.5, requires_grad=True)),
            NotImplementedError,
            "parameter of the divergence requires",
        ),
        (
            kd.Decoupled(target_weight=torch.zeros(5)),
            ValueError,
            "Decoupled: target_weight must have one entry per token",
        ),
    ],
    ids=["beyond", "0-d", "nan", "shape", "dtype", "gradient", "weight"],
)
def test_bad_tensors_are_refused(divergence: kd.Divergence, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kd.distillation_loss(*random_logits(17), divergence, labels=LABELS)


# --- the target apart --------------------------------------------------------------------------------------------------


def without(logits: Tensor, labels: Tensor) -> Tensor:
    """``[N, V - 1]``: the columns that are not the row's label, gathered."""
    columns = torch.arange(logits.shape[-1] - 1)
    return logits.gather(-1, columns + (columns >= labels.unsqueeze(-1)))


def decoupled(
    formula: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tau: Any,
    teacher_tau: Any,
    target_weight: Any = 1.0,
    rest_weight: Any = 1.0,
) -> Tensor:
    """By the definition, with the label taken out of the rows."""
    s, t = (
        logits / (tau if isinstance(tau, float) else tau.unsqueeze(-1))
        for logits, tau in ((student, tau), (teacher, teacher_tau))
    )
    log_rest = [torch.log_softmax(without(logits, labels), -1) for logits in (t, s)]
    two = []
    for logits in (t, s):
        odds = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - without(logits, labels).logsumexp(-1)
        two.append(torch.stack([torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)], -1))
    return rest_weight * formula(*log_rest) + target_weight * kl(*two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@each([*EVERY_DIVERGENCE, SOFT_CROSS_ENTROPY])
def test_decoupled(case: Case, dtype: torch.dtype) -> None:
    """Value and both gradients of every divergence, with weights and temperatures per token and hard labels."""
    vocab = 1030
    student, teacher = random_logits(vocab, dtype)
    labels = torch.tensor([0, 1029, 1023, 1024, 5, 500])
    generator = torch.Generator().manual_seed(3)
    target_weight, rest_weight, tau, ce_weight = (
        0.3 + torch.rand(4, 6, generator=generator, dtype=torch.float64)
    ).unbind()
    upstream = upstream_for(student).double()
    form = kd.Decoupled(case.divergence, target_weight=target_weight, rest_weight=rest_weight)
    results = []
    for compute in (dtype, torch.float64, None):
        s, t = (leaf(logits, compute or dtype) for logits in (student, teacher))
        if compute is None:
            value = kd.distillation_loss(
                s,
                t,
                form,
                temperature=tau,
                teacher_temperature=1.3,
                labels=labels,
                ce_weight=ce_weight,
                reduction="none",
            )
        else:
            tau_, target_, rest_, ce_ = (each.to(compute) for each in (tau, target_weight, rest_weight, ce_weight))
            value = decoupled(case.formula, s, t, labels, tau_, 1.3, target_, rest_)
            value = value + ce_ * torch.nn.functional.cross_entropy(s, labels, reduction="none")
        results.append((value.detach(), *torch.autograd.grad(value, (s, t), upstream.to(value.dtype))))
    plain, truth, ours = results
    size = case.factor * truth[0].abs().clamp(min=math.log(vocab))
    check("value", ours[0], plain[0], truth[0], size)
    # A gradient is a sum of probabilities, each times a factor of the loss; an exponential errs by its exponent's rounding.
    logits = [student.double() / tau.unsqueeze(-1), teacher.double() / 1.3]
    logits += [each.scatter(-1, labels.unsqueeze(-1), -math.inf) for each in logits]
    logs = torch.stack([torch.log_softmax(each, -1).clamp(min=-1e5) for each in logits])
    size = upstream.abs() * (
        case.factor * truth[0].abs().clamp(min=1) * (target_weight + rest_weight) / tau.clamp(max=1) + 1
    )
    gradient_size = size.unsqueeze(-1) * (logs.exp() * (1 - logs)).sum(0)
    for name, mine, near, exact in zip(("student", "teacher"), ours[1:], plain[1:], truth[1:], strict=True):
        check(f"{name}'s gradient", mine, near, exact, gradient_size)


@each_pairing
@pytest.mark.parametrize("backend", [None, "reference"])
def test_decoupled_of_logits_and_heads(pairing: str, backend: str | None) -> None:
    labels = pairs.some_labels()
    tensors = pairs.make(pairing, dtype=torch.float64)

    def ours(tensors: pairs.Tensors) -> Tensor:
        return kd.distillation_loss(
            *pairs.sources(tensors),
            kd.Decoupled(kd.ReverseKL(), target_weight=0.7, rest_weight=2.0),
            labels=labels,
            temperature=1.5,
            ce_weight=0.4,
            reduction="sum",
            backend=backend,
            **({} if backend else {"memory_budget": 3 * 8 * pairs.VOCAB}),
        )

    def plain(tensors: pairs.Tensors) -> Tensor:
        logits = [
            (
                torch.nn.functional.linear(source.hidden, source.weight, source.bias)
                if isinstance(source, kd.LMHead)
                else source
            )[labels >= 0]
            for source in pairs.sources(tensors)
        ]
        kept = labels[labels >= 0]
        value = decoupled(lambda p, q: kl(q, p), *logits, kept, 1.5, 1.5, 0.7, 2.0)
        return (value + 0.4 * torch.nn.functional.cross_entropy(logits[0], kept, reduction="none")).sum()

    value, found = pairs.value_and_gradients(ours, tensors)
    expected, true = pairs.value_and_gradients(plain, tensors)
    assert_like(value, expected)
    for name in true:
        assert_like(found[name], true[name])


@pytest.mark.parametrize("logit", [40.0, -40.0, 300.0], ids=str)
def test_decoupled_where_the_target_has_nearly_all_or_nothing(logit: float) -> None:
    """The rest is still told apart to the last digits; subtracting the target's mass would leave nothing of it."""
    student, teacher = random_logits(17, rows=6)
    student, teacher = (each.scatter(-1, LABELS.unsqueeze(-1), logit) for each in (student, teacher))
    mine, true = leaf(student), leaf(student, torch.float64)
    value = kd.distillation_loss(mine, teacher, kd.Decoupled(), labels=LABELS, ce_weight=0.5, reduction="none")
    expected = decoupled(kl, true, teacher.double(), LABELS, 1.0, 1.0)
    expected = expected + 0.5 * torch.nn.functional.cross_entropy(true, LABELS, reduction="none")
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-7)
    assert_like(*gradients(value, mine), *gradients(expected, true), 1e-6)


def test_decoupled_is_the_forward_kl_with_the_weights_that_make_it_so() -> None:
    student, teacher = random_logits(17, torch.float64)
    p = torch.softmax(teacher, -1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    found, whole = leaf(student), leaf(student)
    value = kd.distillation_loss(found, teacher, kd.Decoupled(rest_weight=1 - p), labels=LABELS)
    expected = kd.distillation_loss(whole, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert_like(*gradients(value, found), *gradients(expected, whole), 1e-12)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_decoupled_of_small_and_masked_vocabularies(backend: str | None) -> None:
    one = torch.randn(3, 1, requires_grad=True)
    value = kd.distillation_loss(
        one, torch.randn(3, 1), kd.Decoupled(), labels=torch.zeros(3, dtype=torch.long), ce_weight=1.0, backend=backend
    )
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert bool((gradients(value, one)[0].abs() < 1e-6).all())
    student = torch.tensor([[0.3, -math.inf], [-math.inf, 0.2], [1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[-math.inf, 1.0], [-math.inf, 1.0], [0.0, 0.5]])
    value = kd.distillation_loss(student, teacher, kd.Decoupled(), labels=torch.tensor([0, 0, 1]), backend=backend)
    assert bool(value.isfinite())
    assert bool(gradients(value, student)[0].isfinite().all())
    empty = torch.empty(0, 5, requires_grad=True)
    assert (
        kd.distillation_loss(empty, empty.detach(), kd.Decoupled(), labels=torch.empty(0, dtype=torch.long)).item() == 0
    )


def test_decoupled_ignores_what_does_not_count_and_leaves_inputs_alone() -> None:
    student, teacher = (each[:, ::2] for each in random_logits(34))
    labels = LABELS.clone()
    labels[2] = -100
    whole = kd.distillation_loss(student, teacher, kd.Decoupled(), labels=labels, reduction="none")
    polluted = teacher.clone()
    polluted[2] = math.nan
    value = kd.distillation_loss(student, polluted, kd.Decoupled(), labels=labels, reduction="none")
    assert whole[2] == 0
    assert torch.equal(value, whole)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "needs labels"),
        ({"labels": LABELS + 12}, ValueError, r"labels must be token ids in \[0, 17\)"),
    ],
    ids=["none", "outside"],
)
def test_decoupled_needs_labels(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kd.distillation_loss(*random_logits(17), kd.Decoupled(), **options)


def test_decoupled_refuses_sparse_teachers_and_itself() -> None:
    student, teacher = random_logits(17)
    with pytest.raises(ValueError, match="must not be Decoupled for a sparse teacher"):
        kd.distillation_loss(student, kd.topk_logits(teacher, 3), kd.Decoupled(), labels=LABELS)
    with pytest.raises(TypeError, match="none of Decoupled"):
        kd.Decoupled(kd.Decoupled())
    with pytest.raises(ValueError, match="finite number"):
        kd.Decoupled(rest_weight=math.inf)


# --- hard-label weights per token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["logits", "head", "truncated", "reference"])
def test_hard_label_weight_per_token(kind: str, reduction: str) -> None:
    student, teacher = random_logits(17, torch.float64)
    labels = LABELS.clone()
    labels[1] = -100
    ce_weight = torch.tensor([0.3, math.nan, 1.0, 0.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    true_weight, mine, true = leaf(ce_weight), leaf(student), leaf(student)
    source: Any = kd.LMHead(torch.eye(6, dtype=torch.float64), mine.T) if kind == "head" else mine
    other: Any = kd.topk_logits(teacher, 17) if kind == "truncated" else teacher
    backend = "reference" if kind == "reference" else None
    options: dict[str, Any] = {"labels": labels, "ce_weight": ce_weight, "reduction": reduction, "backend": backend}
    value = kd.distillation_loss(source, other, **options)
    kept = labels >= 0
    hard = torch.nn.functional.cross_entropy(true[kept], labels[kept], reduction="none")
    expected = kl(log_softmax(teacher[kept]), log_softmax(true[kept])) + true_weight[kept] * hard
    if reduction == "mean":
        expected = expected.mean()
    else:
        value = value[kept]
    assert_like(value, expected, 1e-6 if kind == "truncated" else 1e-9)
    found, right = gradients(value, mine, ce_weight), gradients(expected, true, true_weight)
    for one, other_one in zip(found, right, strict=True):
        assert_like(one, other_one, 1e-6 if kind == "truncated" else 1e-9)


# --- operators ---------------------------------------------------------------------------------------------------------


def everything(tensors: pairs.Tensors, share: Tensor, labels: Tensor) -> Tensor:
    return kd.distillation_loss(
        *pairs.sources(tensors),
        kd.Decoupled(kd.SkewForwardKL(share), target_weight=share + 1, rest_weight=0.5),
        labels=labels,
        ce_weight=share,
        temperature=1.2,
    )


@pytest.mark.slow
def test_opcheck() -> None:
    tensors = pairs.make("logits-logits")
    calls = recorded(lambda: everything(tensors, pairs.per_token(0, 1), pairs.some_labels()).backward())
    assert calls
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("pairing", ["logits-logits", "head-logits"])
def test_compiled_graphs_are_whole_and_not_compiled_anew(pairing: str) -> None:
    torch._dynamo.reset()
    tensors, labels = pairs.make(pairing), pairs.some_labels()
    frames = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    compiled = torch.compile(everything, fullgraph=True, backend=count)
    for seed in (0.0, 0.1):
        share = pairs.per_token(0, 0.9) + seed
        expected, true = pairs.value_and_gradients(lambda each, share=share: everything(each, share, labels), tensors)
        value, found = pairs.value_and_gradients(lambda each, share=share: compiled(each, share, labels), tensors)
        torch.testing.assert_close(value, expected)
        for name in true:
            torch.testing.assert_close(found[name], true[name])
    assert frames == 1


@pytest.mark.parametrize(
    "divergence",
    [
        kd.SoftCrossEntropy(),
        kd.Decoupled(kd.JSD(torch.tensor([0.0, 0.4, 1.0]))),
        kd.SkewReverseKL(torch.tensor([0.0, 0.4, 1])),
    ],
    ids=["soft", "decoupled", "skew"],
)
def test_second_derivatives(divergence: kd.Divergence) -> None:
    student, teacher = (leaf(each) for each in random_logits(4, torch.float64, rows=3))
    labels = torch.tensor([0, 2, 3])

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kd.distillation_loss(student, teacher, divergence, labels=labels, temperature=1.3, reduction="none")

    assert torch.autograd.gradcheck(loss, (student, teacher))
    assert torch.autograd.gradgradcheck(loss, (student, teacher))
