"""The family pairwise_l1 over any row backend.

Every row of one side meets every row of the other, so the logits of language-model heads are cut along the vocabulary: one
GEMM per head makes those of all rows for a chunk of its entries. A first sweep over the chunks finds the softmax's
normalisers, a second one the distances; in the backward a third one turns the logits of a chunk into their gradient in
place, and GEMMs carry it on. The rows of the weight's gradient are written once, that of the hidden states is summed in
float32 over the chunks. Sources that are logits are views, and all of it is one chunk if both are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.chunked_head import Needs, SideGradients, budget_of
from kdkernels.backends.rows import PairSpec, Side, Tempering, compute_dtype

__all__ = ["Found", "distances", "gradients"]


class Found(NamedTuple):
    """The distances ``[B, n, m]``, and what their gradient is made from."""

    distance: Tensor
    signed_mass: Tensor
    """``[B, n, m]``: the sum of ``x sign(x - y)`` over the vocabulary; ``[0]`` if no gradient is wanted."""
    student_normalisers: Tensor
    """``[B n, 2]``, see ``pairwise_normalisers`` of a row backend."""
    teacher_normalisers: Tensor
    """``[B m, 2]``."""


def vocab_of(side: Side) -> int:
    return side.tensor.shape[1] if side.weight is None else side.weight.shape[0]


def chunks(sides: tuple[Side, Side], memory_budget: int | None) -> list[slice]:
    """Equal runs of the vocabulary for which the logits of the heads fit the budget, on boundaries of 64 entries."""
    vocab = vocab_of(sides[0])
    entry_bytes = sum(side.tensor.shape[0] * side.tensor.element_size() for side in sides if side.weight is not None)
    fitting = vocab if not entry_bytes else max(1, budget_of(sides[0], memory_budget) // entry_bytes)
    size = -(-vocab // -(-vocab // fitting))
    if fitting >= 64:
        size = min(-(-size // 64) * 64, fitting // 64 * 64)
    return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]


class Columns:
    """One side while chunks of the vocabulary go by: makes logits, takes their gradient."""

    def __init__(self, side: Side, width: int, needs: Needs = Needs(False)) -> None:  # noqa: B008 - immutable
        self.side = side
        self.needs = needs
        self.gradients = SideGradients()
        self.held: slice | None = None
        if side.weight is not None:
            self.buffer = side.tensor.new_empty(side.tensor.shape[0] * width)
        if needs.tensor:
            dtype = side.tensor.dtype if side.weight is None else compute_dtype(side.tensor, None)
            make = side.tensor.new_empty if side.weight is None else side.tensor.new_zeros
            self.gradients = self.gradients._replace(tensor=make(side.tensor.shape, dtype=dtype))
        if side.weight is not None and needs.weight:
            self.gradients = self.gradients._replace(weight=side.weight.new_empty(side.weight.shape))
        if side.bias is not None and needs.bias:
            self.gradients = self.gradients._replace(bias=side.bias.new_empty(side.bias.shape))

    def logits(self, chunk: slice) -> Tensor:
        side = self.side
        if side.weight is None:
            return side.tensor[:, chunk]
        rows, width = side.tensor.shape[0], chunk.stop - chunk.start
        out = self.buffer[: rows * width].view(rows, width)
        if self.held != chunk:  # the last chunk of one sweep is the first of the next
            weight = side.weight[chunk].t()
            if side.bias is None:
                torch.addmm(out, side.tensor, weight, beta=0, alpha=side.scale, out=out)
            else:
                torch.addmm(side.bias[chunk], side.tensor, weight, beta=side.scale, alpha=side.scale, out=out)
            self.held = chunk
        return out

    def gradient_buffer(self, logits: Tensor, chunk: slice) -> Tensor | None:
        """Where the backend writes the gradient of a chunk's logits: over them, if they are ours."""
        if not any(self.needs):
            return None
        if self.side.weight is not None:
            self.held = None
            return logits
        assert self.gradients.tensor is not None
        return self.gradients.tensor[:, chunk]

    def take(self, gradient: Tensor | None, chunk: slice) -> None:
        """Carries the gradient of a chunk's logits on to hidden states, weight and bias."""
        side, found = self.side, self.gradients
        if gradient is None or side.weight is None:
            return
        if found.tensor is not None:
            if side.tensor.dtype == found.tensor.dtype:
                found.tensor.addmm_(gradient, side.weight[chunk], alpha=side.scale)
            else:
                found.tensor.add_(gradient @ side.weight[chunk], alpha=side.scale)
        if found.weight is not None:
            part = found.weight[chunk]
            torch.addmm(part, gradient.t(), side.tensor, beta=0, alpha=side.scale, out=part)
        if found.bias is not None:
            dtype = compute_dtype(gradient, None)
            found.bias[chunk] = gradient.sum(0, dtype=dtype).mul_(side.scale)

    def finish(self) -> SideGradients:
        found = self.gradients
        return found if found.tensor is None else found._replace(tensor=found.tensor.to(self.side.tensor.dtype))


