"""The arguments of ``plackett_luce`` and ``token_ranks``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments.divergence import REDUCTIONS, Total
from kdkernels.arguments.rows import (
    CPU,
    REAL_DTYPES,
    Problem,
    active_rows,
    check_same_device,
    check_same_tokens,
    check_same_vocab,
    side,
)
from kdkernels.arguments.rows import temperature as row_temperatures
from kdkernels.backends.rows import RowSpec, Side, compute_dtype
from kdkernels.checks import check_choice, check_integer, check_integral
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import Form
from kdkernels.sources import MAX_VOCAB_SIZE, Source

__all__ = ["Counting", "Ranking", "prepare_plackett_luce", "prepare_token_ranks"]

WEIGHTS = ("softmax", "uniform")


class Ranking(NamedTuple):
    """A student, and how its entries are to be ranked."""

    problem: Problem
    """The teacher is None where the order is given."""
    order: Tensor | None
    """int64 ``[N, K]``, -1 past the last rank."""
    weights: Tensor | None
    """``[N, K]`` of the compute type, perhaps expanded; None: the teacher's probabilities."""
    top_k: int | None
    """How many of the teacher's ranks count; None: all."""


class Counting(NamedTuple):
    """A source, and the ids whose ranks are wanted."""

    source: Side
    ids: Tensor
    """int64 ``[N, m]``."""
    shape: torch.Size
    """Of the ids as they were given."""


def prepare_plackett_luce(
    student: Source,
    teacher_or_order: Source,
    *,
    labels: Tensor | None,
    weights: str | Tensor,
    temperature: float | Tensor,
    top_k: int | None,
    mask: Tensor | None,
    ignore_index: int,
    reduction: str,
    vocab_size: int | None,
) -> tuple[Ranking, Total]:
    """Checks the arguments of ``plackett_luce``."""
    check_choice("reduction", reduction, REDUCTIONS)
    rows, shape, vocab = side("student", student, vocab_size)
    if vocab > MAX_VOCAB_SIZE:
        raise ValueError(f"student: the vocabulary must have at most {MAX_VOCAB_SIZE} entries, got {vocab}")
    dtype = compute_dtype(rows.tensor, None)
    device = rows.tensor.device
    is_order = (
        isinstance(teacher_or_order, Tensor)
        and not teacher_or_order.is_floating_point()
        and not teacher_or_order.is_complex()
    )
    spec = RowSpec(*Form(0), student_softcap=rows.softcap)
    teacher, order = None, None
    if is_order:
        assert isinstance(teacher_or_order, Tensor)
        if labels is not None or top_k is not None:
            raise ValueError(
                "labels and top_k go with a teacher; an order says itself what comes first, and how much of it"
            )
        order = checked_order(teacher_or_order, shape, vocab, device)
        ranks = order.shape[1]
    else:
        teacher, teacher_shape, teacher_vocab = side("teacher_or_order", teacher_or_order, vocab_size)
        check_same_tokens(shape, teacher_shape)
        check_same_vocab(vocab, teacher_vocab)
        check_same_device(rows, teacher)
        dtype = compute_dtype(rows.tensor, teacher.tensor)
        number, numbers = row_temperatures("temperature", temperature, shape, device, dtype)
        if numbers is not None and top_k is not None:
            raise ValueError("temperature must be a number where top_k is given, got a tensor")
        spec = spec._replace(teacher_temperature=number, teacher_temperatures=numbers, teacher_softcap=teacher.softcap)
        ranks = vocab if top_k is None else check_integer("top_k", top_k)
        if not 1 <= ranks <= vocab:
            raise ValueError(f"top_k must be between 1 and the vocabulary of {vocab}, got {top_k}")
    problem = Problem(rows, teacher, shape, vocab, dtype, spec)
    problem = active_rows(problem, mask, labels, ignore_index)
    found = rank_weights(weights, order is not None, ranks, problem)
    return Ranking(problem, order, found, None if order is not None else top_k), Total(reduction, 1.0, 0.0, None, None)


