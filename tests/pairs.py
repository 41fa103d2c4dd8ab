"""Small students and teachers in every pairing of logits and heads, and every optional argument of the loss.

A pairing is a plain dictionary of tensors, so that it can be an argument of a compiled or differentiated function; ``sources``
makes of it what the public functions take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd

BATCH = (2, 5)
VOCAB = 37
HIDDEN = 6

Tensors = dict[str, Tensor]

PAIRINGS = {
    "logits-logits": ("student.logits", "teacher.logits"),
    "head-logits": ("student.hidden", "student.weight", "student.bias", "teacher.logits"),
    "logits-head": ("student.logits", "teacher.hidden", "teacher.weight"),
    "head-head": ("student.hidden", "student.weight", "teacher.hidden", "teacher.weight", "teacher.bias"),
}

each_pairing = pytest.mark.parametrize("pairing", PAIRINGS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    pairing: str,
    *,
    dtype: torch.dtype = torch.float32,
    batch: tuple[int, ...] = BATCH,
    seed: int = 0,
    grad: bool = True,
) -> Tensors:
    """The tensors of a pairing, all of which require grad if any."""
    shapes = {"logits": (*batch, VOCAB), "hidden": (*batch, HIDDEN), "weight": (VOCAB, HIDDEN), "bias": (VOCAB,)}
    source = generator(seed)
    return {
        name: torch.randn(shapes[name.partition(".")[2]], generator=source, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
        for name in PAIRINGS[pairing]
    }


def sources(tensors: Tensors, **head_options: Any) -> tuple[Any, Any]:
    """(student, teacher); ``head_options`` such as ``softcap`` go to every head."""

    def one(name: str) -> Any:
        if f"{name}.logits" in tensors:
            return tensors[f"{name}.logits"]
        return kd.LMHead(
            tensors[f"{name}.hidden"], tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **head_options
        )

    return one("student"), one("teacher")


def per_token(low: float, high: float, batch: tuple[int, ...] = BATCH) -> Tensor:
    """Numbers between ``low`` and ``high``, one per token, the same in every call."""
    return low + (high - low) * torch.rand(batch, generator=generator(7))


def some_labels() -> Tensor:
    labels = torch.randint(0, VOCAB, BATCH, generator=generator(8))
    labels[0, 1] = -100
    return labels


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "sum": lambda: {"reduction": "sum"},
    "none": lambda: {"reduction": "none"},
    "labels": lambda: {"labels": some_labels(), "ce_weight": 0.7},
    "labels-none": lambda: {"labels": some_labels(), "ce_weight": 0.7, "reduction": "none"},
    "labels-without-ce": lambda: {"labels": some_labels()},
    "weight": lambda: {"weight": per_token(0.1, 2.0)},
    "mask": lambda: {"mask": per_token(0, 1) < 0.6},
    "temperatures": lambda: {
        "temperature": per_token(0.5, 3.0),
        "teacher_temperature": 1.5,
        "temperature_squared": True,
    },
    "teacher-temperatures": lambda: {"temperature": 2.0, "teacher_temperature": per_token(0.5, 3.0)},
    "normalizer": lambda: {"normalizer": torch.tensor(9)},
    "vocab_size": lambda: {"vocab_size": VOCAB - 4},
    "memory_budget": lambda: {"memory_budget": 4 * 4 * VOCAB},
    "everything": lambda: {
        "labels": some_labels(),
        "ce_weight": 0.3,
        "weight": per_token(0.1, 2.0),
        "mask": per_token(0, 1) < 0.8,
        "temperature": per_token(0.5, 3.0),
        "teacher_temperature": 1.5,
        "temperature_squared": True,
        "vocab_size": VOCAB - 1,
    },
}
"""Arguments of ``distillation_loss`` by what they are about, made anew at every call."""


def value_and_gradients(
    loss: Callable[[Tensors], Tensor], tensors: Tensors, *, factor: float = 1.0
) -> tuple[Tensor, Tensors]:
    """The loss, and the gradients of its sum times ``factor`` to all the tensors that require grad."""
    value = loss(tensors)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(factor * value.sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, gradients, strict=True))
