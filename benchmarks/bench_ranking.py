"""Plackett-Luce losses and ranks on the CPU, beside sorts, scans and comparisons in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reporting import SideBySide
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking.workloads import MODELS

ROWS, CLASSES, VOCAB, K = 256, 32_000, MODELS["qwen3"].vocab, 64
EAGER = "sort, gather and logcumsumexp"
EAGER_TRUNCATED = "topk, masked logsumexp, gather and logcumsumexp"
COMPARISON = "gather, comparison and sum"


def logits(vocab: int, seed: int) -> Tensor:
    return 2.5 * torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(seed))


def columns(operation: str, vocab: int, **more: str | int) -> dict[str, str | int]:
    return {"operation": operation, "tokens": ROWS, "vocab": vocab, "dtype": "float32", "device": "cpu"} | more


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    ordered, order = torch.sort(teacher.softmax(-1), dim=-1, descending=True)
    ranked = student.gather(-1, order)
    suffixes = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (ordered * (suffixes - ranked)).sum(-1).mean()


def plain_truncated(student: Tensor, teacher: Tensor) -> Tensor:
    weights, order = teacher.softmax(-1).topk(K)
    ranked = student.gather(-1, order)
    rest = student.scatter(-1, order, -torch.inf).logsumexp(-1, keepdim=True)
    suffixes = torch.cat([ranked, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)
    return (weights * (suffixes[:, :-1] - ranked)).sum(-1).mean()


def measure(
    side_by_side: SideBySide,
    title: str,
    vocab: int,
    ours: Callable[[Tensor, Tensor], Tensor],
    eager: tuple[str, Callable[[Tensor, Tensor], Tensor]],
    bound: float,
) -> None:
    student, teacher = logits(vocab, 0).requires_grad_(), logits(vocab, 1)

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            value = loss(student, teacher)
            return value, torch.autograd.grad(value, student)

        return call

    calls = {
        "kdkernels": with_gradient(ours),
        eager[0]: with_gradient(eager[1]),
        "fused forward KL": with_gradient(kd.distillation_loss),
    }
    name = f"{title}, forward+backward: {ROWS} tokens × {vocab:,}, float32, cpu"
    side_by_side.measure(name, calls, rounds=5, columns=columns(title, vocab))
    side_by_side.ratio(f"{eager[0]} in {title}", eager[0], "kdkernels", bound, at_least=True)


def test_plackett_luce(side_by_side: SideBySide) -> None:
    measure(side_by_side, "plackett_luce", CLASSES, kd.plackett_luce, (EAGER, plain), 3)


def test_truncated(side_by_side: SideBySide) -> None:
    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return kd.plackett_luce(student, teacher, top_k=K)

    measure(side_by_side, f"plackett_luce, top {K}", VOCAB, ours, (EAGER_TRUNCATED, plain_truncated), 4)


@pytest.mark.parametrize("count", [1, 4])
def test_token_ranks(side_by_side: SideBySide, count: int) -> None:
    source = logits(VOCAB, 0)
    ids = torch.randint(VOCAB, (ROWS, count), generator=torch.Generator().manual_seed(1))

    def comparison() -> object:
        own = source.gather(-1, ids)
        return torch.stack([(source > own[:, i : i + 1]).sum(-1) for i in range(count)], -1)

    calls: dict[str, Callable[[], object]] = {
        "kdkernels": lambda: kd.token_ranks(source, ids),
        COMPARISON: comparison,
        "amax": lambda: source.amax(-1),
    }
    title = f"ranks of {count} ids: {ROWS} tokens × {VOCAB:,}, float32, cpu"
    side_by_side.measure(title, calls, rounds=9, columns=columns("token_ranks", VOCAB, ids=count))
    side_by_side.ratio(f"{COMPARISON} in the ranks of {count} ids", COMPARISON, "kdkernels", 2, at_least=True)
