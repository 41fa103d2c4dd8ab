"""The family bernoulli over any row backend: forms, targets, and language-model heads by chunks of tokens."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import row_backend
from kdkernels.backends.chunked_head import Head, Needs, SideGradients, active_index, chunks, only_active, spread
from kdkernels.backends.rows import RowSpec, Side, compute_dtype

__all__ = ["BernoulliForm", "Targets", "bernoulli", "dense_targets"]


class BernoulliForm(IntEnum):
    """What is summed over the vocabulary; ``RowSpec.kind`` of this family.

    The numbering is shared with ``csrc/cpu/bernoulli.cpp`` and ``triton_kernels/bernoulli.py``.
    """

    CROSS_ENTROPY = 0
    KL = 1
    HALF = 2
    TARGET_CROSS_ENTROPY = 3
    """The teacher's matrix holds probabilities, as in the next."""
    TARGET_KL = 4


class Targets(NamedTuple):
    """A teacher's logits or probabilities as rows, or ``ids`` and ``values`` ``[N, k]`` with a ``fill`` ``[N]`` for the rest."""

    side: Side | None
    ids: Tensor | None = None
    values: Tensor | None = None
    fill: Tensor | None = None

    def take(self, index: slice | Tensor) -> Targets:
        """Those of some of the rows."""
        side = None if self.side is None else self.side._replace(tensor=self.side.tensor[index])
        return Targets(side, *(None if tensor is None else tensor[index] for tensor in self[1:]))


def dense_targets(targets: Targets, vocab: int) -> Tensor:
    """``[N, V]`` of sparse targets."""
    ids, values, fill = targets[1:]
    assert ids is not None
    assert values is not None
    assert fill is not None
    # One column more takes what is no entry.
    room = fill.unsqueeze(-1).repeat(1, vocab + 1)
    return room.scatter_(1, torch.where(ids < 0, vocab, ids), values)[:, :vocab]


@torch.no_grad()
def bernoulli(
    student: Side,
    targets: Targets,
    spec: RowSpec,
    grad_values: Tensor | None,
    needs: Needs,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, SideGradients]:
    """``bernoulli`` of a row backend for any sources: the values ``[N]``, and the gradients that are needed."""
    sides = [student] if targets.side is None else [student, targets.side]
    rows = student.tensor.shape[0]
    index = active_index(sides, spec)
    if index is not None:
        kept = spec.take(index)._replace(active=None)
        upstream = None if grad_values is None else grad_values[index]
        found, gradients = bernoulli(
            only_active(student, index), targets.take(index), kept, upstream, needs, memory_budget, backend
        )
        return spread(found, index, rows), gradients.spread(index, rows)
    kernels = row_backend(backend)
    vocab = (student.tensor if student.weight is None else student.weight.t()).shape[1]
    teacher = None if targets.side is None else targets.side.tensor
    values = student.tensor.new_empty(rows, dtype=compute_dtype(student.tensor, teacher))
    heads = [Head(side, need, spec.active) for side, need in zip(sides, (needs, Needs(False)), strict=False)]
    extra = vocab * values.element_size() if targets.side is None else 0
    for chunk in chunks(sides, memory_budget, extra_row_bytes=extra):
        logits = heads[0].logits(chunk)
        wanted = heads[1].logits(chunk) if len(heads) > 1 else dense_targets(targets.take(chunk), vocab)
        gradient = heads[0].gradient_buffer(logits, chunk)
        upstream = None if grad_values is None else grad_values[chunk]
        values[chunk] = kernels.bernoulli(logits, wanted, spec.take(chunk), upstream, gradient)
        heads[0].take(gradient, chunk)
    return values, heads[0].finish()
