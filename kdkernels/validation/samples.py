"""Awkward hidden states for ``relation_loss`` and ``angle_loss``: masked and ragged rows, few of them, one tensor on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["AngleCase", "RelationCase", "angle_cases", "relation_cases"]

SIZES = {"student": 8, "teacher": 12}
WIDE_SIZES = {"student": 16, "teacher": 32}
"""Dimensions of the hidden states; the wide ones are those that the CPU has a kernel of its own for."""


def hidden_states(
    rows: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, double: bool
) -> dict[str, Tensor]:
    """Leaves of these shapes, the same in every dtype but for rounding; ``double``: float64, of what the dtype made of them."""
    generator = torch.Generator().manual_seed(sum(map(sum, rows.values())))
    states = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in rows.items()}
    return {name: (one.double() if double else one).requires_grad_() for name, one in states.items()}


def values_and_gradients(values: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    upstream = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype, device=values.device).view(values.shape)
    parts = torch.autograd.grad(values, list(leaves.values()), upstream)
    found = {f"gradient to {name}": part for name, part in zip(leaves, parts, strict=True)}
    return {"value": values.detach().flatten(), **found}


@dataclass(frozen=True)
class RelationCase:
    """Softmax relations of a few problems."""

    name: str
    left: int
    right: int
    problems: int = 2
    wide: bool = False
    term_size: float = 0.0
    masked: bool = False
    """Some rows do not count, some columns take no part."""
    ragged: bool = False
    labels: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def answers(
        self, library: Any, dtype: torch.dtype, device: str, arguments: dict[str, Any], *, double: bool = False
    ) -> dict[str, Tensor]:
        """The losses of the rows and their sum, and the gradients of both."""
        shapes = {
            f"{side} {half}": (self.problems, rows, size)
            for side, size in (WIDE_SIZES if self.wide else SIZES).items()
            for half, rows in (("left", self.left), ("right", self.right))
        }
        leaves = hidden_states(shapes, dtype, device, double)
        options = dict(self.options)
        if self.masked:
            options["row_mask"] = torch.arange(self.left, device=device) % 3 != 1
            options["column_mask"] = torch.arange(self.right, device=device) % 4 != 2
        if self.ragged:
            options["lengths"] = torch.tensor([self.left, self.left // 2], device=device)
        if self.labels:
            labels = torch.arange(self.left, device=device) % self.right
            options |= {"labels": labels.expand(self.problems, -1), "ce_weight": 0.5}
        found: dict[str, Tensor] = {}
        for reduction in ("none", "sum"):
            values = library.relation_loss(*leaves.values(), **options, reduction=reduction, **arguments)
            answers = values_and_gradients(values, leaves)
            found |= {f"{name}, reduction {reduction}": answer for name, answer in answers.items()}
        return found


@dataclass(frozen=True)
class AngleCase:
    """The angles of all triples of a few points."""

    name: str
    points: int
    term_size: float = 0.0

    def answers(
        self, library: Any, dtype: torch.dtype, device: str, arguments: dict[str, Any], *, double: bool = False
    ) -> dict[str, Tensor]:
        """The loss and the gradient to the student's points."""
        leaves = hidden_states({side: (self.points, size) for side, size in SIZES.items()}, dtype, device, double)
        values = library.angle_loss(leaves["student"], leaves["teacher"].detach(), **arguments)
        return values_and_gradients(values, {"student": leaves["student"]})


def relation_cases() -> tuple[RelationCase, ...]:
    return (
        RelationCase("7 × 5", 7, 5),
        RelationCase("1 × 1", 1, 1),
        RelationCase("33 × 130", 33, 130),
        RelationCase("8 problems of 12 × 20", 12, 20, problems=8, wide=True),
        RelationCase("masked rows and columns", 13, 9, masked=True),
        RelationCase("ragged, causal", 12, 12, ragged=True, options={"causal": True}),
        RelationCase("labels, cosines", 6, 11, labels=True, options={"score": "cosine", "student_scale": 5.0}),
        RelationCase("squared distances", 6, 11, options={"score": "sqeuclidean"}),
    )


def angle_cases() -> tuple[AngleCase, ...]:
    return AngleCase("3 points", 3), AngleCase("19 points", 19)
