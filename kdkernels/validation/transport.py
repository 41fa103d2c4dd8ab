"""Awkward transport problems for the kernels of ``sinkhorn``: ragged, forbidden pairs, rows without mass, relaxed marginals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.transport import GRADIENTS

__all__ = ["TransportCase", "transport_cases"]

ITERATIONS = 12
UNDETERMINED = "implicit"
"""The gradient in which potentials are known up to a constant only, and what it gives to masses, too."""


@dataclass(frozen=True)
class TransportCase:
    """A few problems of one kind; masses are data, the same in every dtype."""

    name: str
    rows: int
    columns: int
    problems: int = 3
    epsilon: float = 0.1
    term_size: float = 0.0
    given: bool = True
    """Random masses, else uniform ones."""
    ragged: bool = False
    forbidden: bool = False
    empty: bool = False
    """A row and a column have no mass."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What gradients are wanted of, and the other arguments."""
        random = torch.Generator().manual_seed(self.rows)
        shape = self.problems, self.rows, self.columns
        cost = torch.rand(shape, generator=random)
        options: dict[str, Any] = {"epsilon": self.epsilon, "max_iterations": ITERATIONS, **self.options}
        if self.forbidden:
            cost[:, 0, self.columns // 2 :] = torch.inf
        leaves = {"cost": cost}
        if self.given:
            for name, size in (("a", self.rows), ("b", self.columns)):
                masses = torch.rand(self.problems, size, generator=random) + 0.1
                if self.empty:
                    masses[:, size // 2] = 0
                leaves[name] = masses / masses.sum(-1, keepdim=True)
        if self.ragged:
            rows = torch.arange(self.problems) % self.rows + 1
            columns = self.columns - torch.arange(self.problems) % self.columns
            outside = torch.arange(self.rows).unsqueeze(-1) >= rows.reshape(-1, 1, 1)
            outside = outside | (torch.arange(self.columns) >= columns.reshape(-1, 1, 1))
            leaves["cost"] = cost.masked_fill(outside, torch.nan)
            options |= {"row_lengths": rows.to(device), "column_lengths": columns.to(device)}
        leaves["cost"] = leaves["cost"].to(dtype)
        return {name: leaf.to(device) for name, leaf in leaves.items()}, options

    def answers(
        self, library: Any, dtype: torch.dtype, device: str, arguments: dict[str, Any], *, double: bool = False
    ) -> dict[str, Tensor]:
        """All that kdkernels or its reference makes of them, in every gradient."""
        inputs, options = self.inputs(dtype, device)
        found: dict[str, Tensor] = {}
        for gradient in GRADIENTS:
            leaves = {
                name: (leaf.double() if double else leaf).detach().clone().requires_grad_()
                for name, leaf in inputs.items()
            }
            result = library.sinkhorn(**leaves, **options, gradient=gradient, **arguments)
            plan = result.plan()
            found |= {
                "distance": result.distance.detach(),
                "value": result.value.detach(),
                "f": result.f.detach(),
                "g": result.g.detach(),
                "plan": plan.detach(),
            }
            total = result.distance.sum() + 0.5 * result.value.sum()
            if gradient != "envelope":
                weights = torch.linspace(-1, 1, plan.shape[-1], dtype=plan.dtype, device=plan.device)
                total = total + (plan * weights).sum()
            parts = torch.autograd.grad(total, list(leaves.values()))
            for name, part in zip(leaves, parts, strict=True):
                determined = part - part.mean(-1, keepdim=True) if gradient == UNDETERMINED and name != "cost" else part
                found[f"gradient to {name}, {gradient}"] = determined
        return found


def transport_cases() -> tuple[TransportCase, ...]:
    return (
        TransportCase("7 × 5", 7, 5),
        TransportCase("1 × 9", 1, 9),
        TransportCase("uniform masses", 17, 20, given=False),
        TransportCase("40 × 35", 40, 35, problems=2),
        TransportCase("ragged, NaN in the padding", 6, 9, problems=4, given=False, ragged=True),
        TransportCase("forbidden pairs", 6, 6, forbidden=True, given=False),
        TransportCase("rows and columns without mass", 6, 7, empty=True),
        TransportCase("relaxed marginals", 9, 6, options={"unbalanced": (0.5, None)}),
        TransportCase("annealed", 9, 6, options={"epsilon_start": 1.0}),
        TransportCase("smaller epsilon", 9, 8, epsilon=0.04),
    )
