"""Losses of decoupled and transformed logits on the CPU, forward and backward, beside the forward KL and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from against_forward_kl import measure_against_forward_kl
from reporting import SideBySide
from torch import Tensor
from torch.nn import functional

import kdkernels as kd

TOKENS, VOCAB = 256, 151_936
SHARES = torch.linspace(0, 0.9, TOKENS)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def apart(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the label and of all else, those of the rest among themselves), as plain code finds them."""
    is_label = functional.one_hot(labels, VOCAB).bool()
    rest = logits.masked_fill(is_label, -1e4)
    odds = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - rest.logsumexp(-1)
    two = torch.stack([functional.logsigmoid(odds), functional.logsigmoid(-odds)], -1)
    return two, rest.log_softmax(-1)


def skew(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    share = SHARES.unsqueeze(-1)
    return kl(log_p, (share * log_p.exp() + (1 - share) * log_q.exp()).log()).mean()


def dkd(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    (of_t, rest_t), (of_s, rest_s) = apart(t, labels), apart(s, labels)
    return (kl(of_t, of_s) + 0.5 * kl(rest_t, rest_s)).mean()


def atkd(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    (of_t, rest_t), (of_s, rest_s) = apart(t, labels), apart(s, labels)
    uncertainty = -torch.expm1(of_t[:, 0])
    easy = uncertainty < uncertainty.median()
    others = kl(rest_t, rest_s)
    return 0.2 * others[easy].mean() + 0.8 * (others + kl(of_t, of_s))[~easy].mean()


def nkd(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    rest_t, rest_s = apart(t, labels)[1], apart(s, labels)[1]
    hard = functional.cross_entropy(s, labels, reduction="none")
    p = t.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return ((1 + p) * hard - 1.5 * (rest_t.exp() * rest_s).sum(-1)).mean()


def ofa(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    label = functional.one_hot(labels, VOCAB)
    target = (t.softmax(-1) + label) ** 1.5 - label
    return functional.cross_entropy(s, labels) - (target * s.log_softmax(-1)).sum(-1).mean()


def ttm(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(s, labels) + 45 * kl((0.1 * t).log_softmax(-1), s.log_softmax(-1)).mean()


def wttm(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    total = (t.softmax(-1) ** 0.2).sum(-1)
    divergence = kl((0.2 * t).log_softmax(-1), s.log_softmax(-1))
    return functional.cross_entropy(s, labels) + 4 * (total * divergence).mean()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contender(NamedTuple):
    """A loss, what plain PyTorch writes for it, and in how many times the forward KL's time it should be done."""

    ours: Loss
    eager: Loss
    bound: float = 1.5


LOSSES = {
    "soft_cross_entropy": Contender(
        lambda s, t, _: kd.distillation_loss(s, t, kd.SoftCrossEntropy()),
        lambda s, t, _: functional.cross_entropy(s, t.softmax(-1)),
    ),
    "skew_per_token": Contender(
        lambda s, t, _: kd.distillation_loss(s, t, kd.SkewForwardKL(SHARES)),
        skew,
        2.5,
    ),
    "dkd": Contender(kd.losses.DKD(), dkd),
    "atkd": Contender(kd.losses.ATKD(), atkd, 2.5),
    "nkd": Contender(kd.losses.NKD(), nkd, 2.5),
    "ofa_kd": Contender(kd.losses.OFAKD(1.5), ofa, 2.5),
    "ttm": Contender(kd.losses.TTM(), ttm),
    "wttm": Contender(kd.losses.WTTM(), wttm, 2.5),
}
"""Those with the larger bound read the teacher once more beforehand, or the forms of a mixture twice."""


@pytest.mark.parametrize("name", LOSSES)
def test_against_forward_kl_and_plain_pytorch(side_by_side: SideBySide, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(TOKENS, VOCAB, generator=generator).requires_grad_()
    teacher = student.detach() + torch.randn(TOKENS, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    loss = LOSSES[name]

    values = [function(student, teacher, labels).item() for function in (loss.ours, loss.eager)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    measure_against_forward_kl(
        side_by_side,
        name,
        student,
        teacher,
        lambda: loss.ours(student, teacher, labels),
        lambda: loss.eager(student, teacher, labels),
        loss.bound,
    )
