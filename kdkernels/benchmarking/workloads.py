"""What is computed in a benchmark, and on which tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.divergences import Divergence

__all__ = ["MODELS", "Inputs", "Model", "Operation", "Workload"]


class Operation(str, enum.Enum):
    DENSE = "dense"
    FORWARD = "forward"
    HEAD = "head"
    STORED = "stored"
    TOPK = "topk"
    SINKHORN = "sinkhorn"
    PAIRS = "pairs"

    @property
    def label(self) -> str:
        return {
            Operation.DENSE: "divergence of logits, forward+backward",
            Operation.FORWARD: "divergence of logits, forward only",
            Operation.HEAD: "divergence of LM heads, forward+backward",
            Operation.STORED: f"divergence of logits from a stored top {TOP}, forward+backward",
            Operation.TOPK: f"top {TOP} of logits and their log-probabilities",
            Operation.SINKHORN: f"Sinkhorn, {ITERATIONS} iterations, forward+backward",
            Operation.PAIRS: "L1 distances of all pairs of tokens, forward+backward",
        }[self]

    @property
    def family(self) -> str:
        """The kernel family that computes it."""
        return {
            Operation.DENSE: "divergence",
            Operation.FORWARD: "divergence",
            Operation.HEAD: "linear_divergence",
            Operation.STORED: "sparse_divergence",
            Operation.TOPK: "topk",
            Operation.SINKHORN: "sinkhorn",
            Operation.PAIRS: "pairwise_l1",
        }[self]

    @property
    def differentiates(self) -> bool:
        return self not in {Operation.FORWARD, Operation.TOPK}

    @property
    def is_divergence(self) -> bool:
        return self not in {Operation.TOPK, Operation.SINKHORN, Operation.PAIRS}


TOP = 64
"""Ids that are picked, or that a stored teacher names; fewer if the vocabulary is smaller."""

ITERATIONS, EPSILON = 50, 0.05
"""Of Sinkhorn, on costs between 0 and 1."""

SIDES = {Operation.SINKHORN: 128, Operation.PAIRS: 64}
"""Tokens of a sequence: all pairs of them meet. There are as many sequences as make up the tokens."""


class Model(NamedTuple):
    """The sizes of a published checkpoint's language-model head."""

    checkpoint: str
    vocab: int
    hidden: int


MODELS = {
    "smollm2": Model("SmolLM2-135M", 49_152, 576),
    "llama3": Model("Llama-3.1-8B", 128_256, 4096),
    "qwen3": Model("Qwen3-0.6B", 151_936, 1024),
    "gemma3": Model("Gemma-3-1B", 262_144, 1152),
}


class Inputs(NamedTuple):
    """Logits ``[N, V]`` (of pairs: ``[B, n, V]``), or with weights ``[V, H]`` hidden states ``[N, H]``.

    A stored teacher is log-probabilities ``[N, K]`` with their ids. Of Sinkhorn, the student is the costs ``[B, n, n]``. Where
    there is no teacher, it is the student. The student's tensors want gradients.
    """

    student: Tensor
    teacher: Tensor
    student_weight: Tensor | None = None
    teacher_weight: Tensor | None = None
    ids: Tensor | None = None

    @property
    def wanted(self) -> list[Tensor]:
        return [self.student] if self.student_weight is None else [self.student, self.student_weight]


@dataclass(frozen=True)
class Workload:
    """One divergence of a student from a frozen teacher, averaged over the tokens, or what else an operation says."""

    operation: Operation
    divergence: Divergence
    tokens: int
    vocab: int
    hidden: int
    """Of the student; the hidden sizes play no part where the inputs are logits."""
    teacher_hidden: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def inputs(self, seed: int = 0) -> Inputs:
        """Random tensors whose logits have the standard deviation 1."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            tensor = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
            return tensor.normal_(std=scale, generator=generator)

        if self.operation in {Operation.DENSE, Operation.FORWARD}:
            student, teacher = normal(self.tokens, self.vocab), normal(self.tokens, self.vocab)
            return Inputs(student.requires_grad_(self.operation is Operation.DENSE), teacher)
        if self.operation is Operation.STORED:
            k = max(1, min(TOP, self.vocab - 1))
            log_probs = normal(self.tokens, k + 1, 3.0).float().log_softmax(-1)[:, :k].contiguous()
            # All over the vocabulary and in no order, which is the most work.
            places = torch.rand(self.tokens, k, generator=generator, device=self.device).argsort(-1)
            spread = torch.rand(self.tokens, k, generator=generator, device=self.device) * (self.vocab // k)
            ids = places * (self.vocab // k) + spread.long().clamp(max=self.vocab // k - 1)
            return Inputs(normal(self.tokens, self.vocab).requires_grad_(), log_probs, ids=ids)
        if self.operation is Operation.TOPK:
            student = normal(self.tokens, self.vocab)
            return Inputs(student, student)
        if self.operation is Operation.SINKHORN:
            costs = torch.rand(self.sequences, self.side, self.side, generator=generator, device=self.device)
            costs = costs.to(self.dtype).requires_grad_()
            return Inputs(costs, costs)
        if self.operation is Operation.PAIRS:
            shape = self.sequences, self.side, self.vocab
            student, teacher = (normal(self.sequences * self.side, self.vocab).view(shape) for _ in range(2))
            return Inputs(student.requires_grad_(), teacher)
        return Inputs(
            normal(self.tokens, self.hidden).requires_grad_(),
            normal(self.tokens, self.teacher_hidden),
            normal(self.vocab, self.hidden, self.hidden**-0.5).requires_grad_(),
            normal(self.vocab, self.teacher_hidden, self.teacher_hidden**-0.5),
        )

    @property
    def side(self) -> int:
        """Tokens of a sequence, where sequences count."""
        return min(SIDES[self.operation], self.tokens)

    @property
    def sequences(self) -> int:
        return self.tokens // self.side

    @property
    def gradient_bytes(self) -> int:
        """The size of the gradients that anyone must return."""
        entries = self.tokens * self.vocab if self.operation.differentiates else 0
        if self.operation is Operation.HEAD:
            entries = (self.tokens + self.vocab) * self.hidden
        elif self.operation is Operation.SINKHORN:
            entries = self.sequences * self.side**2
        elif self.operation is Operation.PAIRS:
            entries = self.sequences * self.side * self.vocab
        return entries * self.dtype.itemsize

    @property
    def columns(self) -> dict[str, str | int]:
        """For tables to come: one entry per parameter."""
        head = self.operation is Operation.HEAD
        return {
            "operation": self.operation.value,
            "divergence": repr(self.divergence) if self.operation.is_divergence else "",
            "tokens": self.tokens,
            "vocab": "" if self.operation is Operation.SINKHORN else self.vocab,
            "hidden": self.hidden if head else "",
            "teacher_hidden": self.teacher_hidden if head else "",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }

    @property
    def title(self) -> str:
        sizes = f"{self.tokens:,} {'token' if self.tokens == 1 else 'tokens'} × {self.vocab:,}"
        if self.operation is Operation.HEAD:
            sizes += f", hidden {self.hidden:,}"
            if self.teacher_hidden != self.hidden:
                sizes += f" (teacher {self.teacher_hidden:,})"
        elif self.operation is Operation.SINKHORN:
            sizes = f"{self.sequences:,} × ({self.side} × {self.side})"
        elif self.operation is Operation.PAIRS:
            sizes = f"{self.sequences:,} × ({self.side} × {self.side}) × {self.vocab:,}"
        if self.operation.is_divergence:
            sizes = f"{self.divergence!r}, {sizes}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation.label}: {sizes}, {dtype}, {self.device}"