def checked_order(order: Tensor, shape: torch.Size, vocab: int, device: torch.device) -> Tensor:
    """Ids by rank as rows."""
    check_integral("teacher_or_order: order", order)
    if order.device != device:
        raise ValueError(f"teacher_or_order: order is on {order.device}, the student on {device}")
    if order.dim() != len(shape) + 1 or order.shape[:-1] != shape or not 1 <= order.shape[-1] <= vocab:
        raise ValueError(
            f"teacher_or_order: an order must have the shape {(*shape, 'K')} with K from 1 to {vocab}, "
            f"got {tuple(order.shape)}"
        )
    rows = order.reshape(shape.numel(), order.shape[-1]).long().contiguous()
    if values_are_checked(rows) and rows.numel():
        check_order_values(rows, vocab)
    return rows


def check_order_values(rows: Tensor, vocab: int) -> None:
    named = rows >= 0
    if not bool(((rows >= -1) & (rows < vocab)).all()):
        wrong = rows[(rows < -1) | (rows >= vocab)][0]
        raise ValueError(f"teacher_or_order: an order must hold ids in [0, {vocab}) or -1, got {int(wrong)}")
    if bool((named[:, 1:] & ~named[:, :-1]).any()):
        raise ValueError("teacher_or_order: in an order -1 stands past the last rank only, got an id behind it")
    counts = torch.zeros(len(rows), vocab, dtype=torch.uint8, device=rows.device)
    counts.scatter_add_(1, rows.clamp(min=0), named.to(torch.uint8))
    if bool((counts > 1).any()):
        row, wrong = (counts > 1).nonzero()[0].tolist()
        raise ValueError(f"teacher_or_order: an order must name an id at most once, token {row} names {wrong} again")


def rank_weights(weights: object, has_order: bool, ranks: int, problem: Problem) -> Tensor | None:
    """Weights by rank ``[N, K]``; None: probabilities of the teacher."""
    device, rows = problem.student.tensor.device, problem.batch_shape.numel()
    if not isinstance(weights, Tensor):
        if check_choice("weights", weights, WEIGHTS) == "uniform":
            return torch.ones(1, ranks, dtype=problem.dtype, device=device).expand(rows, ranks)
        if has_order:
            raise ValueError('weights="softmax" needs the teacher\'s logits; with an order give "uniform" or a tensor')
        return None
    if weights.dtype not in REAL_DTYPES or weights.layout != torch.strided:
        raise TypeError(f"weights must be a dense real tensor, got {weights.dtype}, {weights.layout}")
    if weights.device not in (device, CPU):
        raise ValueError(f"weights are on {weights.device}, the student on {device}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("weights require grad, which they do not get: detach them")
    if weights.shape != (ranks,) and weights.shape != (*problem.batch_shape, ranks):
        raise ValueError(
            f"weights must have one entry per rank, shape {(ranks,)} or {(*problem.batch_shape, ranks)}, "
            f"got {tuple(weights.shape)}"
        )
    found = weights.to(device, problem.dtype)
    if values_are_checked(found) and not bool(((found >= 0) & found.isfinite()).all()):
        raise ValueError("weights must be finite and at least 0")
    if found.dim() == 1:
        return found.contiguous().unsqueeze(0).expand(rows, ranks)
    return found.reshape(rows, ranks).contiguous()


def prepare_token_ranks(source: Source, ids: Tensor, *, vocab_size: int | None) -> Counting:
    """Checks the arguments of ``token_ranks``."""
    rows, shape, vocab = side("source", source, vocab_size)
    check_integral("ids", ids)
    if ids.device != rows.tensor.device:
        raise ValueError(f"ids are on {ids.device}, the source on {rows.tensor.device}")
    if ids.shape != shape and ids.shape[:-1] != shape:
        raise ValueError(
            f"ids must have the shape of the source's tokens, {tuple(shape)}, or {(*shape, 'm')}, got {tuple(ids.shape)}"
        )
    if values_are_checked(ids) and not bool(((ids >= -1) & (ids < vocab)).all()):
        wrong = ids[(ids < -1) | (ids >= vocab)][0]
        raise ValueError(f"ids must lie in [0, {vocab}), or be -1 for none, got {int(wrong)}")
    count = 1 if ids.shape == shape else ids.shape[-1]
    return Counting(rows, ids.reshape(shape.numel(), count).long().contiguous(), ids.shape)
