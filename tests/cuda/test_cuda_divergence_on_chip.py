"""The divergence of rows that shared memory holds, beside that of rows that it does not, in CUDA C++ run on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated as there
import pytest
import torch
from emulated import Device
from torch import Tensor
from truth import EVERY_DIVERGENCE, Case

import kdkernels as kd
from kdkernels.backends.rows import RowSpec
from kdkernels.divergences import Kind

Emulated = Callable[..., Any]

VOCAB = 601
DEVICES = {
    "one block": (Device(48 << 10), {"divergence_on_chip": 1}),
    "a cluster": (Device(8 << 10), {"divergence_on_chip": 4}),
    "no clusters": (Device(48 << 10, clusters=False), {"divergence_on_chip": 1}),
    "too little": (Device(3 << 10, clusters=False), {"divergence_forward": 1, "divergence_backward": 1}),
}
"""Devices, and the kernels that a fused divergence of such rows takes there, with the blocks of their clusters."""

CASES = [*EVERY_DIVERGENCE, Case("soft_cross_entropy", kd.SoftCrossEntropy(), lambda p, q: -(p.exp() * q).sum(-1))]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_near(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Relative to the whole of what is expected: zeros and wrong signs are errors of 1 and 2."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("place", DEVICES)
def test_every_divergence_is_right_wherever_its_rows_are(place: str, emulated: Emulated) -> None:
    device, kernels = DEVICES[place]
    student, teacher, upstream = normal(2, VOCAB), normal(2, VOCAB, seed=1), torch.tensor([1.0, -0.5])
    calls = [(student, teacher, RowSpec(*case.divergence.form), upstream) for case in CASES]
    found, records = emulated(there.on_device, device, there.each, there.divergence, calls)
    assert {name: cluster for name, (*_, cluster) in records.items()} == kernels
    for case, (values, _, *gradients) in zip(CASES, found, strict=True):
        leaves = [logits.double().requires_grad_() for logits in (student, teacher)]
        wanted = case.formula(*(leaf.log_softmax(-1) for leaf in reversed(leaves)))
        assert_near(values, wanted.detach(), 1e-5, case.name)
        for ours, truth in zip(gradients, torch.autograd.grad(wanted, leaves, upstream.double()), strict=True):
            assert_near(ours, truth, 1e-5, case.name)


def hostile(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With masked entries, a row of equal logits and one that does not count."""
    student, teacher = normal(4, VOCAB, dtype=dtype), normal(4, VOCAB, seed=1)
    student[0, 7:40], teacher[0, 9] = -torch.inf, -torch.inf
    student[1] = 3
    student[2], teacher[2] = torch.nan, torch.inf
    return student, teacher


SPEC = RowSpec(
    int(Kind.JSD),
    0.3,
    0.0,
    student_temperatures=torch.tensor([0.7, 1.0, 2.0, 3.0]),
    teacher_temperature=1.5,
    student_softcap=20.0,
    labels=torch.tensor([3, VOCAB - 1, 0, 50]),
    active=torch.tensor([True, True, False, True]),
    parameters=torch.tensor([0.3, 0.5, 0.2, 0.9]),
)
UPSTREAM = torch.tensor([1.0, -0.5, 2.0, 0.25])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.JSD, torch.float32), (Kind.JSD, torch.bfloat16), (Kind.FORWARD_KL, torch.float16)],
    ids=str,
)
def test_whatever_a_row_may_have(kind: Kind, dtype: torch.dtype, emulated: Emulated) -> None:
    """The same as from memory: a softcap, temperatures, labels, parameters of rows, masked entries, half precision, in place."""
    options = [((True, True), False, 0), ((True, True), False, 1), ((True, False), True, 0)]
    chosen = {}
    for place, (device, _) in DEVICES.items():
        # Tensors go to the other process as shared memory: what is written in place there is written here.
        calls = [(*hostile(dtype), SPEC._replace(kind=int(kind)), UPSTREAM, *option) for option in options]
        chosen[place] = emulated(there.on_device, device, there.each, there.divergence, calls)
    expected, _ = chosen.pop("too little")
    for place, (found, _) in chosen.items():
        for ours, others in zip(found, expected, strict=True):
            for mine, other in zip(ours, others, strict=True):
                if mine is None or other is None:
                    assert mine is other
                    continue
                assert mine.isfinite().all()
                assert_near(mine, other, 1e-6 if mine.dtype == torch.float32 else 1e-4, place)


def test_the_forward_of_two_sweeps_reads_once(emulated: Emulated) -> None:
    student, teacher = normal(2, VOCAB), normal(2, VOCAB, seed=1)
    sizes = {}
    for place, (device, _) in DEVICES.items():
        values, records = emulated(there.on_device, device, there.loss, student, teacher, kd.JSD(0.3))
        assert_near(values, there.loss(student, teacher, kd.JSD(0.3), "reference"), 1e-5)
        ((_, (sizes[place], stored, _)),) = records.items()
        assert stored == 0
    once = 2 * 4 * student.numel()
    assert sizes == {"one block": once, "a cluster": once, "no clusters": once, "too little": 2 * once}


@pytest.mark.slow
def test_a_whole_vocabulary(emulated: Emulated) -> None:
    student, teacher = normal(1, 151_936), normal(1, 151_936, seed=1)
    arguments = (student, teacher, RowSpec(*kd.ForwardKL().form), torch.ones(1))
    (values, _, *gradients), records = emulated(there.on_device, Device(227 << 10), there.divergence, *arguments)
    assert records == {"divergence_on_chip": (8 * student.numel(), 8 * student.numel(), 8)}
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    assert_near(values, terms.sum(-1), 1e-5)
    assert_near(gradients[0], log_q.exp() - log_p.exp(), 1e-5)
    assert_near(gradients[1], log_p.exp() * (log_p - log_q - terms.sum(-1, keepdim=True)), 1e-5)
