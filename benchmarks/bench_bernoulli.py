"""Losses of sigmoids, forward and backward, beside the fused forward KL and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from against_forward_kl import measure_against_forward_kl
from reporting import SideBySide
from torch import Tensor
from torch.nn import functional as F

import kdkernels as kd
from kdkernels.benchmarking.workloads import MODELS

ROWS, VOCAB = 256, MODELS["qwen3"].vocab


def eager_half(student: Tensor, teacher: Tensor) -> Tensor:
    """As the authors of DHKD have it."""
    a = torch.sigmoid((student - teacher) / 2).clamp(1e-8, 1 - 1e-7)
    half = torch.full_like(a, 0.5)
    value = half * (half / a).log() + (1 - half) * ((1 - half) / (1 - a)).log()
    return 4 * value.sum(-1).mean()


def eager_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher), reduction="sum") / len(student)


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "DHKD": (kd.losses.DHKD(), eager_half),
    "binary cross-entropy": (kd.bernoulli_loss, eager_cross_entropy),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(side_by_side: SideBySide, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2.5 * torch.randn(2, ROWS, VOCAB, generator=generator)
    student.requires_grad_()

    ours, eager = LOSSES[name]
    measure_against_forward_kl(
        side_by_side, name, student, teacher, lambda: ours(student, teacher), lambda: eager(student, teacher), 1.5
    )
