"""Divergences by hand, their limits, symmetries and bounds: what a formula with a wrong coefficient could not satisfy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from truth import EVERY_DIVERGENCE, OTHER_PARAMETERS, Case, each, each_divergence, leaf, random_logits

import kdkernels as kd

P = [0.5, 0.25, 0.125, 0.125]
Q = [0.125, 0.25, 0.5, 0.125]
LN2 = math.log(2)


def log(probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def of(student: Tensor, teacher: Tensor, divergence: kd.Divergence) -> Tensor:
    return kd.distillation_loss(student, teacher, divergence, reduction="none")


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # p / q is 4, 1, 1/4, 1, so that every logarithm is one of 2 or 5.
        (kd.ForwardKL(), 0.5 * 2 * LN2 - 0.125 * 2 * LN2),
        (kd.ReverseKL(), 0.5 * 2 * LN2 - 0.125 * 2 * LN2),
        (kd.Jeffreys(0.2), 0.75 * LN2),
        # m = (5/16, 1/4, 5/16, 1/8)
        (kd.JSD(0.5), 0.5 * math.log(8 / 5) + 0.125 * math.log(2 / 5)),
        # m = 3/4 p + 1/4 q = (13/32, 1/4, 7/32, 1/8)
        (
            kd.JSD(0.75),
            0.75 * (0.5 * math.log(16 / 13) + 0.125 * math.log(4 / 7))
            + 0.25 * (0.125 * math.log(4 / 13) + 0.5 * math.log(16 / 7)),
        ),
        (kd.SkewForwardKL(0.75), 0.5 * math.log(16 / 13) + 0.125 * math.log(4 / 7)),
        # m = 3/4 q + 1/4 p
        (kd.SkewReverseKL(0.75), 0.5 * math.log(16 / 13) + 0.125 * math.log(4 / 7)),
        (kd.TVD(), 0.375),
        (kd.Hellinger(), 1 - (2 * 0.25 + 0.25 + 0.125)),
        (kd.AlphaDivergence(0.5), 4 * 0.125),
        # sum p^2 / q = 2 + 1/4 + 1/32 + 1/8
        (kd.AlphaDivergence(2), (1 - 77 / 32) / -2),
        (kd.AlphaDivergence(-1), (1 - 77 / 32) / -2),
        (kd.Renyi(2), math.log(77 / 32)),
        (kd.Renyi(0.5), -2 * math.log(0.875)),
        # -(sum p q - sum p^2 / 2 - sum q^2 / 2) = sum (p - q)^2 / 2
        (kd.ABDivergence(1, 1), 0.375**2),
        # -(1/2) (sum p^2 q - 2/3 sum p^3 - 1/3 sum q^3); sum p^2 q = (16 + 8 + 4 + 1) / 512
        (kd.ABDivergence(2, 1), -0.5 * (29 / 512 - (64 + 8 + 1 + 1) / 512)),
    ],
    ids=lambda value: str(value) if isinstance(value, kd.Divergence) else "",
)
def test_by_hand(divergence: kd.Divergence, expected: float) -> None:
    value = of(log(Q), log(P), divergence)
    assert value.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("divergence", "student", "teacher"),
    [
        # The table of gradients, per tempered logit.
        (kd.ForwardKL(), lambda p, q, m, kl: q - p, lambda p, q, m, kl: p * ((p / q).log() - kl(p, q))),
        (kd.ReverseKL(), lambda p, q, m, kl: q * ((q / p).log() - kl(q, p)), lambda p, q, m, kl: p - q),
        (
            kd.JSD(0.3),
            lambda p, q, m, kl: 0.7 * q * ((q / m).log() - kl(q, m)),
            lambda p, q, m, kl: 0.3 * p * ((p / m).log() - kl(p, m)),
        ),
        (
            kd.SkewForwardKL(0.3),
            lambda p, q, m, kl: -0.7 * q * (p / m - (q * p / m).sum(-1, keepdim=True)),
            lambda p, q, m, kl: p * ((p / m).log() - 0.3 * p / m - kl(p, m) + 0.3 * (p * p / m).sum(-1, keepdim=True)),
        ),
        (
            kd.TVD(),
            lambda p, q, m, kl: 0.5 * q * ((q - p).sign() - (q * (q - p).sign()).sum(-1, keepdim=True)),
            lambda p, q, m, kl: 0.5 * p * ((p - q).sign() - (p * (p - q).sign()).sum(-1, keepdim=True)),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, kd.Divergence) else "",
)
def test_gradients_by_hand(divergence: kd.Divergence, student: object, teacher: object) -> None:
    s, t = (leaf(logits) for logits in random_logits(50, torch.float64))
    temperature, teacher_temperature = 2.0, 0.5
    kd.distillation_loss(
        s, t, divergence, temperature=temperature, teacher_temperature=teacher_temperature, reduction="sum"
    ).backward()
    q, p = torch.softmax(s.detach() / temperature, -1), torch.softmax(t.detach() / teacher_temperature, -1)
    m = 0.3 * p + 0.7 * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1, keepdim=True)

    torch.testing.assert_close(s.grad, student(p, q, m, kl) / temperature, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(t.grad, teacher(p, q, m, kl) / teacher_temperature, rtol=1e-9, atol=1e-14)


SMALL = 1e-7
AT_LIMITS = [
    # divergence close to its limit, the factor its definition vanishes with, the limit
    ("jsd/beta->0", kd.JSD(SMALL), 1 / SMALL, kd.ForwardKL()),
    ("jsd/(1-beta)->0", kd.JSD(1 - SMALL), 1 / SMALL, kd.ReverseKL()),
    ("skew_forward_kl->0", kd.SkewForwardKL(SMALL), 1, kd.ForwardKL()),
    ("skew_reverse_kl->0", kd.SkewReverseKL(SMALL), 1, kd.ReverseKL()),
    ("renyi->1-", kd.Renyi(1 - SMALL), 1, kd.ForwardKL()),
    ("renyi->1+", kd.Renyi(1 + SMALL), 1, kd.ForwardKL()),
    ("alpha->1-", kd.AlphaDivergence(1 - SMALL), 1, kd.ForwardKL()),
    ("alpha->1+", kd.AlphaDivergence(1 + SMALL), 1, kd.ForwardKL()),
    ("alpha->0-", kd.AlphaDivergence(-SMALL), 1, kd.ReverseKL()),
    ("alpha->0+", kd.AlphaDivergence(SMALL), 1, kd.ReverseKL()),
    ("ab->(1,0)", kd.ABDivergence(1, SMALL), 1, kd.ForwardKL()),
    ("ab->(0,1)", kd.ABDivergence(SMALL, 1), 1, kd.ReverseKL()),
]
THE_SAME = [
    ("skew_forward_kl(0)", kd.SkewForwardKL(0), 1, kd.ForwardKL()),
    ("skew_reverse_kl(0)", kd.SkewReverseKL(0), 1, kd.ReverseKL()),
    ("renyi(1)", kd.Renyi(1), 1, kd.ForwardKL()),
    ("alpha(1)", kd.AlphaDivergence(1), 1, kd.ForwardKL()),
    ("alpha(0)", kd.AlphaDivergence(0), 1, kd.ReverseKL()),
    ("jeffreys(1)", kd.Jeffreys(1), 1, kd.ForwardKL()),
    ("jeffreys(0)", kd.Jeffreys(0), 1, kd.ReverseKL()),
    ("alpha(0.5) is 4 hellinger", kd.AlphaDivergence(0.5), 0.25, kd.Hellinger()),
    ("ab(a,1-a) is alpha", kd.ABDivergence(0.3, 0.7), 1, kd.AlphaDivergence(0.3)),
]


def value_and_gradients(student: Tensor, teacher: Tensor, divergence: kd.Divergence, factor: float = 1) -> list[Tensor]:
    s, t = leaf(student), leaf(teacher)
    value = factor * of(s, t, divergence)
    value.sum().backward()
    assert s.grad is not None
    assert t.grad is not None
    return [value.detach(), s.grad, t.grad]


@pytest.mark.parametrize(
    ("close", "factor", "limit", "tolerance"),
    [(*each[1:], 3e-6) for each in AT_LIMITS] + [(*each[1:], 1e-12) for each in THE_SAME],
    ids=[each[0] for each in AT_LIMITS + THE_SAME],
)
def test_limits(close: kd.Divergence, factor: float, limit: kd.Divergence, tolerance: float) -> None:
    student, teacher = random_logits(40, torch.float64, rows=2)
    found = value_and_gradients(student, teacher, close, factor)
    expected = value_and_gradients(student, teacher, limit)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("divergence", [kd.SkewForwardKL, kd.SkewReverseKL], ids=["skew_forward_kl", "skew_reverse_kl"])
def test_skew_vanishes_towards_one(divergence: type[kd.SkewForwardKL | kd.SkewReverseKL]) -> None:
    """The mixture becomes the first argument: the divergence falls as ``(1 - alpha)^2 / 2 chi^2``."""
    student, teacher = log(Q), log(P)
    chi_squared = (
        (student.exp() - teacher.exp()) ** 2 / (teacher if divergence is kd.SkewForwardKL else student).exp()
    ).sum()
    rest = 1e-4
    value = of(student, teacher, divergence(1 - rest))
    assert value.item() == pytest.approx(0.5 * rest**2 * chi_squared.item(), rel=1e-3)


SYMMETRIC = [
    kd.JSD(0.5),
    kd.TVD(),
    kd.Hellinger(),
    kd.Jeffreys(0.5),
    kd.ABDivergence(0.6, 0.6),
    kd.AlphaDivergence(0.5),
]
MIRRORED = [
    (kd.ForwardKL(), kd.ReverseKL(), 1.0),
    (kd.JSD(0.2), kd.JSD(0.8), 1.0),
    (kd.SkewForwardKL(0.3), kd.SkewReverseKL(0.3), 1.0),
    (kd.Jeffreys(0.2), kd.Jeffreys(0.8), 1.0),
    (kd.AlphaDivergence(0.2), kd.AlphaDivergence(0.8), 1.0),
    (kd.AlphaDivergence(1.5), kd.AlphaDivergence(-0.5), 1.0),
    (kd.ABDivergence(0.3, 1.1), kd.ABDivergence(1.1, 0.3), 1.0),
    (kd.Renyi(0.2), kd.Renyi(0.8), 0.25),  # (1 - a) R_a(p, q) = a R_(1-a)(q, p)
]


@pytest.mark.parametrize(
    ("divergence", "mirror", "factor"), [(each, each, 1.0) for each in SYMMETRIC] + MIRRORED, ids=str
)
def test_exchanging_teacher_and_student(divergence: kd.Divergence, mirror: kd.Divergence, factor: float) -> None:
    student, teacher = random_logits(70, torch.float64)
    value, to_student, to_teacher = value_and_gradients(student, teacher, divergence)
    exchanged = value_and_gradients(teacher, student, mirror, factor)
    for mine, other in zip((value, to_teacher, to_student), exchanged, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@each(EVERY_DIVERGENCE + OTHER_PARAMETERS)
def test_of_a_distribution_from_itself(case: Case, dtype: torch.dtype) -> None:
    """Zero, and so is the gradient, to the rounding of the terms they are sums of."""
    logits, _ = random_logits(1500, dtype)
    value, to_student, to_teacher = value_and_gradients(logits, logits, case.divergence)
    rounding = 16 * torch.finfo(dtype).eps * case.factor
    assert bool((value.abs() <= rounding).all()), value
    # The power forms round log-probabilities, whose exponentials then err by more the smaller they are.
    log_mass = torch.log_softmax(logits, -1)
    allowed = rounding * (1 - log_mass) * log_mass.exp()
    for gradient in (to_student, to_teacher):
        assert bool((gradient.abs() <= allowed).all()), (gradient / log_mass.exp()).abs().max()


def logits(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-60, 60, width=32), min_size=size, max_size=size)


pairs = st.integers(1, 20).flatmap(lambda size: st.tuples(logits(size), logits(size)))
BOUNDS: dict[str, float] = {"tvd": 1.0, "hellinger": 1.0, "jsd(0.5)": LN2, "jsd(0.1)": LN2, "alpha(0.3)": 1 / 0.21}


@each(EVERY_DIVERGENCE, slow=OTHER_PARAMETERS)
@given(pair=pairs)
def test_never_negative_and_never_above_its_bound(case: Case, pair: tuple[list[float], list[float]]) -> None:
    student, teacher = (torch.tensor(side) for side in pair)
    value = of(student, teacher, case.divergence).item()
    rounding = 16 * torch.finfo(torch.float32).eps * case.factor * max(1.0, abs(value))
    assert -rounding <= value
    assert value <= BOUNDS.get(case.name, math.inf) + rounding


@pytest.mark.slow
@each_divergence
@given(pair=pairs, shift=st.floats(-100, 100, width=32), temperature=st.floats(0.2, 5))
def test_only_differences_of_logits_matter(
    case: Case, pair: tuple[list[float], list[float]], shift: float, temperature: float
) -> None:
    """Also: a temperature is the same as a division beforehand."""
    student, teacher = (torch.tensor(side, dtype=torch.float64) for side in pair)
    value = of((student + shift) / temperature, teacher / temperature, case.divergence)
    other = kd.distillation_loss(student, teacher - shift, case.divergence, temperature=temperature, reduction="none")
    assert value.item() == pytest.approx(other.item(), rel=1e-9, abs=1e-11 * case.factor)
