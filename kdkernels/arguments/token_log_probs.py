"""The arguments of ``token_log_probs`` and ``token_set_log_probs``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments.rows import Problem, active_rows, side
from kdkernels.arguments.rows import temperature as row_temperatures
from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.sparse_rows import Policy, SparseRows
from kdkernels.checks import check_integral
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import ForwardKL
from kdkernels.sources import Source

__all__ = ["SetProblem", "prepare_token_log_probs", "prepare_token_set"]


def prepare_token_log_probs(
    source: Source,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    ignore_index: int,
    vocab_size: int | None,
) -> Problem:
    """The divergence from a teacher who is certain of the label: ``-log q_y``, with the gradient ``q - e_y``."""
    if labels is None:
        raise TypeError("labels must be a tensor of token ids with one entry per token, got None")
    problem = one_source(source, temperature, vocab_size)
    problem = active_rows(problem, mask, labels, ignore_index)
    spec = problem.spec
    assert spec.labels is not None
    ids = spec.labels if spec.active is None else spec.labels.masked_fill(~spec.active, -1)
    certain = torch.zeros(len(ids), 1, dtype=problem.dtype, device=ids.device)
    return problem._replace(
        spec=spec._replace(labels=None), sparse=SparseRows(int(Policy.DROP), ids.unsqueeze(-1), certain)
    )


def one_source(source: Source, temperature: float | Tensor, vocab_size: int | None) -> Problem:
    rows, shape, vocab = side("source", source, vocab_size)
    dtype = compute_dtype(rows.tensor, None)
    number, numbers = row_temperatures("temperature", temperature, shape, rows.tensor.device, dtype)
    spec = RowSpec(*ForwardKL().form, number, numbers, student_softcap=rows.softcap)
    return Problem(rows, None, shape, vocab, dtype, spec)


class SetProblem(NamedTuple):
    """A source, and the part of its vocabulary whose probability is wanted."""

    problem: Problem
    members: Tensor
    """bool ``[V]``."""


def prepare_token_set(
    source: Source,
    token_set: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    vocab_size: int | None,
) -> SetProblem:
    """Checks the arguments of ``token_set_log_probs``."""
    problem = active_rows(one_source(source, temperature, vocab_size), mask, None, 0)
    device, vocab = problem.student.tensor.device, problem.vocab
    if isinstance(token_set, Tensor) and token_set.device != device:
        raise ValueError(f"token_set is on {token_set.device}, the source on {device}")
    if isinstance(token_set, Tensor) and token_set.dtype == torch.bool:
        if token_set.shape != (vocab,):
            raise ValueError(
                f"token_set must have one entry per token of the vocabulary, {vocab}, got {tuple(token_set.shape)}"
            )
        return SetProblem(problem, token_set)
    check_integral("token_set", token_set)
    if token_set.dim() != 1:
        raise ValueError(f"token_set must have the shape [K], got {tuple(token_set.shape)}")
    if not token_set.numel():
        raise ValueError("token_set must hold at least one token id, got none")
    if values_are_checked(token_set) and not bool(((token_set >= 0) & (token_set < vocab)).all()):
        wrong = token_set[(token_set < 0) | (token_set >= vocab)][0]
        raise ValueError(f"token_set must hold token ids in [0, {vocab}), got {int(wrong)}")
    members = torch.zeros(vocab, dtype=torch.bool, device=device)
    return SetProblem(problem, members.index_fill(0, token_set.long(), True))
