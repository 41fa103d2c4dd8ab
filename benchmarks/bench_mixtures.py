"""Teachers made of several sources, forward and backward on the CPU, beside the fused forward KL and the eager form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from against_forward_kl import measure_against_forward_kl
from reporting import SideBySide
from torch import Tensor

import kdkernels as kd

ROWS, VOCAB = 256, 151_936


class Mixture(NamedTuple):
    sources: int
    make: Callable[[Tensor, list[Tensor]], kd.LogitMixture]
    eager: Callable[[Tensor, list[Tensor]], Tensor]
    """The target's log-probabilities."""
    bound: float
    """In the time of the forward KL."""


def probabilities(student: Tensor, sources: list[Tensor]) -> Tensor:
    return torch.stack([source.softmax(-1) for source in sources]).mean(0).log()


def chosen(student: Tensor, sources: list[Tensor]) -> Tensor:
    first = (torch.arange(ROWS) % 2 == 0).unsqueeze(-1)
    return torch.where(first, sources[0], sources[1]).log_softmax(-1)


def choice(student: Tensor, sources: list[Tensor]) -> kd.LogitMixture:
    first = (torch.arange(ROWS) % 2 == 0).float()
    return kd.LogitMixture(sources, [first, 1 - first])


MIXTURES = {
    "TAID": Mixture(
        1,
        lambda student, sources: kd.LogitMixture([student, *sources], [0.6, 0.4]),
        lambda student, sources: (0.6 * student.detach() + 0.4 * sources[0]).log_softmax(-1),
        1.5,
    ),
    "delta-KD": Mixture(
        3,
        lambda student, sources: kd.LogitMixture(sources, [1.0, 0.7, -0.7]),
        lambda student, sources: (sources[0] + 0.7 * (sources[1] - sources[2])).log_softmax(-1),
        1.5,
    ),
    "mean of 3 teachers' probabilities": Mixture(
        3, lambda student, sources: kd.LogitMixture(sources, space="probabilities"), probabilities, 2.5
    ),
    "choice of a teacher per token": Mixture(2, choice, chosen, 1.5),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture(side_by_side: SideBySide, name: str) -> None:
    mixture = MIXTURES[name]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ROWS, VOCAB, generator=generator, requires_grad=True)
    sources = [torch.randn(ROWS, VOCAB, generator=generator) for _ in range(mixture.sources)]

    def ours() -> Tensor:
        return kd.distillation_loss(student, mixture.make(student, sources))

    def eager() -> Tensor:
        log_q, log_p = student.log_softmax(-1), mixture.eager(student, sources)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    measure_against_forward_kl(side_by_side, name, student, sources[0], ours, eager, mixture.bound)
