"""The family relation over any row backend.

The problems, or the rows of one, are cut into chunks whose scores stay in the cache. Per chunk a batched GEMM a side makes
the scores, the row kernel turns them in place into their gradient, and two batched GEMMs carry that to left and right:
within a problem, right is to left what the weight of a language-model head is to hidden states. Nothing of size n x m is
kept beyond the chunk. A backend may have a kernel that does all of it, see ``backends.cpu.relation``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import HAVE_RELATION, row_backend
from kdkernels.backends.relations import Relations

__all__ = ["divergence_with_gradients"]

GPU_BUDGET = 1 << 30
CPU_BUDGET_PER_THREAD = 2 << 20
"""Bytes of scores: what a core's second-level cache holds. Larger chunks are slower."""


class Chunk(NamedTuple):
    """Whole problems, or some rows of one: either way a run of all rows."""

    problems: slice
    rows: slice

    def flat(self, rows_per_problem: int) -> slice:
        start = self.problems.start * rows_per_problem + self.rows.start
        count = (self.problems.stop - self.problems.start) * (self.rows.stop - self.rows.start)
        return slice(start, start + count)


def chunks(relations: Relations, memory_budget: int | None) -> Iterator[Chunk]:
    """Chunks whose scores of both sides fit the budget, at least one row each."""
    problems, rows, columns = relations.shape
    if memory_budget is None:
        on_cpu = relations.student_left.device.type == "cpu"
        memory_budget = CPU_BUDGET_PER_THREAD * torch.get_num_threads() if on_cpu else GPU_BUDGET
    fitting = max(1, memory_budget // (2 * columns * relations.dtype.itemsize))
    if fitting >= rows:
        size = fitting // rows
        for start in range(0, problems, size):
            yield Chunk(slice(start, min(start + size, problems)), slice(0, rows))
        return
    size = -(-rows // -(-rows // fitting))
    for problem in range(problems):
        for start in range(0, rows, size):
            yield Chunk(slice(problem, problem + 1), slice(start, min(start + size, rows)))


class Side:
    """Left and right of one side while the chunks go by: makes scores, takes their gradient."""

    def __init__(
        self, left: Tensor, right: Tensor, scale: float, relations: Relations, wanted: Sequence[bool], scores: int
    ) -> None:
        self.left, self.right = (tensor.to(relations.dtype).contiguous() for tensor in (left, right))
        active, columns = relations.spec.active, relations.masks.columns
        # Blank where nothing counts, for 0 * NaN is no 0 in a GEMM.
        if active is not None:
            self.left = self.left.masked_fill(~active.view(left.shape[:2]).unsqueeze(-1), 0)
        if columns is not None:
            self.right = self.right.masked_fill(~columns.unsqueeze(-1), 0)
        self.scale = scale
        self.masks = relations.masks
        self.buffer = self.left.new_empty(scores) if scores else self.left
        self.left_gradient = torch.empty_like(self.left) if wanted[0] else None
        self.right_gradient = torch.empty_like(self.right) if wanted[1] else None

    def scores(self, chunk: Chunk) -> Tensor:
        left, right = self.left[chunk.problems, chunk.rows], self.right[chunk.problems]
        out = self.buffer[: left.shape[0] * left.shape[1] * right.shape[1]].view(*left.shape[:2], right.shape[1])
        torch.baddbmm(out, left, right.mT, beta=0, alpha=self.scale, out=out)
        self.masks.hide(out, chunk.problems, chunk.rows)
        return out

    def take(self, gradient: Tensor, chunk: Chunk) -> None:
        """Carries the gradient of a chunk's scores on to left and right."""
        if self.left_gradient is not None:
            part = self.left_gradient[chunk.problems, chunk.rows]
            torch.baddbmm(part, gradient, self.right[chunk.problems], beta=0, alpha=self.scale, out=part)
        if self.right_gradient is not None:
            part = self.right_gradient[chunk.problems]
            first = int(chunk.rows.start > 0)  # a product to add to has been made
            left = self.left[chunk.problems, chunk.rows]
            torch.baddbmm(part, gradient.mT, left, beta=first, alpha=self.scale, out=part)


@torch.no_grad()
def divergence_with_gradients(
    relations: Relations,
    scales: tuple[Tensor, Tensor | None] | None,
    wanted: Sequence[bool],
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """``(divergence [P n], cross_entropy [P n] or [0], gradients)`` of the four tensors, None where not wanted.

    The gradients are of the sum of ``scales`` times the values, in the compute type.
    """
    problems, rows, columns = relations.shape
    spec, dtype = relations.spec, relations.dtype
    count = problems * rows
    divergence = relations.student_left.new_zeros(count, dtype=dtype)
    cross_entropy = divergence.new_zeros(0 if spec.labels is None else count)
    if 0 in relations.shape:
        return divergence, cross_entropy, [blank(*each, dtype) for each in zip(relations.tensors, wanted, strict=True)]
    kernels = row_backend(backend)
    whole = backend in HAVE_RELATION and memory_budget is None and kernels.relation_applies(relations)
    parts = [] if whole else list(chunks(relations, memory_budget))
    largest = max((part.flat(rows).stop - part.flat(rows).start for part in parts), default=0) * columns
    student = Side(*relations[:2], relations.student_scale, relations, wanted[:2], largest)
    teacher = None
    if relations.teacher_left is not None and relations.teacher_right is not None:
        pair = relations.teacher_left, relations.teacher_right
        teacher = Side(*pair, relations.teacher_scale, relations, wanted[2:], largest)
    sides = [student.left, student.right, *((None, None) if teacher is None else (teacher.left, teacher.right))]
    gradients = [student.left_gradient, student.right_gradient]
    gradients += [None, None] if teacher is None else [teacher.left_gradient, teacher.right_gradient]
    if whole:
        kernels.relation(relations, sides, scales, gradients, divergence, cross_entropy)
        return divergence, cross_entropy, gradients
    for part in parts:
        run = part.flat(rows)
        size = run.stop - run.start
        mine = student.scores(part)
        logits = mine.view(size, columns)
        if teacher is None:  # the divergence does not count then, so that one row of zeros serves
            other_logits = logits.new_zeros(1, columns).expand(size, columns)
        else:
            other = teacher.scores(part)
            other_logits = other.view(size, columns)
        some = spec.take(run)
        if scales is None:
            values = kernels.divergence_forward(logits, other_logits, some)
        else:
            factors = scales[0][run], None if scales[1] is None else scales[1][run]
            buffers = logits if any(wanted[:2]) else None, other_logits if any(wanted[2:]) else None
            values = kernels.divergence_fused(logits, other_logits, some, *factors, *buffers)
            if buffers[0] is not None:
                student.take(mine, part)
            if buffers[1] is not None and teacher is not None:
                teacher.take(other, part)
        divergence[run] = values[0]
        if spec.labels is not None:
            cross_entropy[run] = values[1]
    return divergence, cross_entropy, gradients


def blank(tensor: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor | None:
    return torch.zeros_like(tensor, dtype=dtype) if wanted and tensor is not None else None
