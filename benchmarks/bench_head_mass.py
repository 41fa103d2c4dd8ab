"""Losses that need a row's head or its standard deviation, forward and backward, beside the fused forward KL and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from against_forward_kl import measure_against_forward_kl
from reporting import SideBySide
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking.workloads import MODELS

ROWS, VOCAB = 256, MODELS["qwen3"].vocab


def eager_akl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        falling, order = p.sort(-1, descending=True)
        inside = falling.cumsum(-1) <= 0.5
        inside[:, 0] = True
        head = torch.zeros_like(inside).scatter_(-1, order, inside)
        gap = (p - q).abs()
        w = (gap * head).sum(-1) / gap.sum(-1)
    return (w * (p * (log_p - log_q)).sum(-1) + (1 - w) * (q * (log_q - log_p)).sum(-1)).mean()


def eager_logit_std(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = (student / (2 * student.std(-1, keepdim=True))).log_softmax(-1)
    p = (teacher / (2 * teacher.std(-1, keepdim=True))).softmax(-1)
    return 4 * torch.nn.functional.kl_div(log_q, p, reduction="batchmean")


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "AKL": (kd.losses.AKL(), eager_akl),
    "LogitStd": (kd.losses.LogitStd(), eager_logit_std),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(side_by_side: SideBySide, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2.5 * torch.randn(2, ROWS, VOCAB, generator=generator)
    student.requires_grad_()

    ours, eager = LOSSES[name]
    measure_against_forward_kl(
        side_by_side, name, student, teacher, lambda: ours(student, teacher), lambda: eager(student, teacher), 2.5
    )
