"""The losses that others wrote: PyTorch's own, SciPy's where it is installed, and torchdistill's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F
from truth import leaf, random_logits

import kdkernels as kd


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return random_logits(200, torch.float64)


def rows(student: Tensor, teacher: Tensor, divergence: kd.Divergence) -> Tensor:
    return kd.distillation_loss(student, teacher, divergence, reduction="none")


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_torch_kl_div(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    """The usual line of distillation code, value and gradient."""
    ours, theirs = leaf(pair[0]), leaf(pair[0])
    value = kd.distillation_loss(ours, pair[1], kd.ForwardKL(), temperature=temperature, temperature_squared=True)
    expected = temperature**2 * F.kl_div(
        F.log_softmax(theirs / temperature, -1),
        F.log_softmax(pair[1] / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    equal(value, expected)
    value.backward()
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    equal(ours.grad, theirs.grad)


def test_torch_distributions(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (Categorical(logits=logits) for logits in pair)
    equal(rows(*pair, kd.ForwardKL()), kl_divergence(teacher, student))
    equal(rows(*pair, kd.ReverseKL()), kl_divergence(student, teacher))
    middle = Categorical(probs=0.3 * teacher.probs + 0.7 * student.probs)
    equal(rows(*pair, kd.JSD(0.3)), 0.3 * kl_divergence(teacher, middle) + 0.7 * kl_divergence(student, middle))
    equal(rows(*pair, kd.SkewForwardKL(0.3)), kl_divergence(teacher, middle))
    equal(rows(*pair, kd.SkewReverseKL(0.7)), kl_divergence(student, middle))
    statistics = kd.token_statistics(*pair)
    equal(statistics.entropy_student, student.entropy())
    assert statistics.entropy_teacher is not None
    equal(statistics.entropy_teacher, teacher.entropy())


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_torch_cross_entropy(pair: tuple[Tensor, Tensor], ignore_index: int) -> None:
    """With the divergence of equal distributions, only the hard-label term is left."""
    labels = torch.tensor([3, 7, 199, 0, 7, 50]).masked_fill(torch.arange(6) == 2, ignore_index)
    ours, theirs = leaf(pair[0]), leaf(pair[0])
    value = kd.distillation_loss(ours, pair[0], labels=labels, ignore_index=ignore_index, ce_weight=1.0)
    expected = F.cross_entropy(theirs, labels, ignore_index=ignore_index)
    equal(value, expected)
    value.backward()
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    equal(ours.grad, theirs.grad)


def test_torch_total_variation_and_hellinger(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (logits.softmax(-1) for logits in pair)
    equal(rows(*pair, kd.TVD()), 0.5 * torch.linalg.vector_norm(student - teacher, 1, dim=-1))
    distance = torch.linalg.vector_norm(student.sqrt() - teacher.sqrt(), dim=-1) / 2**0.5
    equal(rows(*pair, kd.Hellinger()), distance**2)
    equal(rows(*pair, kd.ABDivergence(1, 1)), 0.5 * torch.linalg.vector_norm(student - teacher, dim=-1) ** 2)


def scipy_module(name: str) -> ModuleType:
    return pytest.importorskip(f"scipy.{name}", reason="SciPy is not installed")


def probabilities(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].softmax(-1), pair[1].softmax(-1)


def test_scipy_relative_entropy(pair: tuple[Tensor, Tensor]) -> None:
    special, (student, teacher) = scipy_module("special"), probabilities(pair)
    equal(rows(*pair, kd.ForwardKL()), torch.from_numpy(special.rel_entr(teacher.numpy(), student.numpy()).sum(-1)))
    equal(rows(*pair, kd.ReverseKL()), torch.from_numpy(special.rel_entr(student.numpy(), teacher.numpy()).sum(-1)))


@pytest.mark.slow
def test_scipy_entropy(pair: tuple[Tensor, Tensor]) -> None:
    stats, (student, teacher) = scipy_module("stats"), probabilities(pair)
    equal(rows(*pair, kd.ForwardKL()), torch.from_numpy(stats.entropy(teacher.numpy(), student.numpy(), axis=-1)))
    equal(kd.token_statistics(*pair).entropy_student, torch.from_numpy(stats.entropy(student.numpy(), axis=-1)))


def test_scipy_jensen_shannon(pair: tuple[Tensor, Tensor]) -> None:
    distance, (student, teacher) = scipy_module("spatial.distance"), probabilities(pair)
    found = distance.jensenshannon(student.numpy(), teacher.numpy(), axis=-1)
    equal(rows(*pair, kd.JSD(0.5)), torch.from_numpy(found**2))


def test_scipy_distances(pair: tuple[Tensor, Tensor]) -> None:
    distance, (student, teacher) = scipy_module("spatial.distance"), probabilities(pair)
    blocks = [distance.cityblock(q, p) for q, p in zip(student.numpy(), teacher.numpy(), strict=True)]
    equal(rows(*pair, kd.TVD()), 0.5 * torch.tensor(blocks, dtype=torch.float64))


def torchdistill_losses() -> list[Any]:
    """(name in torchdistill, its arguments, ours)."""
    paths = ("x", "output", "x", "output")
    tempered = {"temperature": 4.0, "alpha": 0.1, "beta": 0.9}

    def hinton(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True)
        return 0.9 * soft - 0.1 * kd.token_log_probs(student, labels).mean()

    def standardised(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = kd.losses.LogitStd(4.0, weight=0.9)(student, teacher)
        return soft - 0.1 * kd.token_log_probs(student, labels).mean()

    def correlations(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kd.losses.DIST(1.5, 0.5, eps=1e-15)(student, teacher)

    return [
        pytest.param("KDLoss", paths, tempered, hinton, id="KD"),
        pytest.param("LogitStdKDLoss", paths, tempered, standardised, id="LogitStd"),
        pytest.param("DISTLoss", paths, {"beta": 1.5, "gamma": 0.5, "eps": 1e-15}, correlations, id="DIST"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "paths", "options", "ours"), torchdistill_losses())
def test_torchdistill(
    name: str, paths: tuple[str, ...], options: dict[str, float], ours: Callable[..., Tensor]
) -> None:
    peer = getattr(pytest.importorskip("torchdistill.losses.mid_level"), name)(*paths, **options)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 9, 31, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(31, (9,), generator=generator)
    found, expected = [], []
    for loss, kept in ((ours, found), (lambda s, t, y: peer({"x": {"output": s}}, {"x": {"output": t}}, y), expected)):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, labels)
        kept += [value.detach(), *torch.autograd.grad(value, leaf)]
    # Its standard deviation has 1e-7 added.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
