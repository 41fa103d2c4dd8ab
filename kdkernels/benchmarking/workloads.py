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

    @property
    def label(self) -> str:
        return {
            Operation.DENSE: "divergence of logits, forward+backward",
            Operation.FORWARD: "divergence of logits, forward only",
            Operation.HEAD: "divergence of LM heads, forward+backward",
        }[self]


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
    """Logits ``[N, V]``, or with weights ``[V, H]`` hidden states ``[N, H]``. The student's tensors want gradients."""

    student: Tensor
    teacher: Tensor
    student_weight: Tensor | None = None
    teacher_weight: Tensor | None = None

    @property
    def wanted(self) -> list[Tensor]:
        return [self.student] if self.student_weight is None else [self.student, self.student_weight]


@dataclass(frozen=True)
class Workload:
    """One divergence of a student from a frozen teacher, averaged over the tokens."""

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

        if self.operation is not Operation.HEAD:
            student, teacher = normal(self.tokens, self.vocab), normal(self.tokens, self.vocab)
            return Inputs(student.requires_grad_(self.operation is Operation.DENSE), teacher)
        return Inputs(
            normal(self.tokens, self.hidden).requires_grad_(),
            normal(self.tokens, self.teacher_hidden),
            normal(self.vocab, self.hidden, self.hidden**-0.5).requires_grad_(),
            normal(self.vocab, self.teacher_hidden, self.teacher_hidden**-0.5),
        )

    @property
    def gradient_bytes(self) -> int:
        """The size of the gradients that anyone must return."""
        entries = {
            Operation.DENSE: self.tokens * self.vocab,
            Operation.FORWARD: 0,
            Operation.HEAD: (self.tokens + self.vocab) * self.hidden,
        }
        return entries[self.operation] * self.dtype.itemsize

    @property
    def columns(self) -> dict[str, str | int]:
        """For tables to come: one entry per parameter."""
        head = self.operation is Operation.HEAD
        return {
            "operation": self.operation.value,
            "divergence": repr(self.divergence),
            "tokens": self.tokens,
            "vocab": self.vocab,
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
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation.label}: {self.divergence!r}, {sizes}, {dtype}, {self.device}"
