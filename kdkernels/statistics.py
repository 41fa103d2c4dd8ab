"""The result of ``token_statistics``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends.rows import STATISTICS

__all__ = ["TokenStatistics", "empty_matrix", "from_columns", "from_matrix"]


class TokenStatistics(NamedTuple):
    """Per-token statistics, each ``[...]``; None where the teacher or the labels were not given.

    Probabilities, log-sum-exps and log-probabilities are of the logits divided by their temperature, in nats; ``max_*`` are
    logits before the temperature, ``argmax_*`` token ids (the lowest of equals).
    """

    lse_student: Tensor
    lse_teacher: Tensor | None
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    entropy_student: Tensor
    entropy_teacher: Tensor | None
    max_student: Tensor
    max_teacher: Tensor | None
    argmax_student: Tensor
    argmax_teacher: Tensor | None
    label_log_prob_student: Tensor | None
    label_log_prob_teacher: Tensor | None


def from_columns(columns: Mapping[str, Tensor], batch_shape: torch.Size) -> TokenStatistics:
    """From a column ``[N]`` for every statistic there is."""

    def column(name: str) -> Tensor | None:
        return columns[name].reshape(batch_shape) if name in columns else None

    return TokenStatistics(**{name: column(name) for name in TokenStatistics._fields})  # type: ignore[arg-type]


def from_matrix(values: Tensor, argmax: Tensor, problem: Problem) -> TokenStatistics:
    """From a row backend's ``values [N, 10]`` (columns ``STATISTICS``) and ``argmax [N, 2]``."""
    columns = dict(zip(STATISTICS, values.unbind(-1), strict=True))
    columns["argmax_student"], columns["argmax_teacher"] = argmax.unbind(-1)

    def meaningful(name: str) -> bool:
        needs_teacher = name.endswith(("teacher", "kl"))
        needs_labels = name.startswith("label")
        return not (needs_teacher and problem.teacher is None) and not (needs_labels and problem.spec.labels is None)

    return from_columns({name: column for name, column in columns.items() if meaningful(name)}, problem.batch_shape)


def empty_matrix(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The shapes of a row backend's answer."""
    values = torch.empty(rows, len(STATISTICS), dtype=dtype, device=device)
    return values, torch.empty(rows, 2, dtype=torch.int64, device=device)
