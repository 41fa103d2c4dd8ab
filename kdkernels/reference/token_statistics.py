"""``token_statistics`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import Composition, RowSpec, Side, row_temperature
from kdkernels.reference.rows import composed_logits, side_logits
from kdkernels.sources import DenseTeacher, Source
from kdkernels.statistics import TokenStatistics, from_columns

__all__ = ["log_sum_exp", "token_statistics"]


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
) -> TokenStatistics:
    """See ``kdkernels.token_statistics``: same arguments, computed on whole ``[N, V]`` tensors."""
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
    with torch.no_grad():
        return statistics(problem)


def log_sum_exp(problem: arguments.Problem) -> Tensor:
    """That of the student of a checked problem, ``[N]``."""
    return statistics(problem).lse_student


def statistics(problem: arguments.Problem) -> TokenStatistics:
    """The statistics of a checked problem."""
    problem = arguments.with_normalisers(problem, log_sum_exp)
    spec, dtype = problem.spec, problem.dtype
    columns: dict[str, Tensor] = {}

    def one_side(
        name: str, side: Side, softcap: float, temperature: float | Tensor, composition: Composition | None
    ) -> Tensor:
        logits = composed_logits(side_logits(side), softcap, dtype, composition)
        tempered = logits / temperature
        log_probs = torch.log_softmax(tempered, dim=-1)
        columns[f"lse_{name}"] = torch.logsumexp(tempered, dim=-1)
        columns[f"entropy_{name}"] = -(log_probs.exp() * log_probs).sum(-1)
        columns[f"max_{name}"] = logits.amax(-1)
        columns[f"argmax_{name}"] = logits.argmax(-1)
        if spec.labels is not None:
            labels = safe_labels(spec, problem.vocab)
            columns[f"label_log_prob_{name}"] = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return log_probs

    with autocast_disabled(problem.student.tensor.device.type):
        log_q = one_side(
            "student",
            problem.student,
            spec.student_softcap,
            row_temperature(spec.student_temperature, spec.student_temperatures),
            spec.student_composition,
        )
        if problem.teacher is not None:
            log_p = one_side(
                "teacher",
                problem.teacher,
                spec.teacher_softcap,
                row_temperature(spec.teacher_temperature, spec.teacher_temperatures),
                spec.teacher_composition,
            )
            columns["forward_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
            columns["reverse_kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
    if spec.active is not None:
        columns = {name: column.masked_fill(~spec.active, 0) for name, column in columns.items()}
    return from_columns(columns, problem.batch_shape)


def safe_labels(spec: RowSpec, vocab: int) -> Tensor:
    """Labels that can be looked up also where the token does not count."""
    assert spec.labels is not None
    return spec.labels if spec.active is None else spec.labels.masked_fill(~spec.active, 0)
