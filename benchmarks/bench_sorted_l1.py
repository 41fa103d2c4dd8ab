"""The sorted L1 distance on the CPU, forward and backward, exact and bounded, beside two sorts and a difference in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reporting import SideBySide
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking.workloads import MODELS

ROWS, VOCAB = 256, MODELS["qwen3"].vocab
ERROR_BOUND = 1e-4
SORTS = "two torch.sort and a difference"


def heavy_tailed(seed: int) -> Tensor:
    """Logits as language models make them: they fall with the logarithm of the rank, which is another one in each row."""
    generator = torch.Generator().manual_seed(seed)
    falling = -1.4 * torch.log(torch.arange(VOCAB) + 2.0)
    ranks = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(ROWS)])
    return falling[ranks] + 0.7 * torch.randn(ROWS, VOCAB, generator=generator)


def gaussian(seed: int) -> Tensor:
    return 2.5 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))


def close() -> tuple[Tensor, Tensor]:
    teacher = gaussian(0)
    return teacher + 0.01 * gaussian(1), teacher


LOGITS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "heavy-tailed": lambda: (heavy_tailed(0), heavy_tailed(1)),
    "gaussian": lambda: (gaussian(0), gaussian(1)),
    "student close to the teacher": close,
}


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    q = torch.sort(torch.softmax(student, -1), dim=-1, descending=True).values
    p = torch.sort(torch.softmax(teacher, -1), dim=-1, descending=True).values
    return (q - p).abs().sum(-1)


@pytest.mark.parametrize("logits", LOGITS)
def test_logits(side_by_side: SideBySide, logits: str) -> None:
    student, teacher = LOGITS[logits]()
    student.requires_grad_()

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            value = loss(student, teacher).mean()
            return value, torch.autograd.grad(value, student)

        return call

    calls = {
        "kdkernels, exact": with_gradient(kd.sorted_l1),
        "kdkernels, bounded": with_gradient(lambda s, t: kd.sorted_l1(s, t, error_bound=ERROR_BOUND)),
        SORTS: with_gradient(plain),
    }
    with torch.no_grad():
        _, bounds = kd.sorted_l1(student, teacher, error_bound=ERROR_BOUND, return_bound=True)
    bound = float(bounds.max())
    side_by_side.measure(
        f"sorted L1, forward+backward, {logits} logits (bound {bound:.1e}): {ROWS} tokens × {VOCAB:,}, float32, cpu",
        calls,
        rounds=3,
        columns={
            "operation": "sorted_l1",
            "logits": logits,
            "tokens": ROWS,
            "vocab": VOCAB,
            "error_bound": f"{bound:.2e}",
            "dtype": "float32",
            "device": "cpu",
        },
    )
    side_by_side.ratio(f"{SORTS} in exact, {logits}", SORTS, "kdkernels, exact", 4, at_least=True)
    side_by_side.ratio(f"{SORTS} in bounded, {logits}", SORTS, "kdkernels, bounded", 12, at_least=True)
