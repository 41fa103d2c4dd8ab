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
    """Held-out token ids ``[sequences, length]`` with the teacher's hidden states for them ``[sequences, length, H]``."""

    def __init__(self, token_ids: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
        self.token_ids, self.teacher_hidden, self.teacher_weight = token_ids, teacher_hidden, teacher_weight

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: torch.nn.Module, token_ids: Tensor) -> HeldOut:
        """Runs the teacher, which is not needed afterwards but for its head."""
        hidden = [teacher.model(ids).last_hidden_state for ids in in_parts(token_ids)]
        return cls(token_ids, torch.cat(hidden), teacher.lm_head.weight)

    @property
    def predictions(self) -> int:
        return self.token_ids[:, 1:].numel()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(in_parts(self.token_ids), in_parts(self.teacher_hidden), strict=True)

    @torch.no_grad()
    def teacher_perplexity(self) -> float:
        losses = [
            next_token_loss(plain_pytorch.log_probabilities(hidden, self.teacher_weight), ids)
            for ids, hidden in self.batches()
        ]
        return math.exp(sum(losses) / self.predictions)

    @torch.no_grad()
    def measure(self, student: torch.nn.Module) -> Quality:
        kl = loss = 0.0
        for ids, teacher_hidden in self.batches():
            log_q = plain_pytorch.log_probabilities(student.model(ids).last_hidden_state, student.lm_head.weight)
            log_p = plain_pytorch.log_probabilities(teacher_hidden, self.teacher_weight)
            kl += plain_pytorch.kl(log_p, log_q).item()
            loss += next_token_loss(log_q, ids)
        return Quality(kl / self.token_ids.numel(), math.exp(loss / self.predictions))


def in_parts(sequences: Tensor) -> tuple[Tensor, ...]:
    return sequences.split(max(1, TOKENS_AT_ONCE // sequences.shape[1]))


def next_token_loss(log_probabilities: Tensor, token_ids: Tensor) -> float:
    """Summed over the sequences; the last position of each has no next token."""
    return functional.nll_loss(
        log_probabilities[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum"
    ).item()
