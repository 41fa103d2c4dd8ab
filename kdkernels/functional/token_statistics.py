"""``token_statistics``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import token_statistics as token_statistics_ops
from kdkernels.reference.token_statistics import statistics as reference_statistics
from kdkernels.sources import DenseTeacher, Source
from kdkernels.statistics import TokenStatistics

__all__ = ["token_statistics"]


def token_statistics(
    student: Source,
    teacher: DenseTeacher | None = None,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """Per-token quantities of one or two distributions over the vocabulary, in one streaming pass. No gradient.

    Args:
        student, teacher: logits ``[..., V]`` or ``kd.LMHead``, the teacher also a ``kd.LogitMixture``; without a teacher its
            columns are None.
        labels: token ids ``[...]`` whose log-probabilities are wanted; ``ignore_index`` drops the token.
        mask: bool ``[...]``, True where a token counts; elsewhere every statistic is 0.
        temperature, teacher_temperature, vocab_size, memory_budget, backend: as in ``distillation_loss``.

    Returns:
        ``TokenStatistics``, every field ``[...]``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``distillation_loss``.
    """
    arguments.check_memory_budget(memory_budget)
    problem = arguments.prepare_statistics(
        student,
        teacher,
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    backend = backend_for(backend, problem.student.tensor.device.type, "token_statistics")
    with torch.no_grad():
        if backend == "reference":
            return reference_statistics(problem)
        problem = arguments.with_normalisers(
            problem, lambda rows: token_statistics_ops.statistics(rows, memory_budget, backend).lse_student
        )
        return token_statistics_ops.statistics(problem, memory_budget, backend)
