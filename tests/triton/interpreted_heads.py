"""What the tests of linear_divergence run where Triton's interpreter is on, see ``interpreted``."""

from __future__ import annotations

from typing import Any, NamedTuple

import interpreted  # noqa: F401 - makes the interpreter fast
import torch
from kdkernels.triton_kernels.tiling import LinearTiling
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.triton.launching import load_kernels

SMALL = LinearTiling(rows=16, columns=16, hidden=16, product=16, num_warps=4, num_stages=1, split=32, strip=32)
"""So small that even tiny problems have several of everything."""

NAMES = ("hidden", "weight", "bias")


class Side(NamedTuple):
    """Tensors of a head, or logits alone, and the head's other properties."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    wanted: tuple[bool, ...] = (True, True, True)

    def to(self, dtype: torch.dtype) -> Side:
        return self._replace(tensors=tuple(tensor.to(dtype) for tensor in self.tensors))

    def source(self, leaves: list[Tensor]) -> Any:
        return leaves[0] if len(leaves) == 1 else kd.LMHead(*leaves, **self.options)


class Answers(NamedTuple):
    value: Tensor
    gradients: dict[str, Tensor]
    relative_error: Tensor
    density: Tensor


def answers(
    student: Side,
    teacher: Side,
    divergence: Any,
    options: dict[str, Any],
    backend: str = "triton",
    tiling: LinearTiling | None = SMALL,
) -> Answers:
    """The loss by heads whose logits are never written, and all the gradients that are wanted. ``tiling``: None, the real one."""
    leaves = [
        [tensor.detach().clone().requires_grad_(want) for tensor, want in zip(side.tensors, side.wanted, strict=False)]
        for side in (student, teacher)
    ]
    named = {
        f"{name}'s {NAMES[place]}": leaf
        for name, tensors in zip(("student", "teacher"), leaves, strict=True)
        for place, leaf in enumerate(tensors)
        if leaf.requires_grad
    }
    arguments = dict(options, backend=backend, memory_budget=0)
    tilings = load_kernels().tiling
    chosen = tilings.choose_linear_tiling
    if tiling is not None:
        tilings.choose_linear_tiling = lambda *_: tiling
    try:
        with kd.GradientReport() as report:
            value = kd.distillation_loss(student.source(leaves[0]), teacher.source(leaves[1]), divergence, **arguments)
            upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
            found = torch.autograd.grad(value, list(named.values()), upstream if value.dim() else None)
    finally:
        tilings.choose_linear_tiling = chosen
    return Answers(value.detach(), dict(zip(named, found, strict=True)), report.relative_error, report.density)
