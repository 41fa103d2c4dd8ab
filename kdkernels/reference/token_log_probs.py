"""``token_log_probs`` and ``token_set_log_probs`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import row_temperature
from kdkernels.backends.sparse_rows import NOTHING
from kdkernels.reference.rows import effective_logits, side_logits
from kdkernels.sources import Source

__all__ = ["label_log_probs", "set_log_probs", "token_log_probs", "token_set_log_probs"]


def token_log_probs(
    source: Source,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:
    """See ``kdkernels.token_log_probs``: same arguments, computed with autograd on whole ``[N, V]`` tensors."""
    problem = arguments.prepare_token_log_probs(
        source, labels, temperature=temperature, mask=mask, ignore_index=ignore_index, vocab_size=vocab_size
    )
    with autocast_disabled(problem.student.tensor.device.type):
        return label_log_probs(problem).reshape(problem.batch_shape)


def token_set_log_probs(
    source: Source,
    token_set: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """See ``kdkernels.token_set_log_probs``: same arguments, computed with autograd on whole ``[N, V]`` tensors."""
    found = arguments.prepare_token_set(source, token_set, temperature=temperature, mask=mask, vocab_size=vocab_size)
    with autocast_disabled(found.problem.student.tensor.device.type):
        return set_log_probs(found).reshape(found.problem.batch_shape)


def tempered_logits(problem: arguments.Problem) -> Tensor:
    """Logits ``[N, V]`` after softcap and temperature."""
    spec = problem.spec
    logits = effective_logits(side_logits(problem.student, spec.active), spec.student_softcap, problem.dtype)
    return logits / row_temperature(spec.student_temperature, spec.student_temperatures)


def where_active(problem: arguments.Problem, values: Tensor) -> Tensor:
    active = problem.spec.active
    return values if active is None else values.masked_fill(~active, 0.0)


def label_log_probs(problem: arguments.Problem) -> Tensor:
    """The log-probabilities ``[N]`` of a checked problem."""
    assert problem.sparse is not None
    assert problem.sparse.ids is not None
    log_probs = tempered_logits(problem).log_softmax(-1)
    return where_active(problem, log_probs.gather(-1, problem.sparse.ids.clamp(min=0)).squeeze(-1))


def set_log_probs(found: arguments.SetProblem) -> Tensor:
    """The same of a set of tokens."""
    logits = tempered_logits(found.problem)
    inside = torch.logsumexp(logits.masked_fill(~found.members, NOTHING), -1)
    return where_active(found.problem, inside - torch.logsumexp(logits, -1))
