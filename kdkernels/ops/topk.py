"""The operators ``kdkernels::topk`` and ``kdkernels::sample``, for logits and language-model heads. They have no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Picking
from kdkernels.backends import chunked_head
from kdkernels.backends.rows import Side, Tempering, compute_dtype
from kdkernels.ops.eager import traced
from kdkernels.ops.schema import TAGS, as_numbers

__all__ = ["sample", "topk"]

SOURCE = "Tensor source, Tensor? weight, Tensor? bias, float scale"
REST = "Tensor tempering, int? memory_budget, str backend"


def topk_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    side, (k, numbers, memory_budget, backend) = Side(*arguments[:4]), arguments[4:]
    return chunked_head.topk(side, k, Tempering(*numbers.tolist()), memory_budget, backend)


topk_op = torch.library.custom_op(
    "kdkernels::topk",
    topk_rows,
    mutates_args=(),
    schema=f"({SOURCE}, SymInt k, {REST}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@topk_op.register_fake
def _(source: Tensor, weight: Any, bias: Any, scale: float, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return picked(source, source.shape[0], k)


def sample_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    side, (uniforms, numbers, memory_budget, backend) = Side(*arguments[:4]), arguments[4:]
    return chunked_head.sample(side, uniforms, Tempering(*numbers.tolist()), memory_budget, backend)


sample_op = torch.library.custom_op(
    "kdkernels::sample",
    sample_rows,
    mutates_args=(),
    schema=f"({SOURCE}, Tensor uniforms, {REST}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@sample_op.register_fake
def _(source: Tensor, weight: Any, bias: Any, scale: float, uniforms: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return picked(source, *uniforms.shape)


def picked(source: Tensor, rows: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a number for each, and one for the row."""
    ids = source.new_empty(rows, count, dtype=torch.int64)
    numbers = source.new_empty(rows, count, dtype=compute_dtype(source, None))
    return ids, numbers, numbers.new_empty(rows)


def topk(picking: Picking, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(ids [N, k], log_probs [N, k], log_tail_mass [N])``."""
    call = topk_op if traced(picking.source.tensor) else topk_rows
    found: tuple[Tensor, Tensor, Tensor] = call(
        *picking.source[:4], picking.entries, as_numbers(picking.tempering), memory_budget, backend
    )
    return found


def sample(
    picking: Picking, uniforms: Tensor, memory_budget: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(ids [N, n], weights [N, n], entropy [N])``."""
    call = sample_op if traced(picking.source.tensor) else sample_rows
    found: tuple[Tensor, Tensor, Tensor] = call(
        *picking.source[:4], uniforms, as_numbers(picking.tempering), memory_budget, backend
    )
    return found
