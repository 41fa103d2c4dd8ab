"""How close a student is to its teacher on held-out text: plain PyTorch, whatever loss trains the student."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import plain_pytorch
import torch
from torch import Tensor
from torch.nn import functional

TOKENS_AT_ONCE = 512  # the log-probabilities of so many tokens are held at a time


@dataclass(frozen=True)
class Quality:
    """``kl``: mean KL(teacher || student), nats per token. ``perplexity``: exp of the mean next-token loss."""

    kl: float
    perplexity: float


class HeldOut:
    """Held-out token ids ``[sequences, length]`` with the teacher's hidden states for them, computed once."""

    def __init__(self, teacher: torch.nn.Module, token_ids: Tensor) -> None:
        self.token_ids = token_ids
        self.sequences_at_once = max(1, TOKENS_AT_ONCE // token_ids.shape[1])
        self.teacher_weight = teacher.lm_head.weight
        with torch.no_grad():
            self.teacher_hidden = [teacher.model(ids).last_hidden_state for ids in self.batches()]
            losses = [
                next_token_loss(plain_pytorch.log_probabilities(hidden, self.teacher_weight), ids)
                for hidden, ids in zip(self.teacher_hidden, self.batches(), strict=True)
            ]
        self.teacher_perplexity = math.exp(sum(losses) / self.predictions)

    @property
    def predictions(self) -> int:
        return self.token_ids[:, 1:].numel()

    def batches(self) -> Iterator[Tensor]:
        return iter(self.token_ids.split(self.sequences_at_once))

    @torch.no_grad()
    def measure(self, student: torch.nn.Module) -> Quality:
        kl = loss = 0.0
        for ids, teacher_hidden in zip(self.batches(), self.teacher_hidden, strict=True):
            log_q = plain_pytorch.log_probabilities(student.model(ids).last_hidden_state, student.lm_head.weight)
            log_p = plain_pytorch.log_probabilities(teacher_hidden, self.teacher_weight)
            kl += plain_pytorch.kl(log_p, log_q).item()
            loss += next_token_loss(log_q, ids)
        return Quality(kl / self.token_ids.numel(), math.exp(loss / self.predictions))


def next_token_loss(log_probabilities: Tensor, token_ids: Tensor) -> float:
    """Summed over the sequences; the last position of each has no next token."""
    return functional.nll_loss(
        log_probabilities[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum"
    ).item()
