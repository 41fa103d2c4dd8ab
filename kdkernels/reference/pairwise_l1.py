"""``pairwise_l1`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import Pairs
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import PairSpec, Side, Tempering
from kdkernels.reference.rows import effective_logits, side_logits
from kdkernels.sources import Source

__all__ = ["distances", "pairwise_l1", "row_distances"]


def pairwise_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """See ``kdkernels.pairwise_l1``: same arguments, computed from differences ``[..., n, m, V]`` made whole."""
    pairs = arguments.prepare_pairs(
        student, teacher, temperature=temperature, teacher_temperature=teacher_temperature, vocab_size=vocab_size
    )
    with autocast_disabled(pairs.student.tensor.device.type):
        return distances(pairs)


def distances(pairs: Pairs) -> Tensor:
    """The distances ``[..., n, m]`` of checked sources."""
    found = row_distances(pairs.student, pairs.teacher, pairs.spec, pairs.dtype)
    return found.reshape(*pairs.batch_shape, *pairs.spec.shape[1:])


def row_distances(student: Side, teacher: Side, spec: PairSpec, dtype: torch.dtype) -> Tensor:
    """The distances ``[B, n, m]``, differentiable any number of times."""

    def probabilities(side: Side, tempering: Tempering, rows: int) -> Tensor:
        logits = effective_logits(side_logits(side), tempering.softcap, dtype)
        return torch.softmax(logits / tempering.temperature, -1).reshape(spec.problems, rows, logits.shape[-1])

    x = probabilities(student, spec.student, spec.student_rows)
    y = probabilities(teacher, spec.teacher, spec.teacher_rows)
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)