def combined(first: Tensor | None, second: Tensor, tempering: Tempering) -> Tensor:
    """The normalisers of rows from those of two parts of them."""
    if first is None:
        return second
    largest = torch.maximum(first[:, 0], second[:, 0])
    total = sum(part[:, 1] * torch.exp((part[:, 0] - largest) / tempering.temperature) for part in (first, second))
    return torch.stack([largest, total], -1)  # type: ignore[list-item]


@torch.no_grad()
def distances(
    student: Side, teacher: Side, spec: PairSpec, with_signs: bool, memory_budget: int | None, backend: str
) -> Found:
    """The distances; ``with_signs`` if their gradient will be asked for."""
    dtype = compute_dtype(student.tensor, teacher.tensor)
    if 0 in spec.shape:
        normalisers = [side.tensor.new_zeros(side.tensor.shape[0], 2, dtype=dtype) for side in (student, teacher)]
        distance = student.tensor.new_zeros(spec.shape, dtype=dtype)
        return Found(distance, distance.new_zeros(spec.shape if with_signs else 0), *normalisers)
    kernels = row_backend(backend)
    parts = chunks((student, teacher), memory_budget)
    width = parts[0].stop
    columns = Columns(student, width), Columns(teacher, width)
    found: list[Tensor | None] = [None, None]
    for chunk in parts:
        for place, tempering in enumerate((spec.student, spec.teacher)):
            part = kernels.pairwise_normalisers(columns[place].logits(chunk), tempering, dtype)
            found[place] = combined(found[place], part, tempering)
    normalisers = [part for part in found if part is not None]
    sums: tuple[Tensor, Tensor] | None = None
    for chunk in reversed(parts):
        values = kernels.pairwise_l1_forward(*(side.logits(chunk) for side in columns), spec, normalisers, with_signs)
        sums = values if sums is None else (sums[0].add_(values[0]), sums[1].add_(values[1]))
    assert sums is not None
    return Found(*sums, *normalisers)


@torch.no_grad()
def gradients(
    student: Side,
    teacher: Side,
    spec: PairSpec,
    found: Found,
    grad: Tensor,
    needs: tuple[Needs, Needs],
    memory_budget: int | None,
    backend: str,
) -> tuple[SideGradients, SideGradients]:
    """The gradients of ``sum(grad * distance)``."""
    parts = chunks((student, teacher), memory_budget)
    width = parts[0].stop
    columns = Columns(student, width, needs[0]), Columns(teacher, width, needs[1])
    if 0 in spec.shape:
        for side in columns:
            for gradient in side.gradients:
                if gradient is not None:
                    gradient.zero_()
        return columns[0].finish(), columns[1].finish()
    grad = grad.contiguous()
    # The mean of what a row's probabilities get: sum_v x_v sum_j grad_ij sign(x_v - y_v), and likewise for the teacher.
    centres = (
        (grad * found.signed_mass).sum(-1).reshape(-1),
        (grad * (found.distance - found.signed_mass)).sum(-2).reshape(-1),
    )
    kernels = row_backend(backend)
    normalisers = [found.student_normalisers, found.teacher_normalisers]
    for chunk in parts:
        logits = [side.logits(chunk) for side in columns]
        buffers = [side.gradient_buffer(part, chunk) for side, part in zip(columns, logits, strict=True)]
        kernels.pairwise_l1_backward(*logits, spec, normalisers, grad, centres, *buffers)
        for side, buffer in zip(columns, buffers, strict=True):
            side.take(buffer, chunk)
    return columns[0].finish(), columns[1].finish()
