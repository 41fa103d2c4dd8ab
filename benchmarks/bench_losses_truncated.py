"""The losses of truncated teachers beside the fused forward KL of the same shape and their formulas in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from against_forward_kl import measure_against_forward_kl
from reporting import SideBySide
from torch import Tensor
from torch.nn.functional import cross_entropy

import kdkernels as kd
from kdkernels import losses

TOKENS, VOCAB = 256, 151_936


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(TOKENS, VOCAB, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(VOCAB, (TOKENS,), generator=generator)


def cases(
    student: Tensor, teacher: Tensor, labels: Tensor
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    few = kd.topk_logits(teacher, 5)
    stored = kd.topk_logits(teacher, 100, top_p=0.95)
    first, pretraining = losses.FIRST(0.2), losses.PretrainingDistillation()
    uniform, prior = losses.TopKUniform(), losses.LexicalPrior(100, temperature=1.0)

    def nll_of(target: Tensor, ids: Tensor) -> Tensor:
        return -(target * student.log_softmax(-1).gather(-1, ids.clamp(min=0))).sum(-1).mean()

    def eager_first() -> Tensor:
        q = student.softmax(-1).gather(-1, few.ids) + 1e-6
        target = (few.log_probs.exp() / 0.2).softmax(-1)
        return (target * (target.log() - (q / q.sum(-1, keepdim=True)).log())).sum() / TOKENS

    def eager_pretraining() -> Tensor:
        return 0.9 * nll_of(stored.log_probs.softmax(-1), stored.ids) + 0.1 * cross_entropy(student, labels)

    def eager_uniform() -> Tensor:
        p = (teacher / 4).softmax(-1)
        kept, ids = p.topk(10, -1)
        rho = ((1 - kept.sum(-1, keepdim=True)) / (VOCAB - 10)).expand_as(p).scatter(-1, ids, kept)
        soft = -(rho * (student / 4).log_softmax(-1)).sum(-1).mean()
        return 0.9 * 16 * soft + 0.1 * cross_entropy(student, labels)

    def eager_prior() -> Tensor:
        weight = prior.schedule.at(5)
        return weight * nll_of(few.log_probs.softmax(-1), few.ids) + (1 - weight) * cross_entropy(student, labels)

    return {
        "FIRST": (lambda: first(student, few), eager_first),
        "PretrainingDistillation": (lambda: pretraining(student, stored, labels), eager_pretraining),
        "TopKUniform": (lambda: uniform(student, teacher, labels), eager_uniform),
        "LexicalPrior": (lambda: prior(student, few, labels, 5), eager_prior),
    }


@pytest.mark.parametrize("name", ["FIRST", "PretrainingDistillation", "TopKUniform", "LexicalPrior"])
def test_loss(side_by_side: SideBySide, name: str) -> None:
    student, teacher, labels = problem()
    ours, eager = cases(student, teacher, labels)[name]

    bound = 2.5 if name == "TopKUniform" else 1.5  # which sweeps over the teacher first
    measure_against_forward_kl(side_by_side, name, student, teacher, ours, eager, bound)
